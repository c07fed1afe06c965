"""Loaded, the plugin costs nothing; asked for, it is found by vLLM's own flags."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_selfspec
from helpers.engines import KV_CACHE_BYTES, Engines, prompts_of, token_ids
from vllm_selfspec import plugin
from vllm_selfspec.config import METHOD
from vllm_selfspec.engine.patcher import ATTACHED
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet

PACKAGE = Path(vllm_selfspec.__file__).parent
# Those that draft, and may therefore import torch and vLLM when they are loaded.
DRAFTING = {
    "draft.batch",
    "draft.compile",
    "draft.drawing",
    "draft.sampler",
    "draft.penalties",
    "draft.truncation",
    "draft.verification",
    "draft.view",
    "draft.dp_ranks",
    "draft.kv_heads",
    "engine.measure",
    "engine.plain_steps",
    "engine.scheduler",
    "draft.seeded",
    "draft.v1_drafts",
    "draft.v1_proposer",
    "draft.v2_copies",
    "draft.v2_row_stops",
    "draft.v2_drawing",
    "draft.v2_graphs",
    "draft.v2_penalties",
    "draft.v2_window",
    "draft.v2_speculator",
    "draft.v2_step",
    "draft.exit_layer",
    "draft.low_bit",
    "draft.low_bit_linear",
    "draft.mixed_probs",
    "draft.row_planner",
    "draft.v1_step",
    "draft.v2_planned",
}
OF_THE_PLUGIN = (
    "plugin",
    "served_config",
    "engine",
    "engine.patcher",
    "engine.registry",
    "engine.replacements",
    "engine.seams",
    "engine.versions",
)
NUM_COPIED = 16  # the longest draft where tokens are on the host: that of a copy
EVERYWHERE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}


# Folders; "" is the package itself.
LOADED_WITHOUT_TORCH = (
    *("", "plan", "draft_length", "draft", "engine", "bench", "cli"),
)


def modules_of(*folders: str) -> set[str]:
    """Dotted names within the package."""
    return {
        ".".join((*folder.split("/"), path.stem)).lstrip(".")
        for folder in folders
        for path in (PACKAGE / folder).glob("*.py")
        if path.stem not in ("__init__", "__main__")
    }


def output_of(script: str, *args: str, **env: str) -> Any:
    """What a fresh Python prints last, as JSON, when it runs `script`."""
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def packages(modules: list[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_loading_the_plugin_imports_neither_torch_nor_vllm_nor_any_drafting() -> None:
    modules = output_of(
        "import json, sys\n"
        "from vllm_selfspec import plugin\n"
        "plugin.register()\n"
        "plugin.register()\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert not packages(modules) & {"torch", "vllm", "pydantic", "numpy"}
    ours = {name for name in modules if name.startswith("vllm_selfspec.")}
    assert ours == {f"vllm_selfspec.{name}" for name in OF_THE_PLUGIN}


@pytest.mark.parametrize(
    "module",
    sorted(modules_of(*LOADED_WITHOUT_TORCH) - DRAFTING),
)
def test_only_drafting_modules_import_torch_or_vllm_when_loaded(module: str) -> None:
    modules = output_of(
        "import importlib, json, sys\n"
        "importlib.import_module('vllm_selfspec.' + sys.argv[1])\n"
        "print(json.dumps(sorted(sys.modules)))",
        module,
    )
    assert f"vllm_selfspec.{module}" in modules
    assert not packages(modules) & {"torch", "vllm"}


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    from importlib.metadata import entry_points

    (entry,) = [
        e for e in entry_points(group="vllm.general_plugins") if e.name == METHOD
    ]
    assert entry.load() is plugin.register


UNSUPPORTED = """
import json, sys
from vllm_selfspec.engine import versions
versions.vllm_version = lambda: "0.99.0"
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm_selfspec.engine.patcher import ATTACHED

def create(spec):
    args = EngineArgs(sys.argv[1], speculative_config=spec, **json.loads(sys.argv[2]))
    return args.create_engine_config()

plain = create(None)
refusals = []
for spec in ({"method": "selfspec"}, {"method": "selfspec", "exit_layer": 99}):
    try:
        create(spec)
    except Exception as error:
        refusals.append([type(error).__name__, str(error)])
