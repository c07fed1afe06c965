"""`RowStops`: a stop rule in the terms of a batch that drafts, in either model runner.

One rule: a token that was drawn stays; what a rule decides is whether the row draws
another (`draft_length.stop_rules` says why that is lossless).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_selfspec import served_config
from vllm_selfspec.draft.stats import DraftStats
from vllm_selfspec.draft_length.options import stop_rule
from vllm_selfspec.draft_length.slots import Slots
from vllm_selfspec.draft_length.stop_rules import StopRule
from vllm_selfspec.draft_length.types import Bools, Floats, Ints


class RowStops:
    """Which rows of a propose still draft.

    Attributes:
        lengths: Draft tokens of each row so far decided on, `[num_rows]`.
        stats: What was decided.
    """

    def __init__(self, rule: StopRule, max_num_reqs: int, stats: DraftStats) -> None:
        """For a batch of up to `max_num_reqs` requests."""
        self.stats = stats
        self._rule, self._slots = rule, Slots(max_num_reqs)
        self._rows: Ints = np.zeros(0, np.int64)  # slots of the rows that draft
        self._most: Ints = self._rows
        self.lengths: Ints = self._rows

    @classmethod
    def of(cls, vllm_config: Any) -> "RowStops | None":
        """As configured; None where no policy stops single rows."""
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        most = served_config.num_model_tokens(vllm_config)
        options = served_config.draft_length_of(vllm_config)
        rule = stop_rule(options, max_num_reqs, most)
        return (
            None if rule is None else cls(rule, max_num_reqs, DraftStats(vllm_config))
        )

    def observe(
        self,
        req_ids: Sequence[str],
        drafted: Ints,
        num_sampled: Ints,
        is_model: Bools,
    ) -> None:
        """Learns from a verification.

        Args:
            req_ids: The running batch.
            drafted: Draft tokens of each that were verified, `[num_reqs]`.
            num_sampled: Tokens that this step emitted for each, 0 where the prompt goes
                on, `[num_reqs]`.
            is_model: Whether they were the model's, `[num_reqs]`; of others nothing is
                learnt.
        """
        self._slots.admit(req_ids, req_ids, self._rule.admit)
        samples = num_sampled > 0
        self.stats.lengths.update(drafted[samples].tolist())
        seen = np.flatnonzero(samples & is_model & (drafted > 0))
        if len(seen):
            self._rule.observe(
                self._slots.of([req_ids[row] for row in seen]),
                drafted[seen],
                num_sampled[seen] - 1,
            )
        self.stats.publish("rows", self._rule.beliefs)

    def begin(self, req_ids: Sequence[str], most: Ints) -> None:
        """A propose for these requests, each drafting at most so many, `[num_rows]`."""
        self._rows, self._most = self._slots.of(req_ids), most
        self.lengths = np.minimum(most, 1)

    def after(self, step: int, confidence: Floats) -> bool:
        """Whether any row draws another token.

        Args:
            step: The draft step that was just run, from 0.
            confidence: The draft's probability of each row's token, `[num_rows]`.
        """
        drawn = np.flatnonzero(self.lengths > step)  # the others ran along
        goes_on = self._rule.goes_on(self._rows[drawn], step, confidence[drawn])
        self.stats.stops["rule"] += int((~goes_on).sum())
        has_room = self.lengths[drawn] < self._most[drawn]
        self.stats.stops["limit"] += int((goes_on & ~has_room).sum())
        goes_on &= has_room
        self.lengths[drawn] += goes_on
        return bool(goes_on.any())
