"""Compiled, the draft view drafts what it drafts eagerly, from a cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import NUM_LAYERS, Engines, drafter_of, greedy, prompts_of, run, token_ids

PLAN: dict[str, Any] = {"exit_layer": NUM_LAYERS // 2, "num_speculative_tokens": 4}


def generated(llm: Any) -> Any:
    """The tokens, and what was drafted and accepted on the way."""
    params = greedy(20)
    outputs, counts = run(llm, prompts_of(4), params)
    return [token_ids(outputs), vars(counts)]


def view_of(llm: Any) -> Any:
    return drafter_of(llm.collective_rpc(lambda w: w.model_runner)[0])._view


def config_of(llm: Any) -> Any:
    return llm.llm_engine.vllm_config


def compare(model: str, cache: Path) -> dict[str, Any]:
    """Generates eagerly, with plain vLLM compiled, and with both compiled."""
    engines = Engines()
    eager = engines.get(model, PLAN, enforce_eager=True)
    found = {"eager": generated(eager)}
    plain = engines.get(model, enforce_eager=False)
    found["plain"] = generated(plain)
    before = set(os.listdir(cache))
    llm = engines.get(model, PLAN, enforce_eager=False)
    found["compiled"] = generated(llm)
    return {
        **found,
        "eager view is compiled": view_of(eager).is_compiled,
        "view is compiled": view_of(llm).is_compiled
        and view_of(llm).own_modules[1].aot_compiled_fn is not None,
        "keys": [
            config.compute_hash()
            for config in (view_of(llm).own_modules[1].vllm_config, config_of(llm))
        ],
        "added to the cache": len(set(os.listdir(cache)) - before),
    }


def test_compiled_draft_equals_eager_draft_and_has_a_cache_of_its_own(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(  # vLLM reads where its cache lies once for a process
        [sys.executable, __file__, tiny_models["llama"], str(tmp_path)],
        env={**os.environ, "VLLM_CACHE_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["eager view is compiled"], "the target is not"
    assert found["view is compiled"], "the target is"
    # Were the two one in the cache, the drafts would be the target's, or its tokens
    # the draft's.
    assert found["compiled"] == found["eager"]
    assert found["plain"][0] == found["eager"][0]
    assert len(set(found["keys"])) == 2, "or one would be loaded for the other"
    assert found["added to the cache"] == 2, "the target with its drafts, and the view"


if __name__ == "__main__":
    model, root = sys.argv[1:]
    cache = Path(root, "torch_compile_cache", "torch_aot_compile")
    print(json.dumps(compare(model, cache)))
