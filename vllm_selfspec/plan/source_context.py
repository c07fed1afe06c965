"""The source `context`: what followed the last time that a row said the same.

One rule: it looks at the row's own tokens, as they are now, and at nothing else.

vLLM has a matcher of its own in each runner. V1's (`NgramProposer`) says neither where
it found a match nor how long that was, by which alone a good copy is told from a
chance one; both stop at the row's newest token, where a loop would go on. So this one
is ours: a match is found in two or three passes of numpy over the row.
"""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vllm_selfspec.plan.keys import Keys
from vllm_selfspec.plan.source import NOTHING, Proposal, Proposer, Source

# Shortest match of each kind. From one kind to the next the chance that a copy is right
# differs; within one it hardly does.
KINDS = (1, 2, 3, 4, 6, 9, 16)
# Of each kind: how often the first token of a copy is right, and the next where that
# is, in source files by two tokenizers (`benchmarks/copied_tokens.py`).
GUESSES = (
    (0.3, 0.45),
    (0.45, 0.55),
    (0.55, 0.65),
    (0.65, 0.7),
    (0.75, 0.75),
    (0.8, 0.85),
    (0.85, 0.85),
)
MAX_MATCH, MAX_COPIED = 256, 64  # that may be asked for
# Of vLLM's matcher on the device, whose work grows with the square of the match, and of
# which a row verifies all tokens, whether they match or not; others than by default.
ON_DEVICE = {"prompt_lookup_min": 2, "prompt_lookup_max": 5, "num_copied_tokens": 8}


class ContextKeys(Keys):
    """Names and meaning of the first two are vLLM's, of its n-gram speculation."""

    prompt_lookup_min: int = Field(
        default=1,
        ge=1,
        le=MAX_MATCH,
        strict=True,
        description="Source 'context': the fewest last tokens that must be found again "
        "before anything is copied.",
    )
    prompt_lookup_max: int = Field(
        default=KINDS[-1],
        ge=1,
        le=MAX_MATCH,
        strict=True,
        description="Source 'context': the most that are looked for; matches beyond "
        "that are all taken to be as good.",
    )
    num_copied_tokens: int = Field(
        default=16,
        ge=1,
        le=MAX_COPIED,
        strict=True,
        description="Source 'context': tokens copied per request and step at most.",
    )

    @model_validator(mode="after")
    def _min_is_no_more_than_max(self) -> "ContextKeys":
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, but must be at most "
                f"prompt_lookup_max, {self.prompt_lookup_max}: lower it"
            )
        return self


def kind_of(match_length: int) -> int:
    """The kind of a copy that was found by a match of so many tokens."""
    return bisect_right(KINDS, match_length) - 1


class CopyingSource(Source):
    """What all sources have that continue a match."""

    guesses = GUESSES

    def max_tokens(self, options: Mapping[str, Any]) -> int:
        return int(options["num_copied_tokens"])


class ContextSource(CopyingSource):
    """Copies from the row itself."""

    name = "context"
    keys = ContextKeys
    speculator = "vllm_selfspec.draft.v2_copies:DeviceCopies"

    @property
    def words(self) -> str:
        return "copies from the request's own tokens"

    def options_on_device(self, config: Any) -> dict[str, Any]:
        options = self.options(config)
        for key in ON_DEVICE.keys() - config.model_fields_set:
            options[key] = ON_DEVICE[key]
        bounds = options["prompt_lookup_min"], options["prompt_lookup_max"]
        return {**options, "prompt_lookup_min": min(bounds)}

    def proposer(self, options: Mapping[str, Any]) -> Proposer:
        return Copier(**options)


class Copier(Proposer):
    """The source at work. It keeps nothing, so nothing of a row can be stale."""

    def __init__(
        self, prompt_lookup_min: int, prompt_lookup_max: int, num_copied_tokens: int
    ) -> None:
        """With the user's keys."""
        self._shortest, self._longest = prompt_lookup_min, prompt_lookup_max
        self._num_tokens = num_copied_tokens

    def propose(self, req_id: str, token_ids: NDArray[np.int32]) -> Proposal:
        """Continues the longest match, of those the latest."""
        end, length = longest_match(token_ids, self._longest)
        if length < self._shortest:
            return NOTHING
        following = token_ids[end : end + self._num_tokens].copy()
        if len(following) < self._num_tokens:
            # A match that reaches to the newest token goes round: what follows it there
            # is what the copy itself says.
            following = np.resize(following, self._num_tokens)
        return Proposal(following, kind_of(length))


def longest_match(token_ids: NDArray[np.int32], longest: int) -> tuple[int, int]:
    """Where a row's last tokens stood before.

    Args:
        token_ids: The row, `[num_tokens]`.
        longest: How many of its last tokens are looked for at most.

    Returns:
        The position after the match, and its length; of the longest ones the latest.
        Length 0 where the last token is new.
    """
    if len(token_ids) < 2:
        return 0, 0
    # Positions of the last token, the newest one's own left out.
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1])
    length = 0
    while len(ends):
        found, length = ends, length + 1
        if length == longest:
            break
        ends = ends[ends >= length]
        ends = ends[token_ids[ends - length] == token_ids[-1 - length]]
    return (int(found[-1]) + 1, length) if length else (0, 0)
