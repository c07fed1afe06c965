"""What an exit layer costs to train for big models, on paper.

Counted from the sizes in their config.json, for 50,000 prompts of 256 tokens that are
gone on with for 256, three epochs, an exit after an eighth of the layers. What is
assumed is the speed: an H100's 989 TFLOP/s in bfloat16, of which training reaches 40%
and generation, some hundred requests at once, 15%.

    python benchmarks/exit_budget.py     # benchmarks/results/exit_layer/budget.json
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_selfspec.bench.page import markdown_table
from vllm_selfspec.training.budget import Budget, Run, Shape

OUTPUT = Path(__file__).resolve().parent / "results" / "exit_layer" / "budget.json"
# Of their config.json, as published.
SHAPES = {
    "LLaMA-2-13B": Shape(40, 5120, 13824, 40, 40, 128, 32000),
    "LLaMA-2-70B": Shape(80, 8192, 28672, 64, 8, 128, 32000),
}


def markdown(document: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    columns = (
        "target",
        "N",
        "trained parameters",
        "head",
        "weights and Adam",
        "texts",
        "generation",
        "training",
    )
    rows = [
        (
            row["model"],
            f"{row['run']['exit_layer']} of {SHAPES[row['model']].num_layers}",
            f"{row['num_parameters'] / 1e6:.0f} M",
            f"{row['head_bytes'] / 1e9:.2f} GB",
            f"{row['memory_bytes'] / 1e9:.1f} GB",
            f"{row['cache_bytes'] / 1e9:.1f} GB",
            f"{row['generation_flops']:.1e} FLOPs, {row['generation_hours']:.1f} h",
            f"{row['training_flops']:.1e} FLOPs, {row['training_hours']:.1f} h",
        )
        for row in document["rows"]
    ]
    return "\n".join(markdown_table(columns, rows))


def main() -> None:
    """Write the table and print it as JSON."""
    rows = []
    for name, shape in SHAPES.items():
        run = Run(exit_layer=shape.num_layers // 8)
        budget = Budget.of(shape, run)
        rows.append({"model": name, "run": asdict(run), **asdict(budget)})
    document = {"command": "python benchmarks/exit_budget.py", "rows": rows}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
