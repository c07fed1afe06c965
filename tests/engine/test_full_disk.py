"""A full disk costs the server its metrics, and nothing else."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import Engines, greedy, prompts_of, run, token_ids
from helpers.environment import IS_SHORT, IS_V2
from helpers.full_disk import full_disk

POLICIES = ("goodput", "threshold")
COUNTED = re.compile(r"^vllm:selfspec_draft_length_count\{.*\} (.*)$", re.MULTILINE)
FAILED = re.compile(r"^vllm:selfspec_failed_writes_total\{.*\} (.*)$", re.MULTILINE)


@pytest.mark.v2
@pytest.mark.skipif(IS_V2 and IS_SHORT, reason="long: make test-all")
def test_an_engine_serves_on_while_the_disk_is_full(
    tiny_models: dict[str, str],
) -> None:
    """In a process of its own, no file of which may grow for a while."""
    command = [sys.executable, __file__, tiny_models["llama"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for policy in POLICIES:
        before, full, after = found[policy]
        assert before["texts"] == full["texts"] == after["texts"]
        assert before["counted"] == full["counted"], "the old counts are shown"
        assert full["counted"] < after["counted"], "and with room the new ones"
        assert before["failed"] == full["failed"] < after["failed"]
        assert before["files"] == full["files"] == after["files"], "nothing half there"
    logged = done.stdout.count("serves on without its metrics")
    assert logged == 1, "once a process, for all its engines and all that they count"


def turns(model: str, policy: str) -> list[dict[str, Any]]:
    """With room, without, and with room again."""
    from vllm_selfspec.draft import stats as draft_stats

    draft_stats.WRITE_EVERY_S = 0  # after every step
    spec = {"draft_length": {"policy": policy}, "exit_layer": 2}
    llm = Engines().get(model, spec)
    found = []
    for disk in (contextlib.nullcontext(), full_disk(), contextlib.nullcontext()):
        with disk:
            outputs, _ = run(llm, prompts_of(2), greedy(8))
        found.append({"texts": token_ids(outputs), **shown()})
    return found


def shown() -> dict[str, Any]:
    """What a scrape shows, and the files that it was read from."""
    from prometheus_client import generate_latest

    from vllm_selfspec.draft.stats import DIRECTORY

    text = generate_latest().decode()
    (counted,), failed = COUNTED.findall(text), FAILED.findall(text)
    return {
        "counted": float(counted),
        "failed": sum(map(float, failed)),
        "files": sorted(path.name for path in Path(os.environ[DIRECTORY]).iterdir()),
    }


if __name__ == "__main__":
    if IS_V2:
        from triton_cpu_stub import mends

        mends.mend()
    found = {policy: turns(sys.argv[1], policy) for policy in POLICIES}
    print(json.dumps(found), flush=True)
    os._exit(0)  # vLLM's own end takes long
