"""`vllm-selfspec bench` on real engines: what it runs, measures and writes."""

import html.parser
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.models import NUM_LAYERS
from vllm_selfspec.bench import report
from vllm_selfspec.bench.methods import PLAIN, methods_of
from vllm_selfspec.cli.main import app

K = 3


@pytest.fixture(scope="module")
def document(
    tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one small run writes: two tasks, two loads, greedy and sampled."""
    directory = tmp_path_factory.mktemp("bench")
    prompts = directory / "own.jsonl"
    rows = [{"prompt": "def f(x):" + "y" * n, "reference": "z"} for n in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(sys.executable, "-m", "vllm_selfspec.cli", "bench", tiny_models["llama"]),
        *(
            "--prompts",
            str(prompts),
            "--concurrency",
            "1,3",
            "--num-prompts",
            "3",
        ),
        *("--temperature", "0,1", "--lengths", f"{K}", "--max-tokens", "12"),
        *("--draft-model", tiny_models["llama"], "--dtype", "float32"),
        *("--arms", "selfspec,ngram,draft_model,hf", "-o", str(directory / "out")),
    ]
    env = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in (directory / "out").iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
    }
    found: dict[str, Any] = json.loads((directory / "out" / "report.json").read_text())
    return found


def rows(document: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [
        row
        for row in document["results"]
        if all(row[key] == value for key, value in wanted.items())
    ]


def test_every_method_has_a_result_at_every_load_it_can_run(
    document: dict[str, Any],
) -> None:
    names = [method["name"] for method in document["methods"]]
    assert names[0] == PLAIN
    configs = [method["speculative_config"] or {} for method in document["methods"]]
    assert {c.get("model") for c in configs} == {None, "llama"}, "a name, and no path"
    groups = {method["group"] for method in document["methods"]}
    assert groups == {"plain", "selfspec", "ngram", "draft_model", "hf"}
    for temperature in (0, 1):
        for num_streams in (1, 3):
            found = rows(document, temperature=temperature, num_streams=num_streams)
            able = [n for n in names if num_streams == 1 or "Hugging" not in n]
            assert [row["method"] for row in found] == able


def test_greedy_text_in_float32_is_plain_vllms_for_every_vllm_arm(
    document: dict[str, Any],
) -> None:
    for row in rows(document, temperature=0):
        assert row["texts"] > 0
        if "Hugging" not in row["method"]:
            assert row["same_texts"] == row["texts"], row


def test_costs_and_bounds_are_measured_where_a_model_drafts(
    document: dict[str, Any],
) -> None:
    ours = [
        method["name"]
        for method in document["methods"]
        if method["group"] == "selfspec"
    ]
    fixed = [name for name in ours if name.endswith(f"k {K}")]
    assert len(ours) > len(fixed) >= 2
    for name in fixed:
        costs = [cost for cost in document["costs"] if cost["method"] == name]
        assert {cost["num_streams"] for cost in costs} == {1, 3}
        assert all(cost["v"] > 0 and cost["c"] > 0 for cost in costs)
        for row in rows(document, method=name):
            assert row["bound"] > 0 and 1 <= row["tokens_per_verification"] <= K + 1
            assert len(row["accepted_at"]) == K
    (target,) = rows(document, method=f"vLLM draft_model, k {K}", temperature=0)[:1]
    assert target["acceptance"] == 1, "here the draft model is the target"
    steps = {row["method"]: row for row in document["steps"]}
    assert steps[PLAIN]["draft forwards"] == 0 < steps[fixed[0]]["draft forwards"]


def test_the_report_can_be_made_again_from_its_json(
    document: dict[str, Any], tmp_path: Path
) -> None:
    text = report.markdown(document)
    assert text.count("| plain vLLM |") == 4, "two loads, two temperatures"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1, "a row has every column"
    page = report.html(document)
    assert page.count("<svg") == len(report.figures(document)) >= 4
    for elsewhere in ("<script", "<link", "src=", "@import", "<img"):
        assert elsewhere not in page, "nothing is loaded"

    class Balance(html.parser.HTMLParser):
        depth = 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.depth += tag not in ("meta", "br", "hr")

        def handle_endtag(self, tag: str) -> None:
            self.depth -= 1

    balance = Balance()
    balance.feed(page[: page.index("<figure>")])
    assert balance.depth == 2, "html and body are open there, and nothing else"


def test_the_grid_has_plans_lengths_and_the_memory_they_take(
    tiny_models: dict[str, str],
) -> None:
    path = Path(tiny_models["llama"])
    methods = methods_of(
        path, path, ["selfspec", "ngram", "suffix", "draft_model"], [4, 2]
    )
    assert methods[0].name == PLAIN
    fixed = {"exit_layer": NUM_LAYERS // 4, "draft_length": "fixed"}
    lengths = [
        method.k
        for method in methods
        if method.speculative_config
        and fixed.items() <= method.speculative_config.items()
    ]
    assert lengths == [4, 2], "the likeliest plan has a grid"
    for method in methods:
        assert (method.extra_bytes > 0) == (method.group == "draft_model")
    without = methods_of(path, None, ["selfspec", "draft_model"], [4])
    assert "draft_model" not in {method.group for method in without}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "selfspec,eagle"], "--methods takes plain, selfspec, ngram"),
        (["--concurrency", "1;4"], "--concurrency takes numbers such as 1,4,8"),
        (["--concurrency", "0,4"], "--concurrency takes numbers from 1"),
        (["--temperature", "-1"], "--temperature takes numbers from 0"),
        (["--prompts", "cod"], "prompts are one of"),
        (["no_such_model_directory/x"], "no_such_model_directory"),
    ],
)
def test_what_cannot_be_run_is_refused_before_an_engine_starts(
    flags: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["bench", *flags])
    assert done.exit_code in (1, 2)
    assert message in done.output.replace("\n", " ")
