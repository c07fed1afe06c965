"""`Slots`: a place in a controller's arrays for each running request."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vllm_selfspec.draft_length.types import Ints


class Slots:
    """Places by request id, given out once and taken back when a request has ended."""

    def __init__(self, num: int) -> None:
        """`num` places: as many as there can be requests between two `keep`s."""
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
            running: All that keep theirs.
            begin: Called with each place that is given out.

        Raises:
            IndexError: If there is none left.
        """
        for req_id in self._of.keys() - set(running):
            self._free.append(self._of.pop(req_id))
        for req_id in req_ids:
            if req_id not in self._of:
                self._of[req_id] = self._free.pop()
                begin(self._of[req_id])

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._of

    def of(self, req_ids: Sequence[str]) -> Ints:
        """Places of known requests, `[len(req_ids)]`."""
        return np.array([self._of[req_id] for req_id in req_ids], np.int64)
