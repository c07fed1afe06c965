"""A draft that reads a window of the KV cache; the text is the same without."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.engines import Engines, drafter_of, greedy, run, token_ids
from helpers.models import NUM_LAYERS, VOCAB_SIZE, build_tiny_model
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.draft.batch import DraftBatch, KVGroup
from vllm_selfspec.draft.v2_window import DeviceWindow
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.step_cost import StepCost

BLOCK_SIZE, NUM_BLOCKS = 32, 64
LONG = {"max_model_len": 512, "block_size": BLOCK_SIZE}
NOTHING = {"skip_layers": {}}
WINDOW = 64


def batch_of(newest: list[int], num_steps: int, window: float | None) -> DraftBatch:
    """Rows whose blocks are numbered by row and place: 100, 101, ..., 200, ..."""
    rows = np.arange(len(newest))
    table = 100 * (1 + torch.arange(len(newest)))[:, None] + torch.arange(NUM_BLOCKS)
    group = KVGroup([], table.int(), BLOCK_SIZE, window)
    return DraftBatch(
        rows=rows,
        token_ids=np.zeros(len(newest), np.int32),
        first_positions=np.array(newest),
        num_drafts=np.full(len(newest), num_steps),
        kv_groups=[group],
        device=torch.device("cpu"),
    )


def read_by(batch: DraftBatch, step: int, row: int) -> list[int]:
    """Blocks that a row reads, and how many tokens of the last."""
    (reads,) = batch._groups
    length = int(reads.seq_lens[step, row])
    num = -(-length // BLOCK_SIZE)
    return [*reads.block_table[row, :num].tolist(), length - (num - 1) * BLOCK_SIZE]


def test_the_first_block_and_the_last_ones_are_read() -> None:
    batch = batch_of([300, 70, 31], num_steps=2, window=WINDOW)
    # Token 300 is the 13th of block 9: two blocks before it make 64 tokens at least.
    assert read_by(batch, 0, 0) == [100, 108, 109, 13]
    assert read_by(batch, 1, 0) == [100, 108, 109, 14]
    assert read_by(batch, 0, 1) == [200, 201, 202, 7], "shorter: all of it"
    assert read_by(batch, 0, 2) == [300, 32]
    assert read_by(batch, 1, 2) == [300, 301, 1]


def test_a_share_of_a_long_context_is_read() -> None:
    batch = batch_of([2000, 300], num_steps=1, window=0.25)
    *blocks, last = read_by(batch, 0, 0)
    # Token 2000 is the 17th of block 62; 500 tokens are 16 blocks.
    assert blocks == [100, *range(147, 163)] and last == 17
    assert read_by(batch, 0, 1)[:2] == [200, 202], "256 tokens at least: 8 blocks"


def test_a_window_grows_with_the_steps_of_a_draft() -> None:
    batch = batch_of([319], num_steps=3, window=WINDOW)
    assert read_by(batch, 0, 0) == [100, 108, 109, 32]
    assert read_by(batch, 2, 0) == [100, 108, 109, 110, 2]


@pytest.mark.parametrize("window", [None, WINDOW])
def test_tokens_are_written_where_they_would_be_without(window: int | None) -> None:
    batch = batch_of([300, 70], num_steps=2, window=window)
    (reads,) = batch._groups
    assert reads.slots[0].tolist() == [109 * 32 + 12, 202 * 32 + 6]
    assert batch.positions[1].tolist() == [301, 71]


def cache_of(*sliding_windows: int | None) -> SimpleNamespace:
    specs = [SimpleNamespace(sliding_window=one) for one in sliding_windows]
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return SimpleNamespace(kv_cache_groups=groups)


@pytest.mark.parametrize("size", [WINDOW, 0.25])
def test_on_the_device_the_same_blocks_are_read(size: float) -> None:
    newest, num_steps = [300, 70, 31, 319, 2000], 3
    batch = batch_of(newest, num_steps, size)
    window = DeviceWindow.of(size, cache_of(None), [BLOCK_SIZE])
    table = batch_of(newest, num_steps, None)._groups[0].block_table
    table = torch.cat([table, torch.zeros(1, NUM_BLOCKS, dtype=torch.int32)])
    lens = torch.tensor(newest, dtype=torch.int32) + 1
    window.apply([table], lens, 2001, num_steps)
    for row in range(len(newest)):
        for step in range(num_steps):
            length = int(lens[row]) + step
            num = -(-length // BLOCK_SIZE)
            found = [*table[row, :num].tolist(), length - (num - 1) * BLOCK_SIZE]
            assert found == read_by(batch, step, row), (row, step)
    assert (lens <= window.most_read(torch.tensor(newest) + 1)).all()


def test_on_the_device_groups_of_other_blocks_leave_out_the_same_tokens() -> None:
    """One sequence length stands for all of them."""
    window = DeviceWindow.of(WINDOW, cache_of(100, None), [16, 32])
    kept = int(window.num_kept(torch.tensor(301)))
    assert (window.unit, kept) == (32, 4), "as wide as the sliding layers'"
    small, large = (torch.arange(n)[None].int() for n in (32, 16))
    lens = torch.tensor([301], dtype=torch.int32)  # newest in block 9 of 32 tokens
    window.apply([small, large], lens, 301, num_steps=2)
    assert large[0, :6].tolist() == [0, 6, 7, 8, 9, 10]
    assert small[0, :11].tolist() == [0, 1, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    assert lens.tolist() == [301 - 5 * 32]


def prompts(num: int, length: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [
        {"prompt_token_ids": rng.integers(1, VOCAB_SIZE, length + 7 * i).tolist()}
        for i in range(num)
    ]


@pytest.mark.v2
def test_a_window_of_the_whole_context_drafts_the_same(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    path, params = tiny_models["llama"], greedy(24)
    counted = []
    for keys in ({}, {"draft_window": 512}):
        llm = engines.get(path, {"exit_layer": 3, **keys}, **LONG)
        counted.append(run(llm, prompts(3, 200), params)[1])
    assert counted[0] == counted[1] and counted[0].draft_tokens


@pytest.fixture(scope="module")
def models(
    tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("gemma3")
    layers = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
    gemma3 = build_tiny_model(
        "gemma3_text", directory, sliding_window=48, layer_types=layers
    )
    return {**tiny_models, "gemma3": str(gemma3)}


@pytest.mark.v2
@pytest.mark.shows("Engine", "drafts that read a window of the KV cache")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_the_text_is_plain_vllms(
    family: str, models: dict[str, str], engines: Engines
) -> None:
    path, params = models[family], greedy(24)
    texts = prompts(4, 230)
    expected, _ = run(engines.get(path, **LONG), texts, params)
    llm = engines.get(path, {**NOTHING, "draft_window": WINDOW}, **LONG)
    found, counts = run(llm, texts, params)
    assert token_ids(found) == token_ids(expected)
    assert counts.draft_tokens
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    assert drafter_of(runner)._view.window == WINDOW


@pytest.mark.v2
def test_a_window_is_read_and_not_the_whole(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    """With nothing skipped a draft is the target's, unless it reads less."""
    path, params, texts = tiny_models["llama"], greedy(24), prompts(4, 300)
    whole = engines.get(path, NOTHING, **LONG)
    assert run(whole, texts, params)[1].acceptance == 1
    llm = engines.get(path, {**NOTHING, "draft_window": WINDOW}, **LONG)
    acceptance = run(llm, texts, params)[1].acceptance
    assert acceptance is not None and acceptance < 1
    short = run(llm, prompts(3, 40), greedy(16))[1].acceptance
    assert short == 1, "a short context is read as a whole"


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": True},
        {"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
        {"kv_cache_memory_bytes": 3 << 20},
    ],
    ids=["prefix cache", "chunked prefill", "preemption"],
)
def test_whatever_else_happens_to_the_cache(
    settings: dict[str, Any], tiny_models: dict[str, str], engines: Engines
) -> None:
    path, params, texts = tiny_models["llama"], greedy(40), prompts(6, 230)
    expected, _ = run(engines.get(path, **LONG), texts, params)
    spec = {"exit_layer": 3, "draft_window": WINDOW}
    llm = engines.get(path, spec, **{**LONG, **settings})
    for _ in range(2):
        found, counts = run(llm, texts, params)
        assert token_ids(found) == token_ids(expected)
        assert counts.draft_tokens


