"""`SelfSpecSpeculator`: drafts for vLLM's V2 model runner, on the device throughout.

One rule: it adapts. It says where the first draft step starts, and hands the steps to
the loop that vLLM's own autoregressive speculators run, CUDA graphs included; which
sublayers run is the draft view's matter.

vLLM's loop takes draft 0 from a prefill of the draft model and steps from there. Here
the newest sampled token takes the place of draft 0: it is the input of the first step,
and column 0 of `draft_tokens` stays unused. Nothing is prefilled, because the target's
own KV cache is the draft's. Why what a draft writes needs no clean-up is told in
`v1_proposer`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import (
    TargetDependentARSpeculator,
    prepare_decode_inputs,
)
from vllm.v1.worker.utils import AttentionGroup

from vllm_selfspec import served_config
from vllm_selfspec.draft import kv_heads
from vllm_selfspec.draft.compile import compile_view
from vllm_selfspec.draft.dp_ranks import DPRanks
from vllm_selfspec.draft.row_planner import uniform_lengths
from vllm_selfspec.draft.v2_drawing import DrawingSpeculator
from vllm_selfspec.draft.v2_graphs import DraftGraphManager
from vllm_selfspec.draft.v2_step import dummy_forward
from vllm_selfspec.draft.v2_window import DeviceWindow
from vllm_selfspec.draft.view import DraftView, LoadedTarget
from vllm_selfspec.draft_length.goodput import WINDOW
from vllm_selfspec.served_config import plan_of

logger = init_logger("vllm.selfspec")  # below vLLM's logger, so it is shown


class SelfSpecSpeculator(DrawingSpeculator):
    """vLLM's autoregressive speculator, drafting with the target model itself.

    Attributes:
        draft_tokens: `[max_num_reqs, 1 + num_speculative_tokens]`, int64.
        hidden_states: `[max_num_reqs, 0]`: a draft step needs none of the one before.
    """

    draft_tokens: torch.Tensor
    hidden_states: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.draft_tokens = self.draft_tokens.new_zeros(
            self.max_num_reqs, 1 + self.num_speculative_steps
        )
        self.hidden_states = self.hidden_states.new_empty(self.max_num_reqs, 0)
        self._num_model_tokens = served_config.num_model_tokens(vllm_config)
        self._ranks = DPRanks(vllm_config.parallel_config)
        # A rank without requests needs no drafts; it makes those that others need.
        self._num_dummy_drafts = self._num_model_tokens if self._ranks.is_alone else 0
        self._view: DraftView | None = None  # where the model does not draft
        self._attn_layer_names: frozenset[str] = frozenset()
        self._window: DeviceWindow | None = None  # where all tokens are read
        self._reads = WINDOW

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        """The target minus the skip set. No weights and no KV cache are added."""
        if not self._num_model_tokens:
            return target_model
        kv_heads.raise_if_misread(target_model, self.vllm_config)
        plan = plan_of(self.vllm_config)
        loaded = LoadedTarget(target_model, plan, self.vllm_config)
        view = self._view = loaded.view(plan)
        self._attn_layer_names = view.attn_layer_names
        compile_view(view, self.vllm_config)
        return view.model

    def set_attn(
        self,
        model_state: ModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: InputBuffers,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        """Gives the target's layers that the draft runs metadata builders of its own.

        To the runner the draft has no attention layers: none is new, none needs a KV
        cache. So vLLM's own `set_attn`, which looks there, finds nothing to build.
        """
        super().set_attn(
            model_state,
            kv_cache_config,
            block_tables,
            target_input_buffers,
            target_attn_groups,
        )
        self.attn_groups, self.attn_cg_support, _ = init_attn_backend(
            kv_cache_config,
            self.attn_vllm_config,
            self.device,
            active_layer_names={*self._attn_layer_names},
        )
        self._configure_decode_metadata_update()
        if self._view is not None and self._view.window is not None:
            sizes = block_tables.block_sizes
            self._window = DeviceWindow.of(self._view.window, kv_cache_config, sizes)

    def _configure_decode_metadata_update(self) -> None:
        # vLLM's loop has no decode step for one draft token; ours has.
        super(TargetDependentARSpeculator, self)._configure_decode_metadata_update()

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepares graphs for the draft steps, as far as the target has full ones.

        With LoRA adapters there are none: the target has one for every number of
        adapters in a batch, and a manager of draft graphs knows no such number.
        """
        has_loras = self.vllm_config.lora_config is not None
        is_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL and not has_loras
        self.decode_cudagraph_manager = DraftGraphManager(
            self.vllm_config,
            self.device,
            CUDAGraphMode.FULL_DECODE_ONLY if is_full else CUDAGraphMode.NONE,
            decode_query_len=1,
        )
        how = "eagerly"
        if is_full:
            how = "with one CUDA graph for each step"
            if self.supports_decode_metadata_update:
                how = "with one CUDA graph for all steps"
        logger.info_once("selfspec drafts %s", how)

    def capture(self) -> None:
        """Captures the whole draft, or one step of it where metadata must be rebuilt
        between steps, for every batch size and every number of drafts."""
        if self._view is None:
            return
        assert self.decode_cudagraph_manager is not None
        self.idx_mapping.zero_()  # what dummy runs left may be out of bounds
        self.prepare_to_capture()
        self.decode_cudagraph_manager.capture(
            self._captured,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing draft CUDA graphs",
            specialize_spec_tokens=self.supports_decode_metadata_update
            and self.speculative_config.uses_dynamic_speculative_decoding(),
        )

    def _captured(self, *args: Any, num_speculative_steps: int) -> None:
        draft = (
            self._generate_fused_drafts
            if self.supports_decode_metadata_update
            else self._generate_draft
        )
        draft(*args, num_speculative_steps=1 + num_speculative_steps)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Drafts for every request of the batch: `[num_reqs, num_speculative_tokens]`.

        The signature is vLLM's; what belongs to a prefill of the draft is not used.
        Nothing here waits for the device. A request in partial prefill drafts too, and
        vLLM drops what it drafted, as with its own speculators.
        """
        num_reqs = input_batch.num_reqs
        num_drafts = num_speculative_tokens
        if num_drafts is None:  # a dummy run
            num_drafts = self._num_dummy_drafts
        else:
            num_drafts = self._begin(input_batch, num_sampled, num_drafts)
        num_drafts = self._ranks.agree(num_drafts, num_reqs)
        if num_drafts > 0:
            self._copy_request_inputs(
                num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run
            )
            self._copy_sampling_states(input_batch, dummy_run)
            if not dummy_run:
                self.set_loras(input_batch, np.ones(num_reqs, np.int32))
            self._prepare_first_step(
                input_batch,
                num_sampled,
                num_rejected,
                last_sampled,
                next_prefill_tokens,
            )
            self._draft(
                input_batch,
                num_drafts,
                dp_sync_state,
                dummy_run,
                skip_attn=dummy_run and skip_attn_for_dummy_run,
                is_profile=is_profile,
            )
        return self.draft_tokens[:num_reqs, 1:]

    def _begin(
        self, input_batch: InputBatch, num_sampled: torch.Tensor, num_drafts: int
    ) -> int:
        """Called before drafting; returns how many tokens at most."""
        return min(num_drafts, self._num_model_tokens)

    def use_request_states(self, states: Any) -> None:
        """The runner's; not needed where nothing looks at tokens."""

    def cut(self, drafts: Any) -> Any:
        """vLLM's `DraftTokenIds`, as long as each row drafted: all alike."""
        return drafts

    def dummy_step(
        self, runner: Any, num_rows: int, num_drafts: int, context: int = 0
    ) -> None:
        """What `num_rows` rows cost, to be timed: the target's forward and LM head, and
        so many draft steps.

        Args:
            runner: vLLM's V2 `GPUModelRunner`.
            num_rows: Of as many requests as there may be; with a context, of one.
            num_drafts: Draft steps.
            context: Tokens to attend to before them.
        """
        before, self._num_dummy_drafts = self._num_dummy_drafts, num_drafts
        try:
            dummy_forward(runner, num_rows, uniform_lengths(self.vllm_config), context)
        finally:
            self._num_dummy_drafts = before

    def _prepare_first_step(
        self,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
    ) -> None:
        """Fills the input buffers of the first step, a decode of one token a request.

        Its token is the newest sampled one, or the next of the prompt where a prefill
        goes on; its position is the one after the last token that was accepted. The
        target's sequence lengths still count rejected tokens, whose KV must not be
        read: `prepare_decode_inputs` takes them off.
        """
        num_reqs = input_batch.num_reqs
        query_end = input_batch.query_start_loc[1 : num_reqs + 1]
        positions = input_batch.positions[query_end - 1 - num_rejected]
        self.input_buffers.positions[:num_reqs] = positions
        self.sample_src_positions[:num_reqs] = positions
        idx_mapping = input_batch.idx_mapping
        newest = torch.where(
            num_sampled > 0,
            last_sampled.view(-1)[idx_mapping],
            next_prefill_tokens.view(-1)[idx_mapping],
        )
        prepare_decode_inputs(
            newest,
            input_batch.seq_lens,
            num_rejected,
            self.input_buffers,
            self.sample_src_positions,
            self.max_model_len,
            self.max_num_reqs,
        )

    def _draft(
        self,
        input_batch: InputBatch,
        num_drafts: int,
        dp_sync_state: DPSyncState | None,
        dummy_run: bool,
        skip_attn: bool,
        is_profile: bool,
    ) -> None:
        """Runs the draft steps, replaying CUDA graphs where there are some."""
        num_reqs = input_batch.num_reqs
        seq_lens = input_batch.seq_lens_cpu_upper_bound
        if self._window is not None and self._reads == WINDOW:
            seq_lens = self._within_window(self._window, num_reqs, seq_lens, num_drafts)
        longest = int(seq_lens[:num_reqs].max())
        self.draft_max_seq_len = min(longest + num_drafts, self.max_model_len)
        num_tokens, sync = num_reqs, None
        if dp_sync_state is not None:
            if dummy_run:
                num_reqs = min(num_reqs, dp_sync_state.num_reqs)
            sync, num_tokens = self._build_uniform_batch_dp_sync(
                dp_sync_state, num_reqs
            )
        batch_desc, sync = dispatch_cg_and_sync_dp(
            self.decode_cudagraph_manager,
            num_reqs,
            num_tokens,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=is_profile,
            dp_sync_state=sync,
        )
        if self.decode_cudagraph_manager is not None:  # None while profiling
            batch_desc = self.decode_cudagraph_manager.specialize_spec_tokens(
                batch_desc, num_drafts
            )
        self._run_steps(dummy_run)(
            num_reqs,
            skip_attn,
            batch_desc,
            None if sync is None else sync.num_tokens_across_dp,
            seq_lens,
            1 + num_drafts,
        )

    def _within_window(
        self,
        window: DeviceWindow,
        num_reqs: int,
        seq_lens: torch.Tensor,
        num_drafts: int,
    ) -> torch.Tensor:
        """Has the draft steps read a window alone; bounds of their first lengths."""
        window.apply(
            self.block_tables.input_block_tables,
            self.input_buffers.seq_lens[:num_reqs],
            min(int(seq_lens[:num_reqs].max()) + 1, self.max_model_len),
            num_drafts,
        )
        return window.most_read(seq_lens + 1)

    def _run_steps(self, dummy_run: bool) -> Callable[..., None]:
        """The loop over draft steps, of vLLM's two the one that suits the backend."""
        if self.supports_decode_metadata_update:
            return self._fused_multi_step_decode
        return self._multi_step_decode

    def _run_model(
        self,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward of the draft: the hidden states `[num_tokens, hidden_size]` to
        sample from, and those `[num_tokens, 0]` to hand to the next step."""
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=cudagraph_runtime_mode,
            num_tokens_across_dp=num_tokens_across_dp,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
            skip_compiled=self._view is None or not self._view.is_compiled,
        ):
            hidden_states = self.model(
                self.input_buffers.input_ids[:num_tokens],
                self.input_buffers.positions[:num_tokens],
            )
        return hidden_states, hidden_states[:, :0]
