"""`DraftBatch`: everything k draft steps need, prepared once per propose.

One rule: a draft step reads a row of tensors made here; it computes no positions and no
slots, and looks at no request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.utils import AttentionGroup

from vllm_selfspec.draft.window import blocks_kept


@dataclass(frozen=True)
class KVGroup:
    """One KV cache group of the target: the layers that share a block table.

    Attributes:
        attn_groups: vLLM's attention groups with at least one layer the draft runs.
        block_table: `[num_reqs, max_num_blocks]`, of the whole running batch.
        block_size: Tokens per block.
        window: The last tokens that are read, in whole blocks, beside the first block,
            or below 1 which share of all; None where all are.
    """

    attn_groups: Sequence[AttentionGroup]
    block_table: torch.Tensor
    block_size: int
    window: float | None = None


@dataclass(frozen=True)
class _Reads:
    """What the rows read and write in a KV cache group.

    Attributes:
        attn_groups: As in `KVGroup`.
        block_table: `[num_rows, ...]`, of the blocks that are read.
        slots: `[num_steps, num_rows]`, which the rows write to.
        seq_lens: Tokens that are read, `[num_steps, num_rows]`, on the device.
        seq_lens_np: The same on the host.
    """

    attn_groups: Sequence[AttentionGroup]
    block_table: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_np: np.ndarray


class DraftBatch:
    """The rows that draft, `[num_rows]`, over `num_steps` steps.

    In step j every row runs one token at position `first_positions + j`, and its K and
    V go to the request's own slot of that position, to be read from then on. A row that
    has drafted all it may runs on with the others, but writes nowhere; nor does any row
    of a batch that is not to write, whose positions have the target's K and V.

    Attributes:
        num_rows: Requests that draft.
        num_steps: Draft steps, the largest of `num_drafts`.
        token_ids: Input of step 0, the newest sampled tokens, `[num_rows]`, int32.
        positions: `[num_steps, num_rows]`, int64.
    """

    def __init__(
        self,
        rows: np.ndarray,
        token_ids: np.ndarray,
        first_positions: np.ndarray,
        num_drafts: np.ndarray,
        kv_groups: Sequence[KVGroup],
        device: torch.device,
        writes: bool = True,
    ) -> None:
        self.num_rows, self.num_steps = len(rows), int(num_drafts.max())
        steps = np.arange(self.num_steps)[:, None]
        # [num_steps, num_rows]; a row that is done repeats its last position.
        positions = first_positions + np.minimum(steps, num_drafts - 1)
        self._seq_lens_np = (positions + 1).astype(np.int32)
        self._query_start_loc_cpu = torch.arange(self.num_rows + 1, dtype=torch.int32)
        self._query_start_loc = self._query_start_loc_cpu.to(device)
        self._is_prefilling = torch.zeros(self.num_rows, dtype=torch.bool)
        self.token_ids = torch.from_numpy(token_ids).to(device)
        self.positions = torch.from_numpy(positions).to(device)
        self._seq_lens = torch.from_numpy(self._seq_lens_np).to(device)
        is_done = torch.from_numpy((steps >= num_drafts) | (not writes)).to(device)
        row_index = torch.from_numpy(rows).to(device)
        self._groups = [self._reads(group, row_index, is_done) for group in kv_groups]

    def _reads(
        self, group: KVGroup, row_index: torch.Tensor, is_done: torch.Tensor
    ) -> _Reads:
        block_table = group.block_table[row_index]
        blocks = block_table.gather(1, (self.positions // group.block_size).T).T
        # Contiguous, because a kernel reads one step's row by its address.
        slots = blocks.contiguous().long() * group.block_size
        slots += self.positions % group.block_size
        slots.masked_fill_(is_done, PAD_SLOT_ID)
        left_out = self._blocks_left_out(group)
        if not left_out.any():
            lens = self._seq_lens, self._seq_lens_np
            return _Reads(group.attn_groups, block_table, slots, *lens)
        lens_np = self._seq_lens_np - (left_out * group.block_size).astype(np.int32)
        return _Reads(
            group.attn_groups,
            _without(block_table, torch.from_numpy(left_out).to(block_table.device)),
            slots,
            torch.from_numpy(lens_np).to(block_table.device),
            lens_np,
        )

    def _blocks_left_out(self, group: KVGroup) -> np.ndarray:
        """Blocks after the first that each row does not read, `[num_rows]`. The window
        ends in the block of the first step's position, and grows with the steps."""
        if group.window is None:
            return np.zeros(self.num_rows, np.int64)
        seq_lens = self._seq_lens_np[0].astype(np.int64)
        newest = (seq_lens - 1) // group.block_size
        kept = blocks_kept(group.window, seq_lens, group.block_size)
        found: np.ndarray = np.maximum(newest - kept, 0)
        return found

    def attention_inputs(
        self, step: int
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slot mapping of one step, by attention layer."""
        metadata_of: dict[str, Any] = {}
        slots_of: dict[str, torch.Tensor] = {}
        for reads in self._groups:
            common = self._common_metadata(step, reads)
            for attn_group in reads.attn_groups:
                metadata = attn_group.build_metadata_for_drafting(common, step)
                metadata_of |= dict.fromkeys(attn_group.layer_names, metadata)
                slots_of |= dict.fromkeys(attn_group.layer_names, reads.slots[step])
        return metadata_of, slots_of

    def _common_metadata(self, step: int, reads: _Reads) -> CommonAttentionMetadata:
        """A batch of one-token decodes, in vLLM's terms."""
        return CommonAttentionMetadata(
            query_start_loc=self._query_start_loc,
            query_start_loc_cpu=self._query_start_loc_cpu,
            seq_lens=reads.seq_lens[step],
            seq_lens_cpu_upper_bound=torch.from_numpy(reads.seq_lens_np[step]),
            num_reqs=self.num_rows,
            num_actual_tokens=self.num_rows,
            max_query_len=1,
            max_seq_len=int(reads.seq_lens_np[step].max()),
            block_table_tensor=reads.block_table,
            slot_mapping=reads.slots[step],
            positions=self.positions[step],
            is_prefilling=self._is_prefilling,
        )


def _without(block_table: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """A block table `[num_rows, num_blocks]` without as many blocks after the first as
    `left_out` `[num_rows]` says; what follows moves up."""
    width = block_table.shape[1]
    places = torch.arange(width, device=block_table.device)
    wanted = torch.where(places > 0, places + left_out[:, None], 0)
    return block_table.gather(1, wanted.clamp_(max=width - 1)).contiguous()
