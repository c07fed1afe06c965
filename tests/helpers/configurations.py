"""Configurations as Hypothesis draws them, what is wrong with each, and what a right
one comes to.

`faults_of` is a second reading of the rules, in plain Python.
"""

import json
import os
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from vllm_selfspec.config import (
    MAX_NUM_SPECULATIVE_TOKENS,
    ConfigError,
    config_type,
)
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.profile import ProfileError
from vllm_selfspec.plan.skip_set import SkipSet

NUM_LAYERS = 4
REFUSALS = (ConfigError, PlanError, ProfileError)
NUM_FUZZED = 500
# The same ones on every run; and no clock decides, for the machine may be busy.
FUZZ = settings(
    derandomize=True,
    max_examples=NUM_FUZZED,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


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
    known = faults & config_type().model_fields.keys()
    return any(key in message for key in known) or any(
        f"no key {key!r:.30}" in message for key in faults - known
    )
