"""`Arrivals`: the rows of prompts that the next step will have beside its drafts.

One rule: what is known is taken as known; for the rest the future is like the past.
"""

from vllm_selfspec.draft_length.best_lengths import Prompts

# How fast what is known of prompts that come unforeseen follows the last steps.
ARRIVAL_RATE = 0.05


def foreseen(num_left: int, num_waiting: int, num_rows: int, most: int) -> int:
    """Rows of prompts that the step after this one will have.

    Args:
        num_left: Of prompts that are under way.
        num_waiting: Of the prompt that is next in line; 0 if there is none.
        num_rows: Of this step.
        most: That a step may have.
    """
    # What would have fitted into this step waits for something else, such as KV blocks.
    if num_rows + num_waiting > most:
        num_left += num_waiting
    return min(num_left, most)


class Arrivals:
    """Foretells the rows of prompts in the next step.

    What waits is known. For the rest it goes by how often steps that decoded had
    prompts in them that nobody knew of when their drafts were planned.
    """

    def __init__(self) -> None:
        self._chance = self._num_rows = 0.0
        self._foreseen = 0

    def none(self) -> None:
        """After a step that decoded without prompts, before another of that kind."""
        self._chance -= ARRIVAL_RATE * self._chance

    def next(self, decodes: bool, num_rows: int, num_foreseen: int) -> Prompts:
        """After a step.

        Args:
            decodes: Whether it has more than prompts in it.
            num_rows: Rows of prompts in it.
            num_foreseen: Rows that the next step will have.
        """
        if decodes and not self._foreseen:
            self._chance += ARRIVAL_RATE * ((num_rows > 0) - self._chance)
            if num_rows:  # the first one is all that is known
                rate = ARRIVAL_RATE if self._num_rows else 1.0
                self._num_rows += rate * (num_rows - self._num_rows)
        self._foreseen = num_foreseen
        if num_foreseen:
            return Prompts(num_foreseen, 1.0)
        return Prompts(round(self._num_rows), self._chance)
