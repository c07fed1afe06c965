"""The fixtures of all tests, and what pytest is asked for: see `helpers`."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import Engines
from helpers.environment import IS_V2
from helpers.models import FAMILIES, build_tiny_model
from vllm_selfspec.plan import calibrated

_shown: dict[tuple[str, str], bool] = {}
_of_v2: dict[tuple[str, str], str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "note in FILE which rows of docs/support.md were shown"
    parser.addoption("--support", metavar="FILE", type=Path, help=help)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    for marker in item.iter_markers("shows"):
        _of_v2[marker.args] = marker.kwargs.get("v2", "")
        if report.failed:
            _shown[marker.args] = False
        elif report.when == "call" and report.passed:
            _shown.setdefault(marker.args, True)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--support")
    if file is None:
        return
    rows = sorted((*row, ok, _of_v2[row]) for row, ok in _shown.items())
    file.write_text(json.dumps(rows))


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    if IS_V2:
        from triton_cpu_stub.mends import mend

        mend()


@pytest.fixture(autouse=True)
def no_plan_is_known() -> None:
    """Of a tiny model, which every test would find that comes after its first start."""
    shutil.rmtree(calibrated.directory(), ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Path of a tiny random model for each supported family."""
    directory = tmp_path_factory.mktemp("models")
    return {family: str(build_tiny_model(family, directory)) for family in FAMILIES}


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    found = Engines()
    yield found
    found.leave()


@pytest.fixture
def cpu_schedules_as_configured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """vLLM switches async scheduling off on a CPU, where it has nothing to hide. It
    works there all the same, so this keeps what the configuration came to."""
    from vllm.platforms.cpu import CpuPlatform

    decided: list[Any] = []
    original = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        scheduler_config = vllm_config.scheduler_config
        decided.append(scheduler_config.async_scheduling)
        original(vllm_config)
        scheduler_config.async_scheduling = decided[-1]

    monkeypatch.setattr(
        CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config)
    )
    return decided
