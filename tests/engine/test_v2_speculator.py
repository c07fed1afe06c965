"""What only the V2 model runner has: run by `make test-v2`, skipped elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.engines import (
    Engines,
    drafter_of,
    greedy,
    planner_of,
    prompts_of,
    run,
    scheduler_of,
    source_by_turns,
    token_ids,
    with_costs,
)
from helpers.environment import IS_V2, TESTS
from helpers.models import DEMO_MODEL
from vllm_selfspec.draft_length import looks
from vllm_selfspec.draft_length.batch_goodput import PlannedSource

pytestmark = [
    pytest.mark.v2,
    pytest.mark.skipif(not IS_V2, reason="for the V2 model runner: make test-v2"),
]
SPEC: dict[str, Any] = {"exit_layer": 2, "num_speculative_tokens": 3}
NUM_PROMPTS = 3
MAX_TOKENS = 14
# Verifying more rows costs nothing, drafting next to nothing.
CHEAP = (1, 64), (1.0, 1.0), (0.001, 0.001)
REPEATING = [{"prompt_token_ids": [n, 9, 7, 3, 8, 1] * 3} for n in (4, 5, 6)]


def runner_of(llm: Any) -> Any:
    return llm.collective_rpc(lambda worker: worker.model_runner)[0]


def generated(llm: Any) -> dict[str, Any]:
    outputs, counts = run(llm, prompts_of(NUM_PROMPTS), greedy(MAX_TOKENS))
    return {"tokens": token_ids(outputs), "accepted": counts.accepted_tokens}


def generate_on_v1(models: dict[str, str]) -> dict[str, Any]:
    """Run in a process of its own: for each model, plain and drafting."""
    engines = Engines()
    return {
        name: {
            "plain": generated(engines.get(path)),
            "drafting": generated(engines.get(path, SPEC)),
        }
        for name, path in models.items()
    }


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, str]) -> dict[str, str]:
    return {**tiny_models, "demo": str(DEMO_MODEL)}


@pytest.fixture(scope="module")
def on_v1(models: dict[str, str]) -> dict[str, Any]:
    """What the V1 model runner generates, without Triton and its interpreter."""
    env = dict(os.environ)
    for name in ("PYTHONPATH", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER"):
        env.pop(name, None)
    env["PYTHONPATH"] = str(TESTS)
    call = "import json, sys, test_v2_speculator as t;" + (
        "print('RESULT', json.dumps(t.generate_on_v1(json.loads(sys.argv[1]))))"
    )
    found = subprocess.run(
        [sys.executable, "-c", call, json.dumps(models)],
        env=env,
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(li for li in found.stdout.splitlines() if li.startswith("RESULT"))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return result


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "demo"])
def test_tokens_and_acceptance_are_those_of_the_v1_runner(
    name: str, models: dict[str, str], on_v1: dict[str, Any], engines: Engines
) -> None:
    plain = generated(engines.get(models[name]))
    drafting = generated(engines.get(models[name], SPEC))
    assert plain["tokens"] == on_v1[name]["plain"]["tokens"]
    assert drafting["tokens"] == on_v1[name]["drafting"]["tokens"]
    # Not only the text, which is the target's whatever was drafted.
    assert drafting["accepted"] == on_v1[name]["drafting"]["accepted"] > 0


def test_the_v2_runner_drafts_with_our_speculator(
    models: dict[str, str], engines: Engines
) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_selfspec.draft.v2_speculator import SelfSpecSpeculator

    runner = runner_of(engines.get(models["llama"], SPEC))
    assert isinstance(runner, GPUModelRunner)
    assert type(runner.speculator) is SelfSpecSpeculator
    assert not runner.speculator.draft_attn_layer_names, "nothing of its own to cache"
    assert runner.vllm_config.speculative_config.method == "custom_class", (
        "it is called otherwise only while vLLM checks its configuration"
    )


SCHEDULE = [[1, 2, 3], [3, 4, 1], [5, 8, 0]]


def test_fewer_tokens_are_drafted_while_more_requests_run(
    models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {**SPEC, "num_speculative_tokens_per_batch_size": SCHEDULE}
    plain, llm = engines.get(models["llama"]), engines.get(models["llama"], spec)
    speculator = drafter_of(runner_of(llm))
    seen: set[tuple[int, int]] = set()
    original = speculator._draft

    def note(input_batch: Any, num_drafts: int, *args: Any, **kwargs: Any) -> None:
        seen.add((input_batch.num_reqs, num_drafts))
        original(input_batch, num_drafts, *args, **kwargs)

    monkeypatch.setattr(speculator, "_draft", note)
    for num_reqs in (2, 4, 5):
        expected, _ = run(plain, prompts_of(num_reqs), greedy(8))
        found, _ = run(llm, prompts_of(num_reqs), greedy(8))
        assert token_ids(found) == token_ids(expected), f"{num_reqs} requests"
    wanted = {
        size: num_drafts
        for first, last, num_drafts in SCHEDULE
        for size in range(first, last + 1)
    }
    assert seen == {(size, wanted[size]) for size, _ in seen}
    assert {(2, 3), (4, 1)} <= seen, "and where it is 0, no draft step runs"


@pytest.mark.parametrize("asked", [None, True, False])
def test_async_scheduling_is_on_unless_switched_off(
    asked: bool | None,
    models: dict[str, str],
    engines: Engines,
    cpu_schedules_as_configured: list[Any],
) -> None:
    path = models["llama"]
    plain = engines.get(path)
    for spec in ({"skip_layers": {}}, SPEC):
        llm = engines.get(path, spec, async_scheduling=asked)
        assert cpu_schedules_as_configured[-1] is (asked is not False)
        expected, _ = run(plain, prompts_of(5), greedy(MAX_TOKENS))
        found, counts = run(llm, prompts_of(5), greedy(MAX_TOKENS))
        assert token_ids(found) == token_ids(expected)
        assert counts.draft_tokens > 0
        if spec is not SPEC:
            assert counts.accepted_tokens == counts.draft_tokens


@pytest.mark.parametrize(
    "spec",
    [
        {"draft_source": "context"},
        {**SPEC, "draft_length": "threshold"},
        {**SPEC, "draft_length": "goodput"},
    ],
    ids=["copies", "threshold", "goodput"],
)
def test_vllms_warm_up_of_its_kernels_leaves_nothing_behind(
    spec: dict[str, Any], tiny_models: dict[str, str], engines: Engines
) -> None:
    """Where there is a GPU, requests of vLLM's own run before costs are measured."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    llm = engines.get(tiny_models["llama"], spec, max_num_seqs=3)
    (worker,) = llm.collective_rpc(lambda worker: worker)
    planner = getattr(drafter_of(worker.model_runner), "planner", None)
    measured = getattr(planner, "goodput", None)
    if planner is not None:
        planner.goodput = None
    warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
    if planner is not None:
        assert "_warmup_0_" not in planner._slots, "nothing is learnt of them"
        planner.goodput = measured
    expected, _ = run(engines.get(tiny_models["llama"]), prompts_of(2), greedy(8))
    found, _ = run(llm, prompts_of(2), greedy(8))
    assert token_ids(found) == token_ids(expected)