def test_what_is_no_window_is_refused() -> None:
    for value in (0, 63, -1, "64", 64.5, True, 0.0, 1.0):
        with pytest.raises(ConfigError, match="draft_window"):
            SelfSpecConfig.parse({"draft_window": value})


def test_it_is_saved_and_read() -> None:
    plan = DraftPlan.of(4, draft_window=WINDOW)
    assert DraftPlan.from_dict(plan.to_dict()) == plan
    assert "window of 64" in str(plan)
    assert plan.to_dict()["draft_window"] == WINDOW
    assert DraftPlan(4).to_dict()["draft_window"] is None
    plan = DraftPlan.of(4, draft_window=0.25)
    assert DraftPlan.from_dict(plan.to_dict()) == plan
    assert "window of 25%" in str(plan)


def test_it_is_priced_by_what_it_leaves_out_of_long_contexts() -> None:
    step = StepCost.uniform(4, head=0.2, attention=0.05, mlp=0.1)
    assert DraftPlan.of(4, draft_window=WINDOW).share(step) == pytest.approx(1)
    long = step.in_context(1000, 0.8)
    assert long.total == pytest.approx(1.6)
    for window, read in ((WINDOW, 0.064), (0.5, 0.5), (0.1, 0.256), (2000, 1.0)):
        draft = DraftPlan.of(4, draft_window=window).cost(long)
        assert draft.total == pytest.approx(0.8 + 0.8 * read), window
    half = SkipSet.of(4, attention=[0, 1])
    both = DraftPlan.of(4, skip_layers=half, draft_window=0.5).cost(long)
    assert both.total == pytest.approx(0.7 + 0.4 * 0.5), "in the layers that run"


def test_a_search_looks_for_one_where_contexts_are_long() -> None:
    start = DraftPlan(4)
    assert start.for_contexts(500) == start
    long = start.for_contexts(8000)
    assert long["draft_window"] == 512
    assert long.choices()["window"] == (0, 512, 256, 1024)
    assert start in list(long.candidates()), "none may be better"
    given = DraftPlan.of(4, draft_window=WINDOW)
    assert given.for_contexts(8000) == given
