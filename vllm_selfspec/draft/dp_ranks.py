"""`DPRanks`: as many draft steps on every data-parallel rank.

Ranks that share a model's experts wait for each other in every forward, so each must
run as many as the others; those of a dense model are engines of their own, and here
they are one rank alone. One rule: before it drafts, or has nothing to do, a rank says
how many steps and rows it has, all run as many steps as the one with the most, and
whoever is done before runs along for nothing.
"""

import torch
import torch.distributed as dist
from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import get_dp_group


class DPRanks:
    """What the ranks have agreed on for the draft that comes next.

    Attributes:
        num_steps: Draft steps that every rank runs.
        num_rows_across_dp: Rows of each rank in each of these steps, `[dp_size]`; None
            where there is one rank.
    """

    def __init__(self, parallel_config: ParallelConfig) -> None:
        self.num_steps = 0
        self.num_rows_across_dp: torch.Tensor | None = None
        self._size: int = parallel_config.data_parallel_size
        self._rank: int = parallel_config.data_parallel_rank

    @property
    def is_alone(self) -> bool:
        return self._size == 1

    @property
    def num_rows(self) -> int:
        """Rows that the others expect of this rank."""
        if self.num_rows_across_dp is None:
            return 1
        return int(self.num_rows_across_dp[self._rank])

    def agree(self, num_steps: int, num_rows: int) -> int:
        """Waits for all ranks, if there are others; returns `num_steps` as agreed.

        Args:
            num_steps: Draft steps that this rank wants.
            num_rows: Rows that it has in them; 0 if it only runs along.
        """
        self.num_steps = num_steps
        if self.is_alone:
            return num_steps
        said = torch.zeros(2, self._size, dtype=torch.int32)  # steps and rows
        said[:, self._rank] = torch.tensor([num_steps, num_rows])
        dist.all_reduce(said, group=get_dp_group().cpu_group)
        self.num_steps = int(said[0].max())
        self.num_rows_across_dp = said[1].clamp(min=1)  # a forward has a row at least
        return self.num_steps
