"""Trains exit heads of the demo model or its twin, and says what that gains and takes.

Trained on prompts cut as the tasks of the benchmark are, from the files the demo model
was trained on; measured on the benchmark's own, from files that nothing was trained on.
On two cores the time goes to the matrices of one layer and the LM head, forward and
back, and to N layers forward.

    python benchmarks/exit_heads.py 3 1 2 4    # benchmarks/exit_heads/demo/N
    python benchmarks/exit_heads.py 2 3 --model plain
    python benchmarks/exit_heads.py 3 --model plain --skip-layers '{"mlp": [1, 2]}'

With a skip set the head of the same N that was trained without it is measured, too.
Ctrl-C keeps what is there; the same command goes on.
"""

import json
import os
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_tasks

from vllm_selfspec.bench.page import markdown_table
from vllm_selfspec.plan.exit_card import (
    CARD_FILE,
    TENSORS_FILE,
    ExitCard,
    read_exit_card,
)
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.target_model import TargetModel
from vllm_selfspec.training.agreement import MAX_DRAFTS, Agreement, score
from vllm_selfspec.training.student import Student
from vllm_selfspec.training.texts import TextOptions, Texts
from vllm_selfspec.training.train_exit import Options, run_train_exit, skip_set_of
from vllm_selfspec.training.trainer import Recipe, answers

REPOSITORY = Path(__file__).resolve().parents[1]
HEADS, WORK = "benchmarks/exit_heads", ".cache/exit"
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


def name_of(exit_layer: int, skips: SkipSet | None) -> str:
    """Of a head's directory, like `3` or `3_attention_1_mlp_1_2`."""
    lists = skips.to_dict() if skips else {}
    words = [f"{s}_{'_'.join(map(str, lists[s]))}" for s in lists if lists[s]]
    return "_".join([str(exit_layer), *words])


def train(model: str, exit_layer: int, skips: SkipSet | None) -> None:
    """One head; where it was trained before, it is only measured again."""
    name = name_of(exit_layer, skips)
    output = Path(WORK) / model / name
    skip_layers = skips.to_dict() if skips else None
    options = Options(
        model=f"benchmarks/{model}_model",
        prompts=(f"{WORK}/prompts.jsonl",),
        held_out=TASKS[1:] + TASKS[:1],
        num_prompts=None,
        max_prompt_tokens=192,
        exit_layer=exit_layer,
        skip_layers=skip_layers,
        texts=TextOptions(max_tokens=192),
        recipe=Recipe(epochs=EPOCHS),
        save_every=50,
        ray=0,
        cache=Path(WORK) / "texts",
        output=output,
        command=f"python benchmarks/exit_heads.py {exit_layer} --model {model}"
        + (f" --skip-layers '{json.dumps(skip_layers)}'" if skips else ""),
    )
    run_train_exit(options)
    head = Path(HEADS) / model / name
    head.mkdir(parents=True, exist_ok=True)
    for name in (TENSORS_FILE, CARD_FILE):
        shutil.copy(output / name, head)


def results(model: str) -> dict[str, Any]:
    """What the cards of all heads of a model say."""
    directory = Path(HEADS) / model
    found = sorted(directory.glob(f"*/{CARD_FILE}"))
    cards = [read_exit_card(file.parent) for file in found]
    cards.sort(key=lambda card: (card.exit_layer, card.skip_layers is not None))
    training = cards[-1].training
    kept = ("seconds", "cpu_seconds", "steps", "tokens", "last_loss")
    same = ("date", "vllm", "torch", "hardware", "recipe", "texts", "num_texts")
    return {
        "command": f"python benchmarks/exit_heads.py --model {model}",
        "model": model,
        "num_held_out": training["num_held_out"],
        **{key: training[key] for key in same},
        "rows": [
            {
                "num_parameters": card.num_parameters,
                "skips": card.skip_set.to_dict() if card.skip_set else None,
                "of_whole_layers": of_whole_layers(model, card),
                **card.training["held_out"],
                **{key: card.training[key] for key in kept},
            }
            for card in cards
        ],
    }


def of_whole_layers(model: str, card: ExitCard) -> dict[str, Any] | None:
    """What the head without a skip set says with that of another, on the texts that
    both were measured on; None where there is no skip set."""
    if card.skip_set is None:
        return None
    texts = Texts(Path(WORK) / "texts" / card.training["texts"]["fingerprint"])
    first, num = card.training["num_texts"], card.training["num_held_out"]
    held_out = [texts[number] for number in range(first, first + num)]
    path = Path(f"benchmarks/{model}_model")
    head = Path(HEADS) / model / name_of(card.exit_layer, None)
    student = Student.read(path, head, skip_set=card.skip_set)
    drafted = answers(student, held_out, MAX_DRAFTS)
    cost = card.training["held_out"]["draft_cost"]
    best = score(held_out, drafted, cost, MAX_DRAFTS)
    return {
        "agreement": asdict(Agreement.of(held_out, answers(student, held_out))),
        "tokens_per_verification": round(best.walk.tokens_per_verification, 4),
        "num_speculative_tokens": best.k,
        "speed_up": round(best.speed_up, 4),
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
    with_holes = any(row["skips"] for row in document["rows"])
    if with_holes:
        columns.append("trained on whole layers")
    rows = []
    for row in document["rows"]:
        before, after = row["before"], row["after"]
        cells = [
            f"{row['exit_layer']} of 12{holes(row)}",
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
        if with_holes:
            of_whole = row["of_whole_layers"]
            cells.append(f"{of_whole['speed_up']:.2f}x" if of_whole else "")
        rows.append(cells)
    said = (
        f"`{document['command']}`, {document['date']}: {document['hardware']}, 2 cores "
        f"shared with others; {document['num_texts']} texts of the target's own to "
        f"train on, {document['num_held_out']} to measure on."
    )
    return "\n".join([said, "", *markdown_table(columns, rows)])


def holes(row: dict[str, Any]) -> str:
    """What drafts leave out of the first N layers, in words."""
    lists = row["skips"] or {}
    words = [f"{s} {','.join(map(str, lists[s]))}" for s in lists if lists[s]]
    return f", without {' and '.join(words)}" if words else ""


def main(
    exit_layers: Annotated[
        list[int] | None,
        typer.Argument(help="N, one or more; none to write the results anew."),
    ] = None,
    model: Annotated[str, typer.Option(help="demo, or plain: its twin.")] = "demo",
    skip_layers: Annotated[
        str, typer.Option(help="Sublayers before the exit layer that drafts leave out.")
    ] = "{}",
) -> None:
    """Train heads of a model after so many layers, one after the other."""
    os.chdir(REPOSITORY)
    write_prompts(Path(WORK) / "prompts.jsonl")
    num_layers = TargetModel.read(Path(f"benchmarks/{model}_model"), model).num_layers
    for exit_layer in exit_layers or ():
        skips = skip_set_of(json.loads(skip_layers), exit_layer, num_layers)
        train(model, exit_layer, skips)
    document = results(model)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{model}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