@pytest.mark.parametrize(
    ("source", "policy"), [("context", "fixed"), ("auto", "goodput")]
)
def test_copies_are_matched_on_the_device_where_steps_run_ahead(
    source: str,
    policy: str,
    tiny_models: dict[str, str],
    engines: Engines,
    cpu_schedules_as_configured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import SamplingParams

    path, params = tiny_models["llama"], greedy(16)
    prompts = [*REPEATING, *prompts_of(2)]
    expected, _ = run(engines.get(path), prompts, params)
    spec = {"draft_source": source, "draft_length": policy, "prompt_lookup_max": 3}
    llm = engines.get(path, spec)
    config = llm.llm_engine.vllm_config
    assert config.scheduler_config.async_scheduling
    assert config.additional_config["selfspec"]["on_device"] == "context"
    if policy == "goodput":
        with_costs(llm, CHEAP, monkeypatch)
    found, counts = run(llm, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.accepted_tokens > 5, "text that repeats itself is copied"
    always = {"temperature": 1, "max_tokens": 16, "ignore_eos": True}
    seeded = [SamplingParams(**always, seed=seed) for seed in range(5)]
    expected, _ = run(engines.get(path), prompts, seeded)
    found, counts = run(llm, prompts, seeded)
    assert token_ids(found) == token_ids(expected), "of a seed, too"
    assert counts.draft_tokens


def noted_certainty(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether copies, by proposal, are what verification takes to be certain: a share
    of the target's own probability beside would be accepted too often, which hundreds
    of samples do not show."""
    from vllm_selfspec.draft.v2_copies import DeviceCopies

    propose, found = DeviceCopies.propose, []

    def noting(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = propose(self, batch, *args, **kwargs)
        num_drafts = kwargs.get("num_speculative_tokens") or 0
        if num_drafts > self._num_model_tokens and self.draft_logits is not None:
            probs = self.draft_logits[batch.idx_mapping].softmax(dim=-1)
            of_drafts = probs.gather(2, drafts[:, :, None])
            found.append(bool((of_drafts == 1).all()))
        return drafts

    monkeypatch.setattr(DeviceCopies, "propose", noting)
    return found


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_the_model_and_copies_take_turns_where_steps_run_ahead(
    method: str,
    tiny_models: dict[str, str],
    engines: Engines,
    cpu_schedules_as_configured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model drafts as the target does, so each of its tokens is accepted: whoever
    takes a copy for one of them, or the other way round, is found out."""
    from vllm import SamplingParams

    path, num_tokens = tiny_models["llama"], 16
    prompts = [*REPEATING, *prompts_of(2)]
    spec = {"skip_layers": {}, "draft_length": "goodput", "draft_source": "auto"}
    spec |= {"num_speculative_tokens": 3, "draft_sample_method": method}
    llm = engines.get(path, {**spec, "prompt_lookup_max": 3})
    config = llm.llm_engine.vllm_config
    own = config.additional_config["selfspec"]
    assert config.scheduler_config.async_scheduling
    assert (own["on_device"], {*own["sources"]}) == ("context", {"model", "context"})
    with_costs(llm, CHEAP, monkeypatch)
    source_by_turns(monkeypatch)
    certain = noted_certainty(monkeypatch)
    stats = scheduler_of(llm).planner.stats
    always = {"max_tokens": num_tokens, "ignore_eos": True}
    seeded = [SamplingParams(**always, temperature=1, seed=n) for n in range(5)]
    for params in (greedy(num_tokens), seeded):
        stats.drafted.clear(), stats.accepted.clear()
        expected, _ = run(engines.get(path), prompts, params)
        found, counts = run(llm, prompts, params)
        assert token_ids(found) == token_ids(expected)
        assert stats.accepted["context"] < stats.drafted["context"]
        assert stats.accepted["context"] or params is seeded
        if method == "probabilistic" or params is not seeded:
            assert stats.accepted["model"] == stats.drafted["model"] > 10
        assert sum(stats.drafted.values()) == counts.draft_tokens
    assert certain and set(certain) == {True} or method == "greedy"


def test_copies_are_learnt_of_while_the_model_drafts(
    tiny_models: dict[str, str],
    engines: Engines,
    cpu_schedules_as_configured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From what requests have said."""
    path, params = tiny_models["llama"], greedy(48)
    spec = {"skip_layers": {}, "draft_length": "goodput", "draft_source": "auto"}
    spec |= {"num_speculative_tokens": 3, "prompt_lookup_max": 3}
    llm = engines.get(path, spec)
    with_costs(llm, CHEAP, monkeypatch)
    goodput = planner_of(llm).goodput
    model = PlannedSource(goodput.acceptance)
    monkeypatch.setattr(goodput, "_sources", lambda: [model])
    monkeypatch.setattr(looks, "LOOK_SHARE", 1.0)
    found, counts = run(llm, REPEATING, params)
    expected, _ = run(engines.get(path), REPEATING, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.accepted_tokens == counts.draft_tokens > 0, "of the model"
    assert goodput.free.num_tried(0) > 5


def test_requests_that_end_while_their_next_step_is_under_way(
    tiny_models: dict[str, str],
    engines: Engines,
    cpu_schedules_as_configured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scheduler is told of a step of theirs when it has forgotten them."""
    path, lengths = tiny_models["llama"], range(3, 24)
    prompts = [{"prompt_token_ids": [n % 7, 9, 7, 3, 8, 1] * 3} for n in lengths]
    params = [greedy(length) for length in lengths]
    expected, _ = run(engines.get(path), prompts, params)
    spec = {"draft_source": "context", "draft_length": "goodput"}
    llm = engines.get(path, {**spec, "prompt_lookup_max": 3})
    with_costs(llm, CHEAP, monkeypatch)
    found, counts = run(llm, prompts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.accepted_tokens


@pytest.mark.parametrize("source", ["model", "auto"])
def test_a_first_start_looks_for_no_plan_here(
    source: str, tiny_models: dict[str, str], engines: Engines
) -> None:
    """Plans are tried by the V1 runner's worker, also where nothing runs ahead."""
    path = tiny_models["llama"]
    spec = {"draft_source": source, "draft_length": "goodput"}
    llm = engines.get(path, spec, async_scheduling=False, max_num_seqs=5)
    own = llm.llm_engine.vllm_config.additional_config["selfspec"]
    assert own["calibration"] is None
    assert ("model" in own["sources"]) is (source == "model")
    expected, _ = run(engines.get(path), prompts_of(2), greedy(8))
    found, _ = run(llm, prompts_of(2), greedy(8))
    assert token_ids(found) == token_ids(expected)


def test_a_batch_of_any_length_finds_the_graph_of_its_own(
    tiny_models: dict[str, str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sizes between those of vLLM's graphs, too, where graphs of other lengths lie
    in between."""
    import copy

    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    from vllm_selfspec.draft_length.options import schedule_of_all

    spec = {**SPEC, "draft_length": "goodput"}
    llm = engines.get(tiny_models["llama"], spec, max_num_seqs=3)
    config = copy.copy(runner_of(llm).vllm_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs = 32
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, *range(8, 129, 8)]
    config.compilation_config.max_cudagraph_capture_size = 128
    longest = SPEC["num_speculative_tokens"] + 1
    config.speculative_config = copy.copy(config.speculative_config)
    schedule = schedule_of_all(longest - 1)
    config.speculative_config.num_speculative_tokens_per_batch_size = schedule
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", object)
    manager = CudaGraphManager(
        config, torch.device("cpu"), CUDAGraphMode.FULL_DECODE_ONLY, longest
    )
    manager._graphs_captured = True
    for num_rows in range(1, 33):
        for length in range(1, longest + 1):
            num_tokens = num_rows * length
            graph = manager.dispatch(num_rows, num_tokens, length, 0)
            assert graph.cg_mode == CUDAGraphMode.FULL, (num_rows, length)
            assert graph.uniform_token_count == length
            assert num_tokens <= graph.num_tokens < num_tokens + 8 + length


@pytest.mark.parametrize("num_drafted", [0, 1, 3])
def test_a_draft_is_penalised_as_its_verification_is(num_drafted: int) -> None:
    """vLLM's kernel reads the drafts of a row from the rows before it."""
    from vllm.v1.worker.gpu.sample.penalties import apply_penalties

    from vllm_selfspec.draft.v2_penalties import DraftPenalties

    num_slots, vocab_size = 3, 70
    generator = torch.Generator().manual_seed(0)
    penalties = [torch.tensor(p) for p in ([1.0, 1.7, 1.3], [0.0, 0.3, 0.0])]
    penalties.append(torch.tensor([0.0, 0.9, 0.6]))
    in_prompts = torch.randint(-(2**31), 2**31, (num_slots, 3), generator=generator)
    counts = torch.randint(0, 3, (num_slots, vocab_size), generator=generator).int()
    counted = in_prompts.int(), counts
    names = "repetition_penalty", "frequency_penalty", "presence_penalty"
    states: Any = SimpleNamespace(
        use_penalty=np.array([False, True, True]),
        prompt_bin_mask=counted[0],
        output_bin_counts=counted[1],
        **{n: SimpleNamespace(gpu=p) for n, p in zip(names, penalties, strict=True)},
    )
    ours = DraftPenalties(num_slots, torch.device("cpu"))
    ours.use(states)
    ours.read(np.array([2, 0, 1]))

    # Row 1 repeats itself; row 2 stands for nobody.
    drafted = torch.tensor([[0, 68, 33, 5], [0, 7, 7, 31], [0, 1, 2, 3], [0, 4, 4, 4]])
    slots = torch.tensor([2, 1, -1, 0])
    logits = torch.randn(len(slots), vocab_size, generator=generator) * 3
    found = logits.clone()
    ours.apply(found, slots, drafted, torch.tensor(1 + num_drafted))
    for row in (0, 1, 3):
        verified = logits[row].repeat(1 + num_drafted, 1)
        rows = [slots[row].repeat(len(verified)), drafted[row]]
        rows.append(torch.arange(len(verified), dtype=torch.int32))
        apply_penalties(verified, *rows, *penalties, *counted)
        torch.testing.assert_close(found[row], verified[-1], rtol=0, atol=1e-6)
    assert torch.equal(found[3], logits[3]), "it has none"
    assert not torch.equal(found[:2], logits[:2])

    ours.read(np.array([0]))
    again = logits.clone()
    ours.apply(again, slots, drafted, torch.tensor(1 + num_drafted))
    assert torch.equal(again, logits), "those of requests that left are taken back"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_skips_nothing_is_drafted_with_the_targets_penalties(
    temperature: float, tiny_models: dict[str, str], engines: Engines
) -> None:
    """Whatever repeats itself would be rejected otherwise."""
    from vllm import SamplingParams

    spec = {"skip_layers": {}, "num_speculative_tokens": 3}
    drawn = {"draft_sample_method": "probabilistic"}
    llm = engines.get(tiny_models["llama"], {**spec, **drawn})
    asked = {"repetition_penalty": 1.5, "frequency_penalty": 0.5}
    plain = {"temperature": temperature, "max_tokens": 13, "ignore_eos": True}
    params = [SamplingParams(**plain, **keys) for keys in (asked, {}, asked)]
    _, counts = run(llm, prompts_of(len(params)), params)
    assert counts.draft_tokens > 20
    # Rounding of p / q may cost a token in a thousand.
    assert counts.accepted_tokens >= counts.draft_tokens - (temperature > 0)
