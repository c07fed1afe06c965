"""Every place where vLLM is changed, as one table.

One rule: no other module rebinds a vLLM name. Each row replaces one function by one of
a few lines that hands over to vLLM's own unless selfspec was asked for. `patcher`
attaches the rows; where one did not fit, plain vLLM goes on working, and asking for
selfspec raises.
"""

import importlib

from vllm_selfspec.engine import patcher, registry, replacements, versions
from vllm_selfspec.engine.patcher import Seam, SeamError

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
        replace=replacements.accept_bare_word,
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
        replace=replacements.take_our_keys,
        why="SpeculativeConfig forbids unknown keys; its method is a closed Literal.",
        remove_when="vLLM has a registry of speculative methods (RFC 36219).",
        is_entry=True,
        in_registry=True,
    ),
    Seam(
        module="vllm.config.vllm",
        target="VllmConfig.num_lookahead_tokens",
        parameters=("self",),
        replace=replacements.reserve_draft_slots,  # type: ignore[arg-type]
        why="It is 0 for custom_class; draft KV would go to blocks nobody reserved.",
        remove_when="a custom proposer can name its lookahead.",
        kind=property,
        in_registry=True,
    ),
    Seam(
        module="vllm.config.vllm",
        target="VllmConfig.compute_hash",
        parameters=("self", "include_version"),
        replace=replacements.keep_compiled_code,
        why="All of additional_config is in the key of vLLM's compile cache, so with "
        "each draft plan the target would be compiled anew: at the second start of a "
        "model, too, which has the plan that the first one found.",
        remove_when="a part of additional_config can be left out of that key.",
    ),
    Seam(
        module="vllm.config.vllm",
        target="VllmConfig._get_v2_model_runner_unsupported_features",
        parameters=("self",),
        replace=replacements.allow_v2_runner,
        why="The V2 runner refuses custom_class, because it cannot build a proposer "
        "that it does not know.",
        remove_when="vLLM has a registry of speculative methods (RFC 36219).",
        in_registry=True,
    ),
    Seam(
        module="vllm.config.vllm",
        target="VllmConfig.__post_init__",
        parameters=("self",),
        replace=replacements.allow_async_scheduling,
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
        replace=replacements.keep_lengths_of_ranks,
        why="vLLM's drafters would wait for each other for ever where data-parallel "
        "ranks draft differently, so it drafts at one length there, for dense models, "
        "too, whose ranks never meet. Ours agree on the steps before they draft.",
        remove_when="a speculative method can say that its ranks may differ.",
    ),
    Seam(
        module="vllm.v1.worker.gpu.cudagraph_utils",
        target="CudaGraphManager._init_candidates",
        parameters=("self",),
        replace=replacements.take_smallest_graphs,
        why="With graphs of several draft lengths vLLM lets a batch take those of the "
        "next size alone, which may be of another length: 12 plain rows found graphs "
        "of 6 x 2 and 4 x 3 rows, not that of 16 plain ones, and ran eagerly, which on "
        "an H200 took 11.5 ms for 2.6.",
        remove_when="vLLM pads a batch to the next graph of its own draft length.",
    ),
    Seam(
        module="vllm.model_executor.model_loader.base_loader",
        target="process_weights_after_loading",
        parameters=("model", "model_config", "target_device"),
        replace=replacements.take_weights,
        why="On CPU vLLM packs a linear layer's weight and leaves an empty one, and "
        "some kernels of GPUs shuffle it. A copy in fewer bits is made of the weight "
        "that was loaded.",
        remove_when="a drafter is asked before the target's weights are processed.",
    ),
    Seam(
        module="vllm.v1.worker.gpu_worker",
        target="Worker.reload_weights",
        parameters=("self", "args", "kwargs"),
        replace=replacements.refuse_new_weights,
        why="Weights that are exchanged at run time leave those beside them behind.",
        remove_when="a drafter is told of new weights before they are processed.",
    ),
    Seam(
        module="vllm.v1.worker.gpu_worker",
        target="Worker.start_weight_update",
        parameters=("self",),
        replace=replacements.refuse_new_weights,
        why="Weights that are exchanged at run time leave those beside them behind.",
        remove_when="a drafter is told of new weights before they are processed.",
    ),
    Seam(
        module="vllm.v1.worker.gpu_worker",
        target="Worker.execute_dummy_batch",
        parameters=("self",),
        replace=replacements.run_along,
        why="A data-parallel rank without requests runs the target for the others' "
        "sake; in the V1 runner it runs the draft only of vLLM's own methods.",
        remove_when="the V1 runner's dummy run asks the proposer.",
    ),
    Seam(
        module=_V2_RUNNER,
        target="init_speculator",
        parameters=("vllm_config", "device", "req_states"),
        replace=replacements.make_speculator,
        why="The V2 runner builds speculators from a closed list of methods.",
        remove_when="vLLM has a registry of speculative methods (RFC 36219).",
        in_registry=True,
    ),
    Seam(
        module=_V2_RUNNER,
        target="GPUModelRunner.load_model",
        parameters=("self", "load_dummy_weights", "args", "model", "kwargs"),
        replace=replacements.share_request_states,
        why="A speculator is told temperatures, and neither penalties, nor the limits "
        "outside of which drafts are never accepted, nor the adapters.",
        remove_when="propose gets the sampler's states and the LoRA state.",
    ),
    Seam(
        module=_V2_RUNNER,
        target="GPUModelRunner.sample",
        parameters=("self", "hidden_states", "input_batch", "grammar_output"),
        replace=replacements.tell_whose_verified_rows_are,
        why="The V2 runner tells the LM head's LoRA layer one adapter a request, where "
        "a verification has rows for each draft token: on CPU the engine stops, on a "
        "GPU an adapter of the LM head meets the rows of another request.",
        remove_when="make_lora_inputs repeats an adapter by its request's logits.",
    ),
    Seam(
        module=_V2_RUNNER,
        target="GPUModelRunner.take_draft_token_ids",
        parameters=("self",),
        replace=replacements.hand_over_row_lengths,
        why="Drafts of all requests are handed over at the batch's length; rows that "
        "stopped early have fewer.",
        remove_when="a speculator can say how many tokens each row drafted.",
    ),
    Seam(
        module="vllm.v1.engine.core",
        target="EngineCore._initialize_kv_caches",
        parameters=("self", "vllm_config"),
        replace=replacements.plan_draft_lengths,
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
        replace=replacements.count_kept_tokens,
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
        replace=replacements.keep_seeds_apart,
        why=_SEEDS + " The bonus token is drawn first, with the noise of the first "
        "draft's position.",
        remove_when="vLLM verifies seeded requests by their own noise.",
    ),
    Seam(
        module=_V1_REJECTION,
        target="rejection_sample",
        parameters=_REJECTION_SAMPLE,
        replace=replacements.draw_as_plain_vllm,
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
        replace=replacements.draw_as_plain_vllm,
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
        replace=replacements.draw_as_plain_vllm_on_device,
        why=_SEEDS,
        remove_when="vLLM verifies seeded requests by their own noise.",
    ),
    Seam(
        module=_V1_RUNNER,
        target="GPUModelRunner.sample_tokens",
        parameters=("self", "grammar_output"),
        replace=replacements.keep_generators_of_unread_prompts,
        why="A prompt that is read in chunks draws a token after each, and takes the "
        "draw back by the generator's offset, which a CPU's has not: a seeded request "
        "with a long prompt stops the engine, with or without drafts. On a CPU it does "
        "not draw until its prompt is read.",
        remove_when="the V1 runner takes draws back on a CPU, too.",
    ),
    Seam(
        module=_V1_RUNNER,
        target="GPUModelRunner._sample",
        parameters=("self", "logits", "spec_decode_metadata"),
        replace=replacements.sample_and_verify,
        why="Steps without drafts go through verification, too, as they do not in V2, "
        "and it does not carry all that vLLM's sampler does: logprob_token_ids are "
        "lost or stop the engine, and so does, without Triton, top_k alone in a step "
        "that has no draft tokens to verify. And on a CPU drafts are verified through "
        "copies of their logits, and with noise for each token of the vocabulary: 5 to "
        "16 ms of a greedy step of 16 requests, 70 of one that is drawn. Steps without "
        "drafts take the same way: otherwise drafts pay for sparing the sampler its "
        "sorting, 80 ms for 16 requests with top-p.",
        remove_when="the V1 runner samples a step without drafts by its sampler; and "
        "on CPUs vLLM neither sorts a vocabulary for top-p nor verifies by noise of "
        "`torch`.",
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
        replace=replacements.expand_in_torch,
        why="On CPU vLLM expands temperature, top_k and top_p into a temporary int64 "
        "copy and hands uninitialised memory to the verification: sampling with any "
        "speculative method is not lossless there.",
        remove_when="_expand_kernel_impl writes its result into `output`.",
    ),
    Seam(
        module=_V1_RUNNER,
        target="GPUModelRunner._input_fits_in_drafter",
        parameters=("self", "common_attn_metadata"),
        replace=replacements.limit_per_row,
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
        replace=replacements.propose,
        why="A custom_class proposer is given no block tables, no sampling metadata "
        "and no way to hand back draft probabilities.",
        remove_when="custom_class passes the runner or those three.",
        in_registry=True,
    ),
    Seam(
        module=_V1_RUNNER,
        target="GPUModelRunner._update_streaming_request",
        parameters=("self", "req_id", "new_req_data"),
        replace=replacements.forget_draft_probs,
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
