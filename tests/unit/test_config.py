"""What a user writes is either accepted and works, or refused by a message that helps.

The fuzz tests compare with `faults_of`, a second reading of the rules in plain Python.
"""

import ast
import json
import os
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vllm_selfspec
from vllm_selfspec.config import (
    MAX_NUM_SPECULATIVE_TOKENS,
    ConfigError,
    DraftPlan,
    SelfSpecConfig,
    resolve_plan,
)
from vllm_selfspec.plan.profile import ProfileError
from vllm_selfspec.plan.skip_set import SkipSet, SkipSetError
from vllm_selfspec.plan.target_model import TargetModel

NUM_LAYERS = 4
REFUSALS = (ConfigError, SkipSetError, ProfileError)
NUM_FUZZED = 500
# The same ones on every run; and no clock decides, for the machine may be busy.
FUZZ = settings(
    derandomize=True,
    max_examples=NUM_FUZZED,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def plan(**keys: Any) -> DraftPlan:
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
    assert auto.skip_set == SkipSet.of(4, [1, 2], [1, 2]), "0.45 of 8, inner layers"
    for words in ("no catalogue entry", "45%", "evenly spread", "first and last"):
        assert words in auto.source, "the log line must say what 'auto' came to"


def test_a_skip_set_is_taken_as_written() -> None:
    written = plan(skip_layers={"attention": [3, 1, 1], "mlp": []})
    assert written.skip_set == SkipSet.of(4, [1, 3])
    assert plan(skip_layers={}).skip_set == SkipSet.of(4)


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
def test_an_exit_layer_runs_the_layers_before_it(exit_layer: int) -> None:
    assert plan(exit_layer=exit_layer).skip_set == SkipSet.early_exit(4, exit_layer)


def test_a_profile_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"skip_layers": {"mlp": [2]}, "num_layers": 4}')
    found = plan(skip_layers=str(path))
    assert found.skip_set == SkipSet.of(4, mlp=[2])
    assert str(path) in found.source, "the log line must say where it came from"


def test_a_plan_survives_the_trip_to_the_workers() -> None:
    for keys in ({}, {"exit_layer": 2}, {"skip_layers": {"mlp": [0, 3]}}):
        sent = plan(**keys)
        assert DraftPlan.from_dict(json.loads(json.dumps(sent.to_dict()))) == sent


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SelfSpecConfig.parse({}).exit_layer = 1  # type: ignore[misc]


@pytest.mark.parametrize("key", ["skip_layer", "exit-layer", "model", "__class__", ""])
def test_an_unknown_key_is_refused_with_the_known_ones(key: str) -> None:
    message = refusal(**{key: 1})
    assert f"there is no key {key!r}: remove it" in message
    for known in SelfSpecConfig.model_fields:
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

CANARY = Path(tempfile.gettempdir()) / f"selfspec-canary-{os.getpid()}"
COMMAND = f"__import__('os').mkdir({str(CANARY)!r})"


class _MakesCanary:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(CANARY),)


HOSTILE_TEXT = [
    COMMAND,
    f"{{{{{COMMAND}}}}}",
    f"$({COMMAND})",
    f"!!python/object/apply:os.mkdir [{str(CANARY)!r}]",
    "{0.__class__.__mro__}",
    "%s%n",
    "../../../../dev/zero",
    "/dev/stdin",
    "\0",
    "\ud800",
    "x" * 5000,
]
HOSTILE_FILES = [
    pickle.dumps(_MakesCanary()),
    COMMAND.encode(),
    f"!!python/object/apply:os.mkdir [{str(CANARY)!r}]".encode(),
    json.dumps({"skip_layers": {"mlp": [1]}, "__class__": COMMAND}).encode(),
    b"[" * 100_000,
    b'{"skip_layers": ' * 5_000,
    b'{"skip_layers": {"mlp": [' + b"9" * 5_000 + b"]}}",
    b'{"skip_layers": {"mlp": [1e999]}}',
    b'{"skip_layers": {"mlp": [-Infinity]}}',
    b'{"skip_layers": {"mlp": [1]}, "skip_layers": {}}',
    b"\xff\xfe\x00",
    b"",
]


@dataclass(frozen=True)
class File:
    """A profile to be written and named in the configuration."""

    content: bytes


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**9, 10**400, -(10**400)]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(HOSTILE_TEXT),
)
keys = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["__class__", "__init__", "skip-layers", "layers", *HOSTILE_TEXT]),
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=8,
)
layers = st.lists(st.integers(0, NUM_LAYERS - 1), max_size=NUM_LAYERS)
good_skip_sets = st.fixed_dictionaries(
    {}, optional={"attention": layers, "mlp": layers}
).filter(lambda lists: _skip_set_of(lists) is not None)
bad_skip_sets = st.fixed_dictionaries(
    {},
    optional={
        "attention": layers | junk | st.lists(scalars, min_size=1),
        "mlp": layers | st.just([*range(NUM_LAYERS)]),
        "attn": layers,
    },
)


