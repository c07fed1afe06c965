"""What `bench` is asked for is looked at before an engine starts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from helpers.models import DEMO_MODEL
from vllm_selfspec import packages
from vllm_selfspec.bench import inputs, report, serve
from vllm_selfspec.bench.comparison import Load
from vllm_selfspec.bench.methods import PLAIN, Method, methods_of
from vllm_selfspec.bench.run import BenchOptions
from vllm_selfspec.bench.tasks import Prompt, Task, TaskError, load_all

OPTIONS = BenchOptions(
    model="demo",
    draft_model=None,
    widen=None,
    tasks=(),
    loads=(Load(1, 2), Load(2, 4)),
    temperatures=(0.0, 1.0),
    groups=("selfspec", "suffix"),
    lengths=(4,),
    max_tokens=10,
    dtype="bfloat16",
    output=None,
)


def own(directory: Path, name: str) -> str:
    file = directory / f"{name}.jsonl"
    file.write_text('{"prompt": "a"}\n')
    return str(file)


def test_files_of_ones_own_are_told_apart_by_their_names(tmp_path: Path) -> None:
    words = [own(tmp_path, "chats"), f"jsonl={own(tmp_path, 'edits')}", "code"]
    assert [task.name for task in load_all(words)] == ["chats", "edits", "code"]
    (tmp_path / "more").mkdir()
    with pytest.raises(TaskError, match="two are 'chats': rename a file"):
        load_all([words[0], own(tmp_path / "more", "chats")])


def positions(*lengths: int, max_tokens: int = 10) -> int:
    prompts = (Prompt(str(n), "a " * n) for n in lengths)
    options = replace(OPTIONS, max_tokens=max_tokens)
    task = Task("mine", tuple(prompts))
    return inputs.positions_for([task], options, DEMO_MODEL)


def test_the_longest_request_has_room_or_is_refused() -> None:
    most = json.loads((DEMO_MODEL / "config.json").read_text())
    most = most["max_position_embeddings"]
    usual = positions(3)
    assert usual == min(inputs.MAX_MODEL_LEN, most)
    with pytest.raises(TaskError, match=f"the model's {most} positions.*'mine'"):
        positions(3, 3 * most)


def test_a_server_is_asked_the_tasks_in_turn_and_no_more_than_that() -> None:
    short = Task("short", tuple(Prompt(f"s{n}", "a") for n in range(3)))
    long = Task("long", tuple(Prompt(f"l{n}", "b") for n in range(2)))
    ids = [prompt.id for prompt in serve._mixed([short, long], 7).prompts]
    assert ids == ["s0", "l0", "s1", "l1", "s2", "s0", "l0"]
    assert len(serve._mixed([short, long], 3).prompts) == 3


def test_a_request_may_be_longer_than_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_MODEL_LEN", 16)
    longest = positions(30) - 10
    assert longest >= 30
    assert positions(30, max_tokens=20) == longest + 20


def test_who_is_asked_twice_or_left_out_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = Task("few", tuple(Prompt(str(n), "a") for n in range(11)))
    enough = Task("enough", (*few.prompts, Prompt("11", "a")))
    console = Console(width=200)
    inputs.tell_what_is_asked_again(OPTIONS, [few, enough], console)
    inputs.tell_what_is_left_out(OPTIONS, [Method("ours", "selfspec")], console)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert told[0].startswith("few has 11 prompts for 12 requests")
    assert told[1] == "suffix is left out: it needs arctic-inference."


def test_packages_are_looked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name: None if "_" in name else name
    )
    scored = Task("mine", (Prompt("0", "a"),), "rouge")
    with pytest.raises(packages.MissingPackageError, match=r"rouge_score.*\[bench\]"):
        inputs.check_packages(OPTIONS, [scored])
    inputs.check_packages(OPTIONS, [replace(scored, metric=None)])


def test_configurations_are_told_apart_and_may_ask_for_memory() -> None:
    of_exit = {"exit_layer": 3, "draft_length": "goodput"}
    configs: list[dict[str, Any]] = [
        {"draft_memory": "30%"},
        {**of_exit, "num_speculative_tokens": 4},
        {**of_exit, "num_speculative_tokens": 8},
    ]
    found = methods_of(DEMO_MODEL, None, ["selfspec"], [4], configs)
    names = [method.name for method in found]
    assert len({*names}) == len(names) == 4, names


def result(task: str, num_streams: int) -> dict[str, Any]:
    figures = dict.fromkeys(
        ("tokens_per_verification", "acceptance", "bound", "share_of_bound")
    )
    return {
        **{"task": task, "num_streams": num_streams, "temperature": 0.0},
        **{"method": PLAIN, "speed_up": 1.0, "latency": 2.0, "quality": {}},
        **{"same_texts": 1, "texts": 1, "accepted_at": []},
        **figures,
    }


def test_a_load_that_was_stopped_half_way_is_reported_as_far_as_it_came() -> None:
    document = {
        "results": [result("a", 1), result("b", 1), result("a", 4)],
        "methods": [{"name": PLAIN, "extra_bytes": 0}],
        "costs": [],
    }
    columns, rows = report.columns_and_rows(document, 0.0)
    of_task = columns.index("b")
    assert [row[of_task] for row in rows] == ["1.00x", ""]
    report._speed_ups({**document, "methods": [{"name": "x"}, {"name": PLAIN}]}, 0.0)


def test_a_server_that_fails_leaves_the_turns_that_were_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [Method(PLAIN, "plain"), Method("ours", "selfspec")]

    def turn(self: Any, method: Method, say: Any) -> Iterator[dict[str, Any]]:
        if method.group != "plain":
            raise serve.ServerError("it ended")
        yield {"rate": 5.0, "texts": ["a"]}

    written: list[Any] = []
    monkeypatch.setattr(serve, "find_model", lambda *_: DEMO_MODEL)
    monkeypatch.setattr(serve, "find_methods", lambda *_: chosen)
    monkeypatch.setattr(serve, "conditions", lambda *_: {})
    monkeypatch.setattr(serve._ServeBench, "write_requests", lambda *_: None)
    monkeypatch.setattr(serve._ServeBench, "turn", turn)
    monkeypatch.setattr(serve.serve_report, "write", lambda d, *_: written.append(d))
    monkeypatch.setattr(serve, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(serve, "prepare", lambda: None)
    options = replace(OPTIONS, tasks=("code",), output=tmp_path, groups=())
    with pytest.raises(serve.ServerError, match="it ended"):
        serve.run_serve(options, serve.ServeOptions((5.0,), 1, {}, 1))
    ((point,),) = [document["points"] for document in written]
    assert (point["method"], point["same_texts"]) == (PLAIN, 1)
