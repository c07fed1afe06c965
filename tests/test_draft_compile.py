"""Compiled, the draft view drafts what it drafts eagerly, from a cache of its own."""

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    NUM_LAYERS,
    Engines,
    drafter_of,
    prompts_of,
    run,
    token_ids,
)

PLAN: dict[str, Any] = {"exit_layer": NUM_LAYERS // 2, "num_speculative_tokens": 4}


def generated(llm: Any) -> tuple[Any, Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    outputs, counts = run(llm, prompts_of(4), params)
    return token_ids(outputs), counts


def view_of(llm: Any) -> Any:
    return drafter_of(llm.collective_rpc(lambda w: w.model_runner)[0])._view


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of compiled models."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    return tmp_path / "torch_compile_cache" / "torch_aot_compile"


def test_compiled_draft_equals_eager_draft_and_has_a_cache_of_its_own(
    tiny_models: dict[str, str], cache: Path
) -> None:
    path = tiny_models["llama"]
    eager = Engines().get(path, PLAN, enforce_eager=True)
    expected = generated(eager)
    assert not view_of(eager).is_compiled, "the target is not"
    plain = Engines().get(path, enforce_eager=False)
    assert generated(plain)[0] == expected[0]
    target_alone = set(os.listdir(cache))
    llm = Engines().get(path, PLAN, enforce_eager=False)
    assert view_of(llm).is_compiled, "the target is"
    assert view_of(llm).own_modules[1].aot_compiled_fn is not None
    # Were the two one in the cache, the drafts would be the target's, or its tokens
    # the draft's.
    assert generated(llm) == expected
    added = set(os.listdir(cache)) - target_alone
    assert len(added) == 2, "the target with its drafts, and the view"
