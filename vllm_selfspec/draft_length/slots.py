"""`Slots`: a place in a controller's arrays for each running request."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vllm_selfspec.draft_length.types import Ints


class Slots:
    """Places by request id, given out once and taken back when a request has ended, or
    waits and another needs its place."""

    def __init__(self, num: int) -> None:
        """`num` places: as many as there can be requests in a step."""
        self._free = list(range(num - 1, -1, -1))
        self._of: dict[str, int] = {}

    def admit(
        self,
        req_ids: Iterable[str],
        running: Iterable[str],
        begin: Callable[[int], None],
    ) -> None:
        """Gives requests that are new their places, and takes back those of others.

        Args:
            req_ids: Those that need a place.
            running: All that keep theirs as long as there is room. There may be more of
                them than places: a worker knows of preempted requests, too.
            begin: Called with each place that is given out.

        Raises:
            IndexError: If more need one than there are.
        """
        for req_id in self._of.keys() - set(running):
            self._free.append(self._of.pop(req_id))
        new = [req_id for req_id in req_ids if req_id not in self._of]
        if len(new) > len(self._free):
            for req_id in self._of.keys() - set(req_ids):
                self._free.append(self._of.pop(req_id))
        for req_id in new:
            self._of[req_id] = self._free.pop()
            begin(self._of[req_id])

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._of

    def of(self, req_ids: Sequence[str]) -> Ints:
        """Places of known requests, `[len(req_ids)]`."""
        return np.array([self._of[req_id] for req_id in req_ids], np.int64)
