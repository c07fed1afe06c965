"""`vllm-selfspec train-exit`: trains a decoder layer that drafts after the first N."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_selfspec.bench.tasks import PROMPTS_HELP
from vllm_selfspec.cli.errors import errors_in_one_line
from vllm_selfspec.cli.options import numbers, parse_exit_layer
from vllm_selfspec.packages import raise_if_no_vllm

EPILOG = (
    "Example: vllm-selfspec train-exit my_model --prompts my_prompts.jsonl "
    "--exit-layer 3 -o my_head"
)


def train_exit(
    model: Annotated[
        str, typer.Argument(help="Model directory, or name on the Hugging Face Hub.")
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            metavar="PROMPTS",
            help=f"{PROMPTS_HELP} More than once for several.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Of the exit layer, its card, the loss curve and the checkpoint with "
            "which the same command goes on where it was stopped.",
        ),
    ],
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to measure on, as --prompts; a tenth of those otherwise.",
        ),
    ] = None,
    exit_layer: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="The target's layers before the exit layer; auto trains a few for an "
            "epoch each and goes on with the best.",
        ),
    ] = "auto",
    num_prompts: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="At most so many, drawn with the seed."),
    ] = None,
    max_prompt_tokens: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="The last so many tokens of a prompt are read."
        ),
    ] = 512,
    max_tokens: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="The target goes on for so many."),
    ] = 256,
    temperature: Annotated[
        str,
        typer.Option(metavar="LIST", help="It does at these, by turns; 0 is greedy."),
    ] = "0,1",
    top_k: Annotated[
        int,
        typer.Option(
            min=1, metavar="K", help="Tokens of its distribution that are learned from."
        ),
    ] = 32,
    epochs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Times that each text is seen.")
    ] = 3,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Texts a step.")
    ] = 16,
    lr: Annotated[
        float | None,
        typer.Option(
            min=1e-8, help="The highest learning rate. Default: 0.768 / hidden size."
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Steps between two checkpoints.")
    ] = 100,
    ray: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Train in N workers of Ray Train, on this machine or in the cluster "
            "of RAY_ADDRESS; --output and --cache must be where all see them.",
        ),
    ] = 0,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="vLLM's, to generate the texts.")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="vLLM's, of the same.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, texts and order.")] = 0,
    cache: Annotated[
        Path,
        typer.Option(
            metavar="DIR", envvar="VLLM_SELFSPEC_CACHE", help="Of generated texts."
        ),
    ] = Path("~/.cache/vllm_selfspec"),
) -> None:
    """Train a decoder layer that drafts after the target's first N.

    The target goes on with the prompts, by vLLM, and the layer learns what it says.
    Nothing of the target changes. Ctrl-C loses nothing: the same command goes on.
    """
    from vllm_selfspec.bench.provenance import command_line
    from vllm_selfspec.training.texts import TextOptions
    from vllm_selfspec.training.train_exit import TrainOptions, run_train_exit
    from vllm_selfspec.training.trainer import Recipe

    with errors_in_one_line():
        raise_if_no_vllm("train-exit")
        texts = TextOptions(
            max_tokens=max_tokens,
            temperatures=tuple(numbers("--temperature", temperature, float, 0)),
            top_k=top_k,
            seed=seed,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
        )
        options = TrainOptions(
            model=model,
            prompts=tuple(prompts),
            held_out=tuple(held_out or ()),
            num_prompts=num_prompts,
            max_prompt_tokens=max_prompt_tokens,
            exit_layer=parse_exit_layer(exit_layer),
            texts=texts,
            recipe=Recipe(epochs, batch_size, lr, seed),
            save_every=save_every,
            ray=ray,
            cache=cache.expanduser(),
            output=output,
            command=command_line(),
        )
        run_train_exit(options)
