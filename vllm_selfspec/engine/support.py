"""Which models and deployments can be drafted for.

One rule: what is not known to work is refused here, before any weights are loaded, with
the reason and what to do instead.
"""

from typing import Any

from vllm_selfspec.plan.axes import AXES
from vllm_selfspec.plan.axis import Deployment
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.families import UnsupportedModelError, family_of


def raise_if_unsupported(model_config: Any, parallel_config: Any) -> None:
    """Refuses what no source can draft for.

    Args:
        model_config: vLLM's `ModelConfig` of the target.
        parallel_config: vLLM's `ParallelConfig`.

    Raises:
        UnsupportedModelError: With the first reason found.
    """
    reasons = {
        "a pipeline stage holds only some layers, but a draft needs all of them in one "
        f"process, and pipeline_parallel_size is "
        f"{parallel_config.pipeline_parallel_size}: use tensor parallelism": (
            parallel_config.pipeline_parallel_size > 1
        ),
        "an encoder-decoder model's cross-attention is not part of a skip set: serve "
        "it without selfspec": model_config.is_encoder_decoder,
        # Tiny Mamba2 and Falcon-H1 models give other texts on a CPU with n-grams, too.
        "recurrent layers change their state on every forward and cannot take a "
        "rejected draft back but by kernels of vLLM's for GPUs, where selfspec was not "
        "tried on them, and this model has some: serve it without selfspec": (
            model_config.is_hybrid or model_config.is_attention_free
        ),
        "only text generation can be drafted for, and the model runner is "
        f"{model_config.runner_type!r}: serve it without selfspec": (
            model_config.runner_type != "generate"
        ),
        "a draft's KV slots are not split over context-parallel ranks, and "
        "decode_context_parallel_size is "
        f"{parallel_config.decode_context_parallel_size}: use 1": (
            parallel_config.decode_context_parallel_size > 1
        ),
        "data-parallel ranks agree on draft steps before each draft, which ranks that "
        "come and go do not, and enable_elastic_ep is set: leave it out": (
            parallel_config.enable_elastic_ep
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(f"selfspec: {reason}")


def raise_if_model_cannot_draft(model_config: Any) -> None:
    """Refuses a target that cannot draft for itself; other sources can for it.

    Raises:
        UnsupportedModelError: With the first reason found.
    """
    if model_config.uses_mrope:
        raise UnsupportedModelError(
            "selfspec: with M-RoPE the text after an image goes on at positions that "
            "are not those of its tokens, by which a draft counts, and this model has "
            "it: use draft_source 'context'"
        )
    family_of(model_config.architecture)


def raise_if_loaded_beside(plan: DraftPlan) -> None:
    """Refuses to exchange the weights of a target that others were loaded beside.

    Raises:
        NotImplementedError: With the first axis that has some.
    """
    for name, _ in plan.values:
        if AXES.named(name).loader is not None:
            raise NotImplementedError(
                f"selfspec loads the weights of {name} with the target's, and they "
                "would stay those of the former ones, or be lost where vLLM sleeps at "
                f"level 2: leave out {name} to update or reload weights at run time"
            )


def raise_if_refused(plan: DraftPlan, deployment: Deployment) -> None:
    """Refuses a plan with a value that cannot be served there.

    Raises:
        UnsupportedModelError: With the first reason found.
    """
    for name, value in plan.values:
        reason = AXES.named(name).refusal(value, deployment)
        if reason is not None:
            raise UnsupportedModelError(f"selfspec: {reason}")
