"""What takes the place of vLLM's functions: a few lines each, for a row of `seams`."""

import copy
import inspect
from typing import Any

from vllm_selfspec.engine.patcher import Function
from vllm_selfspec.served_config import (
    compile_key,
    is_in_use,
    needs_host_tokens,
    needs_v1_runner,
    num_model_tokens,
    plan_of,
    uses_selfspec,
)


def accept_bare_word(original: Function) -> Function:
    def add_cli_args(parser: Any) -> Any:
        from vllm_selfspec.engine import vllm_args

        return vllm_args.accept_bare_word(original(parser))

    return add_cli_args


def take_our_keys(original: Function) -> Function:
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        from vllm_selfspec.engine import seams, vllm_args

        if vllm_args.asks_for_selfspec(self):
            seams.raise_if_unusable()
            vllm_args.translate(self, target_model_config, target_parallel_config)
        return original(self, target_model_config, target_parallel_config)

    return create_speculative_config


def reserve_draft_slots(original: property) -> property:
    def num_lookahead_tokens(self: Any) -> int:
        if uses_selfspec(self):
            return num_model_tokens(self)
        return int(original.__get__(self))

    return property(num_lookahead_tokens)


def limit_per_row(original: Function) -> Function:
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> Any:
        if uses_selfspec(self.vllm_config):
            return common_attn_metadata is not None
        return original(self, common_attn_metadata)

    return _input_fits_in_drafter


def propose(original: Function) -> Function:
    signature = inspect.signature(original)

    def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not uses_selfspec(self.vllm_config):
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs).arguments
        drafts = self.drafter.propose_for_runner(
            self,
            call["scheduler_output"],
            call["sampled_token_ids"],
            call["sampling_metadata"],
        )
        self._draft_probs, self._draft_prob_req_ids = drafts.probs, drafts.req_ids
        return drafts.token_ids

    return propose_draft_token_ids


def forget_draft_probs(original: Function) -> Function:
    def _update_streaming_request(self: Any, req_id: str, new_req_data: Any) -> Any:
        if uses_selfspec(self.vllm_config):
            self._draft_probs = None
        return original(self, req_id, new_req_data)

    return _update_streaming_request


def keep_compiled_code(original: Function) -> Function:
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not uses_selfspec(self):
            return original(self, *args, **kwargs)
        config = copy.copy(self)
        config.additional_config = compile_key(self)
        return original(config, *args, **kwargs)

    return compute_hash


def allow_v2_runner(original: Function) -> Function:
    def _get_v2_model_runner_unsupported_features(self: Any) -> Any:
        unsupported = original(self)
        if not uses_selfspec(self):
            return unsupported
        if needs_v1_runner(self):
            return unsupported
        return [feature for feature in unsupported if "'custom_class'" not in feature]

    return _get_v2_model_runner_unsupported_features


def allow_async_scheduling(original: Function) -> Function:
    def __post_init__(self: Any) -> None:
        is_async = uses_selfspec(self) and not needs_host_tokens(self)
        if not (is_async and self.use_v2_model_runner):
            original(self)
            return
        self.speculative_config.method = "ngram_gpu"
        try:
            original(self)
        finally:
            self.speculative_config.method = "custom_class"

    return __post_init__


def keep_lengths_of_ranks(original: Function) -> Function:
    def _maybe_disable_dynamic_sd_for_data_parallel(self: Any) -> None:
        if not uses_selfspec(self):
            original(self)

    return _maybe_disable_dynamic_sd_for_data_parallel


def take_smallest_graphs(original: Function) -> Function:
    def _init_candidates(self: Any) -> None:
        original(self)
        if uses_selfspec(self.vllm_config):
            from vllm_selfspec.draft.v2_graphs import smallest_fitting

            for key in self._candidates:
                self._candidates[key] = smallest_fitting(self._capture_descs, *key)

    return _init_candidates


def take_weights(original: Function) -> Function:
    def process_weights_after_loading(
        model: Any, model_config: Any, target_device: Any
    ) -> None:
        from vllm.config import get_current_vllm_config_or_none

        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None and uses_selfspec(vllm_config):
            from vllm_selfspec.draft.view import take_weights

            take_weights(model, vllm_config)
        original(model, model_config, target_device)

    return process_weights_after_loading


def refuse_new_weights(original: Function) -> Function:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if uses_selfspec(self.vllm_config):
            from vllm_selfspec.engine.support import raise_if_loaded_beside

            raise_if_loaded_beside(plan_of(self.vllm_config))
        return original(self, *args, **kwargs)

    return refuse


def run_along(original: Function) -> Function:
    def execute_dummy_batch(self: Any) -> None:
        original(self)
        if uses_selfspec(self.vllm_config) and not self.use_v2_model_runner:
            self.model_runner.drafter.run_along(self.model_runner)

    return execute_dummy_batch


def make_speculator(original: Function) -> Function:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not uses_selfspec(vllm_config):
            return original(vllm_config, device, req_states)
        from vllm_selfspec.draft.v2_row_stops import make_speculator

        return make_speculator(vllm_config, device)

    return init_speculator


