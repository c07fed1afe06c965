"""Counts of drafting add up, go by a file, and read well."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from helpers.full_disk import full_disk
from vllm_selfspec import whole_file
from vllm_selfspec.draft.stats import DIRECTORY, DraftStats
from vllm_selfspec.engine.metrics import MetricsCollector
from vllm_selfspec.plan.source_context import MAX_COPIED


class Config:
    class model_config:
        served_model_name = ["m", "an alias"]


def stats(**counts: Any) -> DraftStats:
    found = DraftStats(Config())
    for name, value in counts.items():
        kept = getattr(found, name)
        if isinstance(kept, dict):
            kept.update(value)
        else:
            setattr(found, name, value)
    return found


def verified(source: str, drafted: list[int], accepted: list[int]) -> DraftStats:
    found = stats()
    found.verified(source, np.array(drafted), np.array(accepted))
    return found


def written(directory: Path, *every: DraftStats) -> str:
    """What a scrape shows."""
    for number, one in enumerate(every):
        (directory / f"{number}.json").write_text(json.dumps(one.to_dict()))
    registry = CollectorRegistry()
    registry.register(MetricsCollector(directory))
    text: str = generate_latest(registry).decode()
    return text


def test_engines_of_a_model_are_added_up(tmp_path: Path) -> None:
    text = written(
        tmp_path,
        stats(lengths={0: 2, 3: 1}, steps={"plain": 2}, gauges={"threshold": 0.6}),
        stats(lengths={3: 4, 1: 1}, draft_seconds=1.5, gauges={"threshold": 0.8}),
        stats(undrafted={"requests": 2, "steps": 9}),
        verified("model", drafted=[3, 1, 0], accepted=[2, 0, 0]),
        verified("model", drafted=[2], accepted=[2]),
        verified("context", drafted=[1], accepted=[1]),
        stats(undrafted={"requests": 1}),
    )
    for line in (
        'vllm:selfspec_draft_length_bucket{le="0.0",model_name="m"} 2.0',
        'vllm:selfspec_draft_length_bucket{le="1.0",model_name="m"} 3.0',
        'vllm:selfspec_draft_length_bucket{le="3.0",model_name="m"} 8.0',
        'vllm:selfspec_draft_length_bucket{le="+Inf",model_name="m"} 8.0',
        'vllm:selfspec_draft_length_sum{model_name="m"} 16.0',
        'vllm:selfspec_steps_total{kind="plain",model_name="m"} 2.0',
        'vllm:selfspec_undrafted_total{model_name="m",what="requests"} 3.0',
        'vllm:selfspec_undrafted_total{model_name="m",what="steps"} 9.0',
        'vllm:selfspec_source_draft_tokens_total{model_name="m",source="model"} 6.0',
        'source_accepted_tokens_total{model_name="m",source="model"} 4.0',
        'draft_tokens_per_pos_total{model_name="m",position="0",source="model"} 3.0',
        'draft_tokens_per_pos_total{model_name="m",position="2",source="model"} 1.0',
        'cepted_tokens_per_pos_total{model_name="m",position="1",source="model"} 2.0',
        'cepted_tokens_per_pos_total{model_name="m",position="0",source="context"} 1.0',
        'vllm:selfspec_draft_seconds_total{model_name="m"} 1.5',
        'vllm:selfspec_controller{model_name="m",what="threshold"} 0.7',
    ):
        assert line in text, text


def test_the_longest_copies_are_shown(tmp_path: Path) -> None:
    text = written(tmp_path, stats(lengths={MAX_COPIED: 1}))
    assert f'draft_length_sum{{model_name="m"}} {MAX_COPIED}.0' in text


def test_a_file_that_is_half_gone_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "9.json").write_text('{"model_na')
    assert 'le="+Inf",model_name="m"} 1.0' in written(tmp_path, stats(lengths={2: 1}))


def changed(**keys: Any) -> str:
    return json.dumps({**stats(lengths={2: 1}).to_dict(), **keys})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 10**5,
        changed(model_name=None),
        changed(model_name="\ud800"),
        changed(lengths=[1]),
        changed(lengths={"two": 1}),
        changed(lengths={10**9: 1}),
        changed(lengths={2: -1}),
        changed(steps={"plain": "many"}),
        changed(stops={"rule": 10**400}),
        changed(drafted_at={"model": [1]}),
        changed(accepted_at={"model": {10**9: 1}}),
        changed(draft_seconds={}),
        changed(gauges={"threshold": None}),
        changed(failed_writes={"metrics": [1]}),
    ],
)
def test_a_file_of_anything_else_is_passed_over(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "7.json").mkdir()
    (tmp_path / "8.json").write_bytes(b"\xff\x00")
    (tmp_path / "9.json").write_text(content)
    own = stats(lengths={2: 1}).to_dict()
    (tmp_path / "10.json").write_text(json.dumps(own))
    collector = MetricsCollector(tmp_path)
    for _ in range(2):
        registry = CollectorRegistry()
        registry.register(collector)
        text = generate_latest(registry).decode()
        assert 'le="+Inf",model_name="m"} 1.0' in text
    assert caplog.text.count("shows no metrics of") == 2, "once each, not each scrape"


def test_counts_are_written_once_a_second_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    found = stats(lengths={2: 1})
    found.publish("part")
    assert not [*tmp_path.iterdir()], "a second has not passed"
    found._written -= 1.1
    found.publish("part")
    (file,) = tmp_path.iterdir()
    assert str(os.getpid()) in file.name
    assert json.loads(file.read_text())["lengths"] == {"2": 1}


def test_without_a_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stats(lengths={2: 1})
    for directory in (None, str(tmp_path / "gone")):
        monkeypatch.setenv(DIRECTORY, directory or "")
        if directory is None:
            monkeypatch.delenv(DIRECTORY)
        found._written -= 1.1
        found.publish("part")


def test_a_full_disk_costs_counts_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    monkeypatch.setattr(whole_file, "_logged", set())
    found = stats(lengths={2: 1})
    found._write("part")
    (file,) = tmp_path.iterdir()
    before = file.read_text()
    found.model_name = "m" * (1 << 21)
    with full_disk(1 << 20):
        for _ in range(3):
            found._write("part")
    assert file.read_text() == before, "what was shown before is shown"
    assert [*tmp_path.iterdir()] == [file], "and nothing lies beside it"
    assert caplog.text.count("serves on without its metrics") == 1
    found.model_name = "m"
    found.lengths[2] += 1
    found._write("part")
    registry = CollectorRegistry()
    registry.register(MetricsCollector(tmp_path))
    text = generate_latest(registry).decode()
    assert 'vllm:selfspec_failed_writes_total{what="metrics"} 3.0' in text
    assert 'le="+Inf",model_name="m"} 2.0' in text


def printed(program: str) -> str:
    """What a process of its own prints; nothing else may end it."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


