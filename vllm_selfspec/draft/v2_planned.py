"""`PlannedSpeculator`: drafts for the V2 model runner, planned when tokens are known.

One rule: what a row drafts is decided on the host, between a verification and the
drafts that follow it, so a step is scheduled when that is done (`vllm_args` switches
asynchronous scheduling off). Rows that take free tokens, and those that draft fewer
than others, keep their places in the batch and run along, for nothing.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_selfspec.draft.row_planner import RowPlan, RowPlanner, SampledStep
from vllm_selfspec.draft.v2_speculator import SelfSpecSpeculator
from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.plan.source import NOTHING


class PlannedSpeculator(SelfSpecSpeculator):
    """`SelfSpecSpeculator` with a plan for each row.

    Attributes:
        planner: What decides; None where every row drafts all it may.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.planner = RowPlanner.of(vllm_config)
        self._row_lengths: Ints = np.zeros(0, np.int64)
        self._row_plan = RowPlan(self._row_lengths)
        self._req_states: Any = None

    def use_request_states(self, states: Any) -> None:
        """The runner's, for the tokens of each request."""
        self._req_states = states

    def cut(self, drafts: DraftTokenIds) -> DraftTokenIds:
        """`drafts` of the last propose, each no longer than its row drafted."""
        rows = zip(drafts.draft_token_ids, self._row_lengths, strict=True)
        return DraftTokenIds(drafts.req_ids, [row[:length] for row, length in rows])

    def _begin(
        self, input_batch: InputBatch, num_sampled: torch.Tensor, num_drafts: int
    ) -> int:
        """Decides for each row; returns the draft steps of the longest."""
        sampled = num_sampled.cpu().numpy().astype(np.int64)  # waits for the device
        self._row_plan = self._planned(input_batch, sampled, num_drafts)
        free = [len(one.token_ids) for one in self._row_plan.proposals]
        self._row_lengths = np.maximum(self._row_plan.model, free)
        self._reads = self._row_plan.reads
        return int(self._row_plan.model.max(initial=0))

    def _planned(
        self, input_batch: InputBatch, sampled: Ints, num_drafts: int
    ) -> RowPlan:
        assert self.planner is not None
        if self.planner.rests(
            input_batch.req_ids,
            input_batch.num_tokens,
            input_batch.num_draft_tokens_per_req is not None,
        ):
            return RowPlan(np.zeros_like(sampled), [NOTHING] * len(sampled))
        return self.planner.plan(self._step(input_batch, sampled, num_drafts))

    def _step(
        self, input_batch: InputBatch, sampled: Ints, num_drafts: int
    ) -> SampledStep:
        """What the V2 runner knows of a step that has sampled."""
        states, slots = self._req_states, input_batch.idx_mapping_np
        num_tokens = states.total_len.gpu.cpu().numpy()[slots].astype(np.int64)
        num_read = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        room = np.clip(self.max_model_len - num_tokens, 0, num_drafts)
        assert self.planner is not None
        if not self.planner.is_uniform:
            # A verification brings one token more than it accepts.
            room = np.clip(states.max_seq_len[slots] - num_tokens - 1, 0, room)
        token_ids = states.all_token_ids.gpu
        return SampledStep(
            req_ids=input_batch.req_ids,
            running=states.req_id_to_index,
            num_sampled=sampled,
            num_drafted=num_drafted_in(input_batch),
            room=room,
            num_scheduled=input_batch.num_scheduled_tokens.astype(np.int64),
            num_left=np.maximum(input_batch.prefill_len_np - num_read, 0),
            num_tokens=num_tokens,
            token_ids_of=lambda row: (
                token_ids[slots[row], : num_tokens[row]].cpu().numpy()
            ),
        )

    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
        """As in `SelfSpecSpeculator`; free tokens take the place of the model's."""
        drafts = super().propose(input_batch, *args, **kwargs)
        if kwargs.get("num_speculative_tokens") is None:  # a dummy run
            return drafts
        for row, proposal in enumerate(self._row_plan.proposals):
            if len(proposal.token_ids):
                token_ids = torch.from_numpy(proposal.token_ids.astype(np.int64))
                self._take(row, token_ids.to(drafts.device), drafts, input_batch)
        return drafts

    def _take(
        self,
        row: int,
        token_ids: torch.Tensor,
        drafts: torch.Tensor,
        input_batch: InputBatch,
    ) -> None:
        """A row's free tokens; what they are drawn from is one-hot."""
        num = len(token_ids)
        drafts[row, :num] = token_ids
        if self.draft_logits is not None:
            logits = self.draft_logits[input_batch.idx_mapping_np[row], :num]
            logits.fill_(-torch.inf).scatter_(1, token_ids[:, None], 0.0)


def num_drafted_in(input_batch: InputBatch) -> Ints:
    """Draft tokens that a step verified, `[num_reqs]`."""
    verified = input_batch.num_draft_tokens_per_req
    if verified is None:
        return np.zeros(input_batch.num_reqs, np.int64)
    found: Ints = verified.astype(np.int64)
    return found