def share_request_states(original: Function) -> Function:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if uses_selfspec(self.vllm_config):
            self.speculator.use_states_of(self.sampler)
            self.speculator.use_loras_of(self)
            self.speculator.use_request_states(self.req_states)

    return load_model


def tell_whose_verified_rows_are(original: Function) -> Function:
    def sample(
        self: Any, hidden_states: Any, input_batch: Any, grammar_output: Any
    ) -> Any:
        if uses_selfspec(self.vllm_config) and input_batch.num_draft_tokens:
            num_rows = input_batch.cu_num_logits_np[: 1 + input_batch.num_reqs]
            self.speculator.set_loras(input_batch, num_rows[1:] - num_rows[:-1])
        return original(self, hidden_states, input_batch, grammar_output)

    return sample


def hand_over_row_lengths(original: Function) -> Function:
    def take_draft_token_ids(self: Any) -> Any:
        drafts = original(self)
        if drafts is None or not uses_selfspec(self.vllm_config):
            return drafts
        return self.speculator.cut(drafts)

    return take_draft_token_ids


def keep_seeds_apart(original: Function) -> Function:
    def forward(
        self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any
    ) -> Any:
        if sampling_metadata.generators and is_in_use():
            from vllm_selfspec.draft.seeded import SeededRows

            rows = SeededRows(self.sampler, metadata, logits, sampling_metadata)
            sampling_metadata = rows.metadata
        return original(self, metadata, draft_probs, logits, sampling_metadata)

    return forward


def draw_as_plain_vllm(original: Function) -> Function:
    signature = inspect.signature(original)

    def rejection_sample(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        seeded = getattr(call["sampling_metadata"], "seeded", None)
        output_token_ids = original(*args, **kwargs)
        if seeded is not None:
            drafts, logits = call["draft_token_ids"], call["target_logits"]
            seeded.verify(output_token_ids, drafts, logits)
        return output_token_ids

    return rejection_sample


def draw_as_plain_vllm_on_device(original: Function) -> Function:
    signature = inspect.signature(original)

    def _verify(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits, *sampled = original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs).arguments
        states, reqs = self.sampler.sampling_states, call["idx_mapping_np"]
        has_seeds = is_in_use() and states.any_explicit_seed(reqs)
        if not has_seeds or self.watermark_key is not None:
            return logits, *sampled
        from vllm_selfspec.draft.seeded import verify_on_device

        drafted, positions = call["verify_draft_sampled"], call["pos"]
        layout = call["cu_num_logits"], reqs, call["expanded_idx_mapping"]
        return logits, *verify_on_device(
            self.sampler, logits, drafted, positions, *layout, *sampled
        )

    return _verify


def keep_generators_of_unread_prompts(original: Function) -> Function:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        if self.device.type != "cpu" or not uses_selfspec(self.vllm_config):
            return original(self, grammar_output)
        generators = self.input_batch.generators
        is_dropped = self.discard_request_mask.np[: self.input_batch.num_reqs]
        rows = [row for row in generators if is_dropped[row]]
        kept = {row: generators.pop(row) for row in rows}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(kept)

    return sample_tokens


def sample_and_verify(original: Function) -> Function:
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        metadata = spec_decode_metadata
        if not uses_selfspec(self.vllm_config):
            return original(self, logits, metadata)
        if metadata is not None:
            has_drafts = any(metadata.num_draft_tokens)
            holder = self.input_batch.sampling_metadata.thinking_budget_state_holder
            if holder is not None:
                holder.in_spec_mode = has_drafts  # it counts rows by that
            metadata = metadata if has_drafts else None
        is_synthetic = self.rejection_sampler.synthetic_mode
        if logits is None or logits.device.type != "cpu" or is_synthetic:
            return original(self, logits, metadata)
        from vllm_selfspec.draft import verification

        sampling = self.input_batch.sampling_metadata
        if not verification.asks_for_tokens_alone(sampling):
            return original(self, logits, metadata)
        from vllm.v1.outputs import SamplerOutput

        if metadata is None:
            return SamplerOutput(verification.sampled(logits, sampling), None)
        draft_probs = self._get_spec_decode_draft_probs(metadata)
        tokens = verification.emitted(metadata, draft_probs, logits, sampling)
        return SamplerOutput(tokens, None)

    return _sample


def expand_in_torch(original: Function) -> Function:
    def expand_batch_to_tokens(
        x: Any,
        cu_num_tokens: Any,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> Any:
        if not is_in_use() or x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        num_tokens_of = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        expanded = x.repeat_interleave(num_tokens_of, output_size=num_tokens)
        return expanded.masked_fill_(expanded == replace_from, replace_to)

    return expand_batch_to_tokens


def count_kept_tokens(original: Function) -> Function:
    def _handle_stopped_request(self: Any, request: Any) -> bool:
        if request.resumable and uses_selfspec(self.vllm_config):
            kept = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, kept)
        return bool(original(self, request))

    return _handle_stopped_request


def plan_draft_lengths(original: Function) -> Function:
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        kv_cache_config = original(self, vllm_config)
        if uses_selfspec(vllm_config):
            from vllm_selfspec.engine import scheduler

            scheduler.prepare(vllm_config, self.model_executor)
        return kv_cache_config

    return _initialize_kv_caches