SHOWN = """
import os
from prometheus_client import REGISTRY, generate_latest
from vllm_selfspec.engine import metrics
metrics.share_directory()
print(os.environ.get(metrics.DIRECTORY), generate_latest().decode())
"""


def test_without_room_for_a_directory_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))  # of the process that started it
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    found = printed(limit + SHOWN)
    assert "serves on without its metrics directory" in found
    assert found.startswith("None "), "its engines do not write to another's"
    assert 'vllm:selfspec_failed_writes_total{what="metrics directory"} 1.0' in found


def test_with_its_metrics_names_taken_a_server_starts() -> None:
    taken = "from prometheus_client import Counter\nCounter('vllm:selfspec_steps', '')"
    assert "metrics are not shown at /metrics: Duplicated" in printed(taken + SHOWN)


def test_a_process_shows_what_its_own_engines_do_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script with an engine of its own may well start a server."""
    monkeypatch.setenv(DIRECTORY, str(tmp_path))  # made by the process that started it
    shown = "import os; from vllm_selfspec.engine import metrics as d; "
    shown += "from prometheus_client import REGISTRY; "
    shown += "d.share_directory(); d.share_directory(); "
    shown += "print(os.environ[d.DIRECTORY]); "
    shown += "print(sum(c._directory.is_dir() for c in REGISTRY._collector_to_names "
    shown += "if isinstance(c, d.MetricsCollector)))"
    done = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, text=True, check=True
    )
    directory, num_collectors = done.stdout.split()
    assert directory != str(tmp_path)
    assert num_collectors == "1"
    assert not Path(directory).exists(), "it goes with its process"


def test_a_line_tells_what_was_done_since_the_last_one() -> None:
    found = stats(lengths={0: 1, 3: 3}, draft_seconds=2.0)
    assert "mean draft length: 2.25, no drafts: 25%, drafting: 2.00 s" in found._line()
    found._last = json.loads(json.dumps(found.to_dict()), object_hook=_whole_keys)
    assert found._line() == ""
    found.lengths.update([1, 1])
    assert "mean draft length: 1.00, no drafts: 0%" in found._line()


def _whole_keys(found: dict[str, Any]) -> dict[Any, Any]:
    return {int(k) if k.isdigit() else k: v for k, v in found.items()}
