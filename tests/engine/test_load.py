"""Minutes of random load: no wrong text, no leak, no request that hangs."""

import gc
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.engines import (
    KV_CACHE_BYTES,
    Engines,
    counter,
    greedy,
    prompts_of,
    run,
    scheduler_of,
    token_ids,
)
from helpers.environment import IS_SHORT, IS_V2

# The interpreter takes tenths of a second for a step, of few requests or of many.
SECONDS = 20 if IS_SHORT else 120 if IS_V2 else 300
# What the allocator keeps grows for two minutes, in plain vLLM as well, and then is
# steady.
LEAKED = 16 << 20
MIN_FINISHED = SECONDS // 4 if IS_V2 else SECONDS
MAX_REQUESTS, MAX_TOKENS = (32, 40) if IS_V2 else (128, 120)
NUM_SEEDS, PROMPTS_EACH = (4, 8) if IS_V2 else (16, 16)
NUM_PROMPTS = NUM_SEEDS * PROMPTS_EACH
ABORTED = 0.05  # share of the requests
SETTINGS: dict[str, Any] = {
    "max_num_seqs": MAX_REQUESTS,
    # Full at about half of them.
    "kv_cache_memory_bytes": KV_CACHE_BYTES // (16 if IS_V2 else 2),
    "block_size": 32,
}
SPEC = {"exit_layer": 2, "num_speculative_tokens": 4}
EVENTS = ("vllm:num_preemptions", "vllm:spec_decode_num_accepted_tokens")


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.v2
@pytest.mark.shows(
    "Engine", "128 requests at random, minutes long", v2="32, two minutes"
)
def test_random_load(tiny_models: dict[str, str], engines: Engines) -> None:
    model = tiny_models["llama"]
    prompts = [p for seed in range(NUM_SEEDS) for p in prompts_of(PROMPTS_EACH, seed)]
    expected = [
        samples[0]
        for samples in token_ids(
            run(engines.get(model), prompts, greedy(MAX_TOKENS))[0]
        )
    ]
    llm = engines.get(model, SPEC, **SETTINGS)
    engine, rng = llm.llm_engine, np.random.default_rng(0)
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    free_blocks, at_half = pool.get_num_free_blocks(), 0
    before = [counter(llm, name) for name in EVENTS]
    asked: dict[str, tuple[int, int]] = {}  # of every running request
    aborted: set[str] = set()
    num_finished, started = 0, time.monotonic()
    while asked or time.monotonic() - started < SECONDS:
        arriving = time.monotonic() - started < SECONDS
        while arriving and len(asked) < MAX_REQUESTS and rng.random() < 0.8:
            which, num = (
                int(rng.integers(NUM_PROMPTS)),
                int(rng.integers(1, MAX_TOKENS)),
            )
            request_id = f"load{num_finished + len(asked) + len(aborted)}"
            engine.add_request(request_id, prompts[which], greedy(num))
            asked[request_id] = which, num
        if not at_half and time.monotonic() - started > SECONDS / 2:
            at_half = resident_bytes()
        for out in engine.step():
            if not out.finished or out.request_id in aborted:
                continue
            which, num = asked.pop(out.request_id)
            assert list(out.outputs[0].token_ids) == expected[which][:num]
            num_finished += 1
        if asked and rng.random() < ABORTED:
            gone = str(rng.choice([*asked]))
            engine.abort_request([gone])
            del asked[gone]
            aborted.add(gone)
        assert time.monotonic() - started < 3 * SECONDS + 60, f"{len(asked)} hang"
    assert num_finished > MIN_FINISHED
    happened = [counter(llm, name) for name in EVENTS]
    assert all(now > then for now, then in zip(happened, before, strict=True))
    assert pool.get_num_free_blocks() == free_blocks
    if not IS_SHORT and not IS_V2:  # which is at an end before memory is steady
        assert resident_bytes() < at_half + LEAKED
