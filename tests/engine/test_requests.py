"""Whatever a request asks for, it is answered as by plain vLLM, or refused: none hangs.

`request_fields` says of each field what becomes of it; here that is held against the
releases that are supported, and against 200 random requests.
"""

import ast
import itertools
import random
from typing import Any

import numpy as np
import pytest

from helpers.engines import Engines, counter, prompts_of, scheduler_of, with_costs
from helpers.environment import IS_SHORT, IS_V2
from helpers.models import NUM_LAYERS, VOCAB_SIZE
from helpers.random_requests import DRAWS, THINK, WRITTEN, Asked, random_requests
from helpers.vllm_source import VERSIONS, source_of
from vllm_selfspec.engine.request_fields import (
    REQUEST_FIELDS,
    SAMPLING_FIELDS,
    Fate,
    Field,
)

PLAN = {"exit_layer": NUM_LAYERS // 2, "num_speculative_tokens": 4}
NUM_REQUESTS = 200
BATCH = 5
# A batch of these takes some dozen steps that emit, and hundreds that wait for a
# grammar to be compiled.
MAX_STEPS = 20_000
# Logits of one row and of several differ by rounding in float32.
TOLERANCE = 2e-4
DRAFTED = "vllm:spec_decode_num_draft_tokens"

Answer = dict[int, Any]  # vLLM's output, or the error, by the request's number


def refusals() -> tuple[type[Exception], ...]:
    from vllm.exceptions import VLLMValidationError

    return (VLLMValidationError, ValueError, TypeError)


def answers(llm: Any, batch: list[Asked]) -> Answer:
    """The outputs of requests that run together; a refusal is in place of its output.

    Fails when the engine does not come to an end with them.
    """
    engine, found = llm.llm_engine, dict[int, Any]()
    for number, asked in enumerate(batch):
        try:
            prompt = {"prompt_token_ids": asked.prompt}
            engine.add_request(str(number), prompt, asked.params())
        except refusals() as error:
            found[number] = error
    for step in itertools.count():
        if not engine.has_unfinished_requests():
            return found
        left = len(batch) - len(found)
        assert step < MAX_STEPS, f"{left} of {batch} run after {step} steps"
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = output
    raise AssertionError


def assert_same_logprobs(found: Any, expected: Any, is_overwritten: bool) -> None:
    """Logprobs of one text: a mapping from token to logprob at each position.

    Args:
        found: vLLM's, of the drafting engine.
        expected: vLLM's, of the plain engine.
        is_overwritten: Whether a neighbour's logprob_token_ids are in the place of all
            but the emitted token's.
    """
    assert (found is None) is (expected is None)
    for ours, plain in zip(found or (), expected or (), strict=True):
        if plain is None:  # the first token of a prompt
            assert ours is None
            continue
        # vLLM fills rows up with -inf for token 0.
        ours, plain = (
            {t: lp for t, lp in each.items() if lp.logprob > -np.inf}
            for each in (ours, plain)
        )
        if is_overwritten:
            ours = {t: lp for t, lp in ours.items() if t in plain}
            plain = {t: lp for t, lp in plain.items() if t in ours}
            assert plain
        assert ours.keys() == plain.keys()
        for token, logprob in plain.items():
            assert ours[token].logprob == pytest.approx(logprob.logprob, abs=TOLERANCE)


def assert_same(
    asked: Asked,
    found: Any,
    expected: Any,
    exact: bool = True,
    is_overwritten: bool = False,
) -> None:
    """One request's answer is plain vLLM's, or of its shape where it is not `exact`."""
    assert_same_logprobs(found.prompt_logprobs, expected.prompt_logprobs, False)
    ours, plain = found.prompt_token_id_logprobs, expected.prompt_token_id_logprobs
    assert (ours is None) is (plain is None)
    assert ours is None or np.allclose(ours, plain, atol=TOLERANCE)
    assert len(found.outputs) == len(expected.outputs)
    for ours, plain in zip(found.outputs, expected.outputs, strict=True):
        if not exact:
            assert_finished(asked, ours)
            continue
        assert list(ours.token_ids) == list(plain.token_ids)
        assert ours.text == plain.text
        assert ours.finish_reason == plain.finish_reason
        assert ours.stop_reason == plain.stop_reason
        assert_same_logprobs(ours.logprobs, plain.logprobs, is_overwritten)


def _is_exact(asked: Asked) -> bool:
    return asked.is_greedy or asked.fields.get("seed") is not None


def assert_finished(asked: Asked, sample: Any) -> None:
    """A text that was drawn has the shape that was asked for."""
    assert sample.finish_reason is not None
    assert 1 <= len(sample.token_ids) <= asked.fields["max_tokens"]
    wants = any(asked.fields.get(f) is not None for f in LOGPROBS)
    assert (sample.logprobs is not None) is wants
    assert not wants or len(sample.logprobs) == len(sample.token_ids)


LOGPROBS = ("logprobs", "logprob_token_ids")


@pytest.fixture(scope="module")
def pair(tiny_models: dict[str, str], engines: Engines) -> tuple[Any, Any]:
    """A plain engine and one that drafts, which allow all that a request may ask."""
    from vllm.config.reasoning import ReasoningConfig

    settings: dict[str, Any] = {
        "max_logprobs": -1,
        "max_num_seqs": 16,
        "reasoning_config": ReasoningConfig(
            reasoning_start_str=THINK[0], reasoning_end_str=THINK[1]
        ),
    }
    path = tiny_models["llama"]
    return engines.get(path, **settings), engines.get(path, PLAN, **settings)


def thinks(asked: Asked) -> bool:
    return asked.fields.get("thinking_token_budget") is not None


REQUESTS = random_requests(NUM_REQUESTS)
if not IS_V2:  # see `is_spoilt`
    REQUESTS.sort(key=thinks)
BATCHES = [REQUESTS[i : i + BATCH] for i in range(0, NUM_REQUESTS, BATCH)]
if IS_V2 and IS_SHORT:  # the interpreter runs some 30 tokens a second
    BATCHES = BATCHES[:2]


@pytest.mark.v2
@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_200_random_requests_are_answered_as_by_plain_vllm(
    batch: list[Asked], pair: tuple[Any, Any]
) -> None:
    plain, drafting = pair
    found = answers(drafting, batch)
    asks = [asked.fields.get("logprob_token_ids") is not None for asked in batch]
    # What plain vLLM's V1 runner keeps of a thinking budget is left behind for whatever
    # request takes the row of one that ends.
    is_spoilt = not IS_V2 and 0 < sum(map(thinks, batch)) < len(batch)
    for number, asked in enumerate(batch):
        # By itself, because what it gets must not be its neighbours' matter.
        expected = answers(plain, [asked])[0]
        if isinstance(expected, Exception):
            assert isinstance(found[number], Exception), f"{asked} is to be refused"
        elif isinstance(found[number], Exception):
            assert _may_be_refused(asked), f"{asked}: {found[number]}"
        else:
            # So says vLLM 0.33: "V1 exact-ID logprobs overwrite other rows in a mixed
            # batch", plain vLLM's.
            is_overwritten = not IS_V2 and any(asks) and not asks[number]
            exact = _is_exact(asked) and not is_spoilt
            assert_same(asked, found[number], expected, exact, is_overwritten)
    ordinary = Asked([5, 6, 7], {"temperature": 0, "max_tokens": 6})
    (after,), (before,) = (
        answers(llm, [ordinary]).values() for llm in (drafting, plain)
    )
    assert_same(ordinary, after, before)


def _may_be_refused(asked: Asked) -> bool:
    refused = [f for f, row in SAMPLING_FIELDS.items() if row.fate is Fate.REFUSED]
    return any(asked.fields.get(field) for field in refused)


def declared(version: str, module: str, name: str) -> set[str]:
    """The annotated fields of a class in the source of a release."""
    path = source_of(version).joinpath(*module.split(".")).with_suffix(".py")
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    (found,) = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return {
        ast.unparse(node.target)
        for node in found.body
        if isinstance(node, ast.AnnAssign)
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("module", "name", "table"),
    [
        ("vllm.sampling_params", "SamplingParams", SAMPLING_FIELDS),
        ("vllm.v1.engine", "EngineCoreRequest", REQUEST_FIELDS),
    ],
)
def test_the_table_has_every_field_of_each_release(
    module: str, name: str, table: dict[str, Field], version: str
) -> None:
    fields = declared(version, module, name)
    assert len(fields) > 10
    assert fields - set(table) == set(), "say what becomes of these beside drafts"
    assert set(table) - fields == set(), "gone"


def test_every_field_that_a_user_sets_is_drawn_at_random() -> None:
    assert set(DRAWS) == set(SAMPLING_FIELDS) - WRITTEN
    asked = {field for request in REQUESTS for field in request.fields}
    assert asked == set(DRAWS)


@pytest.mark.v2
def test_logprobs_of_chosen_tokens_are_answered_without_drafts_and_counted(
    pair: tuple[Any, Any],
) -> None:
    """With n-gram drafts as with any, vLLM loses them, or never comes to an end."""
    chosen = {"temperature": 0, "max_tokens": 12, "logprob_token_ids": [7, 11, 42]}
    ranked = {"temperature": 0, "max_tokens": 20, "logprobs": 2}
    plain, drafting = pair
    count = scheduler_of(drafting).undrafted.undrafted
    prompts = [prompt["prompt_token_ids"] for prompt in prompts_of(2)]
    for batch in (
        [Asked(prompts[0], chosen)],
        [Asked(prompts[0], chosen), Asked(prompts[1], ranked)],
    ):
        before = count.copy()
        drafts = counter(drafting, DRAFTED)
        found, expected = answers(drafting, batch), answers(plain, batch)
        for number, asked in enumerate(batch):
            assert_same(asked, found[number], expected[number])
        logprobs = found[0].outputs[0].logprobs
        assert all({7, 11, 42} <= set(position) for position in logprobs)
        assert count - before == {"requests": 1, "steps": 12}
        is_alone = len(batch) == 1
        assert (counter(drafting, DRAFTED) == drafts) is is_alone, "then drafts go on"


@pytest.mark.v2
def test_thinking_budgets_are_kept_to_whenever_thinking_starts_again(
    pair: tuple[Any, Any],
) -> None:
    """With drafts V1 does not force the end of thinking where it did so before."""
    plain, drafting = pair
    rng = random.Random(1)
    batch = []
    for budget in (1, 2, 4, None):
        # All end together, because in V1 plain vLLM has neighbours pay for one that
        # ended.
        fields = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
        fields |= {"thinking_token_budget": budget}
        fields |= {"allowed_token_ids": [ord(THINK[0]), 96, 79, 127]}
        batch.append(Asked([rng.randrange(2, VOCAB_SIZE) for _ in range(5)], fields))
    found, expected = answers(drafting, batch), answers(plain, batch)
    for number, asked in enumerate(batch):
        assert_same(asked, found[number], expected[number])
    texts = [expected[number].outputs[0].text for number in range(len(batch))]
    assert all(text.count(THINK[1]) > 1 for text in texts[:3]), "it starts again"
    assert THINK[1] not in texts[3]


@pytest.mark.v2
@pytest.mark.parametrize("draft_length", ["fixed", "goodput", "threshold"])
def test_a_request_that_joins_takes_back_the_drafts_of_those_that_run(
    draft_length: str,
    tiny_models: dict[str, str],
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They were drafted before anybody knew of it."""
    plain = engines.get(tiny_models["llama"])
    spec = {**PLAN, "draft_length": draft_length}
    drafting = engines.get(tiny_models["llama"], spec)
    if draft_length == "goodput":  # otherwise nothing is worth drafting
        with_costs(drafting, ((1, 64), (1.0, 1.0), (0.001, 0.001)), monkeypatch)
    drafts = counter(drafting, DRAFTED)
    chosen = {"temperature": 0, "max_tokens": 6, "logprob_token_ids": [7, 11, 42]}
    long = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    prompts = [prompt["prompt_token_ids"] for prompt in prompts_of(2)]
    engine, found = drafting.llm_engine, {}
    engine.add_request("0", {"prompt_token_ids": prompts[0]}, Asked([], long).params())
    for step in range(MAX_STEPS):
        if step == 3:
            params = Asked([], chosen).params()
            engine.add_request("1", {"prompt_token_ids": prompts[1]}, params)
        found |= {int(out.request_id): out for out in engine.step() if out.finished}
        if step > 3 and not engine.has_unfinished_requests():
            break
    assert counter(drafting, DRAFTED) > drafts
    for number, fields in enumerate((long, chosen)):
        asked = Asked(prompts[number], fields)
        assert_same(asked, found[number], answers(plain, [asked])[0])
