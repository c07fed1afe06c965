"""Draft sources: the model, the request's own tokens, and one of another package's.

The toy source here proposes what it was told the text will be, with some tokens wrong.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import Field

from helpers.engines import (
    Engines,
    greedy,
    planner_of,
    prompts_of,
    run,
    token_ids,
    with_costs,
)
from helpers.environment import IS_V2
from vllm_selfspec.cli.preview import Preview
from vllm_selfspec.config import ConfigError, SelfSpecConfig, config_type
from vllm_selfspec.draft.row_planner import RowPlanner
from vllm_selfspec.draft_length.goodput import REST
from vllm_selfspec.draft_length.looks import NUM_TIMED
from vllm_selfspec.plan import sources
from vllm_selfspec.plan.keys import Keys
from vllm_selfspec.plan.source import NOTHING, Proposal, Proposer, Source
from vllm_selfspec.plan.source_context import Copier
from vllm_selfspec.plan.source_suffix import SuffixSource

NUM_TOKENS = 16 if IS_V2 else 48
EMPTY = {"skip_layers": {"attention": [], "mlp": []}}
CHEAP = ((1, 64), (1.0, 1.0), (0.001, 0.001))

TEXTS: dict[str, list[int]] = {}  # what the toy source was told, by the first tokens


class EchoKeys(Keys):
    echo: int | None = Field(
        default=None, ge=2, le=9, strict=True, description="Every so manyth is wrong."
    )


class Echo(Source):
    name = "echo"
    keys = EchoKeys

    @property
    def words(self) -> str:
        return "what it was told"

    def max_tokens(self, options: Mapping[str, Any]) -> int:
        return 6

    def proposer(self, options: Mapping[str, Any]) -> Proposer:
        return EchoProposer(options["echo"])


class EchoProposer(Proposer):
    def __init__(self, wrong: int | None) -> None:
        self._wrong = wrong

    def propose(self, req_id: str, token_ids: Any) -> Proposal:
        text = TEXTS.get(str(token_ids[:3].tolist()))
        if text is None:
            return NOTHING
        coming = np.array(text[len(token_ids) :][:6], np.int32)
        if self._wrong is not None:
            coming[self._wrong - 1 :] = (coming[self._wrong - 1 :] + 1) % 128
        return Proposal(coming)


@pytest.fixture
def registered() -> Iterator[None]:
    before = [*sources.SOURCES]
    sources.SOURCES.register(Echo())
    sources.SOURCES.register(Echo())
    assert len(sources.SOURCES) == len(before) + 1, (
        "registered twice is registered once"
    )
    yield
    sources.SOURCES[:] = before


def parse(**keys: Any) -> SelfSpecConfig:
    return SelfSpecConfig.parse({"method": "selfspec", **keys})


def test_a_source_is_named_and_its_keys_are_its_own() -> None:
    assert parse().draft_source == "auto"
    assert parse(draft_source="context", prompt_lookup_min=3).prompt_lookup_min == 3
    with pytest.raises(ConfigError, match="draft_source is 'contxt', .*auto, model"):
        parse(draft_source="contxt")
    with pytest.raises(ConfigError, match="prompt_lookup_min is of source 'context'"):
        parse(draft_source="model", prompt_lookup_min=3)
    with pytest.raises(ConfigError, match="exit_layer is of source 'model'"):
        parse(draft_source="context", exit_layer=2)
    assert parse(draft_source="suffix", num_copied_tokens=3).num_copied_tokens == 3
    with pytest.raises(ConfigError, match="prompt_lookup_min is 9, but"):
        parse(prompt_lookup_min=9, prompt_lookup_max=4)


def test_the_key_of_another_packages_source_is_accepted_and_refused(
    registered: None,
) -> None:
    assert parse(draft_source="echo", echo=3).draft_source == "echo"
    with pytest.raises(ConfigError, match="echo is 10, but must be at most 9"):
        parse(echo=10)
    assert "echo" in config_type().model_fields


def test_show_prints_it(registered: None, tiny_models: dict[str, str]) -> None:
    from rich.console import Console

    preview = Preview.of(tiny_models["llama"], {"draft_source": "echo"})
    assert preview.to_dict()["sources"] == ["echo"]
    console = Console(width=100)
    with console.capture() as printed:
        preview.print(console)
    assert "what it was told" in printed.get()


@pytest.mark.v2
def test_another_packages_source_is_served(
    registered: None, tiny_models: dict[str, str], engines: Engines
) -> None:
    path, prompts, params = tiny_models["llama"], prompts_of(3), greedy(NUM_TOKENS)
    outputs, _ = run(engines.get(path), prompts, params)
    expected = token_ids(outputs)
    for output in outputs:
        text = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        TEXTS[str(text[:3])] = text
    right = {"draft_source": "echo"}
    found, counts = run(engines.get(path, right), prompts, params)
    assert token_ids(found) == expected
    assert counts.acceptance == 1 and counts.draft_tokens > 3 * counts.drafts
    wrong = {"draft_source": "echo", "echo": 2}
    found, counts = run(engines.get(path, wrong), prompts, params)
    assert token_ids(found) == expected
    assert counts.accepted_tokens == counts.drafts, "of each proposal the first token"


def test_no_file_of_ours_knows_it() -> None:
    package = Path(sources.__file__).parents[1]
    assert not [p for p in package.rglob("*.py") if "EchoKeys" in p.read_text()]


def looping_prompts(num: int) -> list[dict[str, Any]]:
    """Prompts that repeat themselves, so that something is copied at once."""
    rng = np.random.default_rng(0)
    pieces = [rng.integers(1, 128, 7).tolist() for _ in range(num)]
    return [{"prompt_token_ids": piece * 3} for piece in pieces]


def drafted(llm: Any) -> dict[str, int]:
    """Draft tokens that were verified so far, by source."""
    return dict(planner_of(llm).stats.drafted)


@pytest.mark.v2
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_copies_leave_the_text_as_it_is(
    family: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    path, params = tiny_models[family], greedy(NUM_TOKENS)
    prompts = [*looping_prompts(3), *prompts_of(2)]
    expected, _ = run(engines.get(path), prompts, params)
    llm = engines.get(path, {"draft_source": "context"}, async_scheduling=False)
    found, counts = run(llm, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens and drafted(llm)["context"]
    assert drafted(llm)["model"] == 0


@pytest.mark.v2
def test_steps_that_draft_nothing_are_not_looked_at_each(
    tiny_models: dict[str, str],
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, params = tiny_models["llama"], greedy(2 * NUM_TOKENS)
    prompts = looping_prompts(3)
    expected, _ = run(engines.get(path), prompts, params)
    keys = {"draft_source": "context", "draft_length": "goodput"}
    llm = engines.get(path, keys, async_scheduling=False)
    asked, propose = [], Copier.propose

    def counted(self: Copier, req_id: str, token_ids: Any) -> Proposal:
        asked.append(req_id)
        return propose(self, req_id, token_ids)

    monkeypatch.setattr(Copier, "propose", counted)
    planned, plan = [], RowPlanner.plan
    monkeypatch.setattr(
        RowPlanner, "plan", lambda *args: planned.append(0) or plan(*args)
    )
    num_asked, num_planned, steps = {}, {}, {}
    # Of a step that takes no time a look is a large share.
    for row, step_seconds in {"dear": 1e-6, "cheap": 1.0}.items():
        asked.clear(), planned.clear()
        verify = (1.0, 2.0, 65.0) if row == "dear" else (1.0, 1.0, 1.01)
        verify = [step_seconds * one for one in verify]
        with_costs(llm, ((1, 2, 64), verify, verify), monkeypatch)
        before = sum(planner_of(llm).stats.steps.values())
        found, counts = run(llm, prompts, params)
        assert token_ids(found) == token_ids(expected)
        steps[row] = sum(planner_of(llm).stats.steps.values()) - before
        num_asked[row], num_planned[row] = len(asked), len(planned)
    assert num_asked["dear"] <= 3 * (NUM_TIMED + 2) < num_asked["cheap"]
    assert num_planned["dear"] < NUM_TOKENS < steps["dear"] + REST
    # Of those after the last one that was planned, nobody has told yet.
    assert NUM_TIMED <= steps["dear"] <= 2 * NUM_TOKENS
    drafted_nothing = planner_of(llm).stats.lengths[0]
    assert drafted_nothing >= 3 * steps["dear"] - 3, "those at rest count, too"


def test_other_outputs_are_copied_from(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    pytest.importorskip("arctic_inference", reason="make .venv/peers")
    path, prompts, params = tiny_models["llama"], prompts_of(3), greedy(NUM_TOKENS)
    expected, _ = run(engines.get(path), prompts, params)
    llm = engines.get(path, {"draft_source": "suffix", "num_copied_tokens": 8})
    accepted = []
    for _ in range(2):
        found, counts = run(llm, prompts, params)
        assert token_ids(found) == token_ids(expected)
        accepted.append(counts.accepted_tokens)
    assert accepted[1] > accepted[0], "what was said before is known"


def test_what_is_not_installed_is_refused_by_name_and_else_left_out(
    tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    preview = Preview.of(tiny_models["llama"], {})
    assert preview.sources == ("model", "context")
    assert "not installed: pip install arctic" in str(SuffixSource().refusal())


def believe_copies(llm: Any) -> None:
    """More than the model: what follows a match is chance in a random one's text."""
    free = planner_of(llm).goodput.free
    free._first_guess = [0.9] * len(free._first_guess)
    free._estimate(range(len(free._tried)))


