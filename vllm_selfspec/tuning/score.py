"""`Score`: what a plan is worth, from what it drafts right and what forwards cost.

One rule: nothing is estimated that can be counted. From the number of right drafts at
every position of a text, the engine's very steps over it follow: where one ends the
next begins. So acceptance and tokens per step are those of generating the text, for
any draft length, without generating it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_selfspec.draft_length.types import Ints

# Of the best length's speed-up: shorter drafts that come so near are taken, as the next
# texts may be harder; some texts tell no smaller differences.
NEAR_BEST = 0.98


@dataclass(frozen=True)
class Walk:
    """The engine's steps over some texts at one draft length.

    Attributes:
        tokens: Emitted.
        verifications: Steps.
        accepted_at: Steps in which at least the first i draft tokens were accepted,
            i from 1.
        tried_at: Steps in which it is known whether they would be: the text goes on
            for so long.
    """

    tokens: int
    verifications: int
    accepted_at: tuple[int, ...]
    tried_at: tuple[int, ...]

    @property
    def tokens_per_verification(self) -> float:
        """E."""
        return self.tokens / self.verifications

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of the steps that accept the first i draft tokens, i from 1."""
        pairs = zip(self.accepted_at, self.tried_at, strict=True)
        return tuple(accepted / max(1, tried) for accepted, tried in pairs)


def walk(right: Sequence[Ints], k: int) -> Walk:
    """Steps over texts with `k` drafts each.

    Args:
        right: For each text and each position t of what was generated, how many draft
            tokens are right when t is the newest token; at least `k` must have been
            drafted.
        k: Draft tokens a step.
    """
    tokens = verifications = 0
    accepted_at, tried_at = np.zeros((2, k), np.int64)
    for of_text in right:
        at = 0
        while at < len(of_text):
            accepted = min(int(of_text[at]), k)
            accepted_at[:accepted] += 1
            tried_at[: len(of_text) - at] += 1
            verifications += 1
            tokens += accepted + 1
            at += accepted + 1
    counts = (tuple(at.tolist()) for at in (accepted_at, tried_at))
    return Walk(tokens, verifications, *counts)


@dataclass(frozen=True)
class Score:
    """What a plan comes to at its draft length.

    Attributes:
        k: Draft tokens a step.
        speed_up: Tokens per second over plain vLLM's, E / (v + k c).
        walk: The steps that were counted.
        draft_cost: c, of a draft step over a plain step.
        verify_cost: v, of verifying `k` draft tokens over a plain step.
    """

    k: int
    speed_up: float
    walk: Walk
    draft_cost: float
    verify_cost: float


def best_score(
    right: Sequence[Ints],
    draft_cost: float,
    verify_costs: Sequence[float],
) -> Score:
    """The shortest draft length of those that gain most or nearly (`NEAR_BEST`), and
    what it gains.

    Args:
        right: As for `walk`.
        draft_cost: c.
        verify_costs: v for 1, 2, ... draft tokens; their number is the longest draft.
    """
    found = []
    for k, v in enumerate(verify_costs, 1):
        steps = walk(right, k)
        gain = steps.tokens_per_verification / (v + k * draft_cost)
        found.append(Score(k, gain, steps, draft_cost, v))
    enough = NEAR_BEST * max(score.speed_up for score in found)
    return next(score for score in found if score.speed_up >= enough)
