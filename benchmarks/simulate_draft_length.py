"""How good are the draft-length controllers, where the best length is known?

    python benchmarks/simulate_draft_length.py -o benchmarks/results/draft_length

Simulated requests accept draft tokens with chances that are stationary, differ between
requests, or drift; time passes by a machine's costs. Every controller is compared with
an oracle that knows each request's chance at every moment (but no token's fate), and
with the best fixed length in hindsight. Writes a table, JSON, and a plot for each
controller: tokens per second over time, as a share of the oracle's.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from vllm_selfspec.draft_length.best_lengths import best_lengths
from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.draft_length.goodput import Goodput
from vllm_selfspec.draft_length.stop_rules import (
    CalibratedThompson,
    StopRule,
    Thompson,
    Threshold,
)
from vllm_selfspec.draft_length.trials import sigmoid

MAX_DRAFTS = 8
FIXED = (0, 1, 2, 4, 8)
NUM_STEPS = 3000
REQUEST_TOKENS = 200
# A machine where up to eight rows cost what one does, and a draft a quarter of it.
FREE_ROWS = 8.0
DRAFT_COST = 0.25
ROW_COST = 0.02
# How far the chances of single tokens lie apart (in logits), and how the draft's
# confidence tells of them: too sure, compressed, with noise.
TOKEN_SPREAD = 1.5
CONFIDENCE_BIAS, CONFIDENCE_SCALE, CONFIDENCE_NOISE = 0.7, 0.8, 0.5
WINDOW = 200  # steps a point of a plot averages
POINTS = 150  # of a curve


def verify_seconds(num_rows: Any) -> Any:
    """Of a target forward; a plain step of one row takes about 1."""
    return np.maximum(1.0, np.asarray(num_rows) / FREE_ROWS) + ROW_COST * num_rows


def draft_seconds(num_rows: Any) -> Any:
    return DRAFT_COST * verify_seconds(num_rows)


@dataclass(frozen=True)
class Scene:
    """How acceptance behaves.

    Attributes:
        name: In the table.
        chance: Logit of a request's acceptance, of its own draw (standard normal), the
            step and the number of steps.
        num_streams: Requests at a time, of the share of the run that is done.
    """

    name: str
    chance: Callable[[float, float], float]
    num_streams: Callable[[float], int] = lambda share: 1


SCENES = (
    Scene("easy", lambda own, share: 2.2),
    Scene("middling", lambda own, share: 0.8),
    Scene("hopeless", lambda own, share: -4.0),
    Scene("by request", lambda own, share: 0.8 + 1.5 * own),
    Scene("drifting", lambda own, share: 1.0 + 2.0 * np.sin(4 * np.pi * share)),
    Scene(
        "load 1, 16, 1",
        lambda own, share: 1.6 + 0.5 * own,
        lambda share: 16 if 1 / 3 <= share < 2 / 3 else 1,
    ),
)


class World:
    """Requests that come and go, and what became of their drafts."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self._scene, self._random = scene, np.random.default_rng(seed)
        num_slots = max(scene.num_streams(share) for share in (0, 0.5))
        self.num_slots = num_slots
        self._own = self._random.standard_normal(num_slots)
        self._left = self._random.integers(1, REQUEST_TOKENS, num_slots)

    def slots(self, share: float) -> np.ndarray:
        return np.arange(self._scene.num_streams(share))

    def tokens(self, slots: np.ndarray, share: float) -> tuple[Any, Any]:
        """Fate and confidence of the next draft tokens, `[n, MAX_DRAFTS]`."""
        base = [self._scene.chance(self._own[slot], share) for slot in slots]
        shape = (len(slots), MAX_DRAFTS)
        logit = np.asarray(base)[:, None]
        logit = logit + TOKEN_SPREAD * self._random.standard_normal(shape)
        told = CONFIDENCE_BIAS + CONFIDENCE_SCALE * logit
        told += CONFIDENCE_NOISE * self._random.standard_normal(shape)
        return self._random.random(shape) < sigmoid(logit), sigmoid(told)

    def chances(self, slots: np.ndarray, share: float) -> np.ndarray:
        """Mean acceptance of a token of each request."""
        base = [self._scene.chance(self._own[slot], share) for slot in slots]
        points = np.linspace(-3, 3, 25)
        weights = np.exp(-(points**2) / 2)
        logit = np.asarray(base)[:, None] + TOKEN_SPREAD * points
        return (sigmoid(logit) * weights).sum(axis=1) / weights.sum()

    def emit(self, slots: np.ndarray, tokens: np.ndarray) -> Iterator[int]:
        """The slots whose request ended, and is another one now."""
        self._left[slots] -= tokens
        for slot in slots[self._left[slots] <= 0]:
            self._own[slot] = self._random.standard_normal()
            self._left[slot] = REQUEST_TOKENS
            yield int(slot)


