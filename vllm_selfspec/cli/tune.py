"""`vllm-selfspec tune`: finds the plan that makes a model fastest on given prompts."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_selfspec.bench.tasks import PROMPTS_HELP
from vllm_selfspec.cli.errors import errors_in_one_line
from vllm_selfspec.packages import raise_if_no_vllm
from vllm_selfspec.plan.profile import MAX_NUM_SPECULATIVE_TOKENS

EPILOG = (
    "Example: vllm-selfspec tune my_model --prompts my_prompts.jsonl "
    "--budget 20m -o my_model.json, then vllm serve my_model --speculative-config "
    """'{"method": "selfspec", "skip_layers": "my_model.json"}'"""
)


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="Model directory or Hub name; 'demo' or 'plain' as for bench."
        ),
    ],
    prompts: Annotated[
        str,
        typer.Option(
            metavar="PROMPTS",
            help=PROMPTS_HELP,
        ),
    ] = "code",
    budget: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="For the search, such as 90s, 20m or 2h. Starting vLLM and measuring "
            "the last candidates come on top.",
        ),
    ] = "5m",
    num_prompts: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts, drawn with the seed.")
    ] = 8,
    max_prompt_tokens: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="The last so many tokens of a prompt are read."
        ),
    ] = 512,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=2,
            metavar="N",
            help="The target goes on with each prompt for so many, and plans are "
            "scored by how much of that they draft.",
        ),
    ] = 64,
    concurrency: Annotated[
        int,
        typer.Option(
            "--concurrency",
            "--streams",
            min=1,
            metavar="N",
            help="Concurrent requests to tune for.",
        ),
    ] = 1,
    max_drafts: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_NUM_SPECULATIVE_TOKENS,
            metavar="K",
            help="The longest draft; a plan is scored at its best length.",
        ),
    ] = 6,
    memory: Annotated[
        str,
        typer.Option(
            metavar="SHARE|BYTES",
            help="What a plan may keep beside the target, like 30% or 300000000 bytes: "
            "copies of its weights in 4 bits, as far as there is room.",
        ),
    ] = "0",
    objective: Annotated[
        Literal["predicted", "measured"],
        typer.Option(
            help="What plans are scored by. 'measured' generates with each, as Draft & "
            "Verify does, with drafts of full length; it takes far longer."
        ),
    ] = "predicted",
    ray: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Score N plans at once, in N Ray workers with an engine each: on this "
            "machine, or in the cluster of RAY_ADDRESS. 0 is one engine without Ray.",
        ),
    ] = 0,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="vLLM's, of each engine.")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights and KV cache.")] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Of search and prompts.")] = 0,
    widen: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="As for bench."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The profile. Beside it lie a plot (.svg) and the study (.study.db), "
            "with which the same command goes on where it was stopped.",
        ),
    ] = Path("profile.json"),
) -> None:
    """Find the draft plan that makes a model fastest on your prompts.

    The model is loaded once, by vLLM. A plan is scored by drafting from every position
    of the texts at once, as the engine drafts, and by what forwards cost here; the best
    few then generate for real. Ctrl-C keeps the best so far.
    """
    from vllm_selfspec.bench.provenance import command_line
    from vllm_selfspec.tuning.offline.tune import TuneOptions, parse_budget, run_tune

    with errors_in_one_line():
        raise_if_no_vllm("tune")
        run_tune(
            TuneOptions(
                model=model,
                widen=widen,
                task=prompts,
                num_prompts=num_prompts,
                max_prompt_tokens=max_prompt_tokens,
                max_tokens=max_tokens,
                budget_s=parse_budget(budget),
                num_streams=concurrency,
                max_drafts=max_drafts,
                memory=int(memory) if memory.isdigit() else memory,
                objective=objective,
                ray=ray,
                tensor_parallel_size=tensor_parallel_size,
                dtype=dtype,
                seed=seed,
                output=output,
                command=command_line(),
            )
        )