@pytest.mark.v2
def test_sources_are_mixed_in_one_batch(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, params = tiny_models["llama"], greedy(NUM_TOKENS)
    prompts = [*looping_prompts(3), *prompts_of(3)]
    expected, _ = run(engines.get(path), prompts, params)
    spec = {"draft_source": "auto", "draft_length": "goodput", "exit_layer": 3}
    llm = engines.get(path, spec, async_scheduling=False)
    with_costs(llm, CHEAP, monkeypatch)
    believe_copies(llm)
    mixes = set()
    plan = type(planner_of(llm)).plan

    def noted(self: Any, step: Any) -> Any:
        found = plan(self, step)
        copies = any(len(one.token_ids) for one in found.proposals)
        mixes.add((bool(found.model.any()), copies))
        return found

    monkeypatch.setattr(type(planner_of(llm)), "plan", noted)
    found, _ = run(llm, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert (True, True) in mixes, "both in one step"
    assert all(drafted(llm)[name] for name in ("model", "context"))


@pytest.mark.v2
def test_what_is_right_is_always_accepted(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    """The model drafts as the target, and copies go round with a text that does."""
    path, params = tiny_models["llama"], greedy(NUM_TOKENS)
    spec = {**EMPTY, "draft_source": "auto", "num_speculative_tokens": 3}
    llm = engines.get(path, spec, async_scheduling=False)
    _, counts = run(llm, prompts_of(3), params)
    stats = planner_of(llm).stats
    assert stats.drafted["model"] == stats.accepted["model"] > 0
    assert counts.accepted_tokens == sum(stats.accepted.values())


@pytest.mark.parametrize("policy", ["threshold", "thompson", "thompson-calibrated"])
def test_stop_rules_act_on_the_models_rows_alone(
    policy: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    path, params = tiny_models["llama"], greedy(NUM_TOKENS)
    prompts = [*looping_prompts(3), *prompts_of(3)]
    expected, _ = run(engines.get(path), prompts, params)
    spec = {"draft_source": "auto", "draft_length": policy, "exit_layer": 2}
    llm = engines.get(path, spec)
    found, _ = run(llm, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert all(drafted(llm)[name] for name in ("model", "context"))
