"""Every change to vLLM is a row of one table, fits the vLLM at hand, and is reported
where it doesn't."""

import ast
import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import vllm_selfspec
from helpers.vllm_source import VERSIONS, exists, signature, source_of
from vllm_selfspec import plugin
from vllm_selfspec.engine import patcher, registry, seams, versions
from vllm_selfspec.engine.patcher import ATTACHED, Seam
from vllm_selfspec.engine.seams import SEAMS

FAKE = "fake_vllm_module"
PACKAGE = Path(vllm_selfspec.__file__).parent


def bound(seam: Seam) -> Any:
    """What `seam`'s target is now, as it lies in its class or module."""
    *path, attribute = seam.target.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(seam.module))
    return vars(owner)[attribute]


def function_of(found: Any) -> Any:
    """The function of a property, a static method or a function."""
    if isinstance(found, property):
        return found.fget
    return getattr(found, "__func__", found)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty list in place of what this process found."""
    found: list[str] = []
    monkeypatch.setattr(patcher, "problems", found)
    return found


def counting(original: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement that adds 1 to what the original returns."""
    return lambda *args, **kwargs: original(*args, **kwargs) + 1


def a_seam(target: str, *parameters: str, **fields: Any) -> Seam:
    """A row for the fake module."""
    fields = {"replace": counting, "why": "to test", "remove_when": "tested", **fields}
    return Seam(module=FAKE, target=target, parameters=parameters, **fields)


def a_module() -> ModuleType:
    """A module with one function of every kind that a row may name."""

    class Base:
        def inherited(self) -> int:
            return 0

    class Engine(Base):
        def run(self, a: int) -> int:
            return a

        @staticmethod
        def make(a: int) -> int:
            return a

        @property
        def size(self) -> int:
            return 10

    module = ModuleType(FAKE)
    module.Engine = Engine  # type: ignore[attr-defined]
    module.helper = lambda a: a  # type: ignore[attr-defined]
    return module


ALL = pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.target)


@ALL
def test_every_row_says_why_it_is_and_when_it_goes(seam: Seam) -> None:
    assert len(seam.why) > 20 and seam.why.endswith("."), "a reason is a sentence"
    assert len(seam.remove_when) > 10 and seam.remove_when.endswith(".")
    assert seam.module.startswith("vllm.") and seam.parameters


@pytest.mark.parametrize("release", versions.SUPPORTED_VLLM)
def test_no_target_has_two_rows_in_a_release(release: str) -> None:
    rows = [seam.name for seam in SEAMS if seam.is_for(release)]
    assert len({*rows}) == len(rows)


@pytest.mark.parametrize("version", VERSIONS)
@ALL
def test_every_target_is_in_the_source_of_each_release_as_recorded(
    seam: Seam, version: str
) -> None:
    if not seam.is_for(version):
        return  # the row is not attached there
    source_root = source_of(version)
    assert signature(source_root, seam.module, seam.target) == seam.parameters


@pytest.mark.parametrize("version", VERSIONS)
def test_every_vllm_name_that_is_imported_exists_in_each_release(version: str) -> None:
    imports = {
        (node.module, alias.name)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm.")
        for alias in node.names
    }
    assert len(imports) > 20
    # The registry is that of `patches/`.
    imports = {(m, name) for m, name in imports if m != "vllm.v1.spec_decode.registry"}
    root = source_of(version)
    assert [i for i in sorted(imports) if not exists(root, *i)] == []


