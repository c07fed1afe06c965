"""Makes a model whose two tasks want different plans, from the demo model, in minutes.

On the demo model an exit after layer 3 is the best plan for code and for chat, so that
a switch from one to the other asks nothing of a search. Here its last two layers learn
to say on chat a mixture of what the whole model and an exit after layer 1 say, and on
code what the whole model always said; nothing else changes. So chat is easier: an exit
after layer 1 is best there, and bad on code as before.

Texts are of what the demo model was trained on, and its own answers to questions about
that: nothing of the files that the benchmarks' prompts are from (`corpus.is_held_out`).

    python benchmarks/two_tasks_model.py     # .cache/two_tasks_model
"""

import copy
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_tasks import chat, code, sources_of
from train_demo_model import block

from vllm_selfspec.bench.own_models import BENCHMARKS, REPOSITORY
from vllm_selfspec.bench.tasks import Prompt, token_ids
from vllm_selfspec.bench.widen import companions, digest

SOURCE = BENCHMARKS / "demo_model"
OUTPUT = REPOSITORY / ".cache" / "two_tasks_model"
STAMP, FORMAT = "two_tasks.json", 1  # a new meaning of the output needs a new FORMAT


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, written to the stamp.

    Attributes:
        exit_layer: The exit that is to know chat.
        exit_share: Of its logits in what the whole model learns to say on chat.
        num_layers: The last ones, which learn.
        num_texts: Of each task.
        num_tokens: Of a text.
        batch_size: Texts of each task in a step.
        steps: Of the optimizer.
        learning_rate: At first; it falls linearly to zero.
        seed: Of the choice of texts.
    """

    exit_layer: int = 1
    exit_share: float = 0.6
    num_layers: int = 2
    num_texts: int = 384
    num_tokens: int = 128
    batch_size: int = 8
    steps: int = 96
    learning_rate: float = 2e-3
    seed: int = 1


def two_tasks_model(output: Path = OUTPUT, recipe: Recipe | None = None) -> Path:
    """Writes the model; idle if it is there already.

    Args:
        output: Directory to write, whole or not at all.
        recipe: How; None for the usual one.

    Returns:
        `output`.
    """
    recipe = recipe or Recipe()
    stamp = {"format": FORMAT, "source_sha256": digest(SOURCE), **asdict(recipe)}
    file = output / STAMP
    if file.is_file() and json.loads(file.read_text()) == stamp:
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, suffix=".partial") as scratch:
        new = Path(scratch) / "new"
        model = Training(recipe).run()
        model.to(torch.bfloat16).save_pretrained(new)
        for companion in companions(SOURCE):
            shutil.copy(companion, new)
        (new / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        if output.exists():
            output.rename(Path(scratch) / "old")
        new.rename(output)
    return output


class Training:
    """Of the last layers. Owns the model and the choice of texts."""

    def __init__(self, recipe: Recipe) -> None:
        from transformers import AutoModelForCausalLM

        self._recipe, self._chance = recipe, random.Random(recipe.seed)
        model: Any = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
        self._model = model.requires_grad_(False)
        layers = model.model.layers
        self._below = layers[recipe.exit_layer : -recipe.num_layers]
        self._taught = copy.deepcopy(layers[-recipe.num_layers :])
        self._learning = layers[-recipe.num_layers :].requires_grad_(True)

    def run(self) -> Any:
        """The model, trained."""
        recipe = self._recipe
        rate = recipe.learning_rate
        optimizer = torch.optim.AdamW(self._learning.parameters(), rate)
        with typer.progressbar(
            range(recipe.steps), label="two_tasks_model", file=sys.stderr
        ) as steps:
            batches = self._batches()
            for step in steps:
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - step / recipe.steps)
                self._loss(next(batches)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return self._model

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        """How far the model is from what it shall say.

        Args:
            ids: Texts, the first half of chat, `[2 * batch_size, num_tokens]`.
        """
        num_chat = len(ids) // 2
        with torch.no_grad():
            early = self._through(
                self._model.model.embed_tokens(ids),
                self._model.model.layers[: self._recipe.exit_layer],
            )
            late = self._through(early, self._below)
            target = self._logits(self._through(late, self._taught))
            of_exit = self._logits(early[:num_chat])
            target[:num_chat] = self._mixed(target[:num_chat], of_exit)
        found = self._logits(self._through(late, self._learning))
        # [tokens, vocab]
        rows = (logits.flatten(0, 1).log_softmax(-1) for logits in (found, target))
        return F.kl_div(*rows, reduction="batchmean", log_target=True)

    def _through(self, hidden: torch.Tensor, layers: Any) -> torch.Tensor:
        """States after some layers, `[rows, tokens, width]`."""
        rope = self._model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in layers:
            hidden = block(layer, hidden, rope, True, True)
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.lm_head(self._model.model.norm(hidden))
        return logits

    def _mixed(self, whole: torch.Tensor, of_exit: torch.Tensor) -> torch.Tensor:
        return whole.lerp(of_exit, self._recipe.exit_share)

    def _batches(self) -> Iterator[torch.Tensor]:
        """Texts of both tasks, `[2 * batch_size, num_tokens]`."""
        sources = sources_of(held_out=False)
        texts = [self._answers(sources), self._code(sources)]
        while True:
            chosen = (self._chance.sample(of, self._recipe.batch_size) for of in texts)
            yield torch.cat([torch.stack(batch) for batch in chosen])

    def _code(self, sources: dict[str, str]) -> list[torch.Tensor]:
        """Beginnings of what the task `code` cuts short."""
        recipe = self._recipe
        # A few are too short.
        records = code(sources, self._chance, 2 * recipe.num_texts)
        prompts = [
            Prompt(record["id"], record["prompt"] + record["reference"])
            for record in records
        ]
        ids = self._token_ids(prompts)
        long = [i[: recipe.num_tokens] for i in ids if len(i) >= recipe.num_tokens]
        return [*map(torch.tensor, long[: recipe.num_texts])]

    def _token_ids(self, prompts: list[Prompt]) -> list[list[int]]:
        most = self._recipe.num_tokens
        return [p["prompt_token_ids"] for p in token_ids(prompts, SOURCE, most)]

    def _answers(self, sources: dict[str, str]) -> list[torch.Tensor]:
        """Questions of chat, with what the model shall answer."""
        records = chat(sources, self._chance, self._recipe.num_texts)
        prompts = [Prompt(record["id"], record["messages"]) for record in records]
        by_length: dict[int, list[list[int]]] = {}
        for ids in self._token_ids(prompts):
            by_length.setdefault(len(ids), []).append(ids)
        batches = map(torch.tensor, by_length.values())
        return [text for batch in batches for text in self._answered(batch)]

    @torch.no_grad()
    def _answered(self, ids: torch.Tensor) -> torch.Tensor:
        """Questions gone on with, `[rows, num_tokens]`."""
        new, cache = ids, None
        while ids.shape[1] < self._recipe.num_tokens:
            out = self._model(
                new, past_key_values=cache, output_hidden_states=True, use_cache=True
            )
            of_exit = self._logits(out.hidden_states[self._recipe.exit_layer][:, -1:])
            new = self._mixed(out.logits[:, -1:], of_exit).argmax(-1)
            ids, cache = torch.cat([ids, new], 1), out.past_key_values
        return ids


if __name__ == "__main__":
    print(two_tasks_model())
