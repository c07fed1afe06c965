"""A request with a seed gets plain vLLM's very text, whatever is drafted."""

import itertools
from typing import Any

import pytest

from helpers.engines import Engines, counter, prompts_of, run, token_ids, with_costs
from helpers.environment import IS_PART, IS_V2
from helpers.models import NUM_LAYERS

pytestmark = pytest.mark.v2
NUM_TOKENS = 8 if IS_PART else 24
ASKED: dict[str, dict[str, Any]] = {
    "T=1": {"temperature": 1.0},
    "T=0.7": {"temperature": 0.7},
    "top_k": {"temperature": 1.3, "top_k": 12},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_k and top_p": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    "penalties": {
        "temperature": 1.0,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.3,
    },
    "bad words": {"temperature": 1.0, "bad_words": ["a", "bc"]},
    "min_tokens": {"temperature": 1.5, "min_tokens": 6, "ignore_eos": False},
    "allowed tokens": {"temperature": 1.0, "allowed_token_ids": [*range(30, 90)]},
    "greedy": {"temperature": 0.0},
    "n": {"temperature": 1.0, "n": 3},
}
SKIP_SETS: dict[str, dict[str, Any]] = {
    "nothing skipped": {"skip_layers": {}},
    "half": {"exit_layer": NUM_LAYERS // 2},
    "sublayers": {"skip_layers": {"attention": [1, 2], "mlp": [2]}},
}
POLICIES = ("fixed", "threshold", "thompson", "thompson-calibrated", "goodput")
METHODS = ("probabilistic", "greedy")
# Costs at which drafting pays for some requests and not for others.
COSTS = ((1, 8, 40), (0.05, 0.06, 0.07), (1e-3, 1e-3, 1e-3))


def params(seed: int | None, **asked: Any) -> Any:
    from vllm import SamplingParams

    defaults = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return SamplingParams(seed=seed, **{**defaults, **asked})


def company_of(name: str, asked: dict[str, Any]) -> list[Any]:
    """Seeded requests, alone or in a batch with others."""
    seeded = [params(seed, **asked) for seed in (7, 8)]
    if name == "alone":
        return seeded[:1]
    free = params(None, temperature=1.0, max_tokens=NUM_TOKENS // 2)
    return [free, seeded[0], params(None, temperature=0.0), seeded[1], free]


def drafting(engines: Engines, model: str, **keys: Any) -> Any:
    return engines.get(model, {"num_speculative_tokens": 4, **keys})


def seeded_texts(llm: Any, sampling: list[Any]) -> tuple[list[list[list[int]]], Any]:
    """The token ids of the seeded requests, and what speculation did."""
    outputs, counts = run(llm, prompts_of(len(sampling)), sampling)
    texts = token_ids(outputs)
    is_seeded = [asked.seed is not None for asked in sampling]
    return list(itertools.compress(texts, is_seeded)), counts


@pytest.fixture
def model(tiny_models: dict[str, str]) -> str:
    return tiny_models["llama"]


@pytest.mark.shows("Requests", "seeds")
@pytest.mark.parametrize("company", ["alone", "mixed"])
@pytest.mark.parametrize("what", ["T=0.7", "top_p"] if IS_PART else ASKED)
def test_a_seeded_request_gets_plain_vllms_text(
    what: str, company: str, model: str, engines: Engines
) -> None:
    sampling = company_of(company, ASKED[what])
    expected, _ = seeded_texts(engines.get(model), sampling)
    method = {"draft_sample_method": "probabilistic"}
    llm = drafting(engines, model, **SKIP_SETS["half"], **method)
    found, counts = seeded_texts(llm, sampling)
    assert found == expected
    assert counts.draft_tokens > counts.accepted_tokens > 0


@pytest.mark.parametrize("policy", ["goodput"] if IS_PART else POLICIES)
@pytest.mark.parametrize("method", ["probabilistic"] if IS_PART else METHODS)
@pytest.mark.parametrize("skipped", ["half"] if IS_PART else SKIP_SETS)
def test_the_text_does_not_depend_on_the_drafts(
    skipped: str,
    method: str,
    policy: str,
    model: str,
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = company_of("mixed", ASKED["top_k and top_p"])
    expected, _ = seeded_texts(engines.get(model), sampling)
    keys = {"draft_length": policy, "draft_sample_method": method}
    llm = drafting(engines, model, **SKIP_SETS[skipped], **keys)
    if policy == "goodput":
        with_costs(llm, COSTS, monkeypatch)
    found, counts = seeded_texts(llm, sampling)
    assert found == expected
    assert counts.draft_tokens


@pytest.mark.parametrize("what", ["top_p"] if IS_PART else ["T=1", "top_k", "top_p"])
def test_a_draft_that_skips_nothing_draws_what_the_target_draws(
    what: str, model: str, engines: Engines
) -> None:
    method = {"draft_sample_method": "probabilistic"}
    llm = drafting(engines, model, **SKIP_SETS["nothing skipped"], **method)
    sampling = [params(seed, **ASKED[what]) for seed in (1, 2, 3)]
    _, counts = seeded_texts(llm, sampling)
    assert counts.accepted_tokens == counts.draft_tokens > NUM_TOKENS


@pytest.mark.skipif(IS_PART, reason="long there: make test-all")
def test_a_seeded_request_that_is_preempted_goes_on_as_plain_vllms(
    model: str, engines: Engines
) -> None:
    tight = {"kv_cache_memory_bytes": 384 << 10, "block_size": 32}
    spec = {"num_speculative_tokens": 4, **SKIP_SETS["half"]}
    spec["draft_sample_method"] = "probabilistic"
    llm = engines.get(model, spec, **tight)
    sampling = [params(seed, **ASKED["T=1"], max_tokens=100) for seed in range(8)]
    prompts = prompts_of(8, shortest=40)
    before = counter(llm, "vllm:num_preemptions")
    expected, _ = run(engines.get(model), prompts, sampling)
    found, _ = run(llm, prompts, sampling)
    assert token_ids(found) == token_ids(expected)
    assert counter(llm, "vllm:num_preemptions") > before


@pytest.mark.skipif(IS_V2, reason="its noise has no generator")
def test_a_prompt_in_chunks_leaves_a_seed_where_it_was(
    model: str, engines: Engines
) -> None:
    """Plain vLLM's engine stops there, on a CPU; in one piece it is the reference."""
    spec = {"num_speculative_tokens": 4, **SKIP_SETS["half"]}
    spec["draft_sample_method"] = "probabilistic"
    llm = engines.get(model, spec, max_num_batched_tokens=32)
    prompts, sampling = prompts_of(3, shortest=60), company_of("alone", ASKED["T=1"])
    sampling = [*sampling, params(None, **ASKED["T=1"]), params(9, **ASKED["top_p"])]
    expected, _ = run(engines.get(model), prompts, sampling)
    found, counts = run(llm, prompts, sampling)
    for which in (0, 2):
        assert token_ids(found)[which] == token_ids(expected)[which]
    assert counts.draft_tokens


def test_the_same_seed_gives_the_same_text_in_other_company(
    model: str, engines: Engines
) -> None:
    method = {"draft_sample_method": "probabilistic"}
    llm = drafting(engines, model, **SKIP_SETS["half"], **method)
    prompt, asked = prompts_of(1)[0], params(7, **ASKED["T=1"])
    free = params(None, **ASKED["T=1"])
    alone, _ = run(llm, [prompt], [asked])
    beside, _ = run(llm, [*prompts_of(4, seed=1), prompt], [*[free] * 4, asked])
    assert token_ids(alone)[0] == token_ids(beside)[-1]


def break_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifies by the noise of one position further on."""
    import vllm_selfspec.draft.seeded as seeded

    if IS_V2:
        right_v2 = seeded.verify_on_device

        def shifted(*args: Any) -> Any:
            sampler, logits, drafted, positions, *rest = args
            return right_v2(sampler, logits, drafted, positions + 1, *rest)

        monkeypatch.setattr(seeded, "verify_on_device", shifted)
        return
    right = seeded.SeededRows.verify

    def one_further(self: Any, *args: Any) -> None:
        import torch

        for generator in self._generators.values():
            torch.randint(0, 2**31, (1,), generator=generator)
        right(self, *args)

    monkeypatch.setattr(seeded.SeededRows, "verify", one_further)


def test_noise_of_another_position_is_noticed(
    model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = company_of("mixed", ASKED["T=1"])
    expected, _ = seeded_texts(engines.get(model), sampling)
    method = {"draft_sample_method": "probabilistic"}
    llm = drafting(engines, model, **SKIP_SETS["half"], **method)
    break_the_noise(monkeypatch)
    found, _ = seeded_texts(llm, sampling)
    assert found != expected


@pytest.mark.parametrize(
    "mode", ["raw_logprobs"] if IS_PART else ["raw_logprobs", "processed_logprobs"]
)
def test_logprobs_of_seeded_requests_are_plain_vllms(
    mode: Any, model: str, engines: Engines
) -> None:
    sampling = [params(seed, **ASKED["top_k"], logprobs=3) for seed in (5, 6)]
    spec = {"num_speculative_tokens": 4, **SKIP_SETS["half"]}
    spec["draft_sample_method"] = "probabilistic"
    plain = engines.get(model, logprobs_mode=mode)
    llm = engines.get(model, spec, logprobs_mode=mode)
    expected, _ = run(plain, prompts_of(2), sampling)
    found, _ = run(llm, prompts_of(2), sampling)
    assert token_ids(found) == token_ids(expected)
    assert_close(logprobs(found), logprobs(expected))


def logprobs(outputs: list[Any]) -> list[dict[int, float]]:
    """Log-probabilities by token, of every position of every output."""
    return [
        {token: entry.logprob for token, entry in position.items()}
        for output in outputs
        for position in output.outputs[0].logprobs
    ]


def assert_close(
    found: list[dict[int, float]], expected: list[dict[int, float]]
) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        # Sums of float32 in another order, over logits of some tens.
        assert mine == pytest.approx(theirs, abs=1e-4)
