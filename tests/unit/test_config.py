"""What a user writes is either accepted and works, or refused by a message that helps.

The fuzz tests compare with `faults_of` of `helpers.configurations`.
"""

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given

import vllm_selfspec
from helpers.configurations import (
    CANARY,
    FUZZ,
    HOSTILE_FILES,
    NUM_LAYERS,
    REFUSALS,
    configurations,
    faults_of,
    flaws,
    names_one_of,
    sound,
    wanted_skip_set,
    written,
)
from vllm_selfspec.chosen_plan import ChosenPlan, resolve_plan
from vllm_selfspec.config import SelfSpecConfig, config_type
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.target_model import TargetModel


def plan(**keys: Any) -> ChosenPlan:
    """The plan of these keys for a model of `NUM_LAYERS` layers."""
    return resolve_plan(SelfSpecConfig.parse(keys), TargetModel(NUM_LAYERS))


def refusal(**keys: Any) -> str:
    """The message these keys are refused with."""
    with pytest.raises(REFUSALS) as error:
        plan(**keys)
    return str(error.value)


def test_nothing_written_means_the_published_default_and_says_so() -> None:
    assert SelfSpecConfig.parse({}) == SelfSpecConfig.parse({"method": "selfspec"})
    assert SelfSpecConfig.parse({}).num_speculative_tokens == 4
    auto = plan()
    assert auto == plan(skip_layers="auto")
    assert auto.plan.skip_set == SkipSet.of(4, [1, 2], [1, 2]), (
        "0.45 of 8, inner layers"
    )
    for words in ("no catalogue entry", "45%", "evenly spread", "first and last"):
        assert words in auto.source, "the log line must say what 'auto' came to"


def test_a_skip_set_is_taken_as_written() -> None:
    written = plan(skip_layers={"attention": [3, 1, 1], "mlp": []})
    assert written.plan.skip_set == SkipSet.of(4, [1, 3])
    assert plan(skip_layers={}).plan.skip_set == SkipSet.of(4)


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
def test_an_exit_layer_runs_the_layers_before_it(exit_layer: int) -> None:
    assert plan(exit_layer=exit_layer).plan.skip_set == SkipSet.early_exit(
        4, exit_layer
    )


def test_a_profile_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"skip_layers": {"mlp": [2]}, "num_layers": 4}')
    found = plan(skip_layers=str(path))
    assert found.plan.skip_set == SkipSet.of(4, mlp=[2])
    assert str(path) in found.source, "the log line must say where it came from"


def test_a_plan_survives_the_trip_to_the_workers() -> None:
    for keys in ({}, {"exit_layer": 2}, {"skip_layers": {"mlp": [0, 3]}}):
        sent = plan(**keys).plan
        assert DraftPlan.from_dict(json.loads(json.dumps(sent.to_dict()))) == sent


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SelfSpecConfig.parse({}).exit_layer = 1  # type: ignore[misc]


@pytest.mark.parametrize("key", ["skip_layer", "exit-layer", "model", "__class__", ""])
def test_an_unknown_key_is_refused_with_the_known_ones(key: str) -> None:
    message = refusal(**{key: 1})
    assert f"there is no key {key!r}: remove it" in message
    for known in config_type().model_fields:
        assert known in message


