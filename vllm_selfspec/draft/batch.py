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


@dataclass(frozen=True)
class KVGroup:
    """One KV cache group of the target: the layers that share a block table.

    Attributes:
        attn_groups: vLLM's attention groups with at least one layer the draft runs.
        block_table: `[num_reqs, max_num_blocks]`, of the whole running batch.
        block_size: Tokens per block.
    """

    attn_groups: Sequence[AttentionGroup]
    block_table: torch.Tensor
    block_size: int


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
        self._max_seq_lens = self._seq_lens_np.max(axis=1)
        self._query_start_loc_cpu = torch.arange(self.num_rows + 1, dtype=torch.int32)
        self._query_start_loc = self._query_start_loc_cpu.to(device)
        self._is_prefilling = torch.zeros(self.num_rows, dtype=torch.bool)
        self.token_ids = torch.from_numpy(token_ids).to(device)
        self.positions = torch.from_numpy(positions).to(device)
        self._seq_lens = torch.from_numpy(self._seq_lens_np).to(device)
        is_done = torch.from_numpy((steps >= num_drafts) | (not writes)).to(device)
        row_index = torch.from_numpy(rows).to(device)
        self._groups = [
            (group, *self._tables(group, row_index, is_done)) for group in kv_groups
        ]

    def _tables(
        self, group: KVGroup, row_index: torch.Tensor, is_done: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block table `[num_rows, ...]` and slots `[num_steps, num_rows]`."""
        block_table = group.block_table[row_index]
        blocks = block_table.gather(1, (self.positions // group.block_size).T).T
        # Contiguous, because a kernel reads one step's row by its address.
        slots = blocks.contiguous().long() * group.block_size
        slots += self.positions % group.block_size
        return block_table, slots.masked_fill_(is_done, PAD_SLOT_ID)

    def attention_inputs(
        self, step: int
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slot mapping of one step, by attention layer."""
        metadata_of: dict[str, Any] = {}
        slots_of: dict[str, torch.Tensor] = {}
        for group, block_table, slots in self._groups:
            common = self._common_metadata(step, block_table, slots[step])
            for attn_group in group.attn_groups:
                metadata = attn_group.build_metadata_for_drafting(common, step)
                metadata_of |= dict.fromkeys(attn_group.layer_names, metadata)
                slots_of |= dict.fromkeys(attn_group.layer_names, slots[step])
        return metadata_of, slots_of

    def _common_metadata(
        self, step: int, block_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> CommonAttentionMetadata:
        """A batch of one-token decodes, in vLLM's terms."""
        return CommonAttentionMetadata(
            query_start_loc=self._query_start_loc,
            query_start_loc_cpu=self._query_start_loc_cpu,
            seq_lens=self._seq_lens[step],
            seq_lens_cpu_upper_bound=torch.from_numpy(self._seq_lens_np[step]),
            num_reqs=self.num_rows,
            num_actual_tokens=self.num_rows,
            max_query_len=1,
            max_seq_len=int(self._max_seq_lens[step]),
            block_table_tensor=block_table,
            slot_mapping=slot_mapping,
            positions=self.positions[step],
            is_prefilling=self._is_prefilling,
        )