def files(documents: st.SearchStrategy[Any]) -> st.SearchStrategy[File]:
    """Profiles of these documents."""
    return st.builds(lambda document: File(json.dumps(document).encode()), documents)


good_profiles = files(
    st.fixed_dictionaries(
        {"skip_layers": good_skip_sets},
        optional={"num_layers": st.just(NUM_LAYERS), "note": st.text(max_size=8)},
    )
)
bad_profiles = st.one_of(
    files(junk),
    files(
        st.fixed_dictionaries(
            {"skip_layers": good_skip_sets | bad_skip_sets | junk},
            optional={"num_layers": scalars, "model": scalars, "extra": junk},
        )
    ),
    st.sampled_from([File(content) for content in HOSTILE_FILES]),
)

GOOD: dict[str, st.SearchStrategy[Any]] = {
    "method": st.just("selfspec"),
    "num_speculative_tokens": st.integers(1, 8),
    "draft_sample_method": st.sampled_from(["greedy", "probabilistic"]),
    "draft_length": st.sampled_from(
        [
            *("goodput", "fixed", "threshold", "thompson", "thompson-calibrated"),
            *({"policy": "fixed"}, {"policy": "threshold", "start": 0.5, "target": 1}),
            *({"policy": "thompson", "seed": 3}, {"policy": "thompson-calibrated"}),
        ]
    ),
    "num_speculative_tokens_per_batch_size": st.sampled_from(
        [None, [[1, 1, 1]], [[1, 2, 1], [3, 8, 0]]]
    ),
}
BAD: dict[str, st.SearchStrategy[Any]] = {
    "method": junk,
    "num_speculative_tokens": junk | st.sampled_from([0, 33, "4", 4.5]),
    "draft_sample_method": junk | st.sampled_from(["Greedy", "gumbel"]),
    "draft_length": junk
    | st.sampled_from(["Goodput", {"policy": "best"}, {"policy": "fixed", "start": 1}])
    | st.sampled_from([{"policy": "threshold", "start": 2}, {"start": 0.5}])
    | st.sampled_from([{"policy": "thompson", "seed": -1}]),
    "num_speculative_tokens_per_batch_size": junk
    | st.sampled_from([[], [[1, 8]], [[2, 3, 1]], [[1, 4, 1], [4, 8, 1]], [[1, 2, -1]]])
    | st.sampled_from([[[1, 2, 99]], [[3, 2, 1]], [[1, 2.0, 1]], [[1, 2, 1], []]]),
    "skip_layers": junk | bad_skip_sets | bad_profiles,
    "exit_layer": junk | st.sampled_from([0, 5, 99, "2", 1.5]),
}
plans = st.one_of(
    st.sampled_from([{}, {"skip_layers": "auto"}, {"exit_layer": None}]),
    st.fixed_dictionaries({"skip_layers": good_skip_sets}),
    st.fixed_dictionaries({"skip_layers": good_profiles}),
    st.fixed_dictionaries({"exit_layer": st.integers(1, NUM_LAYERS)}),
)
sound = st.builds(
    lambda keys, plan: {**keys, **plan}, st.fixed_dictionaries({}, optional=GOOD), plans
)
flaws = st.one_of(
    *(st.fixed_dictionaries({key: values}) for key, values in BAD.items()),
    st.dictionaries(keys, junk, min_size=1, max_size=2),
)
flawed = st.builds(lambda keys, flaw: {**keys, **flaw}, sound, flaws)
wild = st.fixed_dictionaries({}, optional=BAD)
configurations = sound | flawed | wild


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _skip_set_of(value: Any) -> SkipSet | None:
    """The skip set that `value` means, or None if it is at fault."""
    if not isinstance(value, dict) or not value.keys() <= {"attention", "mlp"}:
        return None
    for indices in value.values():
        if not isinstance(indices, list):
            return None
        if not all(_is_int(index, 0, NUM_LAYERS - 1) for index in indices):
            return None
    sets = [frozenset(value.get(sublayer, ())) for sublayer in ("attention", "mlp")]
    if len(sets[0]) + len(sets[1]) == 2 * NUM_LAYERS:
        return None
    return SkipSet(NUM_LAYERS, *sets)


