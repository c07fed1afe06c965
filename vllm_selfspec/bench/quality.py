"""Scores of answers: ROUGE for summaries, pass@1 for programs.

One rule: these show that answers do not change, not how good a model is. Programs that
a model wrote run in a process of their own, under limits.
"""

import resource
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from vllm_selfspec.bench.tasks import Prompt, Task

ROUGE = ("rouge1", "rouge2", "rougeL")
PROGRAM_SECONDS = 10
PROGRAM_BYTES = 1 << 30
# Where a completion of HumanEval ends (the Codex paper, arXiv 2107.03374, section 2.1).
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")


def scores(task: Task, answers: Sequence[str]) -> dict[str, float]:
    """The scores of `task`'s answers, in the order of its prompts; none if it has none.

    Raises:
        ImportError: If the task needs ROUGE and `rouge-score` is not installed.
    """
    if task.metric == "rouge":
        return rouge([p.reference or "" for p in task.prompts], answers)
    if task.metric == "pass@1":
        passed = [passes(p, a) for p, a in zip(task.prompts, answers, strict=True)]
        return {"pass@1": mean(passed)}
    return {}


def rouge(references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Mean F-measures, by Google's `rouge-score` with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(r, a) for r, a in zip(references, answers, strict=True)]
    return {name: mean(score[name].fmeasure for score in found) for name in ROUGE}


def completion(answer: str) -> str:
    """The answer up to where the function ends."""
    ends = [answer.find(stop) for stop in STOPS]
    return answer[: min((end for end in ends if end >= 0), default=len(answer))]


def passes(prompt: Prompt, answer: str) -> bool:
    """Whether HumanEval's tests pass for this answer.

    The program runs with its own temporary directory, isolated from the environment and
    from installed packages, with limits on time, memory, files and processes. That
    stops accidents, not an attacker: for a model that is not trusted use a container.
    """
    word = secrets.token_hex()  # that it got to the end; exiting with 0 is not that
    program = "\n".join(
        [
            str(prompt.content) + completion(answer),
            prompt.extra["test"],
            f"check({prompt.extra['entry_point']})",
            f"open('passed', 'w').write('{word}')",
        ]
    )
    with tempfile.TemporaryDirectory() as directory:
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", program],
                cwd=directory,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=PROGRAM_SECONDS,
                preexec_fn=_limit,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
        passed = Path(directory, "passed")
        return passed.is_file() and passed.read_text() == word


def _limit() -> None:
    limits = {
        resource.RLIMIT_CPU: PROGRAM_SECONDS,
        resource.RLIMIT_AS: PROGRAM_BYTES,
        resource.RLIMIT_FSIZE: 1 << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))
