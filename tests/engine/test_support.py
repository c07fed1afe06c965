"""What a draft cannot run on is refused with the reason and what to do instead."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.engines import Engines, greedy, planner_of, prompts_of, run, token_ids
from helpers.models import build_tiny_model
from vllm_selfspec.engine.support import (
    raise_if_model_cannot_draft,
    raise_if_unsupported,
)
from vllm_selfspec.plan.families import FAMILIES, UnsupportedModelError, family_of

# What `raise_if_unsupported` reads of vLLM's two objects, as for a plain Llama.
MODEL = {
    "architecture": "LlamaForCausalLM",
    "is_encoder_decoder": False,
    "is_hybrid": False,
    "is_attention_free": False,
    "uses_mrope": False,
    "runner_type": "generate",
}
PARALLEL = {
    "pipeline_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "enable_elastic_ep": False,
}

RECURRENT = (
    "recurrent layers change their state on every forward and cannot take a rejected "
    "draft back but by kernels of vLLM's for GPUs, where selfspec was not tried on them"
)


def check(**changed: object) -> None:
    """Checks a plain Llama with these attributes changed."""
    objects = [
        SimpleNamespace(**{k: changed.get(k, v) for k, v in plain.items()})
        for plain in (MODEL, PARALLEL)
    ]
    assert changed.keys() <= MODEL.keys() | PARALLEL.keys()
    raise_if_unsupported(*objects)
    raise_if_model_cannot_draft(objects[0])


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_known_family_is_accepted(architecture: str) -> None:
    check(architecture=architecture)
    assert family_of(architecture) == FAMILIES[architecture]


def refusal(
    what: str, changed: dict[str, object], rule: str, found: str, fix: str
) -> Any:
    """A row of the support table: what is refused, and what the message says."""
    shows = pytest.mark.shows("Refused", f"{what}: {rule}")
    return pytest.param(changed, rule, found, fix, marks=shows, id=next(iter(changed)))


@pytest.mark.parametrize(
    ("changed", "rule", "found", "fix"),
    [
        refusal(
            "pipeline parallelism",
            {"pipeline_parallel_size": 2},
            "a pipeline stage holds only some layers, but a draft needs all of them in "
            "one process",
            "pipeline_parallel_size is 2",
            "use tensor parallelism",
        ),
        refusal(
            "models with recurrent layers",
            {"is_hybrid": True},
            RECURRENT,
            "this model has some",
            "serve it without selfspec",
        ),
        refusal(
            "models with recurrent layers",
            {"is_attention_free": True},
            RECURRENT,
            "this model has some",
            "serve it without selfspec",
        ),
        refusal(
            "encoder-decoder models",
            {"is_encoder_decoder": True},
            "cross-attention is not part of a skip set",
            "encoder-decoder model",
            "serve it without selfspec",
        ),
        refusal(
            "drafts of multimodal models with M-RoPE",
            {"uses_mrope": True},
            "with M-RoPE the text after an image goes on at positions that are not "
            "those of its tokens, by which a draft counts",
            "this model has it",
            "use draft_source 'context'",
        ),
        refusal(
            "pooling models",
            {"runner_type": "pooling"},
            "only text generation can be drafted for",
            "the model runner is 'pooling'",
            "serve it without selfspec",
        ),
        refusal(
            "context parallelism",
            {"decode_context_parallel_size": 2},
            "a draft's KV slots are not split over context-parallel ranks",
            "decode_context_parallel_size is 2",
            "use 1",
        ),
        refusal(
            "elastic expert parallelism",
            {"enable_elastic_ep": True},
            "data-parallel ranks agree on draft steps before each draft, which ranks "
            "that come and go do not",
            "enable_elastic_ep is set",
            "leave it out",
        ),
        refusal(
            "drafts of models that are not in this table",
            {"architecture": "BloomForCausalLM"},
            "selfspec must know where a model's sublayers are",
            "this model is a BloomForCausalLM",
            "use draft_source 'context'",
        ),
    ],
)
def test_what_cannot_be_drafted_for_is_refused(
    changed: dict[str, object], rule: str, found: str, fix: str
) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        check(**changed)
    message = str(error.value)
    assert message.startswith("selfspec"), "who refuses"
    assert rule in message, "the rule"
    assert found in message, "the value found"
    assert message.endswith(fix), "the fix"


def test_the_refusal_of_a_model_names_those_that_work() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        family_of("BloomForCausalLM")
    for architecture in FAMILIES:
        assert architecture in str(error.value)


def test_a_recurrent_model_is_refused_for_its_reason_and_not_for_its_name() -> None:
    with pytest.raises(UnsupportedModelError, match="recurrent layers"):
        check(is_hybrid=True, architecture="JambaForCausalLM")


REFUSED = {
    ("mamba2", "Mamba2ForCausalLM"): "recurrent layers change their state",
    ("granitemoehybrid", "GraniteMoeHybridForCausalLM"): "recurrent layers change",
    ("whisper", "WhisperForConditionalGeneration"): "encoder-decoder model",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model[0])
def test_a_real_configuration_is_refused_before_an_engine_starts(
    model: tuple[str, str], tmp_path: Path
) -> None:
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs

    config = AutoConfig.for_model(model[0])
    config.architectures = [model[1]]
    config.save_pretrained(tmp_path)
    engine_args = EngineArgs(
        str(tmp_path),
        skip_tokenizer_init=True,
        dtype="float32",
        speculative_config={"method": "selfspec"},
    )
    with pytest.raises(UnsupportedModelError, match=REFUSED[model]):
        engine_args.create_engine_config()


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("bloom")
    return str(build_tiny_model("bloom", directory, tie_word_embeddings=True))


@pytest.mark.v2
@pytest.mark.shows("Engine", "models that cannot draft: copies alone")
def test_a_model_that_cannot_draft_is_served_with_copies_alone(
    bloom: str, engines: Engines
) -> None:
    prompts = [{"prompt_token_ids": [5, 9, 7, 3, 8, 1] * 3}, *prompts_of(2)]
    params = greedy(16)
    expected, _ = run(engines.get(bloom), prompts, params)
    llm = engines.get(bloom, {"draft_source": "auto"})
    found, counts = run(llm, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens and not planner_of(llm).stats.drafted["model"]


@pytest.mark.parametrize("keys", [{"draft_source": "model"}, {"exit_layer": 2}])
def test_it_is_refused_where_it_was_told_to_draft(
    keys: dict[str, Any], bloom: str, engines: Engines
) -> None:
    with pytest.raises(UnsupportedModelError, match="this model is a BloomForCausalLM"):
        engines.get(bloom, {"draft_source": "auto", **keys})


def test_pipeline_parallelism_is_refused_before_an_engine_starts(
    tiny_models: dict[str, str],
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    engine_args = EngineArgs(
        tiny_models["llama"],
        pipeline_parallel_size=2,
        speculative_config={"method": "selfspec"},
    )
    with pytest.raises(UnsupportedModelError, match="pipeline_parallel_size is 2"):
        engine_args.create_engine_config()
