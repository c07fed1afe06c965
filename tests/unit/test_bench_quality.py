"""Scores: right answers pass, wrong and hostile ones don't."""

import time
from pathlib import Path

import pytest

from vllm_selfspec.bench import quality
from vllm_selfspec.bench.tasks import Prompt, Task

TEST = (
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9"
)
SQUARE = Prompt(
    "HumanEval/0",
    "def square(x):\n",
    "    return x * x\n",
    {"test": TEST, "entry_point": "square"},
)


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("    return x * x\n", True),
        ("    return x * x\n\ndef other():\n    this is no Python", True),
        ("    return x + x\n", False),
        ("    return x *\n", False),
        ("    raise SystemExit(3)\n", False),
        ("    raise SystemExit(0)\n", False),
        ("    import torch\n    return x * x\n", False),
        ("    return x * x * len('a' * (1 << 33)) // (1 << 33)\n", False),
    ],
    ids=[
        "right",
        "goes on",
        "wrong",
        "no Python",
        "exits",
        "exits well",
        "imports",
        "memory",
    ],
)
def test_a_program_passes_if_it_is_right(answer: str, passes: bool) -> None:
    assert quality.passes(SQUARE, answer) == passes


def test_a_program_that_does_not_end_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "PROGRAM_SECONDS", 1)
    start = time.monotonic()
    assert not quality.passes(SQUARE, "    while True: pass\n")
    assert not quality.passes(SQUARE, "    import time; time.sleep(60)\n")
    assert time.monotonic() - start < 30


def test_a_program_cannot_write_beside_its_own_directory_much(tmp_path: Path) -> None:
    target = tmp_path / "big"
    answer = (
        f"    open({str(target)!r}, 'w').write('a' * (1 << 22))\n    return x * x\n"
    )
    assert not quality.passes(SQUARE, answer), "a file has a limit"
    assert target.stat().st_size <= 1 << 20


def test_scores_are_those_of_the_task() -> None:
    answers = ["    return x * x\n", "    return 0\n"]
    code = Task("humaneval", (SQUARE, SQUARE), "pass@1")
    assert quality.scores(code, answers) == {"pass@1": 0.5}
    assert quality.scores(Task("code", (SQUARE, SQUARE)), answers) == {}


def test_rouge_is_one_for_the_reference_and_less_for_other_words() -> None:
    pytest.importorskip("rouge_score")
    texts = ["The cat sat on the mat.", "It rained all day long."]
    assert quality.rouge(texts, texts) == dict.fromkeys(quality.ROUGE, 1.0)
    half = quality.rouge(texts, [texts[0], "Nothing of this kind."])
    assert half["rouge1"] == pytest.approx(0.5, abs=0.1)
    summary = Prompt("1", "text", texts[0])
    found = quality.scores(Task("xsum", (summary,), "rouge"), texts[:1])
    assert found["rougeL"] == 1.0