lookahead = VllmConfig.num_lookahead_tokens.fget
print(json.dumps({
    "plain": plain.model_config.max_model_len,
    "additional_config": plain.additional_config,
    "rebound": hasattr(lookahead, ATTACHED),
    "refusals": refusals,
}))
"""


def test_an_unsupported_vllm_goes_on_and_only_asking_for_selfspec_fails(
    tiny_models: dict[str, str],
) -> None:
    found = output_of(UNSUPPORTED, tiny_models["llama"], json.dumps(EVERYWHERE))
    assert found["plain"] == 256 and found["additional_config"] == {}
    assert not found["rebound"], "vLLM's inner functions must be left as they are"
    assert [kind for kind, _ in found["refusals"]] == ["UnsupportedVersionError"] * 2
    for _, message in found["refusals"]:
        assert "supports vLLM 0.32.x and 0.33.x, but this is vLLM 0.99.0" in message
        assert "install a supported vLLM" in message


@pytest.fixture
def model(tiny_models: dict[str, str]) -> str:
    return tiny_models["llama"]


def args_of(model: str, *flags: str) -> Any:
    """What vLLM's own parser makes of the flags of `vllm serve`."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    always = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    args = parser.parse_args(["--model", model, *always, *flags])
    return AsyncEngineArgs.from_cli_args(args)


AUTO = SkipSet.of(4, [1, 2], [1, 2])


@pytest.mark.parametrize(
    ("flags", "skip_set", "k"),
    [
        (["--speculative-config", "selfspec"], AUTO, 4),
        (["--speculative-config=selfspec"], AUTO, 4),
        (["-sc", "selfspec"], AUTO, 4),
        (["--speculative-config", '"selfspec"'], AUTO, 4),
        (["--speculative-config", '{"method": "selfspec"}'], AUTO, 4),
        (
            ["--speculative-config", '{"method": "selfspec", "exit_layer": 2}'],
            SkipSet.early_exit(4, 2),
            4,
        ),
        (
            [
                "--speculative-config",
                '{"method": "selfspec", "skip_layers": {"mlp": [3]}, '
                '"num-speculative-tokens": 2}',
            ],
            SkipSet.of(4, mlp=[3]),
            2,
        ),
        (["--spec-method", "selfspec"], AUTO, 4),
        (["--spec-method", "selfspec", "--spec-tokens", "3"], AUTO, 3),
        (
            ["--spec-method", "selfspec", "--speculative-config", '{"exit_layer": 1}'],
            SkipSet.early_exit(4, 1),
            4,
        ),
        (
            [
                "--speculative-config.method=selfspec",
                "--speculative-config.exit_layer=3",
            ],
            SkipSet.early_exit(4, 3),
            4,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_way_to_write_it_gives_the_plan_that_was_meant(
    flags: list[str], skip_set: SkipSet, k: int, model: str
) -> None:
    config = args_of(model, *flags).create_engine_config()
    plan = config.additional_config[METHOD]
    assert DraftPlan.from_dict(plan["plan"]).skip_set == skip_set
    assert plan["plan"]["num_layers"] == 4
    assert plan["num_model_tokens"] == k
    assert config.num_lookahead_tokens == k, "draft KV needs slots of its own"
    assert config.speculative_config.num_speculative_tokens == NUM_COPIED


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--spec-method", "selfspec", "--speculative-config", "selfspec"],
            r"--spec-method and --speculative-config\['method'\] are mutually",
        ),
        (
            [
                *("--spec-method", "selfspec"),
                *("--speculative-config", '{"method": "selfspec"}'),
            ],
            r"--spec-method and --speculative-config\['method'\] are mutually",
        ),
        (
            [
                *("--spec-method", "selfspec", "--spec-tokens", "3"),
                *("--speculative-config", '{"num_speculative_tokens": 3}'),
            ],
            r"--spec-tokens and --speculative-config\['num_speculative_tokens'\] are",
        ),
        (
            [*("--speculative-config", "selfspec", "--spec-model", "other")],
            "there is no key 'model': remove it",
        ),
        (
            ["--spec-method", "selfspec", "--spec-tokens", "99"],
            "num_speculative_tokens is 99, but must be at most 32: lower it",
        ),
        (
            [
                "--speculative-config",
                '{"method": "selfspec", "exit_layer": 2, "exit-layer": 3}',
            ],
            "it has method, exit_layer, exit-layer: remove one",
        ),
    ],
    ids=["word", "json", "tokens", "model", "bound", "spelling"],
)
def test_flags_that_contradict_each_other_are_refused(
    flags: list[str], message: str, model: str
) -> None:
    with pytest.raises(ValueError, match=message):
        args_of(model, *flags).create_engine_config()


