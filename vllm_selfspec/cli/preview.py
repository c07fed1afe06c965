"""`Preview`: what a draft plan runs, reads and can bring, before anything is served.

One rule: neither torch nor vLLM is needed, and of a checkpoint only headers are read.
"""

import json
import shlex
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_selfspec.chosen_plan import Known, resolve_plan
from vllm_selfspec.config import METHOD, SelfSpecConfig
from vllm_selfspec.plan.axis_skip_layers import AUTO
from vllm_selfspec.plan.calibrated import newest_of
from vllm_selfspec.plan.cost import (
    CheckpointError,
    ModelWeights,
    bound,
    decimal,
    expected_tokens,
)
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.families import family_of
from vllm_selfspec.plan.hub import DESCRIPTION, identity_of, locate, read_weights
from vllm_selfspec.plan.skip_set import SUBLAYERS
from vllm_selfspec.plan.sources import MODEL, SOURCES
from vllm_selfspec.plan.target_model import TargetModel

TABLE_K = (1, 2, 4, 8)
TABLE_ACCEPTANCE = (0.6, 0.8, 0.9, 1.0)
LAYERS_PER_LINE = 60  # with labels and gaps a line stays under 80 columns
LAYERS_PER_GROUP = 10
SPEED_UP_NOTE = (
    "a: chance that a draft token is accepted. Below 1.00x drafts cost more than\n"
    "they save. Verifying k + 1 tokens is taken to cost one step, as it does while\n"
    "reading the weights is what takes the time."
)


