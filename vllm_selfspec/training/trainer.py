"""`Trainer`: takes the steps, keeps the loss curve, and goes on from a checkpoint.

One rule: a step is decided by its number, the texts and the settings alone. So a run
that was killed goes on to the very curve that it would have had.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_selfspec import whole_file
from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.training.batch import Batch, pieces
from vllm_selfspec.training.errors import TrainError
from vllm_selfspec.training.loss import kl_to_top
from vllm_selfspec.training.student import Student
from vllm_selfspec.training.texts import Continuation, Texts
from vllm_selfspec.training.workers import Workers

CHECKPOINT = "training.pt"
# Wider matrices take smaller steps (maximal update parametrisation, arXiv 2203.03466,
# table 8): for Adam, in proportion to 1 / width. 3e-3 at 256, where it took 80 steps to
# what 1e-3 reached in 120, and 1.5e-4 at 5120.
LR_TIMES_WIDTH = 0.768
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.95), 0.01, 1.0
WARM_UP = 0.05  # of the steps


@dataclass(frozen=True)
class Recipe:
    """How the steps are taken.

    Attributes:
        epochs: Times that each text is seen.
        batch_size: Texts a step, of all workers.
        lr: The highest learning rate; None for what suits the width.
        seed: Of the order of texts.
    """

    epochs: int = 3
    batch_size: int = 16
    lr: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One exit layer to be trained, as each worker is told of it.

    Attributes:
        model: Checkpoint directory of the target.
        exit_layer: N.
        texts: Directory of them.
        numbers: Those to train on.
        recipe: How.
        output: Directory of the checkpoint.
        save_every: Steps between two checkpoints.
    """

    model: Path
    exit_layer: int
    texts: Path
    numbers: tuple[int, ...]
    recipe: Recipe
    output: Path
    save_every: int = 100

    def student(self) -> Student:
        """Before the first step: float32 on a CPU, bfloat16 around it on a GPU."""
        on_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        device = "cuda" if on_gpu else "cpu"
        return Student(self.model, self.exit_layer, dtype, device)


