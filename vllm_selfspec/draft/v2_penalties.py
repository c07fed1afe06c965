"""`DraftPenalties`: the target's penalties on drafts of the V2 runner.

One rule: a draft is penalised as its verification will be, or what repeats itself is
drafted and rejected. What a request has said vLLM's kernel goes by. What was drafted
since it reads where a verification lays it, so of these tokens a kernel here tells.
"""

import numpy as np
import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState, apply_penalties


class DraftPenalties:
    """Those of the requests that are drafted for, where CUDA graphs read them.

    Attributes:
        are_asked_for: Whether a request of the last batch has some.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        """With nothing penalised. Not to be called while weights are loaded, whose
        memory sleeping gives back."""
        self._states: PenaltiesState | None = None
        self._repetition = torch.ones(num_slots, device=device)
        self._frequency = torch.zeros(num_slots, device=device)
        self._presence = torch.zeros(num_slots, device=device)
        self._no_drafts = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.are_asked_for = False

    def use(self, states: PenaltiesState) -> None:
        """The sampler's, which keeps count of prompts and outputs."""
        self._states = states

    def read(self, slots: np.ndarray) -> None:
        """Takes over those of the requests in `slots`, `[num_reqs]`. Others may have
        left theirs in their slots: without any, all are taken back."""
        states, were_asked_for = self._states, self.are_asked_for
        if states is None:
            return
        self.are_asked_for = bool(states.use_penalty[slots].any())
        if self.are_asked_for:
            self._repetition.copy_(states.repetition_penalty.gpu)
            self._frequency.copy_(states.frequency_penalty.gpu)
            self._presence.copy_(states.presence_penalty.gpu)
        elif were_asked_for:
            self._repetition.fill_(1.0)
            self._frequency.zero_()
            self._presence.zero_()

    def apply(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        draft_tokens: torch.Tensor,
        draft_step: torch.Tensor,
    ) -> None:
        """Writes to the logits of a draft step. Nothing here waits for the device.

        Args:
            logits: `[num_rows, vocab_size]`.
            slots: The request of each row, `[num_rows]`; -1 where there is none.
            draft_tokens: The i-th of a row in column i, from 1, `[max_num_reqs, 1 + k]`
                int64.
            draft_step: Which of them comes next, `[]`.
        """
        states = self._states
        assert states is not None
        counted = states.prompt_bin_mask, states.output_bin_counts
        penalties = self._repetition, self._frequency, self._presence
        # vLLM's kernel reads a slot for every row.
        rows = slots.clamp_min(0), draft_tokens, self._no_drafts[: len(slots)]
        apply_penalties(logits, *rows, *penalties, *counted)
        _penalise_drafted[(len(slots),)](
            logits,
            logits.stride(0),
            slots,
            draft_tokens,
            draft_tokens.stride(0),
            draft_step,
            *penalties,
            states.prompt_bin_mask,
            states.prompt_bin_mask.stride(0),
            states.output_bin_counts,
            states.output_bin_counts.stride(0),
        )


@triton.jit
def _penalise_drafted(  # type: ignore[no-untyped-def]  # as Triton's are
    logits_ptr,
    logits_stride,
    slots_ptr,
    draft_tokens_ptr,
    draft_tokens_stride,
    draft_step_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    prompt_mask_ptr,
    prompt_mask_stride,
    counts_ptr,
    counts_stride,
):
    """One row: what its drafts add to penalties of its prompt and output, at the place
    of each, once."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    is_penalised = repetition != 1.0 or frequency != 0.0 or presence != 0.0
    if not is_penalised:
        return
    drafted_ptr = draft_tokens_ptr + row * draft_tokens_stride + 1
    num_drafted = tl.load(draft_step_ptr) - 1
    for i in tl.range(num_drafted):
        token = tl.load(drafted_ptr + i)
        num_same = 0
        num_before = 0
        for j in tl.range(num_drafted):
            is_same = (tl.load(drafted_ptr + j) == token).to(tl.int32)
            num_same += is_same
            num_before += is_same * (j < i)
        is_new = tl.load(counts_ptr + slot * counts_stride + token) == 0
        mask = tl.load(prompt_mask_ptr + slot * prompt_mask_stride + token // 32)
        is_in_prompt = (mask >> (token % 32).to(tl.int32)) & 1
        logit_ptr = logits_ptr + row * logits_stride + token
        logit = tl.load(logit_ptr).to(tl.float32)
        scale = tl.where(is_new & (is_in_prompt == 0), repetition, 1.0)
        logit *= tl.where(logit > 0, 1.0 / scale, scale)
        logit -= frequency * num_same
        logit -= tl.where(is_new, presence, 0.0)
        tl.store(logit_ptr, logit, mask=num_before == 0)