INSTALLED = VERSIONS[0]
SPEC_DECODE = "vllm.v1.worker.gpu.spec_decode"
SCHEDULER = ("vllm.v1.core.sched.scheduler", "Scheduler")
SPECULATOR = (
    (f"{SPEC_DECODE}.target_dependent_ar.speculator", "TargetDependentARSpeculator"),
    (f"{SPEC_DECODE}.speculator", "DraftModelSpeculator"),
    (f"{SPEC_DECODE}.speculator", "BaseSpeculator"),
)
# What the classes that extend one of vLLM's extend, nearest first.
BASES = {
    "PlainSteps": (SCHEDULER,),
    "PlanningScheduler": (
        ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
        SCHEDULER,
    ),
    "DrawingSpeculator": SPECULATOR,
    "SelfSpecSpeculator": SPECULATOR,
    "PlannedSpeculator": SPECULATOR,
    "RowStoppingSpeculator": SPECULATOR,
    "DraftGraphManager": (
        (
            f"{SPEC_DECODE}.target_dependent_ar.cudagraph_utils",
            "SpeculatorCudaGraphManager",
        ),
        ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager"),
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BASES)
def test_every_class_fits_those_it_extends_in_each_release(
    name: str, version: str
) -> None:
    def inherited(method: str, version: str = version) -> tuple[str, ...] | None:
        root = source_of(version)
        found = (signature(root, m, f"{c}.{method}") for m, c in BASES[name])
        return next((names for names in found if names is not None), None)

    files = (
        "draft/v2_drawing.py",
        "draft/v2_speculator.py",
        "draft/v2_graphs.py",
        "draft/v2_planned.py",
        "draft/v2_row_stops.py",
        "engine/plain_steps.py",
        "engine/scheduler.py",
    )
    modules = [ast.parse((PACKAGE / file).read_text()) for file in files]
    (ours,) = [
        n for module in modules for n in module.body if getattr(n, "name", "") == name
    ]
    methods = {n.name: n for n in ours.body if isinstance(n, ast.FunctionDef)}
    overridden = 0
    for method, node in methods.items():
        expected = inherited(method)
        if expected is None:
            continue
        overridden += 1
        accepted = {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
        if node.args.kwarg is None:
            assert set(expected) <= accepted, f"{method} is called with {expected}"
    assert overridden >= 1
    used = {
        node.attr
        for node in ast.walk(ours)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value).split("(")[0] in ("self", "super")
    }
    inherited_here = {m for m in used - set(methods) if inherited(m, INSTALLED)}
    for method in inherited_here:
        assert inherited(method) == inherited(method, INSTALLED), method


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_planning_scheduler_reads_is_there_in_each_release(
    version: str,
) -> None:
    modules = [
        ast.parse((PACKAGE / f"engine/{name}.py").read_text())
        for name in ("plain_steps", "scheduler")
    ]
    ours = {getattr(n, "name", ""): n for module in modules for n in module.body}
    annotated = [
        node
        for mixin in (ours["OfScheduler"], ours["PlanningScheduler"])
        for node in mixin.body
        if isinstance(node, ast.AnnAssign)
    ]
    names = {ast.unparse(node.target) for node in annotated} - {"costs"}  # ours
    path = Path(*SCHEDULER[0].split(".")).with_suffix(".py")
    source = (source_of(version) / path).read_text()
    missing = [n for n in names if not re.search(rf"self\.{n}\b\s*[:=]", source)]
    assert len(names) > 5 and not missing


def test_the_source_reader_tells_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / FAKE).mkdir()
    (tmp_path / FAKE / "__init__.py").write_text(
        "from .deep import far\n"
        "class Engine:\n"
        "    size = 10\n"
        "    def run(self, a, /, b=1, *rest, c, **others): ...\n"
        "class Engine:\n"
        "    def run(self, b): ...\n"
        "def free(a, *, b): ...\n"
        "LIMIT: int = 3\n"
    )
    (tmp_path / FAKE / "deep.py").write_text("def far(x): ...\n")
    assert signature(tmp_path, FAKE, "Engine.run") == ("self", "b"), "the last"
    assert signature(tmp_path, FAKE, "free") == ("a", "b")
    assert signature(tmp_path, FAKE, "far") == ("x",), "imported from there"
    for missing in ("Engine.size", "Engine.walk", "Motor.run", "Engine.run.x"):
        assert signature(tmp_path, FAKE, missing) is None, missing
    assert signature(tmp_path, "nowhere.at.all", "f") is None
    for name in ("Engine", "free", "far", "LIMIT", "deep"):
        assert exists(tmp_path, FAKE, name), name
    assert not exists(tmp_path, FAKE, "Motor")


