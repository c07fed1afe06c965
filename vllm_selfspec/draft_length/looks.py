"""`Looks`: whether to ask free sources at all, which takes time of the host.

One rule: asking must bring what it takes. Where it has brought more of late, or brought
something just now, it is done in each step; else it takes no more than a small share of
the time, so a copy that begins meanwhile is found some steps later. The forward of many
requests hardly takes longer than that of one, while the host's work is many times more.
"""

from collections import deque

# Of the time, what asking in vain may take.
LOOK_SHARE = 0.003
# How fast what looks usually bring follows the last ones.
USUAL_RATE = 0.05
# A look that was interrupted, or the first at new requests, says nothing of the next
# one: the least of so many counts.
NUM_TIMED = 3


class Looks:
    """When the next one is due."""

    def __init__(self) -> None:
        self._of_row: deque[float] = deque(maxlen=NUM_TIMED)  # seconds
        self._owed = 0.0  # seconds that looks may take by now
        self._usual = 0.0  # seconds that one saves
        self._pays = True  # whether the last one brought anything

    def is_due(self, num_rows: int) -> bool:
        """Whether sources are to be asked now, for so many rows."""
        if self._pays or len(self._of_row) < NUM_TIMED:
            return True
        return max(self._owed, self._usual) >= num_rows * min(self._of_row)

    def brought(self, seconds: float) -> None:
        """After each look: what its proposals are expected to save, 0 if nothing."""
        self._owed, self._pays = 0.0, seconds > 0
        self._usual += USUAL_RATE * (seconds - self._usual)

    def took(self, seconds: float, num_rows: int) -> None:
        """What a look at so many rows took; all ranks must be told the same."""
        self._of_row.append(seconds / num_rows)

    def passed(self, seconds: float) -> None:
        """After each step, which takes so long without drafts."""
        self._owed += LOOK_SHARE * seconds
