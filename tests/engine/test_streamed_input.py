"""A session whose prompt comes in pieces gets plain vLLM's text after each of them.

A piece asks for some tokens, and of these vLLM leaves the last one out before it reads
the next piece. Drafts that skip nothing are all accepted, so that nearly every piece
ends within an accepted draft, and the tokens behind its end must leave no trace.
"""

import asyncio
import copy
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpers.engines import (
    KV_CACHE_BYTES,
    Engines,
    counter,
    greedy,
    run,
    scheduler_of,
    token_ids,
)
from helpers.environment import IS_PART
from helpers.models import VOCAB_SIZE

NUM_DRAFTS = 4
EMPTY: dict[str, Any] = {"skip_layers": {}, "num_speculative_tokens": NUM_DRAFTS}
# Tokens of each piece, and how many are asked for after it. One piece is a single
# token, which vLLM schedules as it does a decode.
SHAPE = ((9, 7), (5, 3), (1, 6), (14, 8))

# The tokens of a piece, and what is asked for after it.
Piece = tuple[list[int], Any]


def params(max_tokens: int, **overrides: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    keys = {"temperature": 0, "ignore_eos": True, **overrides}
    delta = RequestOutputKind.DELTA  # vLLM takes no other one here
    return SamplingParams(max_tokens=max_tokens, output_kind=delta, **keys)


def random_tokens(num: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(2, VOCAB_SIZE, num).tolist()
    return found


def pieces(
    number: int = 0, shape: Sequence[tuple[int, int]] = SHAPE, **overrides: Any
) -> list[Piece]:
    return [
        (random_tokens(num_tokens, 100 * number + i), params(max_tokens, **overrides))
        for i, (num_tokens, max_tokens) in enumerate(shape)
    ]


def add(llm: Any, session: str, piece: Piece, is_last: bool = False) -> None:
    """As `AsyncLLM` does it, which closes a session by a request without meaning."""
    engine = llm.llm_engine
    request = engine.input_processor.process_inputs(
        session,
        {"prompt_token_ids": list(piece[0])},
        piece[1],
        supported_tasks=engine.get_supported_tasks(),
        resumable=not is_last,
    )
    request.external_req_id = session
    # There the engine is in another process, and has a copy of its own.
    engine.output_processor.add_request(copy.deepcopy(request), None, None, 0)
    engine.engine_core.add_request(request)


Texts = dict[str, list[list[int]]]


def hold(llm: Any, sessions: dict[str, list[Piece]], is_queued: bool = False) -> Texts:
    """What each session is answered, piece by piece.

    Args:
        llm: The engine.
        sessions: The pieces of each, by name.
        is_queued: Whether all pieces are there at once; otherwise the next one comes
            when the last one is answered.
    """
    left = {name: [*given] for name, given in sessions.items()}
    texts: Texts = defaultdict(lambda: [[]])

    def give(name: str) -> None:
        if left[name]:
            add(llm, name, left[name].pop(0))
        else:
            add(llm, name, sessions[name][-1], is_last=True)

    for name in sessions:
        while is_queued and left[name]:
            give(name)
        give(name)
    for _ in range(2000):
        if not llm.llm_engine.has_unfinished_requests():
            break
        for output in llm.llm_engine.step():
            name, sample = output.request_id, output.outputs[0]
            texts[name][-1] += sample.token_ids
            if sample.finish_reason is None:
                continue
            if len(texts[name]) < len(sessions[name]):
                texts[name].append([])
            if not is_queued:
                give(name)
    assert not llm.llm_engine.has_unfinished_requests(), "a session hangs"
    return dict(texts)


def drafting(
    engines: Engines,
    model: str,
    policy: str = "fixed",
    draft_sample_method: str = "greedy",
    **settings: Any,
) -> Any:
    keys = {"draft_length": policy, "draft_sample_method": draft_sample_method}
    return engines.get(model, {**EMPTY, **keys}, **settings)


POLICIES = ["fixed", "threshold"] if IS_PART else ["fixed", "threshold", "goodput"]


@pytest.mark.v2
@pytest.mark.parametrize("is_queued", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_sessions_get_plain_vllms_text(
    policy: str, is_queued: bool, tiny_models: dict[str, str], engines: Engines
) -> None:
    path = tiny_models["llama"]
    num = 2 if IS_PART else 4
    sessions = {f"{policy}-{is_queued}-{i}": pieces(i) for i in range(num)}
    expected = hold(engines.get(path), sessions, is_queued)
    assert [*map(len, next(iter(expected.values())))] == [most for _, most in SHAPE]
    assert hold(drafting(engines, path, policy), sessions, is_queued) == expected


def test_pieces_do_end_within_accepted_drafts(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    """Otherwise the other tests would test nothing."""
    llm = drafting(engines, tiny_models["llama"])
    accepted = counter(llm, "vllm:spec_decode_num_accepted_tokens")
    texts = hold(llm, {"one": pieces()})
    accepted = counter(llm, "vllm:spec_decode_num_accepted_tokens") - accepted
    # Each piece's first token is no draft's.
    assert accepted > sum(map(len, texts["one"])) - len(SHAPE)


def answer(llm: Any, session: str, piece: Piece) -> list[int]:
    """What an engine without other requests says after one more piece."""
    add(llm, session, piece)
    found: list[int] = []
    for _ in range(200):
        for output in llm.llm_engine.step():
            found += output.outputs[0].token_ids
            if output.outputs[0].finish_reason is not None:
                return found
    raise AssertionError(f"{session} hangs")


@pytest.mark.v2
def test_a_stop_token_within_a_draft_ends_a_piece(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    path = tiny_models["llama"]
    plain, llm = engines.get(path), drafting(engines, path)
    tokens, _ = pieces()[0]
    stop = answer(plain, "free", (tokens, params(8)))[2]
    add(plain, "free", (tokens, params(8)), is_last=True)
    given = [(tokens, params(8, stop_token_ids=[stop])), *pieces()[1:]]
    expected = hold(plain, {"stopped": given})
    assert expected["stopped"][0][-1] == stop and len(expected["stopped"][0]) <= 3
    assert hold(llm, {"stopped": given}) == expected


@pytest.mark.v2
@pytest.mark.parametrize("policy", ["fixed"] if IS_PART else POLICIES)
def test_other_requests_find_no_dropped_token_in_the_prefix_cache(
    policy: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    path = tiny_models["llama"]
    llm = drafting(engines, path, policy, block_size=32)
    given = pieces(5, ((25, 3), (3, 3), (30, 4), (9, 2), (40, 3)))
    answer(llm, "session", given[0])
    session = scheduler_of(llm).requests["session"]
    for piece in given[1:]:
        answer(llm, "session", piece)
    add(llm, "session", given[0], is_last=True)
    # All that the engine takes to have been said, to one block and to the end.
    said = list(session.all_token_ids)
    prompts = [{"prompt_token_ids": said[:num]} for num in (40, 70, len(said))]
    expected, _ = run(engines.get(path), prompts, greedy(12))
    found, _ = run(llm, prompts, greedy(12))
    assert token_ids(found) == token_ids(expected)
    assert [output.num_cached_tokens for output in found] == [32, 64, 96]


@pytest.mark.v2
def test_sessions_that_are_preempted_go_on(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    path = tiny_models["llama"]
    # Room for 384 tokens: see test_identity.
    llm = drafting(engines, path, kv_cache_memory_bytes=384 << 10, block_size=32)
    shape = ((30, 40), (20, 30), (1, 30))
    sessions = {f"session {i}": pieces(i, shape) for i in range(4)}
    expected = hold(engines.get(path), sessions, is_queued=True)
    before = counter(llm, "vllm:num_preemptions")
    assert hold(llm, sessions, is_queued=True) == expected
    assert counter(llm, "vllm:num_preemptions") > before


@pytest.mark.parametrize("is_queued", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_token_sampled_after_a_piece_is_distributed_as_plain_vllms(
    num_tokens: int, is_queued: bool, tiny_models: dict[str, str], engines: Engines
) -> None:
    """By a chi-squared test that fails a right build once in a million times."""
    path, num_samples = tiny_models["llama"], 1000
    shape = ((9, 1), (num_tokens, 1))  # nothing sampled is kept, so all say the same
    given = pieces(3, shape, temperature=1)
    prompt = {"prompt_token_ids": given[0][0] + given[1][0]}
    wanted, _ = run(engines.get(path), [prompt], params(1, temperature=1, logprobs=20))
    logprobs = wanted[0].outputs[0].logprobs[0]
    likely = {k: np.exp(v.logprob) for k, v in logprobs.items() if v.logprob > -4}
    llm = drafting(engines, path, draft_sample_method="probabilistic", max_num_seqs=64)
    sessions = {f"session {i}": given for i in range(num_samples)}
    found = Counter(last for _, (last,) in hold(llm, sessions, is_queued).values())
    counts = [found[token] for token in likely]
    shares = [*likely.values()]
    p_value = stats.chisquare(
        [*counts, num_samples - sum(counts)],
        num_samples * np.array([*shares, 1 - sum(shares)]),
    ).pvalue
    assert p_value > 1e-6


def test_a_seeded_session_gets_the_same_text_again(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    llm = drafting(engines, tiny_models["llama"])
    sessions = {"seeded": pieces(temperature=1, seed=7)}
    first, second = (hold(llm, sessions, is_queued) for is_queued in (True, False))
    assert first == second
    other = {"seeded": pieces(temperature=1, seed=8)}
    assert hold(llm, other) != first


async def converse(engine: Any, given: list[Piece]) -> list[list[int]]:
    """What `AsyncLLM` answers, each piece given once the last one is answered."""
    from vllm.engine.protocol import StreamingInput

    texts: list[list[int]] = []
    is_answered = asyncio.Event()

    async def stream() -> AsyncIterator[Any]:
        for tokens, sampling in given:
            texts.append([])
            yield StreamingInput({"prompt_token_ids": tokens}, sampling)
            await is_answered.wait()
            is_answered.clear()

    async for output in engine.generate(stream(), given[0][1], "session"):
        for sample in output.outputs:
            texts[-1] += sample.token_ids
            if sample.finish_reason is not None:
                is_answered.set()
    return texts


def test_async_llm_answers_as_plain_vllm_does(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    path = tiny_models["llama"]
    spec = {"method": "selfspec", "draft_length": "fixed", **EMPTY}
    args = AsyncEngineArgs(
        path,
        speculative_config=spec,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )

    async def session() -> list[list[int]]:
        engine = AsyncLLM.from_engine_args(args)
        try:
            return await converse(engine, pieces())
        finally:
            engine.shutdown()

    expected = hold(engines.get(path), {"session": pieces()})
    assert asyncio.run(session()) == expected["session"]
