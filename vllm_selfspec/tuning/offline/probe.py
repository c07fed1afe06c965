"""`Probe`: drafts from every position of a text at once, in the worker.

One rule: it drafts as the engine does. Rows are requests of their own to the V1
proposer's draft loop: row t has the text up to its token t behind it, in the target's
own KV cache. What lies before the block of token t all rows share; that block, which
the row will write to, it has a copy of. With nothing skipped every draft is therefore
what the target says, which is how a probe checks itself.

It takes KV blocks as it likes: the engine must be idle, and must not keep prefixes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_selfspec.draft.batch import DraftBatch, KVGroup
from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.plan.draft_plan import DraftPlan

MAX_ROWS = 64


class ProbeError(RuntimeError):
    """A text that does not fit into the KV cache."""


class Probe:
    """Texts in the target's KV cache, and rows that draft from within them."""

    def __init__(self, worker: Any, num_drafts: int) -> None:
        """For drafts of `num_drafts` tokens, in vLLM's V1 worker."""
        self._runner = worker.model_runner
        self._num_drafts = num_drafts
        tables = self._runner.input_batch.block_table
        self._groups = [
            (gid, attn_groups, tables[gid].block_size)
            for gid, attn_groups in enumerate(self._runner.attn_groups)
        ]
        # Block 0 is vLLM's null block. KV cache groups share the blocks of one pool.
        self._next_block = 1
        # By group: blocks of a row's own, from the newest token's on.
        self._own = [
            self._take(MAX_ROWS * self._num_own(size)).reshape(MAX_ROWS, -1)
            for _, _, size in self._groups
        ]
        self._texts: list[tuple[Ints, list[Ints]]] = []

    def _num_own(self, block_size: int) -> int:
        """Blocks that a draft may write to."""
        return 1 + -(-self._num_drafts // block_size)

    def _take(self, num: int) -> Ints:
        first, self._next_block = self._next_block, self._next_block + num
        most = self._runner.kv_cache_config.num_blocks
        if self._next_block > most:
            raise ProbeError(
                f"the texts must fit into the KV cache, but they need over {most} "
                "blocks: take fewer or shorter ones, or a larger cache"
            )
        return np.arange(first, first + num)

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int]) -> int:
        """Runs the target over a text, once; returns its number."""
        text = np.asarray(token_ids, np.int64)
        blocks = [self._take(-(-len(text) // size)) for _, _, size in self._groups]
        self._forward(text, blocks)
        self._texts.append((text, blocks))
        return len(self._texts) - 1

    def _forward(self, text: Ints, blocks: Sequence[Ints]) -> None:
        runner, num = self._runner, len(text)
        positions = torch.arange(num, device=runner.device)
        metadata: dict[str, Any] = {}
        slots_of: dict[str, torch.Tensor] = {}
        for (_, attn_groups, size), own in zip(self._groups, blocks, strict=True):
            table = torch.from_numpy(own).to(runner.device, torch.int32)[None]
            slots = table[0][positions // size].long() * size + positions % size
            common = self._whole_prompt(num, table, slots, positions)
            for group in attn_groups:
                built = group.get_metadata_builder().build(0, common)
                metadata |= dict.fromkeys(group.layer_names, built)
                slots_of |= dict.fromkeys(group.layer_names, slots)
        with set_forward_context(
            metadata, runner.vllm_config, num_tokens=num, slot_mapping=slots_of
        ):
            runner.model(
                torch.from_numpy(text).to(runner.device, torch.int32), positions
            )

    def _whole_prompt(
        self,
        num: int,
        table: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> CommonAttentionMetadata:
        """A batch of one prefill, in vLLM's terms."""
        ends = torch.tensor([0, num], dtype=torch.int32)
        lengths = torch.tensor([num], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=ends.to(table.device),
            query_start_loc_cpu=ends,
            seq_lens=lengths.to(table.device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=1,
            num_actual_tokens=num,
            max_query_len=num,
            max_seq_len=num,
            block_table_tensor=table,
            slot_mapping=slots,
            positions=positions,
            is_prefilling=torch.ones(1, dtype=torch.bool),
        )

    @torch.inference_mode()
    def num_right(self, number: int, first: int, plan: DraftPlan) -> Ints:
        """How many draft tokens are right at each position.

        Args:
            number: Of the text, whose tokens from `first` on are the target's own.
            first: The first position to draft from.
            plan: How the draft differs from its target.

        Returns:
            For each newest token from `first` to the last but one, how many of the
            drafted tokens are the text's own next ones before the first that is not.
        """
        self._runner.drafter.use_plan(plan)
        text, _ = self._texts[number]
        positions = np.arange(first, len(text) - 1)
        found = [
            self._num_right(number, positions[start : start + MAX_ROWS])
            for start in range(0, len(positions), MAX_ROWS)
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _num_right(self, number: int, positions: Ints) -> Ints:
        text, _ = self._texts[number]
        steps = np.arange(1, self._num_drafts + 1)
        wanted = positions[:, None] + steps  # [num_rows, num_drafts]
        exists = wanted < len(text)
        drafts = self._draft(number, positions)
        is_right = exists & (drafts == text[np.minimum(wanted, len(text) - 1)])
        found: Ints = np.cumprod(is_right, axis=1).sum(axis=1)
        return found

    def _draft(self, number: int, positions: Ints) -> Ints:
        """Draft tokens `[num_rows, num_drafts]`."""
        text, blocks = self._texts[number]
        rows = np.arange(len(positions))
        groups = []
        for (gid, attn_groups, size), shared, own in zip(
            self._groups, blocks, self._own, strict=True
        ):
            table = self._tables(positions // size, shared, own)
            self._copy_blocks(gid, shared[positions // size], own[: len(rows), 0])
            view = self._runner.drafter._view
            kept = [g for g in attn_groups if view.attn_layer_names & {*g.layer_names}]
            if kept:
                groups.append(KVGroup(kept, table, size))
        batch = DraftBatch(
            rows=rows,
            token_ids=text[positions].astype(np.int32),
            first_positions=positions,
            num_drafts=np.full(len(rows), self._num_drafts),
            kv_groups=groups,
            device=self._runner.device,
        )
        token_ids, _ = self._runner.drafter._draft(
            batch, _greedy(), self._runner.sampler
        )
        found: Ints = token_ids.cpu().numpy().astype(np.int64)
        return found

    def _tables(self, at: Ints, shared: Ints, own: Ints) -> torch.Tensor:
        """Block tables: the text's up to block `at` of each row, then the row's own."""
        width = int(at.max()) + own.shape[1]
        table = np.zeros((len(at), width), np.int32)
        for row, count in enumerate(at):
            table[row, :count] = shared[:count]
            table[row, count : count + own.shape[1]] = own[row]
        return torch.from_numpy(table).to(self._runner.device)

    def _copy_blocks(self, gid: int, sources: Ints, targets: Ints) -> None:
        """K and V of whole blocks, in every layer of a group."""
        config = self._runner.kv_cache_config
        layers = self._runner.compilation_config.static_forward_context
        of, to = (
            torch.from_numpy(blocks).to(self._runner.device)
            for blocks in (sources, targets)
        )
        for name in config.kv_cache_groups[gid].layer_names:
            cache = layers[name].kv_cache
            cache = cache[0] if isinstance(cache, list) else cache
            dim = next(
                d for d, size in enumerate(cache.shape) if size == config.num_blocks
            )
            cache.index_copy_(dim, to, cache.index_select(dim, of))


def _greedy() -> SamplingMetadata:
    """As much of it as greedy drafting reads."""
    found: Any = SamplingMetadata.__new__(SamplingMetadata)
    found.all_greedy, found.temperature = True, None
    return found
