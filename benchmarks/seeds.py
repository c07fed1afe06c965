"""What does it cost to give a seeded request plain vLLM's very text?

Measured: how often drafts are accepted by the coupled rule that requests with a seed
get, beside the standard rule of those without, on the same prompts and plans. What
bounds them is the total variation distance TV of draft and target: the standard rule
accepts 1 - TV of the drafts, the coupled one (1 - TV) / (1 + TV) at least.

    python benchmarks/seeds.py demo plain path/to/model -o benchmarks/results/seeds.json

Acceptance does not depend on a model's width, so those of the repository are run as
they are, not widened.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.own_models import OWN_MODELS
from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.engine.measured_llm import MeasuredLLM
from vllm_selfspec.engine.spec_counters import Counts

HERE = Path(__file__).parent
NUM_DRAFTS = 4
TEMPERATURES = (0.7, 1.0)
TASKS = ("code", "chat")
# By the number of layers: a draft that is right often, one in between, and a bad one.
PLANS: dict[str, Any] = {
    "no MLP in two layers": lambda num: {"skip_layers": {"mlp": [num // 3, num // 2]}},
    "three quarters of the layers": lambda num: {"exit_layer": num * 3 // 4},
    "a quarter of the layers": lambda num: {"exit_layer": num // 4},
}
console = Console(stderr=True)


def main(
    models: Annotated[list[str], typer.Argument(help="`demo`, `plain`, or paths.")],
    num_prompts: Annotated[int, typer.Option(help="Of each task.")] = 8,
    num_seeds: Annotated[int, typer.Option(help="Samples of a prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Of a sample.")] = 48,
    output: Annotated[Path | None, typer.Option("-o", help="For the JSON.")] = None,
) -> None:
    """Prints a row for each model, plan and temperature, JSON last."""
    prepare_environment()
    sizes = {"prompts": num_prompts, "seeds": num_seeds, "max_tokens": max_tokens}
    document = {
        **provenance(f"python benchmarks/seeds.py {' '.join(map(name_of, models))}"),
        "num_drafts": NUM_DRAFTS,
        **sizes,
        "rows": [row for model in models for row in rows_of(model, **sizes)],
    }
    print(json.dumps(document, indent=1))
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n")
        output.with_suffix(".md").write_text(markdown(document) + "\n")


def name_of(model: str) -> str:
    return model if model in OWN_MODELS else Path(model).name


def rows_of(
    model: str, prompts: int, seeds: int, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Measures one model; an engine for each plan."""
    from transformers import AutoConfig

    path = str(HERE / OWN_MODELS[model]) if model in OWN_MODELS else model
    num_layers = AutoConfig.from_pretrained(path).num_hidden_layers
    for plan, keys_of in PLANS.items():
        llm = engine(path, keys_of(num_layers))
        for temperature in TEMPERATURES:
            standard, coupled = (
                counts(llm, prompts, seeds, max_tokens, temperature, is_seeded)
                for is_seeded in (False, True)
            )
            row = {
                "model": name_of(model),
                "plan": plan,
                "temperature": temperature,
                "standard": figures(standard),
                "coupled": figures(coupled),
            }
            console.print(json.dumps(row))
            yield row


@cache
def _kept() -> list[Any]:
    """Engines: one that is shut down takes what all of a process share with it."""
    return []


def engine(path: str, keys: Mapping[str, Any]) -> MeasuredLLM:
    """Started, and kept to the end."""
    config = {"method": "selfspec", "draft_source": "model", "draft_length": "fixed"}
    found = MeasuredLLM(
        path,
        {**config, "num_speculative_tokens": NUM_DRAFTS, **keys},
        enforce_eager=True,
        enable_prefix_caching=True,
        max_model_len=1024,
        max_num_seqs=16,
        kv_cache_memory_bytes=256 << 20,
    )
    _kept().append(found)
    return found


def counts(
    engine: MeasuredLLM,
    prompts: int,
    seeds: int,
    max_tokens: int,
    temperature: float,
    seeded: bool,
) -> Counts:
    """What speculation did with every prompt, sampled some times."""
    tokenizer = engine.tokenizer
    texts = [
        p.render(tokenizer) for task in TASKS for p in load(task).prompts[:prompts]
    ]
    every = [(text, seed) for text in texts for seed in range(seeds)]
    return engine.generate(
        [text for text, _ in every],
        max_tokens,
        temperature,
        seeds=[seed if seeded else None for _, seed in every],
    ).counts


def figures(found: Counts) -> dict[str, float]:
    """The share accepted of first drafts and of all, and tokens a verification."""
    return {
        "first": found.accepted_at[0] / found.drafts,
        "all": found.accepted_tokens / found.draft_tokens,
        "emitted": 1 + found.accepted_tokens / found.drafts,
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The run as a table."""
    lines = [
        f"`{document['command']}`, {document['date']}: {document['hardware']}; vLLM "
        f"{document['vllm']}, k = {document['num_drafts']}.",
        "",
        "| model | plan | T | first draft: standard | coupled | all: standard "
        "| coupled | tokens a step: standard | coupled |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        a, b = row["standard"], row["coupled"]
        lines.append(
            f"| {row['model']} | {row['plan']} | {row['temperature']} "
            f"| {a['first']:.3f} | {b['first']:.3f} | {a['all']:.3f} | {b['all']:.3f} "
            f"| {a['emitted']:.2f} | {b['emitted']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
