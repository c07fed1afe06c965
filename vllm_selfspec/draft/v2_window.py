"""`DeviceWindow`: drafts of the V2 runner that read a window of the KV cache.

One rule: it is done once, in place and on the device, before the first draft step. What
a step reads, whether it is built anew, updated or replayed from a CUDA graph, lies in
the runner's block tables of the batch and in the speculator's sequence lengths; where a
step writes goes by positions and by the block tables of the requests, which stay. The
target gathers the batch's block tables afresh for each of its steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, lcm
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceWindow:
    """Reads the first block and the last ones, in every KV cache group alike, because
    vLLM has one sequence length for all of them.

    A layer with a sliding window of its own reads what it always does: no window is
    narrower than the widest of those.

    Attributes:
        block_sizes: Tokens in a block, by group.
        num_kept: Blocks before that of the newest token that are read at least, of the
            size that all groups' blocks divide: `unit`.
    """

    block_sizes: Sequence[int]
    num_kept: int

    @classmethod
    def of(
        cls, window: int, kv_cache_config: Any, block_sizes: Sequence[int]
    ) -> "DeviceWindow":
        """For a window of so many tokens in a KV cache that has such groups."""
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        sliding = [getattr(spec, "sliding_window", None) or 0 for spec in specs]
        return cls(tuple(block_sizes), ceil(max(window, *sliding) / lcm(*block_sizes)))

    @property
    def unit(self) -> int:
        """What is left out is a multiple of so many tokens."""
        return lcm(*self.block_sizes)

    def most_read(self, seq_len: int) -> int:
        """Tokens that the first step reads at most, of `seq_len`."""
        return min(seq_len, self.unit * (self.num_kept + 1))

    def apply(
        self,
        block_tables: Sequence[torch.Tensor],
        seq_lens: torch.Tensor,
        num_steps: int,
    ) -> None:
        """Takes out of the block tables what is not read, and off the lengths.

        Args:
            block_tables: Of the batch, by group, `[max_num_reqs, max_num_blocks]`.
            seq_lens: Tokens that the first step would read, `[num_reqs]`.
            num_steps: Draft steps; each reads one token more.
        """
        left_out = ((seq_lens - 1) // self.unit - self.num_kept).clamp_(min=0)
        for table, block_size in zip(block_tables, self.block_sizes, strict=True):
            blocks_of_unit = self.unit // block_size
            read = blocks_of_unit * (self.num_kept + 1) + ceil(num_steps / block_size)
            places = torch.arange(min(read, table.shape[1]), device=table.device)
            moved = left_out[:, None] * blocks_of_unit
            wanted = places + torch.where(places < blocks_of_unit, 0, moved)
            rows = table[: len(seq_lens)]
            # A copy first: what moves up is read from the places that it moves to.
            found = rows.gather(1, wanted.clamp_(max=table.shape[1] - 1))
            rows[:, : len(places)] = found
        seq_lens -= left_out * self.unit
