"""`RowStoppingSpeculator`: drafts for the V2 model runner with rows that stop.

One rule: what a stop saves, draft steps and rows to verify, is decided on the host, so
the confidence of each step's tokens goes there, and a step is scheduled when all rows
of the one before have stopped (`vllm_args` switches asynchronous scheduling off). A row
that stopped keeps its place in the batch and runs along, for nothing, until the others
have.
"""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_selfspec import served_config
from vllm_selfspec.config import ConfigError
from vllm_selfspec.draft.row_planner import RowPlan
from vllm_selfspec.draft.row_stops import RowStops
from vllm_selfspec.draft.truncation import scaled
from vllm_selfspec.draft.v2_planned import PlannedSpeculator, num_drafted_in
from vllm_selfspec.draft.v2_speculator import SelfSpecSpeculator
from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.plan.source import NOTHING
from vllm_selfspec.plan.sources import SOURCES


def make_speculator(
    vllm_config: VllmConfig, device: torch.device
) -> SelfSpecSpeculator:
    """The speculator for the configured draft length.

    Raises:
        ConfigError: If what its CUDA graphs hold is to be exchanged while serving.
    """
    reason = served_config.needs_v1_runner(vllm_config)
    if reason is not None:
        raise ConfigError(
            f"{reason}, which the V2 runner's CUDA graphs of drafts hold, but "
            "VLLM_USE_V2_MODEL_RUNNER is not 0: set it to 0, or serve without that"
        )
    served_config.mark_in_use()
    on_device = served_config.source_on_device(vllm_config)
    if on_device is not None:
        found = resolve_name(str(SOURCES.named(on_device).speculator))
        speculator: SelfSpecSpeculator = found(vllm_config, device)
        return speculator
    if served_config.stops_rows(vllm_config):
        return RowStoppingSpeculator(vllm_config, device)
    if served_config.plans_rows(vllm_config):
        return PlannedSpeculator(vllm_config, device)
    return SelfSpecSpeculator(vllm_config, device)


class RowStoppingSpeculator(PlannedSpeculator):
    """`PlannedSpeculator` with one CUDA graph for each draft step, and a stop rule
    between them."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        stops = RowStops.of(vllm_config)
        assert stops is not None
        self._stops = stops
        self._drafting: Ints = np.zeros(0, np.int64)  # rows that the model drafts for
        # The draft's probability of the tokens that it has just drawn.
        self._confidence = self.temperature.new_zeros(self.max_num_reqs)

    def _configure_decode_metadata_update(self) -> None:
        super()._configure_decode_metadata_update()
        # One graph of all steps could not be left half way.
        self.supports_decode_metadata_update = False

    def _planned(
        self, input_batch: InputBatch, sampled: Ints, num_drafts: int
    ) -> RowPlan:
        """Tells the stop rule what was verified; rows without a sampled token draft
        nothing."""
        req_ids = input_batch.req_ids
        is_model = np.ones(len(req_ids), bool)
        if self.planner is not None:
            is_model = ~self.planner.took_free_tokens(req_ids)
        self._stops.observe(req_ids, num_drafted_in(input_batch), sampled, is_model)
        if self.planner is not None:
            plan = super()._planned(input_batch, sampled, num_drafts)
        else:
            most = min(num_drafts, self._num_model_tokens)
            plan = RowPlan(np.where(sampled > 0, most, 0), [NOTHING] * len(req_ids))
        self._drafting = np.flatnonzero(plan.model)
        drafting = [req_ids[row] for row in self._drafting]
        self._stops.begin(drafting, plan.model[self._drafting])
        return plan

    def _run_steps(self, dummy_run: bool) -> Callable[..., None]:
        return super()._run_steps(dummy_run) if dummy_run else self._until_stopped

    def _until_stopped(
        self,
        num_reqs: int,
        skip_attn: bool,
        batch_desc: BatchExecutionDescriptor,
        num_tokens_across_dp: torch.Tensor | None,
        seq_lens_cpu_upper_bound: torch.Tensor,
        num_speculative_steps: int,
    ) -> None:
        """vLLM's `_multi_step_decode`, left as soon as no row draws another token,
        unless other data-parallel ranks wait for all steps."""
        for step in range(1, num_speculative_steps):
            slot_mappings = self.block_tables.compute_slot_mappings(
                self.idx_mapping[:num_reqs],
                self.input_buffers.query_start_loc[: num_reqs + 1],
                self.input_buffers.positions[:num_reqs],
                batch_desc.num_tokens,
            )
            attn_metadata = self._build_uniform_attn_metadata(
                num_reqs=num_reqs,
                batch_desc=batch_desc,
                num_query_per_req=1,
                seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
                step=step,
            )
            self.current_draft_step.fill_(step)
            if batch_desc.cg_mode == CUDAGraphMode.FULL:
                assert self.decode_cudagraph_manager is not None
                self.decode_cudagraph_manager.run_fullgraph(batch_desc)
            else:
                self._generate_draft(
                    num_reqs,
                    batch_desc.num_tokens,
                    attn_metadata,
                    build_slot_mappings_by_layer(slot_mappings, self.kv_cache_config),
                    num_tokens_across_dp,
                    batch_desc.cg_mode,
                    num_speculative_steps,
                )
            confidence = self._confidence[:num_reqs].double().cpu().numpy()
            goes_on = self._stops.after(step - 1, confidence[self._drafting])
            if not goes_on and self._ranks.is_alone:
                break
        self._row_lengths[self._drafting] = self._stops.lengths

    def sample_draft(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `SelfSpecSpeculator`; notes the confidence, in a CUDA graph, too."""
        sampled = super().sample_draft(*args, **kwargs)
        num_reqs = len(sampled)
        logits = self._logits.float()
        if self.draft_logits is not None:
            logits = scaled(logits, self.temperature[self.idx_mapping[:num_reqs]])
        chosen = logits.gather(1, sampled.long()[:, None])[:, 0]
        self._confidence[:num_reqs] = (chosen - logits.logsumexp(dim=-1)).exp()
        return sampled