@ALL
def test_every_target_is_rebound_in_the_installed_vllm(seam: Seam) -> None:
    plugin.register()
    seams.raise_if_unusable()
    if not seam.is_for(versions.vllm_version()):
        return
    assert getattr(function_of(bound(seam)), ATTACHED) is seam


def test_installing_twice_equals_installing_once() -> None:
    plugin.register()
    seams.raise_if_unusable()
    once = [bound(seam) for seam in SEAMS]
    plugin.register()
    seams.install()
    for seam, before in zip(SEAMS, once, strict=True):
        assert bound(seam) is before, f"{seam.name} was rebound a second time"
    assert patcher.problems == []


def test_a_row_is_attached_once_and_hands_over(problems: list[str]) -> None:
    module = a_module()
    engine = module.Engine()
    rows = [
        a_seam("Engine.run", "self", "a"),
        a_seam("Engine.make", "a", kind=staticmethod),
    ]
    for seam in [*rows, *rows, a_seam("helper", "a")]:
        patcher.attach(seam, module)
    assert engine.run(1) == 2, "attached twice, it would be 3"
    assert module.Engine.make(1) == engine.make(1) == 2, "still a static method"
    assert module.helper(1) == 2, "a function of the module itself"
    assert problems == []


def test_a_property_stays_a_property(problems: list[str]) -> None:
    module = a_module()
    seam = a_seam(
        "Engine.size",
        "self",
        kind=property,
        replace=lambda original: property(lambda self: original.__get__(self) + 1),
    )
    for _ in range(2):
        patcher.attach(seam, module)
    assert module.Engine().size == 11
    assert problems == []


@pytest.mark.parametrize(
    ("seam", "finding"),
    [
        (a_seam("Engine.walk", "self"), "Engine.walk does not exist"),
        (a_seam("Motor.run", "self"), "Motor.run does not exist"),
        (a_seam("gone", "a"), "gone does not exist"),
        # Rebinding it would reach the base's other children too.
        (a_seam("Engine.inherited", "self"), "Engine.inherited does not exist"),
        (
            a_seam("Engine.run", "self", "b"),
            "Engine.run has parameters ('self', 'a'), not ('self', 'b')",
        ),
        (
            a_seam("Engine.size", "self", "unit", kind=property),
            "Engine.size has parameters ('self',)",
        ),
    ],
    ids=lambda value: value.target if isinstance(value, Seam) else "",
)
def test_a_row_that_does_not_fit_is_reported_and_leaves_vllm_alone(
    seam: Seam, finding: str, problems: list[str]
) -> None:
    module = a_module()
    before = (dict(vars(module)), dict(vars(module.Engine)))
    for _ in range(2):
        patcher.attach(seam, module)
    assert (dict(vars(module)), dict(vars(module.Engine))) == before
    assert len(problems) == 1, "one finding, however often it is met"
    assert problems[0].startswith(f"{FAKE}:") and finding in problems[0]


def test_a_row_that_does_not_fit_makes_asking_fail_with_the_version(
    problems: list[str],
) -> None:
    patcher.attach(a_seam("Engine.walk", "self"), a_module())
    with pytest.raises(patcher.SeamError) as error:
        seams.raise_if_unusable()
    message = str(error.value)
    assert f"does not fit this vLLM {versions.vllm_version()}" in message, "found"
    assert f"{FAKE}:Engine.walk does not exist" in message, "the rule broken"
    assert "a newer vllm-selfspec" in message, "the fix"


