"""`run_train_exit`: texts, training, measurement, and the exit layer that is saved.

One rule: whatever stops it, the same command goes on where it was stopped.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.bench.run import prepare, progress_bar
from vllm_selfspec.bench.tasks import Prompt, load, token_ids
from vllm_selfspec.config import ConfigError
from vllm_selfspec.packages import raise_if_lacking
from vllm_selfspec.plan.cost import ModelWeights
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.exit_card import write_exit_layer
from vllm_selfspec.plan.hub import locate
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.target_model import TargetModel, weights_fingerprint
from vllm_selfspec.training import report

# By share of the layers, what `auto` compares.
AUTO_SHARES = (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3)
AUTO_EPOCHS = 1  # of each, before the best is trained to the end
HELD_OUT_SHARE = 0.1
MAX_HELD_OUT = 512  # texts that are measured on
SAID_OVER = 20  # steps


@dataclass(frozen=True)
class TrainOptions:
    """What the user asked for.

    Attributes:
        model: Checkpoint directory or Hub name.
        prompts: Tasks to train on, as `tasks.load` takes them.
        held_out: Tasks to measure on; empty for a tenth of the prompts.
        num_prompts: Of all to train on, drawn with the seed; None for all.
        max_prompt_tokens: The last so many of a prompt are read.
        exit_layer: N; None to compare a few.
        texts: A `TextOptions`.
        recipe: A `Recipe`.
        save_every: Steps between two checkpoints.
        ray: Workers of Ray Train; 0 for one process without Ray.
        cache: Directory of generated texts.
        output: Directory of the exit layer.
        command: How to do it again.
    """

    model: str
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    num_prompts: int | None
    max_prompt_tokens: int
    exit_layer: int | None
    texts: Any
    recipe: Any
    save_every: int
    ray: int
    cache: Path
    output: Path
    command: str


def run_train_exit(options: TrainOptions) -> None:
    """Trains an exit layer, and writes it with its card and its loss curve.

    Ctrl-C keeps texts and a checkpoint.

    Raises:
        CheckpointError: If the model cannot be found or read.
        TaskError: If the prompts cannot be read.
        UnsupportedModelError: If the model cannot be cut after so many layers.
        TextsError: If vLLM cannot generate.
        MissingPackageError: If a package is missing.
        TrainError: If the checkpoint is of another run.
    """
    packages = ("matplotlib", "safetensors", *["ray"] * bool(options.ray))
    raise_if_lacking("train-exit", packages, "train")
    console = Console(highlight=False)
    prepare()
    # As for the tuner: the engine in the process that asks it.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic
    try:
        _run(options, console)
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from there.")
        raise


def _run(options: TrainOptions, console: Console) -> None:
    model = locate(options.model)
    prompts, held_out = _prompts(options, model)
    texts = _texts(options, model, [*prompts, *held_out], console)
    training = _Training(options, model, texts, len(prompts), console)
    exit_layer = options.exit_layer
    if exit_layer is None:
        exit_layer = training.best_of(candidates(training.target.num_layers))
    training.run(exit_layer)


def candidates(num_layers: int) -> list[int]:
    """The exit layers that `auto` compares."""
    found = {max(1, round(share * num_layers)) for share in AUTO_SHARES}
    return sorted(n for n in found if n < num_layers)


def _prompts(options: TrainOptions, model: Path) -> tuple[list[Any], list[Any]]:
    """Token ids to train on, and to measure on."""

    def read(tasks: Sequence[str]) -> list[Prompt]:
        return [prompt for words in tasks for prompt in load(words).prompts]

    def encoded(prompts: Sequence[Prompt]) -> list[list[int]]:
        most = options.max_prompt_tokens
        found = token_ids(prompts, model, most)
        return [one["prompt_token_ids"] for one in found if one["prompt_token_ids"]]

    found = read(options.prompts)
    order = np.random.default_rng(options.texts.seed).permutation(len(found))
    chosen = [found[which] for which in order][: options.num_prompts]
    if options.held_out:
        return encoded(chosen), encoded(read(options.held_out))
    num = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(chosen))))
    if len(chosen) < 2:
        raise ConfigError(
            "a part of the prompts is held out to measure on, but --prompts has only "
            f"{len(chosen)}: give more, or --held-out"
        )
    return encoded(chosen[num:]), encoded(chosen[:num])


def _texts(options: TrainOptions, model: Path, prompts: Any, console: Console) -> Any:
    from vllm_selfspec.training.texts import make_texts

    console.print(f"{len(prompts)} texts of the target's own ...")
    started = time.monotonic()
    with progress_bar(console) as progress:
        bar = progress.add_task("vLLM generates", total=len(prompts))

        def say(done: int, of: int) -> None:
            is_new = done != progress.tasks[0].completed
            progress.update(bar, completed=done)
            if is_new and not console.is_terminal:  # a log has no bar
                spent = time.monotonic() - started
                console.print(f"{spent:.0f} s: {done} of {of} texts")

        found = make_texts(model, prompts, options.texts, options.cache, say)
    seconds = time.monotonic() - started
    console.print(f"{found.num_tokens} tokens of them, after {seconds:.0f} s")
    return found


class _Training:
    """What all trainings of one call share."""

    def __init__(
        self,
        options: TrainOptions,
        model: Path,
        texts: Any,
        num: int,
        console: Console,
    ) -> None:
        """Of `texts` the first `num` are trained on, the others measured on."""
        self._options, self._model, self._console = options, model, console
        self._texts, self._num = texts, num
        self.target = TargetModel.read(model, options.model)
        held_out = range(num, len(texts))[:MAX_HELD_OUT]
        self._held_out = [texts[number] for number in held_out]

    def best_of(self, exit_layers: Sequence[int]) -> int:
        """The one that gains most after a short training of each."""
        recipe = replace(self._options.recipe, epochs=AUTO_EPOCHS)
        rows = []
        for exit_layer in exit_layers:
            output = self._options.output / "trials" / str(exit_layer)
            rows.append(self._trained(self._job(exit_layer, recipe, output))[1])
        report.show(rows, self._console)
        best = max(rows, key=lambda row: float(row["speed_up"]))
        return int(best["exit_layer"])

    def run(self, exit_layer: int) -> None:
        """Trains one to the end, and saves it."""
        import torch
        from safetensors.torch import save

        options = self._options
        job = self._job(exit_layer, options.recipe, options.output)
        trainer, row = self._trained(job)
        card = {
            "exit_layer": exit_layer,
            "num_layers": self.target.num_layers,
            "model": options.model,
            "architecture": dict(self.target.architecture),
            "weights": weights_fingerprint(self._model),
            "num_parameters": trainer.student.num_parameters,
            "training": self._provenance(trainer) | {"held_out": row},
        }
        tensors = save(trainer.student.tensors(torch.bfloat16), {"format": "pt"})
        write_exit_layer(options.output, card, tensors)
        report.write_curve(trainer.curve, options.output)
        report.show([row], self._console)
        self._console.print(f"The exit layer is in {options.output}", style="bold")

    def _job(self, exit_layer: int, recipe: Any, output: Path) -> Any:
        from vllm_selfspec.training.trainer import Job

        return Job(
            self._model.resolve(),
            exit_layer,
            self._texts.directory.resolve(),
            tuple(range(self._num)),
            recipe,
            output.resolve(),
            self._options.save_every,
        )

    def _trained(self, job: Any) -> tuple[Any, dict[str, Any]]:
        """Its trainer at the end, and what the student came to on held-out texts."""
        from vllm_selfspec.training.agreement import Agreement, draft_cost
        from vllm_selfspec.training.trainer import answers

        texts, student = self._held_out, job.student()
        said = {"untrained": answers(student, texts)}
        with student.without_exit_layer():
            said["before"] = answers(student, texts)
        del student
        trainer = self._train(job)
        said["after"] = answers(trainer.student, texts)
        row: dict[str, Any] = {"exit_layer": job.exit_layer}
        for name in ("before", "untrained", "after"):
            row[name] = asdict(Agreement.of(texts, said[name]))
        weights = ModelWeights.from_checkpoint(self._model)
        exits = SkipSet.early_exit(weights.num_layers, job.exit_layer)
        shared = DraftPlan.skipping(exits).share(weights.step)
        row["shared_head"] = self._worth(said["before"], shared)
        cost = draft_cost(weights, job.exit_layer)
        return trainer, row | self._worth(said["after"], cost)

    def _train(self, job: Any) -> Any:
        from vllm_selfspec.training.trainer import Trainer, train
        from vllm_selfspec.training.workers import Alone, run_by_ray

        self._console.print(f"Training the exit layer after {job.exit_layer} layers")
        if self._options.ray:
            run_by_ray(self._options.ray, job, job.output / "ray")
            trainer = Trainer(job, job.student(), Alone())
            trainer.load()
            return trainer
        with progress_bar(self._console) as progress:
            bar = progress.add_task("", total=None)

            def say(trainer: Any) -> None:
                recent = trainer.curve[-SAID_OVER:]
                text = f"loss {sum(recent) / len(recent):.3f}"
                done, of = trainer.step, trainer.num_steps
                progress.update(bar, completed=done, total=of, description=text)
                if not self._console.is_terminal and done % SAID_OVER == 0:
                    self._console.print(f"step {done} of {of}: {text}")  # a log

            return train(job, Alone(), say)

    def _worth(self, found: Any, cost: float) -> dict[str, Any]:
        """By the tuner's score, at the best draft length."""
        from vllm_selfspec.training.agreement import score

        best = score(self._held_out, found, cost)
        return {
            "num_speculative_tokens": best.k,
            "tokens_per_verification": round(best.walk.tokens_per_verification, 4),
            "acceptance": [round(share, 4) for share in best.walk.acceptance],
            "draft_cost": round(cost, 4),
            "speed_up": round(best.speed_up, 4),
        }

    def _provenance(self, trainer: Any) -> dict[str, Any]:
        options = self._options
        return {
            "recipe": asdict(options.recipe),
            "texts": asdict(options.texts) | {"fingerprint": self._texts.fingerprint},
            "num_texts": self._num,
            "num_held_out": len(self._held_out),
            "steps": trainer.step,
            "tokens": trainer.num_tokens,
            "seconds": round(trainer.seconds),
            "cpu_seconds": round(trainer.cpu_seconds),
            "workers": max(1, options.ray),
            "last_loss": round(sum(trainer.curve[-50:]) / len(trainer.curve[-50:]), 4),
            **provenance(options.command),
        }