@pytest.mark.parametrize(
    ("keys", "finding"),
    [
        ({"draft_length": "best"}, "is 'best', but must be one of goodput, fixed, thr"),
        (
            {"draft_length": {"policy": "threshold", "start": 2}},
            "start is 2, but must be at most 1.0: lower it",
        ),
        (
            {"draft_length": {"policy": "fixed", "start": 1}},
            "there is no key 'start': remove it, or use one of policy",
        ),
        ({"num_speculative_tokens": 0}, "is 0, but must be at least 1: raise it"),
        ({"num_speculative_tokens": 33}, "is 33, but must be at most 32: lower it"),
        ({"num_speculative_tokens": "4"}, "is '4', but must be a whole number: write"),
        ({"num_speculative_tokens": 4.0}, "is 4.0, but must be a whole number: write"),
        ({"num_speculative_tokens": True}, "is True, but must be a whole number"),
        ({"num_speculative_tokens": None}, "is None, but must be a whole number"),
        ({"num_speculative_tokens": 10**5000}, "but must be at most 32: lower it"),
        ({"exit_layer": 0}, "is 0, but must be at least 1: raise it"),
        ({"exit_layer": "2"}, "is '2', but must be a whole number: write one"),
        ({"exit_layer": 10**9}, "but must be less than 10000: lower it"),
        ({"exit_layer": 5}, "1 to 4 for this model, but it is 5: use 4"),
        (
            {"draft_sample_method": "best"},
            "is 'best', but must be 'greedy' or 'probabilistic': write that",
        ),
        (
            {"num_speculative_tokens_per_batch_size": [[1, 4]]},
            "num_speculative_tokens_per_batch_size is [[1, 4]], but must be a list of "
            "[first batch size, last, tokens]: write it like [[1, 8, 4]",
        ),
        (
            {"num_speculative_tokens_per_batch_size": [[2, 8, 1]]},
            "is [[2, 8, 1]], but must name every batch size from 1 once",
        ),
        (
            {"num_speculative_tokens_per_batch_size": [[1, 8, 5]]},
            "asks for 5 tokens, more than num_speculative_tokens=4: lower it",
        ),
        (
            {
                "draft_source": "context",
                "num_copied_tokens": 9,
                "num_speculative_tokens_per_batch_size": [[1, 8, 10]],
            },
            "asks for 10 tokens, more than the longest draft of draft_source 'context'"
            "=9: lower it",
        ),
        (
            {"draft_source": "context", "draft_memory": "30%"},
            "draft_memory is of source 'model', but draft_source is 'context'",
        ),
        ({"method": "eagle"}, "is 'eagle', but must be 'selfspec': write that"),
        (
            {"skip_layers": [1, 2]},
            "is [1, 2], but must be 'auto', 'online', the path of a JSON profile, or a "
            'skip set: write one, like {"attention": [3], "mlp": [4]}',
        ),
        (
            {"skip_layers": None},
            "is None, but must be 'auto', 'online', the path of a JSON",
        ),
        (
            {"skip_layers": {"mlp": 3}},
            "skip_layers.mlp is 3, but must be a list of layer indices: write one",
        ),
        (
            {"skip_layers": {"mlp": ["x"]}},
            "skip_layers.mlp.0 is 'x', but must be a whole number: write one",
        ),
        (
            {"skip_layers": {"attentoin": []}},
            "there is no key 'attentoin': remove it, or use one of attention, mlp",
        ),
        (
            {"skip_layers": {"path": []}},
            "there is no key 'path': remove it, or use one of attention, mlp",
        ),
        (
            {"skip_layers": {"attention": [1, 40]}},
            "skip set names attention of layer 40, but the model has 4 layers "
            "(0 to 3): remove [40] from 'attention'",
        ),
        (
            {"skip_layers": {"attention": [*range(4)], "mlp": [*range(4)]}},
            "must run at least one sublayer, but this skip set names all 8: keep one",
        ),
        ({"skip_layers": "no/such/profile.json"}, "No such file"),
        ({"skip_layers": "autos"}, "check the path"),
        ({"skip_layers": ""}, "check the path"),
        ({"skip_layers": "x" * 5000}, "must have at most 4096 characters: shorten it"),
    ],
)
def test_a_value_not_allowed_is_refused_by_key_value_rule_and_fix(
    keys: dict[str, Any], finding: str
) -> None:
    message = refusal(**keys)
    assert finding in message
    assert next(iter(keys)) in message, "the key"
    assert len(message) < 400, "a message is for reading"


