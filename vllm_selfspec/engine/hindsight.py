"""`Hindsight`: how far copies would have been right that nobody drafted.

One rule: it takes hardly any time. Where steps are scheduled ahead of the device nobody
knows who has a match, and to find out by drafting costs a step of something better. But
what a request has said is on the host a step later, and with it what a copy of some
tokens ago would have said. So one request at a time is looked at, as far as that was
saved up for.
"""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllm_selfspec.draft_length.looks import Looks
from vllm_selfspec.plan.source import Proposer

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Hindsight:
    """Looks back at running requests."""

    def __init__(self, proposer: Proposer, num_tokens: int) -> None:
        """With the source on the host that the device's is like, and the most that the
        latter drafts."""
        self._proposer, self._num_tokens = proposer, num_tokens
        self._looks = Looks()
        self._seen: dict[str, int] = {}  # tokens that were looked at already

    def look(self, running: Iterable["Request"], seconds: float) -> dict[str, int]:
        """How many of the last tokens of a request a copy would have had right: of one
        of those that `running` has, or of none.

        Args:
            running: Requests; not asked for where no look is due.
            seconds: That went by since the last call.
        """
        self._looks.passed(seconds)
        if not self._looks.is_due(1) or not (requests := [*running]):
            return {}
        started = time.perf_counter()
        found = self._newest(requests)
        if found:  # else nothing was looked at, which takes no time
            self._looks.took(time.perf_counter() - started, 1)
            self._looks.brought(0.0)  # it saves nothing by itself
        return found

    def _newest(self, running: Sequence["Request"]) -> dict[str, int]:
        """Of the request that has said most since it was looked at."""
        self._seen = {
            request.request_id: self._seen.get(
                request.request_id, request.num_prompt_tokens
            )
            for request in running
        }
        newest = max(running, key=lambda r: r.num_tokens - self._seen[r.request_id])
        if newest.num_tokens - self._seen[newest.request_id] < self._num_tokens:
            return {}
        token_ids = np.array(newest.all_token_ids, np.int32)
        self._seen[newest.request_id] = len(token_ids)
        before, said = np.split(token_ids, [len(token_ids) - self._num_tokens])
        copied = self._proposer.propose(newest.request_id, before).token_ids
        copied = copied[: self._num_tokens]
        differing = np.flatnonzero(copied != said[: len(copied)])
        right = int(differing[0]) if len(differing) else len(copied)
        return {newest.request_id: right}
