"""Compiled, the draft view drafts what it drafts eagerly, from a cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import Engines, drafter_of, greedy, prompts_of, run, token_ids
from helpers.environment import IS_SHORT
from helpers.exit_layers import build_exit_layer
from helpers.models import NUM_LAYERS
from vllm_selfspec.served_config import DRAFT_PART

PLAN: dict[str, Any] = {"exit_layer": NUM_LAYERS // 2, "num_speculative_tokens": 4}
OTHER: dict[str, Any] = {"exit_layer": 1, "num_speculative_tokens": 3}


def generated(llm: Any) -> Any:
    """The tokens, and what was drafted and accepted on the way."""
    params = greedy(20)
    outputs, counts = run(llm, prompts_of(4), params)
    return [token_ids(outputs), vars(counts)]


def view_of(llm: Any) -> Any:
    return drafter_of(llm.collective_rpc(lambda w: w.model_runner)[0])._view


def config_of(llm: Any) -> Any:
    return llm.llm_engine.vllm_config


def compare(
    model: str, cache: Path, plan: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Generates eagerly, with plain vLLM compiled, and with both compiled."""
    engines = Engines()
    eager = engines.get(model, plan, enforce_eager=True, dtype=dtype)
    found = {"eager": generated(eager)}
    plain = engines.get(model, enforce_eager=False, dtype=dtype)
    found["plain"] = generated(plain)
    before = set(os.listdir(cache))
    llm = engines.get(model, plan, enforce_eager=False, dtype=dtype)
    found["compiled"] = generated(llm)
    after = set(os.listdir(cache))
    other = [
        generated(engines.get(model, OTHER, enforce_eager=is_eager, dtype=dtype))
        for is_eager in (True, False)
    ]
    return {
        **found,
        "eager view is compiled": view_of(eager).is_compiled,
        "view is compiled": view_of(llm).is_compiled
        and view_of(llm).own_modules[1].aot_compiled_fn is not None,
        "keys": [
            config.compute_hash()
            for config in (view_of(llm).own_modules[1].vllm_config, config_of(llm))
        ],
        "added to the cache": len(after - before),
        "other": other,
        "added by the other": len(set(os.listdir(cache)) - after),
    }


def compared(
    model: str, root: Path, plan: dict[str, Any], dtype: str = "float32"
) -> dict[str, Any]:
    """In a process of its own, because vLLM reads where its cache lies once."""
    done = subprocess.run(
        [sys.executable, __file__, model, str(root), json.dumps(plan), dtype],
        env={**os.environ, "VLLM_CACHE_ROOT": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_compiled_draft_equals_eager_draft_and_has_a_cache_of_its_own(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    found = compared(tiny_models["llama"], tmp_path, PLAN)
    assert not found["eager view is compiled"], "the target is not"
    assert found["view is compiled"], "the target is"
    # Were the two one in the cache, the drafts would be the target's, or its tokens
    # the draft's.
    assert found["compiled"] == found["eager"]
    assert found["plain"][0] == found["eager"][0]
    assert len(set(found["keys"])) == 2, "or one would be loaded for the other"
    assert found["added to the cache"] == 2, "the target with its drafts, and the view"
    eager, compiled = found["other"]
    assert compiled == eager and eager[0] == found["plain"][0]
    assert eager[1] != found["eager"][1], "it drafts otherwise"
    assert found["added by the other"] == 1, "its view; the target's code is there"


def test_what_the_target_is_compiled_for_depends_on_what_is_made_of_it(
    tiny_models: dict[str, str],
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def key_of(part: bool = False, **keys: Any) -> str:
        told = {"method": "selfspec", "draft_source": "model", **keys}
        args = EngineArgs(tiny_models["llama"], speculative_config=told)
        config = args.create_engine_config()
        if part:
            config.additional_config = {**config.additional_config, DRAFT_PART: "draft"}
        return str(config.compute_hash())

    one, other = {"exit_layer": 1}, {"exit_layer": 2, "draft_length": "fixed"}
    assert key_of(**one) == key_of(**other)
    assert key_of(**one, draft_weights="int4") != key_of(**one)
    views = {key_of(part=True, **keys) for keys in (one, other)}
    assert len(views | {key_of(**one)}) == 3


@pytest.mark.skipif(IS_SHORT, reason="a minute: SELFSPEC_TEST_ALL=1")
def test_a_compiled_exit_layer_has_the_kv_of_every_token(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """As the target's own last layer it is right as often as the target: always."""
    model = tiny_models["llama"]
    head = build_exit_layer(model, NUM_LAYERS - 1, tmp_path / "head")
    plan = {"trained_exit_layer": str(head), "num_speculative_tokens": 4}
    found = compared(model, tmp_path, plan)
    assert found["view is compiled"]
    assert found["plain"][0] == found["compiled"][0] == found["eager"][0]
    counts = found["compiled"][1]
    assert counts["accepted_tokens"] == counts["draft_tokens"] > 0


LOW_BIT = {"attention": "int8", "mlp": "int4", "head": "int4"}


@pytest.mark.skipif(IS_SHORT, reason="a minute: SELFSPEC_TEST_ALL=1")
def test_low_bit_copies_of_a_compiled_float32_target_draft_eagerly(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    plan = {"draft_weights": LOW_BIT, "num_speculative_tokens": 4}
    found = compared(tiny_models["qwen2"], tmp_path, plan)
    assert not found["view is compiled"]
    assert found["plain"][0] == found["compiled"][0] == found["eager"][0]
    assert found["compiled"][1] == found["eager"][1], "other drafts are accepted"


@pytest.mark.skipif(IS_SHORT, reason="a minute: SELFSPEC_TEST_ALL=1")
def test_low_bit_copies_of_a_compiled_target_draft_compiled(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Rounding differs, so a few drafts may, and texts at near-ties."""
    plan = {"draft_weights": LOW_BIT, "num_speculative_tokens": 4}
    found = compared(tiny_models["qwen2"], tmp_path, plan, "bfloat16")
    assert found["view is compiled"]
    compiled, eager = (
        found[name][1]["accepted_tokens"] / found[name][1]["draft_tokens"]
        for name in ("compiled", "eager")
    )
    assert abs(compiled - eager) < 0.1


if __name__ == "__main__":
    model, root, plan, dtype = sys.argv[1:]
    cache = Path(root, "torch_compile_cache", "torch_aot_compile")
    print(json.dumps(compare(model, cache, json.loads(plan), dtype)))