class Controller:
    """What the simulation asks: lengths of this step, and learning from it."""

    def lengths(self, world: World, slots: Any, share: float, confidence: Any) -> Any:
        raise NotImplementedError

    def observe(self, slots: Any, lengths: Any, accepted: Any, seconds: float) -> None:
        pass

    def admit(self, slot: int) -> None:
        pass


class Fixed(Controller):
    def __init__(self, k: int) -> None:
        self._k = k

    def lengths(self, world: World, slots: Any, share: float, confidence: Any) -> Any:
        return np.full(len(slots), self._k)


class Oracle(Controller):
    """Knows every request's chance at every moment, and the costs."""

    def lengths(self, world: World, slots: Any, share: float, confidence: Any) -> Any:
        each = world.chances(slots, share)[:, None]
        survival = np.cumprod(np.repeat(each, MAX_DRAFTS, axis=1), axis=1)
        room = np.full(len(slots), MAX_DRAFTS)
        return best_lengths(survival, room, true_costs())


class ByGoodput(Controller):
    """Starts from costs that are wrong: each kind by up to a third, and the numbers of
    rows by another twentieth."""

    def __init__(self, num_slots: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        rows = np.array([1, 2, 4, 8, 16, 32, 64, 144])
        wrong = 1 + random.uniform(-1 / 3, 1 / 3, (2, 1))
        wrong = wrong * random.uniform(0.95, 1.05, (2, rows.size))
        costs = StepCosts(
            rows, verify_seconds(rows) * wrong[0], draft_seconds(rows) * wrong[1]
        )
        self._goodput = Goodput(num_slots, MAX_DRAFTS, costs)

    def lengths(self, world: World, slots: Any, share: float, confidence: Any) -> Any:
        return self._goodput.plan(slots, np.full(len(slots), MAX_DRAFTS)).lengths

    def observe(self, slots: Any, lengths: Any, accepted: Any, seconds: float) -> None:
        self._goodput.acceptance.observe(slots, lengths, accepted)
        num_rows = len(slots) + int(lengths.sum())
        steps = int(lengths.max())
        self._goodput.costs.observe(num_rows, len(slots), steps, seconds)

    def admit(self, slot: int) -> None:
        self._goodput.acceptance.admit(slot)


class ByStopRule(Controller):
    def __init__(self, rule: StopRule) -> None:
        self._rule = rule

    def lengths(self, world: World, slots: Any, share: float, confidence: Any) -> Any:
        lengths = np.ones(len(slots), np.int64)
        going = np.arange(len(slots))
        for step in range(MAX_DRAFTS):
            goes = self._rule.goes_on(slots[going], step, confidence[going, step])
            going = going[goes & (lengths[going] < MAX_DRAFTS)]
            lengths[going] += 1
            if not len(going):
                break
        return lengths

    def observe(self, slots: Any, lengths: Any, accepted: Any, seconds: float) -> None:
        self._rule.observe(slots, lengths, accepted)

    def admit(self, slot: int) -> None:
        self._rule.admit(slot)


def true_costs() -> StepCosts:
    rows = np.array([1, 8, 16, 32, 64, 144])
    return StepCosts(rows, verify_seconds(rows), draft_seconds(rows))


def controllers(num_slots: int, seed: int) -> dict[str, Controller]:
    """Fresh ones, by name."""
    token_cost = DRAFT_COST + ROW_COST
    found: dict[str, Controller] = {"oracle": Oracle()}
    found |= {f"fixed {k}": Fixed(k) for k in FIXED}
    found["threshold"] = ByStopRule(Threshold(num_slots, MAX_DRAFTS))
    found["thompson"] = ByStopRule(Thompson(num_slots, MAX_DRAFTS, seed))
    found["thompson-calibrated"] = ByStopRule(
        CalibratedThompson(num_slots, MAX_DRAFTS, token_cost, seed)
    )
    found["goodput"] = ByGoodput(num_slots, seed)
    return found


def simulate(scene: Scene, controller: Controller, seed: int, num_steps: int) -> Any:
    """Seconds and tokens of every step, `[num_steps, 2]`."""
    world = World(scene, seed)
    found = np.zeros((num_steps, 2))
    for step in range(num_steps):
        share = step / num_steps
        slots = world.slots(share)
        fate, confidence = world.tokens(slots, share)
        lengths = controller.lengths(world, slots, share, confidence)
        survives = np.cumprod(fate, axis=1).sum(axis=1)
        accepted = np.minimum(survives, lengths)
        seconds = float(verify_seconds(len(slots) + lengths.sum()))
        seconds += int(lengths.max()) * float(draft_seconds(len(slots)))
        controller.observe(slots, lengths, accepted, seconds)
        for slot in world.emit(slots, accepted + 1):
            controller.admit(slot)
        found[step] = seconds, (accepted + 1).sum()
    return found


def rate(run: Any) -> float:
    """Tokens per second, each third of the run (its load may differ) weighing alike."""
    thirds = np.array_split(run, 3)
    rates = [third[:, 1].sum() / third[:, 0].sum() for third in thirds]
    return float(np.exp(np.mean(np.log(rates))))


def main(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Of the results.")
    ] = Path("draft-length"),
    steps: Annotated[
        int, typer.Option(min=60, metavar="N", help="Steps of each run.")
    ] = NUM_STEPS,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs.")] = 5,
) -> None:
    """Compare the draft-length controllers with an oracle, by simulation."""
    shares: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[str, Any]] = {}
    for scene in SCENES:
        runs: dict[str, list[Any]] = {}
        for seed in range(seeds):
            for name, one in controllers(World(scene, seed).num_slots, seed).items():
                runs.setdefault(name, []).append(simulate(scene, one, seed, steps))
        best = np.mean([rate(run) for run in runs["oracle"]])
        for name, found in runs.items():
            share = float(np.mean([rate(run) for run in found]) / best)
            shares.setdefault(name, {})[scene.name] = round(share, 4)
            curves.setdefault(name, {})[scene.name] = smoothed(found)
        print(f"{scene.name}: done")
    output.mkdir(parents=True, exist_ok=True)
    document = {"steps": steps, "seeds": seeds, "share_of_oracle": shares}
    (output / "simulation.json").write_text(json.dumps(document, indent=1) + "\n")
    (output / "simulation.md").write_text(table(shares))
    for name in shares:
        if name != "oracle" and not name.startswith("fixed"):
            plot(name, curves).savefig(output / f"{name}.svg", bbox_inches="tight")
    print(table(shares))


