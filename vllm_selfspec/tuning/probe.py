"""`Probe`: drafts from every position of a text at once, in the worker.

One rule: it drafts as the engine does. Rows are requests of their own to the V1
proposer's draft loop: row t has a text up to its token t behind it, in the target's own
KV cache. What lies before the block of token t all rows of a text share; that block,
which the row will write to, it has a copy of. With nothing skipped every draft is
therefore what the target says, which is how a probe checks itself.

It takes KV blocks as it likes: the engine must be idle, and must not keep prefixes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_selfspec.draft.batch import DraftBatch, KVGroup
from vllm_selfspec.draft.v1_step import window_of
from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.plan.draft_plan import DraftPlan

MAX_ROWS = 64
# Of the KV cache, what rows' own blocks may take; the rest is for the texts.
MOST_OWN = 0.5


class ProbeError(RuntimeError):
    """A text that does not fit into the KV cache."""


class Probe:
    """Texts in the target's KV cache, and rows that draft from within them."""

    def __init__(self, worker: Any, num_drafts: int) -> None:
        """For drafts of at most `num_drafts` tokens, in vLLM's V1 worker."""
        self._runner = worker.model_runner
        self._num_drafts = num_drafts
        tables = self._runner.input_batch.block_table
        self._groups = [
            (gid, attn_groups, tables[gid].block_size)
            for gid, attn_groups in enumerate(self._runner.attn_groups)
        ]
        # Block 0 is vLLM's null block. KV cache groups share the blocks of one pool.
        self._next_block = 1
        self._max_rows = self._fitting_rows()
        # By group: blocks of a row's own, from the newest token's on.
        self._own = [
            self._take(self._max_rows * self._num_own(size)).reshape(self._max_rows, -1)
            for _, _, size in self._groups
        ]
        self._first_block = self._next_block
        self._texts: list[tuple[Ints, list[Ints]]] = []

    def _fitting_rows(self) -> int:
        """Rows at once: what the engine has buffers for, and the KV cache room."""
        most = min(MAX_ROWS, self._runner.scheduler_config.max_num_seqs)
        blocks = sum(self._num_own(size) for _, _, size in self._groups)
        room = int(MOST_OWN * self._runner.kv_cache_config.num_blocks) // blocks
        return int(max(1, min(most, room)))

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
    def read(self, token_ids: Sequence[int] | Ints) -> int:
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

    def continued(self, texts: Sequence[Sequence[int]], num_tokens: int) -> list[Ints]:
        """Texts with as many tokens more as the target says come next, greedily: drafts
        of which nothing is left out.

        Args:
            texts: Token ids.
            num_tokens: At most the drafts that the probe is for.
        """
        numbers = np.array([self.read(text) for text in texts])
        last = np.array([len(text) - 1 for text in texts])
        config = self._runner.model_config
        self._runner.drafter.use_plan(DraftPlan(config.get_total_num_hidden_layers()))
        found = self._in_parts(self._draft, numbers, last, num_tokens)
        self._texts, self._next_block = [], self._first_block  # they are read no more
        return [np.concatenate(pair) for pair in zip(texts, found, strict=True)]

    def num_right(
        self, numbers: Ints, positions: Ints, plan: DraftPlan, num_drafts: int
    ) -> Ints:
        """How many draft tokens are right at some positions.

        Args:
            numbers: Of the texts, which are the target's own from there on, `[n]`.
            positions: Of the newest token, before the last of the text, `[n]`.
            plan: How the draft differs from its target.
            num_drafts: Tokens to draft, at most those that the probe is for.

        Returns:
            For each position how many of the drafted tokens are the text's own next
            ones before the first that is not, `[n]`.
        """
        self._runner.drafter.use_plan(plan)
        return self._in_parts(self._num_right, numbers, positions, num_drafts)

    def _in_parts(
        self,
        ask: Callable[[Ints, Ints, int], Ints],
        numbers: Ints,
        positions: Ints,
        num_drafts: int,
    ) -> Ints:
        """Of as many rows at once as there may be."""
        starts = range(0, len(positions), self._max_rows)
        parts = [slice(start, start + self._max_rows) for start in starts]
        return np.concatenate(
            [ask(numbers[rows], positions[rows], num_drafts) for rows in parts]
        )

    def _num_right(self, numbers: Ints, positions: Ints, num_drafts: int) -> Ints:
        drafts = self._draft(numbers, positions, num_drafts)
        is_right = np.zeros(drafts.shape, bool)
        for row, (number, position) in enumerate(zip(numbers, positions, strict=True)):
            wanted = self._texts[number][0][position + 1 :][:num_drafts]
            is_right[row, : len(wanted)] = drafts[row, : len(wanted)] == wanted
        found: Ints = np.cumprod(is_right, axis=1).sum(axis=1)
        return found

    @torch.inference_mode()
    def _draft(self, numbers: Ints, positions: Ints, num_drafts: int) -> Ints:
        """Draft tokens `[num_rows, num_drafts]`."""
        rows = np.arange(len(positions))
        texts = [self._texts[number] for number in numbers]
        groups = []
        for which, (gid, attn_groups, size) in enumerate(self._groups):
            own, shared = self._own[which], [blocks[which] for _, blocks in texts]
            at = positions // size
            table = self._tables(at, shared, own)
            newest = np.array([blocks[i] for blocks, i in zip(shared, at, strict=True)])
            self._copy_blocks(gid, newest, own[: len(rows), 0])
            view = self._runner.drafter._view
            kept = [g for g in attn_groups if view.attn_layer_names & {*g.layer_names}]
            if kept:
                window = window_of(self._runner, gid, view)
                groups.append(KVGroup(kept, table, size, window))
        tokens = [text[i] for (text, _), i in zip(texts, positions, strict=True)]
        batch = DraftBatch(
            rows=rows,
            token_ids=np.array(tokens, np.int32),
            first_positions=positions,
            num_drafts=np.full(len(rows), num_drafts),
            kv_groups=groups,
            device=self._runner.device,
        )
        token_ids, _ = self._runner.drafter._draft(
            batch, _greedy(), self._runner.sampler
        )
        found: Ints = token_ids.cpu().numpy().astype(np.int64)
        return found

    def _tables(self, at: Ints, shared: Sequence[Ints], own: Ints) -> torch.Tensor:
        """Block tables: a text's up to block `at` of each row, then the row's own."""
        width = int(at.max()) + own.shape[1]
        table = np.zeros((len(at), width), np.int32)
        for row, count in enumerate(at):
            table[row, :count] = shared[row][:count]
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
    found.all_greedy, found.temperature, found.no_penalties = True, None, True
    return found
