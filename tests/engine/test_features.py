"""What a request can ask for, and what happens to it, leaves the text plain vLLM's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import (
    KV_CACHE_BYTES,
    Engines,
    counter,
    prompts_of,
    run,
    scheduler_of,
    token_ids,
)
from helpers.environment import IS_SHORT, IS_V2
from helpers.models import NUM_LAYERS

pytestmark = [
    pytest.mark.v2,
    pytest.mark.skipif(IS_V2 and IS_SHORT, reason="long there: make test-all"),
]
PLAN = {"exit_layer": NUM_LAYERS // 4, "num_speculative_tokens": 4}
# Room for two or three of eight long requests: see test_identity.
TIGHT: dict[str, Any] = {"kv_cache_memory_bytes": 384 << 10, "block_size": 32}


def params(**overrides: Any) -> Any:
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    return SamplingParams(**{**defaults, **overrides})


def structured(**kind: Any) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return params(structured_outputs=StructuredOutputsParams(**kind), ignore_eos=False)


REQUESTS: dict[str, Callable[[], Any]] = {
    "guided regex": lambda: structured(regex="[ab]{3,9}c[0-9]+z"),
    "guided grammar": lambda: structured(grammar='root ::= ("x" | "yy")+ "," [0-9]+'),
    "guided choice": lambda: structured(choice=["first", "second", "third one"]),
    "allowed tokens": lambda: params(allowed_token_ids=[*range(40, 80)]),
    "min_tokens": lambda: params(min_tokens=20, ignore_eos=False),
}


@pytest.fixture
def pair(tiny_models: dict[str, str], engines: Engines) -> tuple[Any, Any]:
    """A plain engine and one that drafts."""
    path = tiny_models["llama"]
    return engines.get(path), engines.get(path, PLAN)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.shows("Requests", what))
        for what in REQUESTS
    ],
)
def test_what_a_request_asks_for_is_kept_to(what: str, pair: tuple[Any, Any]) -> None:
    prompts = prompts_of(4)
    free, _ = run(pair[0], prompts, params())
    # A request that asks for nothing shares the batch.
    sampling = [*[REQUESTS[what]()] * 3, params()]
    expected, _ = run(pair[0], prompts, sampling)
    found, counts = run(pair[1], prompts, sampling)
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    changed = what != "min_tokens"  # a random model hardly ends a text by itself
    assert (token_ids(expected)[:3] != token_ids(free)[:3]) is changed


@pytest.mark.shows("Requests", "bad words")
def test_bad_words_are_kept_out(pair: tuple[Any, Any]) -> None:
    prompts = prompts_of(4)
    free, _ = run(pair[0], prompts, params())
    text = free[0].outputs[0].text
    sampling = [params(bad_words=[text[3], text[5:7]]), *[params()] * 3]
    expected, _ = run(pair[0], prompts, sampling)
    found, counts = run(pair[1], prompts, sampling)
    assert token_ids(found) == token_ids(expected)
    assert token_ids(found)[0] != token_ids(free)[0]
    assert counts.draft_tokens


@pytest.mark.shows("Refused", "`min_p`, `logit_bias`: by vLLM itself, with any drafts")
@pytest.mark.parametrize("asked", [{"min_p": 0.1}, {"logit_bias": {101: 3.0}}])
def test_what_vllm_refuses_beside_speculation_it_refuses(
    asked: dict[str, Any], pair: tuple[Any, Any]
) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(
        VLLMValidationError, match="min_p and logit_bias .* not yet supported with spec"
    ):
        run(pair[1], prompts_of(1), params(temperature=1, **asked))


@pytest.mark.shows("Requests", "seeds")
def test_a_seeded_request_gets_the_same_text_again(pair: tuple[Any, Any]) -> None:
    sampling = [params(temperature=1, seed=seed) for seed in (1, 2, 1)]
    prompts = [prompts_of(1)[0]] * 3
    first, second = (token_ids(run(pair[1], prompts, sampling)[0]) for _ in range(2))
    assert first == second
    assert first[0] == first[2] != first[1]


@pytest.mark.shows("Engine", "priority scheduling")
def test_priorities_with_preemption(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    settings = {**TIGHT, "scheduling_policy": "priority"}
    plain = engines.get(tiny_models["llama"], **settings)
    drafting = engines.get(tiny_models["llama"], PLAN, **settings)
    prompts, sampling = prompts_of(8, shortest=40), params(max_tokens=100)
    urgency = [7, 6, 5, 4, 3, 2, 1, 0]  # the last come first
    before = counter(drafting, "vllm:num_preemptions")
    expected, _ = run(plain, prompts, sampling, priority=urgency)
    found, _ = run(drafting, prompts, sampling, priority=urgency)
    assert token_ids(found) == token_ids(expected)
    assert counter(drafting, "vllm:num_preemptions") > before


def test_more_urgent_requests_come_before_preempted_ones(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    """A worker then knows of more requests than a step may have."""
    settings = {**TIGHT, "scheduling_policy": "priority", "max_num_seqs": 4}
    prompts, sampling = prompts_of(8, shortest=40), params(max_tokens=100)
    plain = engines.get(tiny_models["llama"], **settings)
    expected = [text for (text,) in token_ids(run(plain, prompts, sampling)[0])]
    spec = {**PLAN, "draft_length": "goodput"}
    llm = engines.get(tiny_models["llama"], spec, **settings)
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    known = getattr(runner, "requests", {})
    engine, found, nums_known = llm.llm_engine, {}, [0]

    def step() -> None:
        finished = (out for out in engine.step() if out.finished)
        found.update({out.request_id: out.outputs[0].token_ids for out in finished})
        nums_known.append(len(known))

    for number, prompt in enumerate(prompts):
        urgency = len(prompts) - number  # the last come first
        engine.add_request(str(number), prompt, sampling, priority=urgency)
        for _ in range(8 if number > 2 else 1):
            step()
    while engine.has_unfinished_requests():
        step()
    texts = [list(found[str(number)]) for number in range(len(prompts))]
    assert texts == expected
    assert max(nums_known) > 4 or IS_V2, "there were more than places"


@pytest.mark.shows("Requests", "aborted requests")
def test_aborted_requests_leave_nothing_behind(pair: tuple[Any, Any]) -> None:
    llm = pair[1]
    prompts = prompts_of(6)
    expected = token_ids(run(pair[0], prompts, params(max_tokens=40))[0])
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    engine, finished = llm.llm_engine, {}
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params(max_tokens=40))
    for step in range(200):
        for out in engine.step():
            if out.finished:
                finished[out.request_id.partition("-")[0]] = out
        if step in (2, 4):  # while it is drafted for
            engine.abort_request([str(step)])
        if not engine.has_unfinished_requests():
            break
    kept = ["0", "1", "3", "5"]
    assert [finished[key].outputs[0].token_ids for key in kept] == [
        expected[int(key)][0] for key in kept
    ]
    assert pool.get_num_free_blocks() == free


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param("fp8", marks=pytest.mark.shows("Engine", "fp8 KV cache")),
        pytest.param("auto", marks=pytest.mark.shows("Engine", "long contexts")),
    ],
)
def test_long_contexts(
    cache: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    settings = {
        "max_model_len": 1024,
        "kv_cache_dtype": cache,
        "kv_cache_memory_bytes": 2 * KV_CACHE_BYTES,
    }
    plain = engines.get(tiny_models["llama"], **settings)
    drafting = engines.get(tiny_models["llama"], PLAN, **settings)
    prompts = prompts_of(3, shortest=900)
    expected, _ = run(plain, prompts, params(max_tokens=60))
    found, counts = run(drafting, prompts, params(max_tokens=60))
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens


@pytest.mark.shows("Engine", "KV cache from a connector")
def test_prompts_whose_kv_comes_from_a_connector(
    tiny_models: dict[str, str], engines: Engines, tmp_path: Path
) -> None:
    """vLLM's example of one, which keeps it on disk; those that offload it to the CPU's
    memory want a GPU."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    connector = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(tmp_path)},
    )
    prompts = prompts_of(4, shortest=70)
    expected, _ = run(engines.get(tiny_models["llama"]), prompts, params())
    llm = engines.get(
        tiny_models["llama"], PLAN, kv_transfer_config=connector, block_size=32
    )
    try:
        for from_disk in (False, True):
            found, counts = run(llm, prompts, params())
            assert token_ids(found) == token_ids(expected)
            assert counts.draft_tokens
            assert all(out.num_cached_tokens > 0 for out in found) is from_disk
            llm.reset_prefix_cache()
    finally:  # it is the whole process's, and would ask every other engine for its data
        ensure_kv_transfer_shutdown()
