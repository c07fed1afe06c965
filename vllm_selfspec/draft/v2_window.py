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

from vllm_selfspec.draft.window import blocks_kept


@dataclass(frozen=True)
class DeviceWindow:
    """Reads the first block and the last ones, in every KV cache group alike, because
    vLLM has one sequence length for all of them.

    A layer with a sliding window of its own reads what it always does: no window is
    narrower than the widest of those.

    Attributes:
        block_sizes: Tokens in a block, by group.
        window: As in `KVGroup`.
        least: Tokens that are read at least.
    """

    block_sizes: Sequence[int]
    window: float
    least: int = 0

    @classmethod
    def of(
        cls, window: float, kv_cache_config: Any, block_sizes: Sequence[int]
    ) -> "DeviceWindow":
        """For a window in a KV cache that has such groups."""
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        sliding = [getattr(spec, "sliding_window", None) or 0 for spec in specs]
        return cls(tuple(block_sizes), window, max(sliding))

    @property
    def unit(self) -> int:
        """What is left out is a multiple of so many tokens."""
        return lcm(*self.block_sizes)

    def num_kept(self, seq_lens: Any) -> Any:
        """Blocks of `unit` tokens that are read before that of the newest token, of
        each row, `[num_rows]`."""
        kept = blocks_kept(self.window, seq_lens, self.unit)
        return kept.clip(min=ceil(self.least / self.unit))

    def most_read(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Tokens that the first step reads at most, of so many or fewer, `[num_rows]`.
        The last block may be full."""
        return seq_lens.minimum(self.unit * (self.num_kept(seq_lens) + 1))

    def apply(
        self,
        block_tables: Sequence[torch.Tensor],
        seq_lens: torch.Tensor,
        max_seq_len: int,
        num_steps: int,
    ) -> None:
        """Takes out of the block tables what is not read, and off the lengths.

        Args:
            block_tables: Of the batch, by group, `[max_num_reqs, max_num_blocks]`.
            seq_lens: Tokens that the first step would read, `[num_reqs]`.
            max_seq_len: No length is above it.
            num_steps: Draft steps; each reads one token more.
        """
        num_kept = self.num_kept(seq_lens)
        left_out = ((seq_lens - 1) // self.unit - num_kept).clamp_(min=0)
        most = int(self.num_kept(torch.tensor([max_seq_len]))[0])
        for table, block_size in zip(block_tables, self.block_sizes, strict=True):
            blocks_of_unit = self.unit // block_size
            read = blocks_of_unit * (most + 1) + ceil(num_steps / block_size)
            places = torch.arange(min(read, table.shape[1]), device=table.device)
            moved = left_out[:, None] * blocks_of_unit
            wanted = places + torch.where(places < blocks_of_unit, 0, moved)
            rows = table[: len(seq_lens)]
            # A copy first: what moves up is read from the places that it moves to.
            found = rows.gather(1, wanted.clamp_(max=table.shape[1] - 1))
            rows[:, : len(places)] = found
        seq_lens -= left_out * self.unit
