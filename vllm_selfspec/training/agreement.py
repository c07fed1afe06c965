"""`Agreement`: how often a student says what the target does, and what that is worth.

One rule: it is counted on texts that were not trained on, and the student answers as
the engine drafts, because the state that enters the exit layer is the target's own. So
what the engine accepts follows from the answers without an engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.plan.cost import ModelWeights
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.training.texts import Continuation
from vllm_selfspec.tuning.score import Score, best_score

MAX_DRAFTS = 8
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """Shares of positions at which the student's likeliest token is the target's.

    Attributes:
        all: Of all texts.
        by_temperature: Of those that were sampled at each.
    """

    all: float
    by_temperature: dict[float, float]

    @classmethod
    def of(cls, texts: Sequence[Continuation], answers: Sequence[Ints]) -> "Agreement":
        """By the student's likeliest tokens at the target's own positions."""
        same = [
            found == text.top_ids[:, 0]
            for text, found in zip(texts, answers, strict=True)
        ]
        by_temperature: dict[float, list[Bools]] = {}
        for text, one in zip(texts, same, strict=True):
            by_temperature.setdefault(text.temperature, []).append(one)
        shares = {at: _share(by_temperature[at]) for at in sorted(by_temperature)}
        return cls(_share(same), shares)


def _share(same: Sequence[Bools]) -> float:
    return round(float(np.concatenate(same).mean()), 4)


def num_right(text: Continuation, answers: Ints, most: int = MAX_DRAFTS) -> Ints:
    """How many draft tokens in a row are the text's own, as `Probe.num_right` counts.

    Args:
        text: The target's greedy one.
        answers: The student's likeliest tokens at the target's own positions.
        most: The longest draft.

    Returns:
        For each newest token that a draft begins at, from the target's first to the
        last but one.
    """
    is_right = answers[1:] == text.token_ids[text.first + 1 :]
    found = np.zeros(len(is_right), np.int64)
    run = 0
    for at in range(len(is_right) - 1, -1, -1):
        run = run + 1 if is_right[at] else 0
        found[at] = min(run, most)
    return found


def draft_cost(weights: ModelWeights, exit_layer: int) -> float:
    """c, where reading weights is what takes time: bytes of a draft step over a step's.

    Args:
        weights: The target's.
        exit_layer: N; the exit layer reads as much as the target's last.
    """
    first = SkipSet.early_exit(weights.num_layers, exit_layer)
    plan = DraftPlan.skipping(first)
    found = plan.cost(weights.step).total + weights.attention[-1] + weights.mlp[-1]
    return found / weights.streamed


def score(
    texts: Sequence[Continuation], answers: Sequence[Ints], draft_cost: float
) -> Score:
    """What drafting so gains for one stream that is bound by memory: v is 1.

    Greedy texts count, and all where there are none.
    """
    pairs = [*zip(texts, answers, strict=True)]
    greedy = [pair for pair in pairs if pair[0].temperature == 0]
    right = [num_right(text, found) for text, found in greedy or pairs]
    return best_score(right, draft_cost, [1.0] * MAX_DRAFTS)
