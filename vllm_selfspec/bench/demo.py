"""The demo: a small preset of `bench`.

One rule: it shows what a user gets who types the flag and nothing else, beside plans
that take less of the model; figures are taken and bounded as in every comparison.
"""

from pathlib import Path

from vllm_selfspec.bench.comparison import Load
from vllm_selfspec.bench.run import BenchOptions, run_bench

TASK = "code"  # what the repository's own models can write


def run_demo(
    model: str | None,
    max_tokens: int,
    num_speculative_tokens: int,
    repeats: int = 1,
    output: Path | None = None,
) -> None:
    """Runs the comparison and prints it; see the command's help.

    Raises:
        CheckpointError: If the model cannot be found or read, or none was named and
            this is not a clone of the repository.
        UnsupportedModelError: If the model cannot be drafted for.
    """
    run_bench(
        BenchOptions(
            model=model or "demo",
            draft_model=None,
            widen=None,
            tasks=(TASK,),
            loads=(Load(1, 6 * repeats), Load(8, 16 * repeats)),
            temperatures=(0.0,),
            groups=("plain", "selfspec"),
            lengths=(num_speculative_tokens,),
            max_tokens=max_tokens,
            dtype="bfloat16",
            output=output,
            is_short=True,
        )
    )