@pytest.mark.parametrize("skip_layers", ["auto", {"mlp": [1]}, "profile.json"])
def test_skip_layers_and_exit_layer_exclude_each_other(skip_layers: Any) -> None:
    message = refusal(skip_layers=skip_layers, exit_layer=2)
    assert "exit_layer and skip_layers exclude each other: remove one" in message


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"skip_layers": {"mlp": [2]}, "num_layers": 12}')
    message = refusal(skip_layers=str(path))
    assert "another model, but this model has 4 layers in place of 12" in message
    assert "use a profile of this model, or skip_layers 'auto'" in message


def test_a_layer_the_model_lacks_is_traced_to_its_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"skip_layers": {"mlp": [2, 7]}}')
    message = refusal(skip_layers=str(path))
    assert str(path) in message, "a user with ten profiles must know which"
    assert "mlp of layer 7, but the model has 4 layers" in message


# What follows generates configurations: sound ones, sound ones with one flaw, and ones
# in which any value may be at fault.


@given(config=configurations)
@FUZZ
def test_any_configuration_works_or_is_refused_by_the_name_of_a_key(
    config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = written(config, tmp_path_factory.getbasetemp() / "fuzzed.json")
    faults = faults_of(config)
    try:
        found = resolve_plan(SelfSpecConfig.parse(keys), TargetModel(NUM_LAYERS))
    except REFUSALS as error:
        assert faults, f"refused without a reason: {config!r:.300}: {error}"
        assert names_one_of(str(error), faults), f"{faults} but: {error}"
        assert len(str(error)) < 1000, "a message is for reading"
    else:
        assert not faults, f"accepted in spite of {faults}: {config!r:.300}"
        assert found.plan.skip_set == wanted_skip_set(config)
        sent = json.loads(json.dumps(found.plan.to_dict()))
        assert DraftPlan.from_dict(sent) == found.plan
    assert not CANARY.exists(), f"executed something in {config!r:.300}"


@given(config=sound, flaw=flaws)
@FUZZ
def test_a_single_fault_is_refused_by_its_very_key(
    config: dict[str, Any],
    flaw: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    faults = faults_of({**config, **flaw})
    assume(len(faults) == 1)  # a flaw may by chance be none, or bring another
    keys = written({**config, **flaw}, tmp_path_factory.getbasetemp() / "fuzzed.json")
    message = refusal(**keys)
    assert names_one_of(message, faults), f"at fault is {faults}, but: {message}"


def test_the_canary_would_show_a_code_execution() -> None:
    try:
        pickle.loads(HOSTILE_FILES[0])
        assert CANARY.exists()
        CANARY.rmdir()
        eval(HOSTILE_FILES[1])
        assert CANARY.exists()
    finally:
        CANARY.rmdir()


# Each turns data into code. `.eval()` of a torch module is an attribute, hence allowed.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml"}
PACKAGE = Path(vllm_selfspec.__file__).parent
# A training reads its own checkpoint by torch.load, with weights_only.
MODULES = sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "training" / "trainer.py"})


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_module_can_turn_data_into_code(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        elif isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN_CALLS, f"line {node.lineno}: {node.id}"
        elif isinstance(node, ast.Attribute) and node.attr == "load":
            names = [ast.unparse(node.value)]
            assert names != ["torch"], f"line {node.lineno}: torch.load unpickles"
        assert not FORBIDDEN_MODULES & {*names}, f"{module.stem} imports {names}"


def test_a_schedule_of_copies_alone_goes_as_far_as_they_do() -> None:
    schedule = [[1, 8, 9], [9, 64, 0]]
    keys = {"draft_source": "context", "num_copied_tokens": 9}
    config = SelfSpecConfig.parse(
        {**keys, "num_speculative_tokens_per_batch_size": schedule}
    )
    found = config.num_speculative_tokens_per_batch_size or []
    assert [[*entry] for entry in found] == schedule