@dataclass(frozen=True)
class Preview:
    """What a user gets to know of a plan before serving it.

    Attributes:
        model: As the user named it.
        architecture: vLLM's name of it.
        keys: The user's keys, from which the plan follows.
        plan: The plan vLLM would draft with.
        source: Where that is from, in words.
        weights: Bytes of the model's parts.
        sources: Names of the draft sources.
        expected: Speed-up that a search has found the plan to bring, if one has.
    """

    model: str
    architecture: str
    keys: dict[str, Any]
    plan: DraftPlan
    source: str
    weights: ModelWeights
    sources: tuple[str, ...]
    expected: float | None = None

    @classmethod
    def of(cls, model: str, keys: dict[str, Any]) -> "Preview":
        """Resolves the user's keys against the model on disk or on the Hub.

        Raises:
            UnsupportedModelError: The model cannot be drafted for.
            CheckpointError: The model cannot be found or read.
        """
        config = SelfSpecConfig.parse(keys)
        path = locate(model, DESCRIPTION)
        target = TargetModel.read(path, model)
        family_of(target.class_name)
        weights = read_weights(model, path)
        if weights.num_layers != target.num_layers:
            raise CheckpointError(
                f"config.json and weights must be of one model, but {str(path)!r} has "
                f"{target.num_layers} layers in one and {weights.num_layers} in the "
                "other: download it again"
            )
        found = None
        if config.is_auto:
            memory = config.memory_beside(weights.step.total)
            identity = identity_of(model, path)
            found = None if identity is None else newest_of(identity, memory)
        chosen = resolve_plan(config, target, known=Known(found, weights.step))
        plan, source = chosen.plan, chosen.source
        usable = [one for one in SOURCES if config.may_use(one) and not one.refusal()]
        is_left_out = chosen.is_useless and config.draft_source == AUTO
        left_out = {MODEL} if is_left_out else set()
        sources = tuple(one.name for one in usable if one.name not in left_out)
        expected = None if chosen.figures is None else chosen.figures.speed_up
        return cls(
            model, target.class_name, keys, plan, source, weights, sources, expected
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.weights.num_layers

    @property
    def draft_share(self) -> float:
        """The `c` of the bound."""
        target, draft = self.streamed()["total"]
        return draft / target

    def speed_up(self, k: int, acceptance: float) -> float:
        """The most that drafting `k` tokens can win."""
        return bound(expected_tokens(acceptance, k), k, self.draft_share)

    def command(self) -> str:
        """How to serve the model with this plan, quoted for a shell."""
        config = json.dumps({"method": METHOD, **self.keys}) if self.keys else METHOD
        return shlex.join(["vllm", "serve", self.model, "--speculative-config", config])

    def streamed(self) -> dict[str, tuple[int, int]]:
        """Bytes a step of target and draft reads, by part."""
        step = self.weights.step
        target, draft = step.parts, self.plan.cost(step).parts
        parts = {
            part: (round(target.get(part, 0)), round(size))
            for part, size in draft.items()
        }
        parts["total"] = (round(sum(target.values())), round(sum(draft.values())))
        return parts

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form of all that `print` shows."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "num_layers": self.num_layers,
            "skippable_sublayers": list(SUBLAYERS),
            "sources": list(self.sources),
            "plan": {"source": self.source, **self.plan.to_dict()},
            "expected_speed_up": self.expected,
            "extra_bytes": self.plan.extra_bytes(self.weights.step),
            "streamed_bytes": {
                part: {"target": target, "draft": draft}
                for part, (target, draft) in self.streamed().items()
            },
            "draft_share": self.draft_share,
            "speed_up_bound": [
                {
                    "num_speculative_tokens": k,
                    "acceptance": acceptance,
                    "bound": self.speed_up(k, acceptance),
                }
                for k in TABLE_K
                for acceptance in TABLE_ACCEPTANCE
            ],
            "ceiling": 1 / self.draft_share,
            "command": self.command(),
        }

    def print(self, console: Console) -> None:
        """Prints it for a terminal of 80 columns or more."""
        for heading, body in (
            ("Model", self._summary()),
            ("Sublayers", self._map(console)),
            ("Read per step", self._streamed_table()),
            ("Speed-up at most", self._speed_up_table()),
        ):
            console.print(heading, style="bold cyan")
            console.print(Padding(body, (0, 0, 1, 2), expand=False))
        console.print("Serve it", style="bold cyan")
        console.print(f"  {self.command()}", markup=False, soft_wrap=True)

    def _summary(self) -> Table:
        family = family_of(self.architecture)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in {
            "name": self.model,
            "architecture": f"{self.architecture}, {self.num_layers} layers",
            "may be skipped": f"{family.attention} and {family.mlp} of every layer, "
            f"but not all {2 * self.num_layers} of them",
            "drafted by": "; ".join(SOURCES.named(one).words for one in self.sources),
            "draft plan": self.plan.outline(),
            "chosen by": self.source,
            **self._extra(),
        }.items():
            table.add_row(label, Text(value))
        return table

    def _extra(self) -> dict[str, str]:
        rows = {}
        if self.expected is not None:
            rows["expected"] = f"{self.expected:.2f}x for one request at a time"
        num_bytes = self.plan.extra_bytes(self.weights.step)
        if num_bytes:
            share = num_bytes / self.weights.step.total
            size = f"{decimal(num_bytes)}, {share:.0%} of the weights"
            rows["extra memory"] = size
        return rows

    def _map(self, console: Console) -> Group:
        """The sublayers as rows of symbols under the numbers of their layers."""
        runs, skipped = "#." if console.options.ascii_only else "\u2588\u00b7"
        num_skipped = self.plan.skip_set.num_skipped
        num_run = 2 * self.num_layers - num_skipped
        lines = [Text(f"{runs} {num_run} run   {skipped} {num_skipped} skipped", "dim")]
        for start in range(0, self.num_layers, LAYERS_PER_LINE):
            layers = range(self.num_layers)[start : start + LAYERS_PER_LINE]
            tens = [f"{i:<10}" for i in layers if i % LAYERS_PER_GROUP == 0]
            lines.append(Text(f"{'layer':<11}{' '.join(tens)}".rstrip(), "dim"))
            for sublayer in SUBLAYERS:
                holes = getattr(self.plan.skip_set, sublayer)
                marks = "".join(skipped if i in holes else runs for i in layers)
                lines.append(Text(f"{sublayer:<11}{_in_groups(marks)}"))
        return Group(*lines)

    def _streamed_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("")
        for column in ("target", "draft", "share"):
            table.add_column(column, justify="right")
        table.add_column("")
        for part, (target, draft) in self.streamed().items():
            share = draft / target if target else 1.0  # a part may have no weights
            name, style = ("= c", "bold") if part == "total" else ("", "")
            sizes = decimal(target), decimal(draft)
            table.add_row(part, *sizes, f"{share:.1%}", name, style=style)
        return table

    def _speed_up_table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("draft tokens k", justify="center")
        for acceptance in TABLE_ACCEPTANCE:
            table.add_column(f"a = {acceptance}", justify="right")
        for k in TABLE_K:
            row = [self.speed_up(k, acceptance) for acceptance in TABLE_ACCEPTANCE]
            cells = [Text(f"{x:.2f}x", "green" if x > 1 else "red") for x in row]
            table.add_row(str(k), *cells)
        ceiling = f"ceiling 1/c = {1 / self.draft_share:.2f}x"
        return Group(
            table,
            Text(f"{ceiling}, for ever longer drafts that are all accepted", "bold"),
            Text(SPEED_UP_NOTE, "dim"),
        )


def _in_groups(marks: str) -> str:
    """`marks` with a gap before every tenth, so that a layer is easily counted."""
    starts = range(0, len(marks), LAYERS_PER_GROUP)
    return " ".join(marks[i : i + LAYERS_PER_GROUP] for i in starts)
