"""`Slots`: a place in a controller's arrays for each running request."""

from collections.abc import Iterable, Sequence

import numpy as np

from vllm_selfspec.draft_length.types import Ints


class Slots:
    """Places by request id, given out once and taken back when a request has ended."""

    def __init__(self, num: int) -> None:
        """`num` places: as many as there can be requests between two `keep`s."""
        self._free = list(range(num - 1, -1, -1))
        self._of: dict[str, int] = {}

    def keep(self, req_ids: Iterable[str]) -> None:
        """Takes back the places of all other requests."""
        for req_id in self._of.keys() - set(req_ids):
            self._free.append(self._of.pop(req_id))

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._of

    def add(self, req_id: str) -> int:
        """The place of a new request.

        Raises:
            IndexError: If there is none left.
        """
        slot = self._of[req_id] = self._free.pop()
        return slot

    def of(self, req_ids: Sequence[str]) -> Ints:
        """Places of known requests, `[len(req_ids)]`."""
        return np.array([self._of[req_id] for req_id in req_ids], np.int64)
