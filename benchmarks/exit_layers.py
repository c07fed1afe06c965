"""Trains exit layers of the demo model or its twin, and says what that gains and takes.

Trained on prompts cut as the tasks of the benchmark are, from the files the demo model
was trained on; measured on the benchmark's own, from files that nothing was trained on.
On two cores the time goes to the matrices of one layer and the LM head, forward and
back, and to N layers forward.

    python benchmarks/exit_layers.py 3 1 2 4    # benchmarks/exit_layers/demo/N
    python benchmarks/exit_layers.py 2 3 --model plain

Ctrl-C keeps what is there; the same command goes on.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_tasks

from vllm_selfspec.bench.page import markdown_table
from vllm_selfspec.plan.exit_card import CARD_FILE, TENSORS_FILE, read_exit_card
from vllm_selfspec.training.texts import TextOptions
from vllm_selfspec.training.train_exit import TrainOptions, run_train_exit
from vllm_selfspec.training.trainer import Recipe

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS, WORK = "benchmarks/exit_layers", ".cache/exit"
RESULTS = REPOSITORY / "benchmarks" / "results" / "exit_layer"
NUM_PROMPTS = 400  # of each task
EPOCHS = 2
TASKS = tuple(make.__name__ for make in make_tasks.TASKS)


def write_prompts(file: Path) -> None:
    """Cut as those of the tasks, from other files."""
    sources = dict(sorted(make_tasks.sources_of(held_out=False).items()))
    rows = [
        {key: row[key] for key in ("id", "prompt", "messages") if key in row}
        for make in make_tasks.TASKS
        for row in make(sources, random.Random(f"exit {make.__name__}"), NUM_PROMPTS)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(model: str, exit_layer: int) -> None:
    """One exit layer; where it was trained before, it is only measured again."""
    output = Path(WORK) / model / str(exit_layer)
    options = TrainOptions(
        model=f"benchmarks/{model}_model",
        prompts=(f"{WORK}/prompts.jsonl",),
        held_out=TASKS[1:] + TASKS[:1],
        num_prompts=None,
        max_prompt_tokens=192,
        exit_layer=exit_layer,
        texts=TextOptions(max_tokens=192),
        recipe=Recipe(epochs=EPOCHS),
        save_every=50,
        ray=0,
        cache=Path(WORK) / "texts",
        output=output,
        command=f"python benchmarks/exit_layers.py {exit_layer} --model {model}",
    )
    run_train_exit(options)
    place = Path(LAYERS) / model / str(exit_layer)
    place.mkdir(parents=True, exist_ok=True)
    for name in (TENSORS_FILE, CARD_FILE):
        shutil.copy(output / name, place)


def results(model: str) -> dict[str, Any]:
    """What the cards of all exit layers of a model say."""
    directory = Path(LAYERS) / model
    found = sorted(directory.glob(f"*/{CARD_FILE}"))
    cards = [read_exit_card(file.parent) for file in found]
    cards.sort(key=lambda card: card.exit_layer)
    training = cards[-1].training
    kept = ("seconds", "cpu_seconds", "steps", "tokens", "last_loss")
    same = ("date", "vllm", "torch", "hardware", "recipe", "texts", "num_texts")
    return {
        "command": f"python benchmarks/exit_layers.py --model {model}",
        "model": model,
        "num_held_out": training["num_held_out"],
        **{key: training[key] for key in same},
        "rows": [
            {
                "num_parameters": card.num_parameters,
                **card.training["held_out"],
                **{key: card.training[key] for key in kept},
            }
            for card in cards
        ],
    }


def markdown(document: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    columns = [
        "N",
        "shared head",
        "exit layer, untrained",
        "trained",
        "greedy: shared head",
        "trained",
        "E",
        "k",
        "c",
        "E / (1 + k c)",
        "of the shared head",
        "training",
        "cores' time",
    ]
    rows = []
    for row in document["rows"]:
        before, after = row["before"], row["after"]
        cells = [
            f"{row['exit_layer']} of 12",
            f"{before['all']:.3f}",
            f"{row['untrained']['all']:.3f}",
            f"{after['all']:.3f}",
            f"{before['by_temperature']['0.0']:.3f}",
            f"{after['by_temperature']['0.0']:.3f}",
            f"{row['tokens_per_verification']:.2f}",
            str(row["num_speculative_tokens"]),
            f"{row['draft_cost']:.2f}",
            f"{row['speed_up']:.2f}x",
            f"{row['shared_head']['speed_up']:.2f}x",
            f"{row['seconds'] / 60:.1f} min",
            f"{row['cpu_seconds'] / 60:.1f} min",
        ]
        rows.append(cells)
    said = (
        f"`{document['command']}`, {document['date']}: {document['hardware']}, 2 cores "
        f"shared with others; {document['num_texts']} texts of the target's own to "
        f"train on, {document['num_held_out']} to measure on."
    )
    return "\n".join([said, "", *markdown_table(columns, rows)])


def main(
    exit_layers: Annotated[
        list[int] | None,
        typer.Argument(help="N, one or more; none to write the results anew."),
    ] = None,
    model: Annotated[str, typer.Option(help="demo, or plain: its twin.")] = "demo",
) -> None:
    """Train exit layers of a model after so many layers, one after the other."""
    os.chdir(REPOSITORY)
    write_prompts(Path(WORK) / "prompts.jsonl")
    for exit_layer in exit_layers or ():
        train(model, exit_layer)
    document = results(model)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{model}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