def _skip_set_in(file: File) -> SkipSet | None:
    """The skip set that a profile means, or None if it is at fault."""
    try:
        document = json.loads(file.content)
    except (ValueError, RecursionError):
        return None
    known = {"skip_layers", "num_layers", "model", "note"}
    if not isinstance(document, dict) or not document.keys() <= known:
        return None
    if file.content.count(b'"skip_layers"') > 1:
        return None
    texts = (document.get("model"), document.get("note"))
    if not all(text is None or isinstance(text, str) for text in texts):
        return None
    if any(text is not None and len(text) > 4096 for text in texts):
        return None
    depth = document.get("num_layers")
    if depth is not None and not _is_int(depth, NUM_LAYERS, NUM_LAYERS):
        return None
    return _skip_set_of(document.get("skip_layers"))


def _is_schedule(value: Any, most: int) -> bool:
    """Whether the batch sizes are told one after the other, each size once."""
    if not isinstance(value, list) or not value:
        return False
    sizes: list[int] = []
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 3:
            return False
        if not (_is_int(entry[0], 1, 10**9) and _is_int(entry[1], entry[0], 10**9)):
            return False
        if not _is_int(entry[2], 0, most):
            return False
        sizes += [*range(entry[0], entry[1] + 1)]
    return sizes == [*range(1, len(sizes) + 1)]


def _is_draft_length(value: Any) -> bool:
    """Whether it is a policy, or one with parameters within their bounds."""
    shares, seeds = ("start", "target"), ("seed",)
    parameters = {
        **{"goodput": (), "fixed": (), "threshold": shares},
        **{"thompson": seeds, "thompson-calibrated": seeds},
    }
    given = dict(value) if isinstance(value, dict) else {"policy": value}
    policy = given.pop("policy", None)
    if not isinstance(policy, str) or policy not in parameters:
        return False
    return all(
        key in parameters[policy]
        and isinstance(number, int | float)
        and (_is_int(number, 0, 10**9) if key in seeds else 0 <= number <= 1)
        for key, number in given.items()
    )


def faults_of(config: dict[str, Any]) -> set[str]:
    """The keys at fault, read from the rules by other code than that under test."""
    value = config.get
    exit_layer, skip_layers = value("exit_layer"), value("skip_layers", "auto")
    num_drafts = value("num_speculative_tokens", 4)
    schedule = value("num_speculative_tokens_per_batch_size")
    is_good = {
        "method": value("method", "selfspec") == "selfspec",
        "num_speculative_tokens": _is_int(
            value("num_speculative_tokens", 4), 1, MAX_NUM_SPECULATIVE_TOKENS
        ),
        "draft_sample_method": value("draft_sample_method", "probabilistic")
        in ("greedy", "probabilistic"),
        "draft_length": _is_draft_length(value("draft_length", "goodput")),
        "num_speculative_tokens_per_batch_size": schedule is None
        or _is_schedule(schedule, num_drafts if _is_int(num_drafts, 1, 32) else 32),
        "exit_layer": exit_layer is None
        or (_is_int(exit_layer, 1, NUM_LAYERS) and "skip_layers" not in config),
        "skip_layers": skip_layers == "auto"
        or _skip_set_of(skip_layers) is not None
        or (isinstance(skip_layers, File) and _skip_set_in(skip_layers) is not None),
    }
    return {key for key in config if not is_good.get(key, False)}


def wanted_skip_set(config: dict[str, Any]) -> SkipSet | None:
    """What a faultless configuration must come to."""
    if config.get("exit_layer") is not None:
        return SkipSet.early_exit(NUM_LAYERS, config["exit_layer"])
    skip_layers = config.get("skip_layers", "auto")
    if skip_layers == "auto":
        return SkipSet.evenly_spread(NUM_LAYERS)
    if isinstance(skip_layers, File):
        return _skip_set_in(skip_layers)
    return _skip_set_of(skip_layers)


def written(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """`config` as a user writes it: its profile in a file at `path`."""
    skip_layers = config.get("skip_layers")
    if not isinstance(skip_layers, File):
        return config
    path.write_bytes(skip_layers.content)
    return {**config, "skip_layers": str(path)}


def names_one_of(message: str, faults: set[str]) -> bool:
    """Whether `message` names one of these keys; of a long one the start is enough."""
    known = faults & SelfSpecConfig.model_fields.keys()
    return any(key in message for key in known) or any(
        f"no key {key!r:.30}" in message for key in faults - known
    )


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
        assert found.skip_set == wanted_skip_set(config)
        sent = json.loads(json.dumps(found.to_dict()))
        assert DraftPlan.from_dict(sent) == found
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