def smoothed(runs: list[Any]) -> Any:
    """Tokens per second over a window, mean over the runs."""
    total = np.cumsum(np.sum(runs, axis=0), axis=0)
    window = min(WINDOW, len(total) // 10)
    moved = (total[window:] - total[:-window])[:: max(1, len(total) // POINTS)]
    return moved[:, 1] / moved[:, 0]


def table(shares: dict[str, dict[str, float]]) -> str:
    """Markdown: tokens per second over the oracle's."""
    names = [scene.name for scene in SCENES]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for controller, found in shares.items():
        values = " | ".join(f"{found[name]:.3f}" for name in names)
        lines.append(f"| {controller} | {values} |")
    return "\n".join(lines) + "\n"


def plot(name: str, curves: dict[str, dict[str, Any]]) -> Any:
    """A panel for each scene: the controller, all fixed lengths, and the oracle."""
    from vllm_selfspec.bench.page import legend, new_plot

    figure, axes = new_plot(2, 3, 13, 7)
    for axis, scene in zip(axes.flat, SCENES, strict=True):
        for other, found in curves.items():
            if other == name:
                axis.plot(found[scene.name], color="green", linewidth=2, label=name)
            elif other == "oracle":
                axis.plot(found[scene.name], color="black", label="oracle")
            elif other.startswith("fixed"):
                axis.plot(found[scene.name], linewidth=0.8, label=other)
        axis.set_title(scene.name, fontsize=10)
        axis.set_xlabel(f"point of a run; each averages {WINDOW} steps")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("tokens per plain step's time")
    legend(figure, axes[0][:1])
    return figure


if __name__ == "__main__":
    typer.run(main)