def test_an_unsupported_version_gets_the_entry_rows_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting: list[Seam] = []
    monkeypatch.setattr(patcher, "when_imported", waiting.append)
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.99.0")
    seams.install()
    assert waiting == [seam for seam in SEAMS if seam.is_entry] != []
    with pytest.raises(versions.UnsupportedVersionError, match="0.99.0"):
        seams.raise_if_unusable()
    waiting.clear()


def test_only_the_rows_that_a_release_needs_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.32.1+cpu")
    assert left_out() == ["rejection_sample"], "0.33's has other parameters"
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.33.1")
    assert left_out() == [
        "VllmConfig.__post_init__",
        "Scheduler._handle_stopped_request",
        "rejection_sample",
    ]
    monkeypatch.setattr(registry, "exists", lambda: True)
    rows = [seam for seam in SEAMS if seam.is_for("0.33") and not seam.in_registry]
    assert seams.needed() == rows != []


def left_out() -> list[str]:
    return [seam.target for seam in SEAMS if seam not in seams.needed()]


def replaced(target: str, original: Any) -> Any:
    """The replacement that `target`'s row makes of `original`."""
    seam, *_ = [seam for seam in SEAMS if seam.target == target]
    return seam.replace(original)


NOT_OURS = SimpleNamespace(additional_config={"someone": "else"})


def test_lookahead_is_vllms_own_unless_asked_for() -> None:
    class Config(SimpleNamespace):
        @property
        def num_lookahead_tokens(self) -> int:
            return 7

    ours = replaced("VllmConfig.num_lookahead_tokens", Config.num_lookahead_tokens)
    assert ours.__get__(Config(additional_config={}, num_speculative_tokens=3)) == 7
    own = {"selfspec": {"num_model_tokens": 3}}
    asked = Config(additional_config=own, num_speculative_tokens=16)
    assert ours.__get__(asked) == 3, "copies have their slots when they are verified"


@pytest.mark.parametrize(
    "target",
    [
        "GPUModelRunner._input_fits_in_drafter",
        "GPUModelRunner.propose_draft_token_ids",
    ],
)
def test_the_runner_is_vllms_own_unless_asked_for(target: str) -> None:
    calls: list[tuple[Any, ...]] = []

    def original(self: Any, *args: Any) -> str:
        calls.append((self, *args))
        return "vLLM's"

    runner = SimpleNamespace(vllm_config=NOT_OURS)
    args = tuple(range(9 if "propose" in target else 1))
    assert replaced(target, original)(runner, *args) == "vLLM's"
    assert calls == [(runner, *args)], "the same arguments, once"
    assert vars(runner) == {"vllm_config": NOT_OURS}, "and nothing left behind"


@pytest.mark.parametrize(
    "args",
    [
        {"speculative_config": None, "spec_method": None},
        {"speculative_config": {"method": "ngram"}, "spec_method": None},
        {"speculative_config": {}, "spec_method": "eagle"},
        {"speculative_config": "not a dict", "spec_method": None},
    ],
)
def test_engine_args_are_vllms_own_unless_asked_for(
    args: dict[str, Any], problems: list[str]
) -> None:
    problems.append("even where selfspec could not work")
    engine_args = SimpleNamespace(**args)
    target = "EngineArgs.create_speculative_config"
    create = replaced(target, lambda self, model, parallel: (self, model, parallel))
    assert create(engine_args, "model", "parallel") == (
        engine_args,
        "model",
        "parallel",
    )
    assert vars(engine_args) == args, "untouched"


@pytest.mark.parametrize(
    "now",
    [
        lambda self: 10,
        functools.cached_property(lambda self: 10),
        classmethod(lambda self: 10),
        10,
    ],
    ids=["method", "cached_property", "classmethod", "value"],
)
def test_a_property_that_became_something_else_is_reported(
    now: Any, problems: list[str]
) -> None:
    module = a_module()
    module.Engine.size = now
    seam = a_seam("Engine.size", "self", kind=property)
    patcher.attach(seam, module)
    assert vars(module.Engine)["size"] is now
    assert len(problems) == 1
