"""`DrawingSpeculator`: what vLLM's V2 runner does not tell a speculator of requests.

One rule: drafts are drawn as the target draws: after its penalties, within its top-k
and top-p, for a request with a seed with the very noise that verification will have,
and with the request's own adapter. What CUDA graphs of the draft read of that lies in
buffers.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.platform_utils import num_compute_units
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import (
    TargetDependentARSpeculator,
)

from vllm_selfspec.draft.truncation import truncated
from vllm_selfspec.draft.v2_penalties import DraftPenalties


class DrawingSpeculator(TargetDependentARSpeculator):
    """vLLM's autoregressive speculator, drawing as the target does."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self._sampling_states: SamplingStates | None = None
        self._penalties = DraftPenalties(self.max_num_reqs, device)
        self._lora_runner: Any = None
        self._penalises = self._truncates = self._has_seeds = False
        self._is_seeded = self.seeds.new_zeros(self.max_num_reqs, dtype=torch.bool)
        self._top_k = self.seeds.new_zeros(self.max_num_reqs, dtype=torch.int32)
        self._top_p = self.temperature.new_ones(self.max_num_reqs)
        self._logits: torch.Tensor  # of the step that is drawn from

    def prepare_to_capture(self) -> None:
        """A graph penalises and truncates, whether or not a request of its batch asks
        for that, and draws with the target's noise, whether or not one has a seed."""
        self._penalises = True
        self._truncates = self._has_seeds = self.draft_logits is not None
        if self._truncates and self.device.type == "cuda":
            self._make_scratch()

    def _make_scratch(self) -> None:
        """vLLM's top-k has a scratch row for each row of the widest batch so far, up to
        one for each multiprocessor, and graphs hold their address: were the first wide
        batch a verification, they would write where something else lies by then."""
        num_rows = num_compute_units()
        logits = self.temperature.new_zeros(num_rows, self.vocab_size)
        ones = self.temperature.new_ones(num_rows)
        truncated(logits, ones, ones.int(), ones)

    def use_states_of(self, sampler: Sampler) -> None:
        """The target's: penalties, top-k, top-p, and which requests have a seed. vLLM
        hands over temperatures and seeds alone."""
        self._sampling_states = sampler.sampling_states
        self._penalties.use(sampler.penalties_state)

    def use_loras_of(self, runner: Any) -> None:
        """The runner's adapters, if it serves any; vLLM tells speculators nothing."""
        self._lora_runner = runner if runner.lora_config is not None else None

    def set_loras(self, input_batch: InputBatch, num_rows: np.ndarray) -> None:
        """Tells vLLM's LoRA layers whose the rows are that come next. Before its own
        next forward the target tells them again.

        Args:
            input_batch: Of this step.
            num_rows: Of each of its requests.
        """
        if self._lora_runner is None:
            return
        state = self._lora_runner.lora_state
        of_rows = tuple(state.lora_ids[input_batch.idx_mapping_np].repeat(num_rows))
        active = state.get_activate_loras(input_batch.req_ids)
        self._lora_runner._set_active_loras(of_rows, of_rows, active)

    def _copy_sampling_states(self, input_batch: InputBatch, dummy_run: bool) -> None:
        """Penalties, limits and who has a seed, to where CUDA graphs read them."""
        if not dummy_run:
            self._penalties.read(input_batch.idx_mapping_np)
            self._penalises = self._penalties.are_asked_for
        states = self._sampling_states
        if states is None or self.draft_logits is None:
            return  # nothing is drawn, neither truncated nor with noise
        slots = input_batch.idx_mapping_np
        self._has_seeds = dummy_run or states.any_explicit_seed(slots)
        self._truncates = dummy_run or bool(
            (states.top_k.np[slots] != states.vocab_size).any()
            or (states.top_p.np[slots] != 1.0).any()
        )
        self._top_k.copy_(states.top_k.gpu)
        self._top_p.copy_(states.top_p.gpu)
        if self._has_seeds:
            seeded = torch.from_numpy(states.seeds_set)
            self._is_seeded.copy_(seeded, non_blocking=True)

    def sample_draft(
        self,
        hidden_states: torch.Tensor,
        sample_src_positions: torch.Tensor,
        idx_mapping: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        draft_step: torch.Tensor,
        draft_logits: torch.Tensor | None,
        spec_step_idx: int = 0,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Samples as vLLM does; `draft_logits` has no column for the newest token. For
        a request with a seed it draws with the noise that verification will."""
        sampled = super().sample_draft(
            hidden_states,
            sample_src_positions,
            idx_mapping,
            temperature,
            seeds,
            draft_step - 1,
            draft_logits,
            spec_step_idx,
            **kwargs,
        )
        if draft_logits is None or not self._has_seeds:
            return sampled
        drawn = gumbel_sample(
            self._logits,
            idx_mapping,
            temperature,
            seeds,
            sample_src_positions,
            apply_temperature=True,
            is_drafting=False,
            use_fp64=self.use_fp64_gumbel,
        )
        return torch.where(self._is_seeded[idx_mapping], drawn, sampled)

    def compute_draft_logits(
        self, hidden_states: torch.Tensor, spec_step_idx: int
    ) -> torch.Tensor:
        """Logits `[num_reqs, vocab_size]` before the temperature, after penalties, and
        truncated where they are drawn from; verification reads them, so they are what
        is drawn from."""
        logits = super().compute_draft_logits(hidden_states, spec_step_idx)
        rows = self.idx_mapping[: len(logits)]
        if self._penalises:
            drafted = self.draft_tokens, self.current_draft_step
            self._penalties.apply(logits, rows, *drafted)
        if self._truncates:
            logits = truncated(
                logits, self.temperature[rows], self._top_k[rows], self._top_p[rows]
            )
        self._logits = logits
        return logits
