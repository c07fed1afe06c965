"""`vllm-selfspec bench --serve`: real servers, and what is made of their figures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_selfspec.bench import serve_report
from vllm_selfspec.bench.methods import PLAIN
from vllm_selfspec.cli.main import app

NUM_REQUESTS = 6
DEADLINE_S = 300


def start(model: str, output: Path, *flags: str) -> subprocess.Popen[str]:
    """Serves plain vLLM and one peer: the plans of ours would be servers more."""
    prompts = output.parent / "own.jsonl"
    rows = [{"prompt": "def f(x):" + "y" * n} for n in range(2 * NUM_REQUESTS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(sys.executable, "-m", "vllm_selfspec.cli", "bench", model, "--serve"),
        *("--task", f"jsonl={prompts}", "--lengths", "3", "--max-tokens", "12"),
        *("--arms", "draft_model", "--draft-model", model, "--dtype", "float32"),
        *("--temperature", "0", "--requests", str(NUM_REQUESTS)),
        *("-o", str(output), *flags),
    ]
    env = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        # As at a terminal: what a shell starts in the background ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_every_method_gets_the_same_requests_and_is_measured_at_every_rate(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    bench = start(tiny_models["llama"], tmp_path / "out", "--rates", "5,50")
    output, errors = bench.communicate(timeout=DEADLINE_S)
    assert bench.returncode == 0, errors[-3000:]
    document = json.loads((tmp_path / "out" / "serve.json").read_text())
    methods = [method["name"] for method in document["methods"]]
    assert methods == [PLAIN, "vLLM draft_model, k 3"]
    turns = [(p["method"], p["rate"]) for p in document["points"]]
    assert turns == [(method, rate) for method in methods for rate in (5, 50)]
    for point in document["points"]:
        assert point["completed"] == point["same_texts"] == NUM_REQUESTS, point
        assert 0 < point["p50_ttft_ms"] < point["p50_e2el_ms"]
        assert 0 < point["request_goodput"] <= 50 * 2
    drafted = document["points"][-1]
    assert drafted["spec_decode_acceptance_rate"] > 99, "the draft is the target"
    requests = sorted((tmp_path / "out" / "requests").iterdir())
    texts = [set(file.read_text().splitlines()) for file in requests]
    assert len(texts) == 2 and not texts[0] & texts[1], "each rate has its own"
    assert PLAIN in output and str(tmp_path / "out") in output


def test_ctrl_c_ends_the_server_and_reports_the_turns_that_were_finished(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    bench = start(tiny_models["llama"], tmp_path / "out", "--rates", "50")
    end, log = time.monotonic() + DEADLINE_S, tmp_path / "out" / "logs"
    while not [*log.glob("vLLM_draft_model*")]:
        assert bench.poll() is None and time.monotonic() < end, "no second server"
        time.sleep(0.2)
    bench.send_signal(signal.SIGINT)
    output, errors = bench.communicate(timeout=DEADLINE_S)
    assert bench.returncode == 0, errors[-3000:]
    assert "Stopped; this is what was finished." in output
    document = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [point["method"] for point in document["points"]] == [PLAIN]
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True
    )
    assert not left.stdout.split(), "no server is left behind"


def test_a_server_that_does_not_start_is_an_error_with_its_last_words(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    bench = start(tiny_models["llama"], tmp_path / "out", "--dtype", "float3")
    _, errors = bench.communicate(timeout=DEADLINE_S)
    assert bench.returncode == 1
    assert "Traceback" not in errors
    assert "ended with status" in errors and "float3" in errors


def point(method: str, repeat: int, tpot: float, latency: float) -> dict[str, Any]:
    times = dict.fromkeys((*serve_report.PLOTTED, "failed", "p99_e2el_ms"), 1.0)
    return {
        **{
            "method": method,
            "repeat": repeat,
            "rate": 2.0,
            "same_texts": 3,
            "texts": 4,
        },
        **times,
        **{"p50_tpot_ms": tpot, "p50_e2el_ms": latency},
    }


def document(*points: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "vllm-selfspec bench --serve",
        "date": "2026-01-01",
        "vllm": "0",
        "hardware": "a CPU",
        "num_cores": 2,
        "dtype": "float32",
        "model": "m",
        "model_bytes_per_step": 10**9,
        "max_tokens": 8,
        "rates": [2.0],
        "num_prompts": 4,
        "goodput": {"ttft": 100.0, "tpot": 20.0},
        "temperature": 0.0,
        "methods": [{"name": PLAIN}, {"name": "ours"}],
        "points": list(points),
    }


def test_gains_are_medians_of_ratios_within_a_turn() -> None:
    found = serve_report.summary(
        document(
            *(point(PLAIN, i, t, 1000) for i, t in enumerate((10, 20, 90))),
            *(point("ours", i, t, 500) for i, t in enumerate((5, 20, 30))),
        )
    )
    plain, ours = found
    assert (plain["tpot_gain"], plain["latency_gain"]) == (1, 1)
    assert ours["tpot_gain"] == pytest.approx(2), "of 2, 1 and 3"
    assert ours["latency_gain"] == pytest.approx(2)
    assert ours["p50_tpot_ms"] == 20
    assert (ours["same_texts"], ours["texts"]) == (9, 12)


def test_a_turn_without_plain_vllms_is_left_out() -> None:
    found = serve_report.summary(
        document(point(PLAIN, 0, 10, 1), point("ours", 0, 5, 1), point("ours", 1, 1, 1))
    )
    assert [row["p50_tpot_ms"] for row in found] == [10, 5]


def test_the_report_has_a_row_for_each_rate_and_method_and_loads_nothing() -> None:
    found = document(point(PLAIN, 0, 10, 1), point("ours", 0, 5, 1))
    lines = serve_report.rows_of(found)
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    page = serve_report.html(found)
    assert page.count("<svg") == 1
    for elsewhere in ("<script", "<link", "src=", "@import", "<img"):
        assert elsewhere not in page


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "speed:3", "tpot:-1", ""])
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    done = CliRunner().invoke(app, ["bench", "--serve", "--goodput", text])
    assert done.exit_code == 2
    assert "--goodput takes milliseconds by ttft" in done.output.replace("\n", " ")