@pytest.mark.parametrize(
    "flags", [["--spec-method", "selfspecs"], ["--speculative-config", "selfspecs"]]
)
def test_a_misspelt_word_is_refused_by_the_parser(
    flags: list[str], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        args_of(model, *flags)
    assert "selfspecs" in capsys.readouterr().err


def test_vllms_own_methods_are_parsed_as_before(model: str) -> None:
    ngram = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    config = args_of(model, "--speculative-config", ngram).create_engine_config()
    assert config.speculative_config.method == "ngram"
    assert config.speculative_config.prompt_lookup_max == 3
    assert METHOD not in config.additional_config
    config = args_of(model).create_engine_config()
    assert config.speculative_config is None and config.num_lookahead_tokens == 0


def create(model: str, spec: dict[str, Any], **kwargs: Any) -> Any:
    """The `VllmConfig` that `LLM(...)` would start with."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model, speculative_config=spec, **{**EVERYWHERE, **kwargs})
    return args.create_engine_config()


def test_translating_leaves_the_users_objects_alone(model: str) -> None:
    spec = {"method": METHOD, "exit_layer": 2}
    additional = {"someone": "else"}
    config = create(model, spec, additional_config=additional)
    assert config.additional_config["someone"] == "else", "it is not ours to drop"
    assert spec == {"method": METHOD, "exit_layer": 2}
    assert additional == {"someone": "else"}, "the same dict may serve a second engine"


def test_a_second_configuration_from_the_same_arguments_is_the_same(model: str) -> None:
    args = args_of(model, "--spec-method", "selfspec", "--spec-tokens", "3")
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.additional_config == second.additional_config
    assert second.additional_config[METHOD]["num_model_tokens"] == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2: use tensor"),
    ],
)
def test_a_deployment_that_cannot_draft_is_refused_before_weights_are_read(
    changed: dict[str, Any], message: str, model: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create(model, {"method": METHOD}, **changed)


@pytest.mark.parametrize("policy", ["threshold", "thompson", "thompson-calibrated"])
def test_rows_that_stop_have_a_step_scheduled_when_they_have(
    policy: str, model: str
) -> None:
    spec = {"method": METHOD, "draft_length": policy}
    config = create(model, spec)
    assert config.scheduler_config.async_scheduling is False
    assert create(model, spec, async_scheduling=False)
    with pytest.raises(ValueError, match=f"'{policy}' stops single .* leave it out"):
        create(model, spec, async_scheduling=True)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The messages of the plugin's logger."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("vllm.selfspec"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_one_log_line_says_what_auto_came_to(model: str, log: list[str]) -> None:
    create(model, {"method": METHOD})
    (line,) = log
    assert "skips attention 1-2; mlp 1-2 (of 4 layers)" in line
    assert "no catalogue entry for this model" in line and "45%" in line


WITHOUT_PLUGIN = """
import json, sys
from vllm import LLM, SamplingParams
settings, prompts, params = map(json.loads, sys.argv[1:])
llm = LLM(**settings)
tokens = [
    [[list(s.token_ids) for s in out.outputs] for out in llm.generate(
        prompts, SamplingParams(**p), use_tqdm=False)]
    for p in params
]
assert not [name for name in sys.modules if name.startswith("vllm_selfspec")]
print(json.dumps(tokens))
"""


def test_installed_but_not_asked_for_it_changes_no_token(
    model: str, engines: Engines
) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    prompts = prompts_of(4)
    greedy = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    seeded = {**greedy, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    settings = {
        "model": model,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "seed": 0,
        **EVERYWHERE,
    }
    llm = engines.get(model)
    assert hasattr(EngineArgs.create_speculative_config, ATTACHED), "it is installed"
    assert METHOD not in llm.llm_engine.vllm_config.additional_config
    with_plugin = [
        token_ids(llm.generate(prompts, SamplingParams(**params), use_tqdm=False))
        for params in (greedy, seeded)
    ]
    without = output_of(
        WITHOUT_PLUGIN,
        *(json.dumps(value) for value in (settings, prompts, [greedy, seeded])),
        VLLM_PLUGINS="",
    )
    assert with_plugin == without
    assert with_plugin[0] != with_plugin[1], "one of the two must really have sampled"