class Trainer:
    """Attributes:
    student: What is trained.
    step: Steps taken.
    num_steps: Of the whole run.
    num_tokens: Of the target's own that were learned from so far.
    seconds: That it took so far.
    cpu_seconds: The same of all cores together, on a machine shared with others.
    curve: Mean loss of a token, by step.
    """

    def __init__(self, job: Job, student: Student, workers: Workers) -> None:
        self.step = self.num_tokens = 0
        self.seconds = self.cpu_seconds = 0.0
        self.curve: list[float] = []
        self.student, self._job, self._workers = student, job, workers
        self._texts = Texts(job.texts)
        recipe = job.recipe
        self._lr = recipe.lr or LR_TIMES_WIDTH / student.hidden_size
        self._optimizer = torch.optim.AdamW(
            student.trained.values(), self._lr, BETAS, weight_decay=WEIGHT_DECAY
        )
        self._steps_of_epoch = -(-len(job.numbers) // recipe.batch_size)
        self.num_steps = recipe.epochs * self._steps_of_epoch

    def train_step(self) -> float:
        """Takes one; returns its loss."""
        started, cpu_started = time.monotonic(), time.process_time()
        texts = [self._texts[number] for number in self._my_texts()]
        trained = [*self.student.trained.values()]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        total = torch.zeros(2, device=self.student.device)  # loss, tokens
        for numbers in pieces(texts, self.student.vocab_size):
            batch = Batch.of([texts[n] for n in numbers], self.student.device)
            logits = self.student.logits(batch.token_ids, batch.where)
            losses = kl_to_top(logits, batch.top_ids, batch.top_logprobs)
            torch.autograd.backward(losses.sum())
            total += torch.stack((losses.detach().sum(), total.new_tensor(len(losses))))
        gradients = [p.grad for p in trained if p.grad is not None]
        self._workers.add_up([*gradients, total])
        for gradient in gradients:
            gradient /= total[1]
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * self._lr_share()
        self._optimizer.step()
        self.step += 1
        self.curve.append(float(total[0] / total[1]))
        self.num_tokens += int(total[1])
        self.seconds += time.monotonic() - started
        self.cpu_seconds += time.process_time() - cpu_started
        return self.curve[-1]

    def _my_texts(self) -> list[int]:
        """Numbers of this worker's share of the step's batch."""
        recipe, numbers = self._job.recipe, self._job.numbers
        epoch, within = divmod(self.step, self._steps_of_epoch)
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(numbers))
        chosen = order[within * recipe.batch_size :][: recipe.batch_size]
        mine = chosen[self._workers.rank :: self._workers.num]
        return [numbers[which] for which in mine]

    def _lr_share(self) -> float:
        """Up in a line, and down to zero in half a cosine."""
        warm_up = max(1, round(WARM_UP * self.num_steps))
        done = max(0, self.step - warm_up) / max(1, self.num_steps - warm_up)
        return min((self.step + 1) / warm_up, (1 + math.cos(math.pi * done)) / 2)

    @property
    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        job = self._job
        return {
            "exit_layer": job.exit_layer,
            "texts": self._texts.fingerprint,
            "num_texts": len(job.numbers),
            **asdict(job.recipe),
        }

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all.

        Raises:
            WriteError: If it cannot be written.
        """
        state = {
            "settings": self._settings,
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "curve": self.curve,
            "trained": {n: p.detach() for n, p in self.student.trained.items()},
            "optimizer": self._optimizer.state_dict(),
        }
        with whole_file.replacing(self._job.output / CHECKPOINT) as partial:
            try:
                torch.save(state, partial)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(str(error)) from error

    def load(self) -> None:
        """Goes on from the checkpoint, where there is one.

        Raises:
            TrainError: If it is of a run with other settings.
        """
        file = self._job.output / CHECKPOINT
        if not file.is_file():
            return
        state = torch.load(file, map_location=self.student.device, weights_only=True)
        found, wanted = state["settings"], self._settings
        # Keys of both: a version that could do otherwise may have written the file.
        other = [key for key in wanted | found if found.get(key) != wanted.get(key)]
        if other:
            key = other[0]
            raise TrainError(
                f"a run goes on with the settings it began with, but {str(file)!r} has "
                f"{key} {found.get(key)!r} in place of {wanted.get(key)!r}: delete it "
                "to begin anew, or choose another --output"
            )
        with torch.no_grad():
            for name, parameter in self.student.trained.items():
                parameter.copy_(state["trained"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.curve = state["step"], state["curve"]
        self.num_tokens, self.seconds = state["num_tokens"], state["seconds"]
        self.cpu_seconds = state["cpu_seconds"]


def train(
    job: Job,
    workers: Workers,
    say: Callable[[Trainer], None] = lambda trainer: None,
) -> Trainer:
    """Trains to the end, from the checkpoint if there is one.

    Ctrl-C leaves a checkpoint, and so does the end.

    Raises:
        KeyboardInterrupt: After that.
        TrainError: If the checkpoint is of another run.

    Args:
        job: What to train.
        workers: That do it together; each calls this.
        say: Told after every step.
    """
    whole_file.make_directory(job.output)
    with deterministic(), stop_between_steps() as is_asked_to_stop:
        trainer = Trainer(job, job.student(), workers)
        trainer.load()
        while trainer.step < trainer.num_steps and not is_asked_to_stop():
            trainer.train_step()
            say(trainer)
            if trainer.step % job.save_every == 0 and workers.rank == 0:
                trainer.save()
        if workers.rank == 0:
            trainer.save()
        if is_asked_to_stop():
            raise KeyboardInterrupt
    return trainer


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits until a step is taken whole; yields whether there was one."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # a worker of Ray's, which is told in its own way
        return
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deterministic() -> Iterator[None]:
    """The same sums in the same order, every time."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@torch.inference_mode()
def answers(student: Student, texts: Sequence[Continuation]) -> list[Ints]:
    """The student's likeliest token wherever the target says one, by text."""
    found: list[Ints] = []
    for numbers in pieces(texts, student.vocab_size):
        chosen = [texts[number] for number in numbers]
        batch = Batch.of(chosen, student.device)
        logits = student.logits(batch.token_ids, batch.where)
        best = logits.argmax(-1).cpu().numpy()
        ends = np.cumsum([len(text.top_ids) for text in chosen])
        found += np.split(best, ends[:-1])
    return found
