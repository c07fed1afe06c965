"""`SelfSpecProposer`: drafts for vLLM's V1 model runner.

One rule: it adapts. It turns the runner's batch into rows, runs the draft steps, and
hands tokens and probabilities back; which sublayers run is the draft view's matter.

What a draft step writes needs no clean-up: it goes to slots at or after the newest
sampled token, where the target has no KV yet, and the next verification starts at that
very token and writes the K and V of all layers there before any attention reads them.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_selfspec import served_config
from vllm_selfspec.draft import kv_heads
from vllm_selfspec.draft.batch import DraftBatch, KVGroup
from vllm_selfspec.draft.compile import compile_view
from vllm_selfspec.draft.dp_ranks import DPRanks
from vllm_selfspec.draft.drawing import confidence_of, largest
from vllm_selfspec.draft.row_planner import RowPlanner
from vllm_selfspec.draft.row_stops import RowStops
from vllm_selfspec.draft.sampler import DraftSampler, Drawn
from vllm_selfspec.draft.seeded import for_rows, rewound
from vllm_selfspec.draft.v1_drafts import Drafts, spread
from vllm_selfspec.draft.v1_step import (
    dummy_context,
    num_drafted_in,
    num_tokens_left,
    sampled_step,
    window_of,
)
from vllm_selfspec.draft.view import DraftView, LoadedTarget
from vllm_selfspec.draft_length.goodput import WINDOW
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.served_config import calibration_of, plan_of

if TYPE_CHECKING:
    from vllm_selfspec.tuning.online.tuner import OnlineTuner


class SelfSpecProposer:
    """vLLM's `custom_class` proposer that drafts with the target model itself."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        assert vllm_config.speculative_config is not None
        served_config.mark_in_use()
        self._vllm_config = vllm_config
        self._max_model_len = vllm_config.model_config.max_model_len
        self.sampler = DraftSampler(vllm_config)
        self._ranks = DPRanks(vllm_config.parallel_config)
        self._num_model_tokens = served_config.num_model_tokens(vllm_config)
        self.planner = RowPlanner.of(vllm_config)
        self._stops = RowStops.of(vllm_config)
        self.tuner = _tuner_of(vllm_config)
        self._num_steps = 0  # draft steps of the last propose
        self._target: LoadedTarget
        self._view: DraftView

    def load_model(self, target: nn.Module) -> None:
        """Builds the draft view. vLLM calls it once the target is loaded."""
        if not self._num_model_tokens:
            return
        kv_heads.raise_if_misread(target, self._vllm_config)
        plan = plan_of(self._vllm_config)
        self._target = LoadedTarget(target, plan, self._vllm_config)
        self.use_plan(plan)
        # Otherwise it is exchanged, too often or once more.
        if self.tuner is None and calibration_of(self._vllm_config) is None:
            compile_view(self._view, self._vllm_config)

    def use_plan(self, plan: DraftPlan) -> None:
        """Drafts by another plan from the next propose on.

        Cheap, because it is not compiled; and safe between two steps: whatever drafts
        left in the KV cache is overwritten before it is read.
        """
        self.plan, self._view = plan, self._target.view(plan)

    def adopt(self, plan: DraftPlan | None) -> None:
        """Drafts by a plan to the end, compiled; or, for None, leaves drafting to free
        sources, and gives back what the model's drafts have taken."""
        if plan is not None:
            self.use_plan(plan)
            compile_view(self._view, self._vllm_config)
            return
        assert self.planner is not None
        self.planner.leave_to_free_sources()
        self.use_plan(DraftPlan(self.plan.num_layers))
        self._target.release()

    @torch.inference_mode()
    def dummy_step(
        self, runner: Any, num_rows: int, num_drafts: int, context: int = 0
    ) -> None:
        """What `num_rows` rows cost, to be timed: the target's forward and LM head, and
        so many draft steps.

        Args:
            runner: vLLM's V1 `GPUModelRunner`.
            num_rows: Of as many requests as there may be; with a context, of one.
            num_drafts: Draft steps.
            context: Tokens to attend to before them; 0 for no attention at all, as in
                vLLM's dummy runs.
        """
        token_ids = torch.zeros(num_rows, dtype=torch.int32, device=runner.device)
        with dummy_context(runner, num_rows, context) as keys:
            hidden_states, _ = runner._dummy_run(num_rows, **keys)
            largest(runner.model.compute_logits(hidden_states[:num_rows]))
            attends = context and num_drafts
            batch = self._dummy_batch(runner, context) if attends else None
            for _ in range(num_drafts):
                if batch is None:
                    hidden_states = self._dummy_forward(token_ids)
                else:
                    hidden_states = self._forward(self._view, batch, 0, token_ids)
                logits = self._view.compute_logits(hidden_states)
                token_ids = largest(logits).int()

    def _dummy_batch(self, runner: Any, context: int) -> DraftBatch:
        """A row of one request that attends to a context, and writes nowhere."""
        return DraftBatch(
            rows=np.zeros(1, np.int64),
            token_ids=np.zeros(1, np.int32),
            first_positions=np.array([context], np.int64),
            num_drafts=np.ones(1, np.int64),
            kv_groups=self._kv_groups(runner, self._view),
            device=runner.device,
            writes=False,
        )

    def _dummy_forward(
        self, token_ids: torch.Tensor, num_rows_across_dp: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states of a draft step that attends to nothing and writes nowhere."""
        with set_forward_context(
            None,
            self._vllm_config,
            num_tokens=len(token_ids),
            num_tokens_across_dp=num_rows_across_dp,
            skip_compiled=not self._view.is_compiled,
        ):
            # What is drafted of nothing may be any token, also one past all positions.
            return self._view(token_ids, torch.zeros_like(token_ids, dtype=torch.long))

    @torch.inference_mode()
    def run_along(self, runner: Any) -> None:
        """What other data-parallel ranks need of one that has no requests."""
        self._ranks.agree(0, 0)
        self._run_along(runner, 0)

    def _run_along(self, runner: Any, num_done: int) -> None:
        """The draft steps that other data-parallel ranks have beyond `num_done`."""
        if num_done >= self._ranks.num_steps:
            return
        num_rows = self._ranks.num_rows
        token_ids = torch.zeros(num_rows, dtype=torch.int32, device=runner.device)
        for _ in range(num_done, self._ranks.num_steps):
            self._dummy_forward(token_ids, self._ranks.num_rows_across_dp)

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: `seams` calls `propose_for_runner`, which sees the runner."""
        raise RuntimeError("selfspec's seams are not installed in this process")

    @torch.inference_mode()
    def propose_for_runner(
        self,
        runner: Any,
        scheduler_output: Any,
        sampled_token_ids: Sequence[Sequence[int]],
        sampling_metadata: SamplingMetadata,
    ) -> Drafts:
        """Drafts for every request that can use it.

        A request in partial prefill, at `max_model_len` or without a sampled token
        drafts nothing.

        Args:
            runner: vLLM's V1 `GPUModelRunner`, after bookkeeping.
            scheduler_output: Of this step; it says how far to draft.
            sampled_token_ids: The tokens this step emitted, by request.
            sampling_metadata: Of the running batch.
        """
        req_ids = runner.input_batch.req_ids
        num_sampled = np.array([*map(len, sampled_token_ids)], np.int64)
        if self._stops is not None or self.tuner is not None:
            self._learn(runner, scheduler_output, num_sampled)
        if self.planner is not None and self.planner.rests(
            req_ids,
            scheduler_output.total_num_scheduled_tokens,
            bool(scheduler_output.scheduled_spec_decode_tokens),
        ):
            return self._nothing(runner, [[] for _ in req_ids])
        room = self._room(
            runner, num_sampled, scheduler_output.num_spec_tokens_to_schedule
        )
        free: list[list[int]] = [[] for _ in req_ids]
        reads = WINDOW
        if self.planner is None:
            num_drafts = np.minimum(room, self._num_model_tokens)
        else:
            if not self.planner.is_uniform:
                room = np.minimum(room, num_tokens_left(runner))
            step = sampled_step(runner, scheduler_output, num_sampled, room)
            plan = self.planner.plan(step)
            num_drafts, reads = plan.model, plan.reads
            free = [one.token_ids.tolist() for one in plan.proposals]
        rows = np.flatnonzero(num_drafts)
        if not len(rows):
            return self._nothing(runner, free)
        self._num_steps = int(num_drafts.max())
        self._ranks.agree(self._num_steps, len(rows))
        _set_loras(runner, rows)
        batch = self._draft_batch(runner, rows, num_drafts[rows], reads)
        sampling = for_rows(sampling_metadata, rows)
        if self._stops is not None:
            self._stops.begin([req_ids[row] for row in rows], num_drafts[rows])
        with rewound(sampling.generators.values()):
            token_ids, probs = self._draft(batch, sampling, runner.sampler)
        self._run_along(runner, token_ids.shape[1])
        if self._stops is not None:
            num_drafts[rows] = self._stops.lengths
        return spread(token_ids, probs, rows, num_drafts, req_ids, free)

    def _nothing(self, runner: Any, free: list[list[int]]) -> Drafts:
        """Where the model drafts nothing: the free tokens of each request alone."""
        self._num_steps = 0
        self.run_along(runner)
        return Drafts(free)

    def _learn(
        self, runner: Any, scheduler_output: Any, num_sampled: np.ndarray
    ) -> None:
        """Tells those who go by it what became of the model's last drafts."""
        req_ids = runner.input_batch.req_ids
        num_drafted = num_drafted_in(scheduler_output, req_ids)
        is_model = np.ones(len(req_ids), bool)
        if self.planner is not None:
            is_model = ~self.planner.took_free_tokens(req_ids)
        if self._stops is not None:
            self._stops.observe(req_ids, num_drafted, num_sampled, is_model)
        if self.tuner is not None:
            # Without a token emitted it is a prompt that is still read.
            verified = is_model & (num_drafted > 0) & (num_sampled > 0)
            is_first_accepted = num_sampled[verified] > 1
            self._tune(self.tuner, runner, scheduler_output, is_first_accepted.tolist())

    def _room(self, runner: Any, num_sampled: np.ndarray, most: int) -> np.ndarray:
        """How many tokens may be drafted for each running request, `[num_reqs]`."""
        num_reqs = len(num_sampled)
        # A drafted token must itself still fit into the context.
        num_tokens = runner.input_batch.num_tokens_no_spec[:num_reqs]
        room = np.clip(self._max_model_len - num_tokens, 0, most)
        return np.where(num_sampled > 0, room, 0).astype(np.int64)

    def _draft_batch(
        self, runner: Any, rows: np.ndarray, num_drafts: np.ndarray, reads: int
    ) -> DraftBatch:
        input_batch = runner.input_batch
        newest = input_batch.num_tokens_no_spec[rows].astype(np.int64) - 1
        return DraftBatch(
            rows=rows,
            token_ids=input_batch.token_ids_cpu[rows, newest],
            first_positions=newest,
            num_drafts=num_drafts,
            kv_groups=self._kv_groups(runner, self._view, reads),
            device=runner.device,
        )

    def _tune(
        self,
        tuner: "OnlineTuner",
        runner: Any,
        scheduler_output: Any,
        is_first_accepted: Sequence[bool],
    ) -> None:
        """Tries another skip set, if it is time, and drafts with it if it is better."""
        found = tuner.after_step(
            runner.input_batch,
            scheduler_output.total_num_scheduled_tokens,
            self._num_steps,
            is_first_accepted,
            partial(self._next_tokens, runner),
        )
        if found is not None:
            self.use_plan(found)

    def _next_tokens(
        self, runner: Any, plan: DraftPlan, rows: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """What a draft would say after tokens of verified contexts; writes nowhere."""
        view = self._view if plan == self.plan else self._target.view(plan)
        _set_loras(runner, rows)
        batch = DraftBatch(
            rows=rows,
            token_ids=runner.input_batch.token_ids_cpu[rows, positions],
            first_positions=positions,
            num_drafts=np.ones_like(rows),
            kv_groups=self._kv_groups(runner, view),
            device=runner.device,
            writes=False,
        )
        hidden_states = self._forward(view, batch, 0, batch.token_ids)
        found: np.ndarray = largest(view.compute_logits(hidden_states)).cpu().numpy()
        return found

    def _kv_groups(
        self, runner: Any, view: DraftView, reads: int = WINDOW
    ) -> list[KVGroup]:
        """The target's KV cache groups that hold a layer the view runs."""
        groups = []
        for gid, attn_groups in enumerate(runner.attn_groups):
            kept = [
                group
                for group in attn_groups
                if view.attn_layer_names.intersection(group.layer_names)
            ]
            if kept:
                table = runner.input_batch.block_table[gid]
                groups.append(
                    KVGroup(
                        kept,
                        table.get_device_tensor(table.max_num_reqs),
                        table.block_size,
                        window_of(runner, gid, view) if reads == WINDOW else None,
                    )
                )
        return groups

    def _draft(
        self, batch: DraftBatch, sampling: SamplingMetadata, target_sampler: Sampler
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens `[num_rows, num_steps]`, probabilities of the same or None."""
        token_ids = batch.token_ids
        steps: list[Drawn] = []
        self.sampler.begin()
        for step in range(batch.num_steps):
            hidden_states = self._forward(self._view, batch, step, token_ids)
            logits = self._view.compute_logits(hidden_states)
            drawn = self.sampler.sample(logits, sampling, target_sampler)
            token_ids = drawn.token_ids
            steps.append(drawn)
            if self._stops is not None:
                confidence = confidence_of(token_ids, drawn.logits, drawn.probs)
                if not self._stops.after(step, confidence):
                    break
        drafted = torch.stack([drawn.token_ids for drawn in steps], dim=1)
        probs = [drawn.probs for drawn in steps if drawn.probs is not None]
        return drafted, torch.stack(probs, dim=1) if probs else None

    def _forward(
        self, view: DraftView, batch: DraftBatch, step: int, token_ids: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states of one step, `[num_rows, hidden_size]`."""
        attn_metadata, slot_mapping = batch.attention_inputs(step)
        with set_forward_context(
            attn_metadata,
            self._vllm_config,
            num_tokens=batch.num_rows,
            num_tokens_across_dp=self._ranks.num_rows_across_dp,
            slot_mapping=slot_mapping,
            skip_compiled=not view.is_compiled,
        ):
            return view(token_ids, batch.positions[step])


def _set_loras(runner: Any, rows: np.ndarray) -> None:
    """Tells vLLM's LoRA layers which adapter each token of a step is for: one token a
    row. Before its next forward the target tells them again."""
    if runner.lora_config is None:
        return
    input_batch = runner.input_batch
    of_tokens = tuple(input_batch.request_lora_mapping[rows].tolist())
    active = {*input_batch.lora_id_to_lora_request.values()}
    runner._set_active_loras(of_tokens, of_tokens, active)


def _tuner_of(vllm_config: Any) -> "OnlineTuner | None":
    """What looks for a better skip set while serving; not even loaded elsewhere."""
    if not served_config.tunes_online(vllm_config):
        return None
    from vllm_selfspec.tuning.online.tuner import OnlineTuner

    return OnlineTuner.of(vllm_config)
