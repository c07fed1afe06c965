"""Greedy output equals plain vLLM's token for token, in float32, whatever is skipped.

Float32, because in bf16 plain vLLM already flips near-ties when its batch size changes:
verifying k + 1 rows and decoding one round differently.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from helpers.engines import Engines, counter, prompts_of, run, token_ids
from helpers.environment import IS_PART, IS_V2
from helpers.models import DEMO_MODEL, FAMILIES, NUM_LAYERS
from vllm_selfspec.engine.spec_counters import Counts

pytestmark = pytest.mark.v2
MODELS = (*FAMILIES, "demo")
LENGTHS = (1, 4, 8)


def plans(num_layers: int) -> dict[str, dict[str, Any]]:
    """A draft that is right, one that is often right, and two that are mostly wrong."""
    every = list(range(num_layers))
    return {
        "empty": {"skip_layers": {"attention": [], "mlp": []}},
        "middling": {"skip_layers": "auto"},
        "absurd": {"skip_layers": {"attention": every, "mlp": every[:-1]}},
        "exit": {"exit_layer": num_layers // 4},
    }


PLANS = tuple(plans(NUM_LAYERS))


@dataclass(frozen=True)
class Case:
    model: str
    plan: str
    k: int
    eager: bool


# Every value of every column meets every value of every other (see the first test).
CASES = [
    Case(model, plan, k=LENGTHS[(m + 2 * p) % 3], eager=(m + p) % 4 != 0)
    for (m, model), (p, plan) in itertools.product(enumerate(MODELS), enumerate(PLANS))
]
# Every value, and every model with two plans or more: of a model's four cases one is
# compiled, and of the others the first and the last are here.
EAGER_CASES = [case for case in CASES if case.eager]
PART_OF_CASES = [*EAGER_CASES[0::3], *EAGER_CASES[2::3], CASES[0]]


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "demo": "LlamaForCausalLM",
}


def marked(cases: list[Case]) -> list[Any]:
    """Each shows that its model is supported."""
    return [
        pytest.param(
            case,
            marks=pytest.mark.shows("Models", ARCHITECTURES[case.model]),
            id=str(case),
        )
        for case in cases
    ]


def test_the_part_has_every_value() -> None:
    for column in ("model", "plan", "k", "eager"):
        values = {getattr(case, column) for case in CASES}
        assert {getattr(case, column) for case in PART_OF_CASES} == values
    models = [case.model for case in PART_OF_CASES]
    assert all(models.count(model) > 1 for model in MODELS)


def test_cases_cover_all_pairs() -> None:
    columns = {"model": MODELS, "plan": PLANS, "k": LENGTHS, "eager": (True, False)}
    for (a, a_values), (b, b_values) in itertools.combinations(columns.items(), 2):
        seen = {(getattr(case, a), getattr(case, b)) for case in CASES}
        missing = set(itertools.product(a_values, b_values)) - seen
        assert not missing, f"no case has {a}, {b} = {sorted(missing, key=str)}"


@pytest.fixture(scope="session")
def paths(tiny_models: dict[str, str]) -> dict[str, str]:
    return {**tiny_models, "demo": str(DEMO_MODEL)}


def params(**overrides: Any) -> Any:
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": 16 if IS_V2 else 32, "ignore_eos": True}
    return SamplingParams(**{**defaults, **overrides})


def json_params() -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    structured = StructuredOutputsParams(json=schema)
    return params(structured_outputs=structured, max_tokens=40, ignore_eos=False)


PENALTIES = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.2,
}

# What is asked of one and the same engine: prompts, and how to sample.
REQUESTS: dict[str, tuple[int, Callable[[], Any]]] = {
    "one request": (1, params),
    "eight requests of different lengths": (8, params),
    # vLLM refuses n=2 at temperature 0; the likeliest token alone is the same thing.
    "two samples each": (3, lambda: params(n=2, temperature=1, top_k=1, max_tokens=16)),
    "penalties": (4, lambda: params(**PENALTIES)),
    "logprobs": (2, lambda: params(logprobs=3, max_tokens=12)),
    "a JSON schema": (2, json_params),
}


def batches() -> dict[str, tuple[list[Any], list[Any]]]:
    """Prompts, and how to sample each. For the V2 runner all of it in one batch: under
    the interpreter a step costs about the same, be it for one request or for many."""
    each = {
        what: (prompts_of(num_reqs), [make_params() for _ in range(num_reqs)])
        for what, (num_reqs, make_params) in REQUESTS.items()
    }
    if not IS_V2:
        return each
    last = [(prompts[-1], sampling[-1]) for prompts, sampling in each.values()]
    prompts, sampling = map(list, zip(*last, strict=True))
    return {"one request of each kind": (prompts, sampling)}


def assert_same_tokens(plain: list[Any], drafted: list[Any], what: str) -> None:
    for number, (a, b) in enumerate(
        zip(token_ids(plain), token_ids(drafted), strict=True)
    ):
        assert a == b, f"{what}: request {number} differs from plain vLLM"
    reasons = [
        [(s.finish_reason, s.stop_reason) for out in outs for s in out.outputs]
        for outs in (plain, drafted)
    ]
    assert reasons[0] == reasons[1], f"{what}: finished for another reason"


@pytest.mark.shows("Requests", "penalties")
@pytest.mark.shows("Requests", "two samples of a prompt")
@pytest.mark.shows("Requests", "JSON schema")
@pytest.mark.parametrize("case", marked(PART_OF_CASES if IS_PART else CASES))
def test_greedy_output_is_plain_vllms(
    case: Case, paths: dict[str, str], engines: Engines
) -> None:
    path = paths[case.model]
    num_layers = 12 if case.model == "demo" else NUM_LAYERS
    spec = {**plans(num_layers)[case.plan], "num_speculative_tokens": case.k}
    plain = engines.get(path, enforce_eager=case.eager)
    drafting = engines.get(path, spec, enforce_eager=case.eager)
    for what, (prompts, sampling) in batches().items():
        expected, _ = run(plain, prompts, sampling)
        found, counts = run(drafting, prompts, sampling)
        assert_same_tokens(expected, found, what)
        if what != "a JSON schema":  # there vLLM drops drafts that break the grammar
            assert counts.draft_tokens > 0, f"{what}: nothing was drafted"


# The usual first threshold is for text; of these prompts a draft is never that sure.
STOPPING: dict[str, Any] = {
    "threshold": {"policy": "threshold", "start": 0.3},
    "thompson": "thompson",
    "thompson-calibrated": "thompson-calibrated",
}


@pytest.mark.parametrize("policy", STOPPING)
@pytest.mark.parametrize("plan", ["empty", "middling", "exit"])
def test_rows_that_stop_drafting_leave_the_text_alone(
    policy: str, plan: str, paths: dict[str, str], engines: Engines
) -> None:
    # A trained model: what random ones draft has no confidence to tell apart.
    spec = {**plans(12)[plan], "num_speculative_tokens": 4}
    plain = engines.get(paths["demo"])
    llm = engines.get(paths["demo"], {**spec, "draft_length": STOPPING[policy]})
    for what, (prompts, sampling) in batches().items():
        expected, _ = run(plain, prompts, sampling)
        found, counts = run(llm, prompts, sampling)
        assert_same_tokens(expected, found, what)
        if what == "eight requests of different lengths":
            if plan == "empty":
                assert counts.accepted_tokens == counts.draft_tokens
                continue
            assert counts.drafts < counts.draft_tokens < 4 * counts.drafts, (
                f"all drafts were of one length: {counts}"
            )


@pytest.mark.parametrize("family", MODELS)
def test_empty_skip_set_accepts_every_draft_token(
    family: str, paths: dict[str, str], engines: Engines
) -> None:
    llm = engines.get(paths[family], plans(NUM_LAYERS)["empty"])
    for num_reqs in (1, 8):
        _, counts = run(
            llm, prompts_of(num_reqs), params(max_tokens=21 if IS_PART else 41)
        )
        assert counts.draft_tokens > 0
        assert counts.accepted_tokens == counts.draft_tokens, (
            f"with nothing skipped the draft is the target, yet {counts} "
            f"at {num_reqs} requests"
        )


def both(
    engines: Engines, path: str, plan: str, num_layers: int = NUM_LAYERS, **kwargs: Any
) -> tuple[Any, Any]:
    """A plain and a drafting engine with the same settings."""
    spec = {**plans(num_layers)[plan], "num_speculative_tokens": 4}
    return engines.get(path, **kwargs), engines.get(path, spec, **kwargs)


def compare(
    pair: tuple[Any, Any], prompts: list[Any], sampling: Any, what: str
) -> tuple[list[Any], Counts]:
    expected, _ = run(pair[0], prompts, sampling)
    found, counts = run(pair[1], prompts, sampling)
    assert_same_tokens(expected, found, what)
    return found, counts


SMALL_PLANS = pytest.mark.parametrize(
    "plan", ["exit"] if IS_PART else ["empty", "middling", "exit"]
)


@pytest.mark.shows("Engine", "chunked prefill")
@SMALL_PLANS
def test_chunked_prefill_forced_by_a_small_token_budget(
    plan: str, paths: dict[str, str], engines: Engines
) -> None:
    pair = both(
        engines, paths["llama"], plan, max_num_batched_tokens=48, max_num_seqs=4
    )
    _, counts = compare(pair, prompts_of(8, shortest=70), params(), "chunked prefill")
    assert counts.draft_tokens > 0
    if plan == "empty":
        assert counts.accepted_tokens == counts.draft_tokens, (
            "a request in partial prefill must neither draft nor disturb the others"
        )


@pytest.mark.shows("Engine", "prefix caching")
@SMALL_PLANS
def test_prefix_caching_with_shared_prefixes(
    plan: str, paths: dict[str, str], engines: Engines
) -> None:
    pair = both(engines, paths["qwen3"], plan, block_size=32)
    shared = prompts_of(1, shortest=100)[0]["prompt_token_ids"]
    tails = [p["prompt_token_ids"] for p in prompts_of(6, seed=1)]
    prompts = [{"prompt_token_ids": shared + tail} for tail in tails]
    for turn in ("cold", "warm"):
        found, counts = compare(pair, prompts, params(), f"{turn} prefix cache")
        if plan == "empty":
            assert counts.accepted_tokens == counts.draft_tokens
    assert all(out.num_cached_tokens >= 96 for out in found), "nothing was cached"
    # The drafts' own KV must not have been cached: a prompt that goes on with what was
    # generated reads the blocks that drafting wrote to.
    longer = [
        {"prompt_token_ids": p["prompt_token_ids"] + list(out.outputs[0].token_ids)}
        for p, out in zip(prompts, found, strict=True)
    ]
    compare(pair, longer, params(), "prompt that goes on with generated text")


@pytest.mark.shows("Engine", "preemption")
@SMALL_PLANS
def test_preemption_forced_by_a_tiny_kv_cache(
    plan: str, paths: dict[str, str], engines: Engines
) -> None:
    # 4 layers x 2 (K and V) x 32 (head size) x 4 bytes = 1 KiB a token: 384 tokens,
    # room for two or three of the eight requests when they are long.
    settings: dict[str, Any] = {"kv_cache_memory_bytes": 384 << 10, "block_size": 32}
    pair = both(engines, paths["llama"], plan, **settings)
    before = counter(pair[1], "vllm:num_preemptions")
    sampling = params(max_tokens=24 if IS_V2 else 100)
    compare(pair, prompts_of(8, shortest=40), sampling, "preemption")
    assert counter(pair[1], "vllm:num_preemptions") > before, (
        "nothing was preempted: the test tests nothing"
    )


@pytest.mark.shows("Requests", "max_model_len inside a draft")
@SMALL_PLANS
@pytest.mark.parametrize("room", [2, 5] if IS_PART else [1, 2, 3, 5, 6])
def test_max_model_len_reached_inside_a_draft(
    plan: str, room: int, paths: dict[str, str], engines: Engines
) -> None:
    pair = both(engines, paths["llama"], plan, max_model_len=128)
    prompts = [*prompts_of(1, shortest=128 - room), *prompts_of(3, shortest=90)]
    found, _ = compare(pair, prompts, params(max_tokens=None), "max_model_len")
    assert [len(out.outputs[0].token_ids) for out in found] == [
        128 - len(prompt["prompt_token_ids"]) for prompt in prompts
    ]


@pytest.mark.shows("Requests", "EOS, stop tokens and stop strings inside a draft")
@SMALL_PLANS
def test_eos_and_stop_inside_a_draft(
    plan: str, paths: dict[str, str], engines: Engines
) -> None:
    pair = both(engines, paths["qwen2"], plan)
    prompts = prompts_of(4)
    free, _ = run(pair[0], prompts, params())
    texts = [out.outputs[0].text for out in free]
    tokens = token_ids(free)[0][0]
    # Each place within a draft of 4, and in the next.
    for at in (2, 6) if IS_PART else (1, 2, 3, 4, 6):
        stopped, _ = compare(
            pair, prompts, params(stop_token_ids=[tokens[at]]), f"stop token at {at}"
        )
        assert stopped[0].outputs[0].finish_reason == "stop"
        compare(pair, prompts, params(stop=[texts[0][at : at + 2]]), f"stop at {at}")
        held = params(stop_token_ids=[tokens[at]], min_tokens=14)
        compare(pair, prompts, held, f"min_tokens beyond a stop token at {at}")


@pytest.mark.shows("Requests", "logprobs of text and prompt")
def test_logprobs_equal_plain_vllms(paths: dict[str, str], engines: Engines) -> None:
    pair = both(engines, paths["llama"], "middling")
    sampling = params(logprobs=3, prompt_logprobs=2)
    plain, _ = run(pair[0], prompts_of(3), sampling)
    found, _ = run(pair[1], prompts_of(3), sampling)
    for a, b in zip(plain, found, strict=True):
        for kind in (lambda o: o.prompt_logprobs, lambda o: o.outputs[0].logprobs):
            for step_a, step_b in zip(kind(a), kind(b), strict=True):
                expected = {t: lp.logprob for t, lp in (step_a or {}).items()}
                got = {t: lp.logprob for t, lp in (step_b or {}).items()}
                # Float32 rounding of a few hundred additions, in another order.
                assert got == pytest.approx(expected, abs=1e-4)
