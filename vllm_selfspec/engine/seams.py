"""Every place where vLLM is changed, as one table.

One rule: no other module rebinds a vLLM name. Each row replaces one function by one of
a few lines that hands over to vLLM's own unless selfspec was asked for. `patcher`
attaches the rows; where one did not fit, plain vLLM goes on working, and asking for
selfspec raises.
"""

import importlib
import inspect
from typing import Any

from vllm_selfspec.engine import patcher, registry, versions
from vllm_selfspec.engine.patcher import Function, Seam, SeamError
from vllm_selfspec.served_config import (
    is_in_use,
    needs_v1_runner,
    stops_rows,
    uses_selfspec,
)


def _accept_bare_word(original: Function) -> Function:
    def add_cli_args(parser: Any) -> Any:
        from vllm_selfspec.engine import vllm_args

        return vllm_args.accept_bare_word(original(parser))

    return add_cli_args


def _take_our_keys(original: Function) -> Function:
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        from vllm_selfspec.engine import vllm_args

        if vllm_args.asks_for_selfspec(self):
            raise_if_unusable()
            vllm_args.translate(self, target_model_config, target_parallel_config)
        return original(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _reserve_draft_slots(original: property) -> property:
    def num_lookahead_tokens(self: Any) -> int:
        if uses_selfspec(self):
            return int(self.num_speculative_tokens)
        return int(original.__get__(self))

    return property(num_lookahead_tokens)


def _limit_per_row(original: Function) -> Function:
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> Any:
        if uses_selfspec(self.vllm_config):
            return common_attn_metadata is not None
        return original(self, common_attn_metadata)

    return _input_fits_in_drafter


def _propose(original: Function) -> Function:
    def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not uses_selfspec(self.vllm_config):
            return original(self, *args, **kwargs)
        call = inspect.signature(original).bind(self, *args, **kwargs).arguments
        drafts = self.drafter.propose_for_runner(
            self,
            call["scheduler_output"],
            call["sampled_token_ids"],
            call["sampling_metadata"],
        )
        self._draft_probs, self._draft_prob_req_ids = drafts.probs, drafts.req_ids
        return drafts.token_ids

    return propose_draft_token_ids


def _forget_draft_probs(original: Function) -> Function:
    def _update_streaming_request(self: Any, req_id: str, new_req_data: Any) -> Any:
        if uses_selfspec(self.vllm_config):
            self._draft_probs = None
        return original(self, req_id, new_req_data)

    return _update_streaming_request


def _allow_v2_runner(original: Function) -> Function:
    def _get_v2_model_runner_unsupported_features(self: Any) -> Any:
        unsupported = original(self)
        if not uses_selfspec(self):
            return unsupported
        if needs_v1_runner(self):
            return unsupported
        return [feature for feature in unsupported if "'custom_class'" not in feature]

    return _get_v2_model_runner_unsupported_features


def _allow_async_scheduling(original: Function) -> Function:
    def __post_init__(self: Any) -> None:
        is_async = uses_selfspec(self) and not stops_rows(self)
        if not (is_async and self.use_v2_model_runner):
            original(self)
            return
        self.speculative_config.method = "ngram_gpu"
        try:
            original(self)
        finally:
            self.speculative_config.method = "custom_class"

    return __post_init__


def _keep_lengths_of_ranks(original: Function) -> Function:
    def _maybe_disable_dynamic_sd_for_data_parallel(self: Any) -> None:
        if not uses_selfspec(self):
            original(self)

    return _maybe_disable_dynamic_sd_for_data_parallel


def _run_along(original: Function) -> Function:
    def execute_dummy_batch(self: Any) -> None:
        original(self)
        if uses_selfspec(self.vllm_config) and not self.use_v2_model_runner:
            self.model_runner.drafter.run_along(self.model_runner)

    return execute_dummy_batch


def _make_speculator(original: Function) -> Function:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not uses_selfspec(vllm_config):
            return original(vllm_config, device, req_states)
        from vllm_selfspec.draft.v2_row_stops import make_speculator

        return make_speculator(vllm_config, device)

    return init_speculator


def _share_request_states(original: Function) -> Function:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if uses_selfspec(self.vllm_config):
            self.speculator.use_sampling_states(self.sampler.sampling_states)
            self.speculator.use_loras_of(self)

    return load_model


def _tell_whose_verified_rows_are(original: Function) -> Function:
    def sample(
        self: Any, hidden_states: Any, input_batch: Any, grammar_output: Any
    ) -> Any:
        if uses_selfspec(self.vllm_config) and input_batch.num_draft_tokens:
            num_rows = input_batch.cu_num_logits_np[: 1 + input_batch.num_reqs]
            self.speculator.set_loras(input_batch, num_rows[1:] - num_rows[:-1])
        return original(self, hidden_states, input_batch, grammar_output)

    return sample


def _hand_over_row_lengths(original: Function) -> Function:
    def take_draft_token_ids(self: Any) -> Any:
        drafts = original(self)
        if drafts is None or not stops_rows(self.vllm_config):
            return drafts
        return self.speculator.cut(drafts)

    return take_draft_token_ids


def _keep_seeds_apart(original: Function) -> Function:
    def forward(
        self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any
    ) -> Any:
        if is_in_use() and sampling_metadata.generators:
            from vllm_selfspec.draft.seeded import SeededRows

            rows = SeededRows(self.sampler, metadata, logits, sampling_metadata)
            sampling_metadata = rows.metadata
        return original(self, metadata, draft_probs, logits, sampling_metadata)

    return forward


def _draw_as_plain_vllm(original: Function) -> Function:
    def rejection_sample(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        seeded = getattr(call["sampling_metadata"], "seeded", None)
        output_token_ids = original(*args, **kwargs)
        if seeded is not None:
            drafts, logits = call["draft_token_ids"], call["target_logits"]
            seeded.verify(output_token_ids, drafts, logits)
        return output_token_ids

    return rejection_sample


def _draw_as_plain_vllm_on_device(original: Function) -> Function:
    def _verify(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits, *sampled = original(self, *args, **kwargs)
        call = inspect.signature(original).bind(self, *args, **kwargs).arguments
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


def _sample_steps_without_drafts(original: Function) -> Function:
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        metadata = spec_decode_metadata
        if metadata is None or not uses_selfspec(self.vllm_config):
            return original(self, logits, metadata)
        has_drafts = any(metadata.num_draft_tokens)
        holder = self.input_batch.sampling_metadata.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = has_drafts  # it counts rows by that
        return original(self, logits, metadata if has_drafts else None)

    return _sample


def _expand_in_torch(original: Function) -> Function:
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


def _count_kept_tokens(original: Function) -> Function:
    def _handle_stopped_request(self: Any, request: Any) -> bool:
        if request.resumable and uses_selfspec(self.vllm_config):
            kept = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, kept)
        return bool(original(self, request))

    return _handle_stopped_request


def _plan_draft_lengths(original: Function) -> Function:
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        kv_cache_config = original(self, vllm_config)
        if uses_selfspec(vllm_config):
            from vllm_selfspec.engine import scheduler

            scheduler.prepare(vllm_config, self.model_executor)
        return kv_cache_config

    return _initialize_kv_caches


_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V1_REJECTION = "vllm.v1.sample.rejection_sampler"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"
_V2_REJECTION = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"

_SEEDS = (
    "With drafts a seeded request's text is not plain vLLM's, and not the same twice: "
    "the noise that verifies goes by what was drafted."
)
_REJECTION_SAMPLE = (
    "draft_token_ids",
    "num_draft_tokens",
    "max_spec_len",
    "cu_num_draft_tokens",
    "draft_probs",
    "target_logits",
    "bonus_token_ids",
    "sampling_metadata",
    "synthetic_mode",
    "synthetic_conditional_rates",
    "use_fp64_gumbel",
)

SEAMS: tuple[Seam, ...] = (
    Seam(
        module="vllm.engine.arg_utils",
        target="EngineArgs.add_cli_args",
        parameters=("parser",),
        replace=_accept_bare_word,
        why="--speculative-config takes JSON only and --spec-method a closed list.",
        remove_when="vLLM has a registry of speculative methods (RFC 36219).",
        kind=staticmethod,
        is_entry=True,
        in_registry=True,
    ),
    Seam(
        module="vllm.engine.arg_utils",
        target="EngineArgs.create_speculative_config",
        parameters=("self", "target_model_config", "target_parallel_config"),
        replace=_take_our_keys,
        why="SpeculativeConfig forbids unknown keys; its method is a closed Literal.",
        remove_when="vLLM has a registry of speculative methods (RFC 36219).",
        is_entry=True,
        in_registry=True,
    ),
    Seam(
        module="vllm.config.vllm",
        target="VllmConfig.num_lookahead_tokens",
        parameters=("self",),
        replace=_reserve_draft_slots,  # type: ignore[arg-type]
        why="It is 0 for custom_class; draft KV would go to blocks nobody reserved.",
        remove_when="a custom proposer can name its lookahead.",
        kind=property,
        in_registry=True,
    ),
    Seam(
        module="vllm.config.vllm",
        target="VllmConfig._get_v2_model_runner_unsupported_features",
        parameters=("self",),
        replace=_allow_v2_runner,
        why="The V2 runner refuses custom_class, because it cannot build a proposer "
        "that it does not know.",
        remove_when="vLLM has a registry of speculative methods (RFC 36219).",
        in_registry=True,
    ),
    Seam(
        module="vllm.config.vllm",
        target="VllmConfig.__post_init__",
        parameters=("self",),
        replace=_allow_async_scheduling,
        why="Before 0.33 async scheduling is for a closed list of methods. While the "
        "config checks itself ours is called ngram_gpu, which like ours drafts on the "
        "device and brings no draft model.",
        remove_when="vLLM 0.32 is not supported any more.",
        in_registry=True,
        only_in=("0.32",),
    ),
    Seam(
        module="vllm.config.vllm",
        target="VllmConfig._maybe_disable_dynamic_sd_for_data_parallel",
        parameters=("self",),
        replace=_keep_lengths_of_ranks,
        why="vLLM's drafters would wait for each other for ever where data-parallel "
        "ranks draft differently, so it drafts at one length there, for dense models, "
        "too, whose ranks never meet. Ours agree on the steps before they draft.",
        remove_when="a speculative method can say that its ranks may differ.",
    ),
    Seam(
        module="vllm.v1.worker.gpu_worker",
        target="Worker.execute_dummy_batch",
        parameters=("self",),
        replace=_run_along,
        why="A data-parallel rank without requests runs the target for the others' "
        "sake; in the V1 runner it runs the draft only of vLLM's own methods.",
        remove_when="the V1 runner's dummy run asks the proposer.",
    ),
    Seam(
        module=_V2_RUNNER,
        target="init_speculator",
        parameters=("vllm_config", "device", "req_states"),
        replace=_make_speculator,
        why="The V2 runner builds speculators from a closed list of methods.",
        remove_when="vLLM has a registry of speculative methods (RFC 36219).",
        in_registry=True,
    ),
    Seam(
        module=_V2_RUNNER,
        target="GPUModelRunner.load_model",
        parameters=("self", "load_dummy_weights", "args", "model", "kwargs"),
        replace=_share_request_states,
        why="A speculator is told the requests' temperatures, and neither top-k and "
        "top-p, outside of which drafts are never accepted, nor the adapters.",
        remove_when="propose gets the sampling states and the LoRA state.",
    ),
    Seam(
        module=_V2_RUNNER,
        target="GPUModelRunner.sample",
        parameters=("self", "hidden_states", "input_batch", "grammar_output"),
        replace=_tell_whose_verified_rows_are,
        why="The V2 runner tells the LM head's LoRA layer one adapter a request, where "
        "a verification has rows for each draft token: on CPU the engine stops, on a "
        "GPU an adapter of the LM head meets the rows of another request.",
        remove_when="make_lora_inputs repeats an adapter by its request's logits.",
    ),
    Seam(
        module=_V2_RUNNER,
        target="GPUModelRunner.take_draft_token_ids",
        parameters=("self",),
        replace=_hand_over_row_lengths,
        why="Drafts of all requests are handed over at the batch's length; rows that "
        "stopped early have fewer.",
        remove_when="a speculator can say how many tokens each row drafted.",
    ),
    Seam(
        module="vllm.v1.engine.core",
        target="EngineCore._initialize_kv_caches",
        parameters=("self", "vllm_config"),
        replace=_plan_draft_lengths,
        why="How many drafts are scheduled follows the number of requests alone, by a "
        "table, and not what they ask for. A scheduler of our own decides; vLLM lets a "
        "config name one, but it has no way to the workers, which measure what a "
        "forward costs, and are told it where they look for a better skip set. This is "
        "called when they are ready and the scheduler is not made yet; its process "
        "loads plugins no earlier than in its __init__.",
        remove_when="a speculative method can say how many tokens to schedule.",
    ),
    Seam(
        module="vllm.v1.core.sched.scheduler",
        target="Scheduler._handle_stopped_request",
        parameters=("self", "request"),
        replace=_count_kept_tokens,
        why="Before 0.33 a streaming session that stops within accepted drafts goes on "
        "counting the tokens after its stop as computed, unless scheduling is async. "
        "The next piece's first tokens are then never read, and other requests find "
        "the dropped tokens' KV in the prefix cache under the names of those that "
        "took their place. n-gram drafts do the same, and are left as they are.",
        remove_when="vLLM 0.32 is not supported any more.",
        only_in=("0.32",),
    ),
    Seam(
        module=_V1_REJECTION,
        target="RejectionSampler.forward",
        parameters=("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
        replace=_keep_seeds_apart,
        why=_SEEDS + " The bonus token is drawn first, with the noise of the first "
        "draft's position.",
        remove_when="vLLM verifies seeded requests by their own noise.",
    ),
    Seam(
        module=_V1_REJECTION,
        target="rejection_sample",
        parameters=_REJECTION_SAMPLE,
        replace=_draw_as_plain_vllm,
        why=_SEEDS,
        remove_when="vLLM verifies seeded requests by their own noise.",
        only_in=("0.32",),
    ),
    Seam(
        module=_V1_REJECTION,
        target="rejection_sample",
        parameters=(
            *_REJECTION_SAMPLE,
            "fly_window_size",
            "fly_entropy_threshold",
            "fly_entropy_top_k",
        ),
        replace=_draw_as_plain_vllm,
        why=_SEEDS,
        remove_when="vLLM verifies seeded requests by their own noise.",
        only_in=("0.33",),
    ),
    Seam(
        module=_V2_REJECTION,
        target="RejectionSampler._verify",
        parameters=(
            "self",
            "logits",
            "draft_logits",
            "draft_sampled",
            "pos",
            "cu_num_logits",
            "idx_mapping",
            "idx_mapping_np",
            "expanded_idx_mapping",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "verify_draft_sampled",
        ),
        replace=_draw_as_plain_vllm_on_device,
        why=_SEEDS,
        remove_when="vLLM verifies seeded requests by their own noise.",
    ),
    Seam(
        module=_V1_RUNNER,
        target="GPUModelRunner._sample",
        parameters=("self", "logits", "spec_decode_metadata"),
        replace=_sample_steps_without_drafts,
        why="Steps without drafts go through verification, too, as they do not in V2, "
        "and it does not carry all that vLLM's sampler does: logprob_token_ids are "
        "lost or stop the engine, and so does, without Triton, top_k alone in a step "
        "that has no draft tokens to verify.",
        remove_when="the V1 runner samples a step without drafts by its sampler.",
    ),
    Seam(
        module=_V1_REJECTION,
        target="expand_batch_to_tokens",
        parameters=(
            "x",
            "cu_num_tokens",
            "num_tokens",
            "replace_from",
            "replace_to",
        ),
        replace=_expand_in_torch,
        why="On CPU vLLM expands temperature, top_k and top_p into a temporary int64 "
        "copy and hands uninitialised memory to the verification: sampling with any "
        "speculative method is not lossless there.",
        remove_when="_expand_kernel_impl writes its result into `output`.",
    ),
    Seam(
        module=_V1_RUNNER,
        target="GPUModelRunner._input_fits_in_drafter",
        parameters=("self", "common_attn_metadata"),
        replace=_limit_per_row,
        why="One request near max_model_len stops drafting for the whole batch and "
        "fills it with token 0; we limit each row by itself.",
        remove_when="vLLM asks the proposer.",
        in_registry=True,
    ),
    Seam(
        module=_V1_RUNNER,
        target="GPUModelRunner.propose_draft_token_ids",
        parameters=(
            "self",
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
        replace=_propose,
        why="A custom_class proposer is given no block tables, no sampling metadata "
        "and no way to hand back draft probabilities.",
        remove_when="custom_class passes the runner or those three.",
        in_registry=True,
    ),
    Seam(
        module=_V1_RUNNER,
        target="GPUModelRunner._update_streaming_request",
        parameters=("self", "req_id", "new_req_data"),
        replace=_forget_draft_probs,
        why="A piece of a streaming session that is one token long is padded with "
        "drafts that do not exist. The token after it is drawn as if they had the "
        "probabilities of the last piece's drafts, whatever proposes those. Without "
        "any, each draft of the step is verified as if it had been certain, which is "
        "lossless, too.",
        remove_when="vLLM samples afresh after a draft token of -1.",
    ),
)


def raise_if_unusable() -> None:
    """Raises if the installed vLLM is unsupported, or a seam did not fit it.

    Raises:
        UnsupportedVersionError: For a vLLM version that is not supported.
        SeamError: If a target is missing or has another signature.
    """
    found = versions.vllm_version()
    if not versions.is_supported(found):
        raise versions.UnsupportedVersionError(versions.unsupported_message(found))
    for seam in needed():
        importlib.import_module(seam.module)  # so that it is attached, or found wanting
    if patcher.problems:
        raise SeamError(
            f"selfspec does not fit this vLLM {found}: {'; '.join(patcher.problems)}. "
            "Install the vLLM release it was written for, or a newer vllm-selfspec"
        )


def install() -> None:
    """Attaches every seam, now or when vLLM imports its module."""
    for seam in needed():
        patcher.when_imported(seam)


def needed() -> list[Seam]:
    """The rows that the installed vLLM needs."""
    found = versions.vllm_version()
    is_supported = versions.is_supported(found)
    has_registry = registry.exists()
    return [
        seam
        for seam in SEAMS
        if (is_supported or seam.is_entry)
        and not (seam.in_registry and has_registry)
        and seam.is_for(found)
    ]
