"""`FreeSources`: the free draft sources of an engine at work, as one.

One rule: kinds of proposals are numbered over all sources, so that what decides knows
kinds alone and no source.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_selfspec.draft_length.acceptance import Acceptance
from vllm_selfspec.draft_length.types import Ints, Slots
from vllm_selfspec.plan.source import NOTHING, Proposal, Proposer
from vllm_selfspec.plan.sources import SOURCES


@dataclass(frozen=True)
class Request:
    """What a source may look at.

    Attributes:
        req_id: Its name.
        token_ids: All its tokens so far, prompt and output, `[num_tokens]`, int32.
    """

    req_id: str
    token_ids: np.ndarray


class FreeSources:
    """Those that were asked for.

    Attributes:
        names: Of each kind's source, `[num_kinds]`.
        guesses: See `Source`; of each kind, `[num_kinds]`.
        max_tokens: The longest proposal.
    """

    def __init__(self, options_of: Mapping[str, Mapping[str, Any]]) -> None:
        """With the user's keys by source name; the model is passed over."""
        self.names: list[str] = []
        self.guesses: list[tuple[float, float]] = []
        self.max_tokens = 0
        self._proposers: list[tuple[int, Proposer]] = []  # first kind, source
        for name, options in options_of.items():
            source = SOURCES.named(name)
            proposer = source.proposer(options)
            if proposer is not None:
                self._proposers.append((len(self.names), proposer))
                self.names += [name] * len(source.guesses)
                self.guesses += source.guesses
                self.max_tokens = max(self.max_tokens, source.max_tokens(options))

    @property
    def num_kinds(self) -> int:
        return len(self.names)

    def keep(self, req_ids: Collection[str]) -> None:
        """All other requests have ended."""
        for _, proposer in self._proposers:
            proposer.keep(req_ids)

    def propose(
        self, requests: Sequence[Request], slots: Slots, acceptance: Acceptance
    ) -> tuple[list[Proposal], Ints]:
        """The proposal for each request of which most is expected, and its kind.

        Args:
            requests: `[num_reqs]`.
            slots: Their places in `acceptance`, `[num_reqs]`.
            acceptance: Of each kind.
        """
        best = [NOTHING] * len(requests)
        kinds = np.zeros(len(requests), np.int64)
        worth = np.zeros(len(requests))
        for first_kind, proposer in self._proposers:
            found = [proposer.propose(r.req_id, r.token_ids) for r in requests]
            num_tokens = np.array([len(one.token_ids) for one in found], np.int64)
            own_kinds = np.array([first_kind + one.kind for one in found], np.int64)
            within = np.arange(self.max_tokens) < num_tokens[:, None]
            expected = (acceptance.survival(slots, own_kinds) * within).sum(axis=1)
            for row in np.flatnonzero(expected > worth):
                best[row], kinds[row] = found[row], own_kinds[row]
            worth = np.maximum(worth, expected)
        return best, kinds
