"""The diffs for vLLM apply to the release they name, compile, and work in its place."""

import compileall
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import Engines, prompts_of, run, token_ids
from helpers.vllm_source import VERSIONS, source_of

REPOSITORY = Path(__file__).resolve().parents[2]
PATCHES = REPOSITORY / "patches"
GENERATE = """
import json, sys
import test_seams
from helpers import engines
from vllm import SamplingParams
from vllm_selfspec.engine import registry
from vllm_selfspec.engine import seams
from vllm_selfspec.engine import patcher

assert registry.exists()
model, keys, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
llm = engines.Engines().get(model, keys)
assert llm.llm_engine.vllm_config.speculative_config.method == "selfspec"
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
outputs, counts = engines.run(llm, prompts, params)
attached = [
    seam.name for seam in seams.SEAMS
    if hasattr(test_seams.function_of(test_seams.bound(seam)), patcher.ATTACHED)
]
print(json.dumps([engines.token_ids(outputs), counts.accepted_tokens, attached]))
"""
PARSE = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

load_general_plugins()
model, every = sys.argv[1], json.loads(sys.argv[2])
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())


def found(flags):
    args = parser.parse_args(["--model", model, "--dtype", "float32", *flags])
    try:
        config = EngineArgs.from_cli_args(args).create_engine_config()
    except ValueError as error:
        return str(error)
    spec = config.speculative_config
    return [spec.method, spec.num_speculative_tokens, config.num_lookahead_tokens]


print(json.dumps([found(flags) for flags in every]))
"""


def patch_of(version: str) -> Path:
    return PATCHES / f"vllm-{version}-speculative-method-registry.patch"


def patched(version: str, to: Path) -> Path:
    """A copy of vLLM in `to`, of links but for what the diff touches, patched."""
    source = source_of(version)
    diff = patch_of(version).read_text()
    touched = {
        line.removeprefix("+++ b/")
        for line in diff.splitlines()
        if line.startswith("+++ b/")
    }
    shutil.copytree(
        source / "vllm",
        to / "vllm",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in touched:
        if (source / name).exists():
            (to / name).unlink()
            shutil.copy(source / name, to / name)
    subprocess.run(
        ["git", "apply", "-p1", "--whitespace=error", str(patch_of(version))],
        cwd=to,
        check=True,
    )
    for name in touched:
        assert compileall.compile_file(to / name, quiet=1, force=True), name
    return to


@pytest.mark.parametrize("version", VERSIONS)
def test_the_diff_applies_and_compiles(version: str, tmp_path: Path) -> None:
    patched(version, tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_ledger_knows_the_diff(version: str) -> None:
    ledger = (PATCHES / "README.md").read_text()
    assert patch_of(version).name in ledger
    for heading in ("Why", "How", "Upstream", "Remove when"):
        assert f"**{heading}.**" in ledger


@pytest.fixture(scope="module")
def with_registry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose vLLM is the installed one with its diff."""
    path = [str(patched("0.32.0", tmp_path_factory.mktemp("patched")))]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def output_of(script: str, *args: str, env: dict[str, str]) -> Any:
    """What `script` prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env=env,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.v2
def test_a_generation_through_the_registry_needs_no_seam(
    tiny_models: dict[str, str], engines: Engines, with_registry: dict[str, str]
) -> None:
    from vllm import SamplingParams

    keys = {"exit_layer": 2, "num_speculative_tokens": 3, "draft_source": "model"}
    prompts = prompts_of(3)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected, counts = run(engines.get(tiny_models["llama"], keys), prompts, params)
    tokens, accepted, attached = output_of(
        GENERATE,
        tiny_models["llama"],
        json.dumps(keys),
        json.dumps(prompts),
        env=with_registry,
    )
    assert tokens == token_ids(expected)
    assert accepted == counts.accepted_tokens > 0
    # What is left mends sampling on a CPU, sampling without drafts and streaming
    # sessions, plans draft lengths, or hands over what no speculator is told or asked:
    # top-k and top-p, and the length of each row; or copies weights before vLLM packs
    # them, and refuses others once there are copies; or finds the graphs of a length;
    # or keeps the draft plan out of what the target is compiled for.
    rest = ("rejection_sampler", "EngineCore", "load_model", "take_draft_token_ids")
    rest += ("_handle_stopped_request", "_update_streaming_request")
    rest += ("GPUModelRunner._sample", "GPUModelRunner.sample")
    rest += ("for_data_parallel", "execute_dummy_batch")
    rest += ("_init_candidates", "compute_hash")
    rest += ("process_weights_after_loading", "reload_weights", "start_weight_update")
    assert all(any(word in name for word in rest) for name in attached), attached


COPIES = [16, 16]  # the longest draft, and the slots for it
SAID_OF_FLAGS: list[tuple[list[str], Any]] = [
    (["--speculative-config", "selfspec"], ["selfspec", *COPIES]),
    (["--spec-method", "selfspec", "--spec-tokens", "3"], ["selfspec", *COPIES]),
    (
        [
            "--speculative-config",
            '{"method": "selfspec", "exit-layer": 1, "num_speculative_tokens": 2, '
            '"draft_source": "model"}',
        ],
        ["selfspec", 2, 2],
    ),
    (
        ["--speculative-config", '{"method": "selfspec", "exit_layer": 9}'],
        "1 to 4 for this model, but it is 9",
    ),
    (
        ["--speculative-config", '{"method": "nonsense", "model": "x"}'],
        "Unknown speculative method 'nonsense'",
    ),
]


def test_the_flags_are_understood_through_the_registry(
    tiny_models: dict[str, str], with_registry: dict[str, str]
) -> None:
    every = json.dumps([flags for flags, _ in SAID_OF_FLAGS])
    said = output_of(PARSE, tiny_models["llama"], every, env=with_registry)
    for (flags, wanted), found in zip(SAID_OF_FLAGS, said, strict=True):
        fits = wanted in found if isinstance(wanted, str) else wanted == found
        assert fits, f"{flags}: {found}"
