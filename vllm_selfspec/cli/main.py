"""The command `vllm-selfspec`: look at a plan before serving it, and try it.

One rule: loading this module imports neither torch nor vLLM; a subcommand that needs
them imports them itself.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from vllm_selfspec import __version__
from vllm_selfspec.bench.serve import ServerError
from vllm_selfspec.bench.tasks import TaskError
from vllm_selfspec.cli.preview import Preview
from vllm_selfspec.config import (
    DEFAULT_NUM_SPECULATIVE_TOKENS,
    ConfigError,
)
from vllm_selfspec.engine import versions
from vllm_selfspec.plan.cost import CheckpointError
from vllm_selfspec.plan.exit_card import ExitHeadError
from vllm_selfspec.plan.families import UnsupportedModelError
from vllm_selfspec.plan.profile import MAX_NUM_SPECULATIVE_TOKENS, ProfileError
from vllm_selfspec.plan.skip_set import SkipSetError
from vllm_selfspec.training.errors import TextsError, TrainError
from vllm_selfspec.tuning.offline.tune import TuneError
from vllm_selfspec.whole_file import WriteError

# What the user wrote is wrong, like an unknown option; the rest is the model's fault.
USAGE_ERRORS = (ConfigError, SkipSetError, ProfileError, TaskError, ExitHeadError)
FAILURES = (ServerError, TuneError, TextsError, TrainError, WriteError)
REFUSALS = (
    UnsupportedModelError,
    CheckpointError,
    versions.UnsupportedVersionError,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the script `vllm-selfspec`."""
    app()


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Without traceback: exits with 1 for a refused model, with 2 for wrong words."""
    try:
        yield
    except FAILURES as error:  # the first with lines of its log
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    except (*USAGE_ERRORS, *REFUSALS) as error:
        message = " ".join(str(error).split())
        typer.echo(f"Error: {message}", err=True)
        code = 2 if isinstance(error, USAGE_ERRORS) else 1
        raise typer.Exit(code) from error


def _print_version(is_asked: bool) -> None:
    if not is_asked:
        return
    found = versions.vllm_version()
    wanted = " or ".join(f"{v}.x" for v in versions.SUPPORTED_VLLM)
    is_supported = versions.is_supported(found)
    verdict = "supported" if is_supported else f"not supported: install {wanted}"
    typer.echo(f"vllm-selfspec {__version__}")
    typer.echo(f"vLLM {found}, {verdict}")
    raise typer.Exit


@app.callback(epilog="Example: vllm-selfspec show Qwen/Qwen3-8B --exit-layer 12")
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the versions of vllm-selfspec and vLLM, and whether they fit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Self-speculative decoding for vLLM: the same text faster, no second model."""


@app.command(
    epilog="""Example: vllm-selfspec show my_model --skip-layers '{"mlp": [3, 4]}'"""
)
def show(
    model: Annotated[
        str, typer.Argument(help="Model directory, or name on the Hugging Face Hub.")
    ],
    skip_layers: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="'auto' (the default), a skip set as JSON, or the path of a JSON "
            "profile.",
        ),
    ] = None,
    exit_layer: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draft with layers 0 to N-1 instead."),
    ] = None,
    exit_head: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Draft with a trained exit layer."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same as JSON.")
    ] = False,
) -> None:
    """Show what a draft of MODEL would run, and how much faster that can be.

    Reads config.json and the headers of the weights; loads no weights.
    """
    with errors_in_one_line():
        keys: dict[str, Any] = {}
        if skip_layers is not None:
            keys["skip_layers"] = parse_skip_layers(skip_layers)
        if exit_layer is not None:
            keys["exit_layer"] = exit_layer
        if exit_head is not None:
            keys["exit_head"] = exit_head
        preview = Preview.of(model, keys)
    if as_json:
        typer.echo(json.dumps(preview.to_dict(), indent=2))
    else:
        preview.print(Console(highlight=False))


@app.command(epilog="Example: vllm-selfspec demo my_model --max-tokens 64")
def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model directory, or name on the Hugging Face Hub. "
            "Default: the demo model of the repository, widened."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate per prompt.")
    ] = 96,
    num_speculative_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_NUM_SPECULATIVE_TOKENS,
            metavar="K",
            help="Tokens drafted per verification.",
        ),
    ] = DEFAULT_NUM_SPECULATIVE_TOKENS,
    repeats: Annotated[
        int, typer.Option(min=1, metavar="N", help="Run everything N times.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Save the figures as JSON."
        ),
    ] = None,
) -> None:
    """Generate with plain vLLM and with selfspec, and compare text and speed."""
    from vllm_selfspec.bench.demo import run_demo

    with errors_in_one_line():
        run_demo(
            model=model,
            max_tokens=max_tokens,
            num_speculative_tokens=num_speculative_tokens,
            repeats=repeats,
            output=output,
        )


@app.command(
    epilog="Example: vllm-selfspec bench my_model --arms plain,selfspec,ngram "
    "--task jsonl=my_prompts.jsonl --streams 1,8 -o report"
)
def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="Model directory or Hub name; 'demo' or 'plain' for the repository's "
            "own models, widened: layers made redundant, and its twin without that."
        ),
    ] = "demo",
    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="For draft_model; without it the repository's own."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="summarization, code, chat, text (all by default), or FORMAT=PATH "
            "with a format of jsonl, cnn_dm, xsum, humaneval, gsm8k, mt_bench, "
            "spec_bench. More than once for several.",
        ),
    ] = None,
    arms: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="What to compare with plain vLLM: selfspec, ngram, suffix, "
            "draft_model, hf.",
        ),
    ] = "selfspec,ngram,suffix,draft_model,hf",
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help="A configuration of selfspec, in place of the usual ones, as in "
            """'{"exit_head": "my_head", "draft_length": "thompson"}'. """
            "More than once for several.",
        ),
    ] = None,
    streams: Annotated[
        str, typer.Option(metavar="LIST", help="Concurrent requests.")
    ] = "1,4,8,16",
    prompts: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Prompts of a task for one stream, and at least so many for more.",
        ),
    ] = 8,
    per_stream: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Prompts of a task for each of several streams. With 1 the last "
            "requests of a turn run with ever fewer others.",
        ),
    ] = 2,
    temperature: Annotated[
        str, typer.Option(metavar="LIST", help="Temperatures; 0 is greedy.")
    ] = "0,1",
    lengths: Annotated[
        str,
        typer.Option(metavar="LIST", help="Draft lengths to try; the likeliest first."),
    ] = "4,2,6",
    max_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens to generate a prompt.")
    ] = 64,
    dtype: Annotated[str, typer.Option(help="Of weights and KV cache.")] = "bfloat16",
    widen: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How often to widen 'demo' or 'plain'. Default: 8 on a CPU (0.5 B "
            "weights), 16 on a GPU (2 B).",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Of the report.")
    ] = Path("bench-report"),
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Run vLLM's own serving benchmark against a live server of each arm "
            "instead, one at a time; --streams bounds the requests a server runs at "
            "once.",
        ),
    ] = False,
    rates: Annotated[
        str, typer.Option(metavar="LIST", help="With --serve: requests a second.")
    ] = "0.25,0.5,1",
    requests: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --serve: requests at a rate.")
    ] = 16,
    goodput: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="With --serve: what a good request keeps, in ms, by ttft, tpot, e2el.",
        ),
    ] = "ttft:2000,tpot:200",
    repeats: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --serve: turns of each arm.")
    ] = 1,
) -> None:
    """Compare selfspec with plain vLLM and what else it offers; write a report.

    Everything runs in one process, in turns. Figures are medians of ratios to plain
    vLLM, with the bound that the costs measured in the same run allow.
    """
    from vllm_selfspec.bench.comparison import Load
    from vllm_selfspec.bench.run import Options, run_bench
    from vllm_selfspec.bench.serve import ServeOptions, parse_goodput, run_serve
    from vllm_selfspec.bench.tasks import SHIPPED

    with errors_in_one_line():
        loads = [
            Load(n, prompts if n == 1 else max(prompts, per_stream * n))
            for n in numbers("--streams", streams, int, 1)
        ]
        options = Options(
            model=model,
            draft_model=draft_model,
            widen=widen,
            tasks=tuple(task or SHIPPED),
            loads=tuple(loads),
            temperatures=tuple(numbers("--temperature", temperature, float, 0)),
            groups=tuple(arm_groups(arms)),
            lengths=tuple(numbers("--lengths", lengths, int, 1)),
            max_tokens=max_tokens,
            dtype=dtype,
            output=output,
            configs=tuple(json_object("--config", text) for text in config or ()),
        )
        if not serve:
            run_bench(options)
            return
        run_serve(
            options,
            ServeOptions(
                rates=tuple(numbers("--rates", rates, float, 0.001)),
                num_prompts=requests,
                goodput=parse_goodput(goodput),
                repeats=repeats,
            ),
        )


@app.command(
    epilog="Example: vllm-selfspec tune my_model --prompts jsonl=my_prompts.jsonl "
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
            metavar="TASK",
            help="Prompts like those that will be served, as a task of bench: code, "
            "jsonl=PATH with lines that have prompt or messages, ...",
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
    streams: Annotated[
        int, typer.Option(min=1, metavar="N", help="Concurrent requests to tune for.")
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
    from vllm_selfspec.tuning.offline.tune import Options, parse_budget, run_tune

    with errors_in_one_line():
        run_tune(
            Options(
                model=model,
                widen=widen,
                task=prompts,
                num_prompts=num_prompts,
                max_prompt_tokens=max_prompt_tokens,
                max_tokens=max_tokens,
                budget_s=parse_budget(budget),
                num_streams=streams,
                max_drafts=max_drafts,
                objective=objective,
                ray=ray,
                tensor_parallel_size=tensor_parallel_size,
                dtype=dtype,
                seed=seed,
                output=output,
                command=shlex.join(["vllm-selfspec", *sys.argv[1:]]),
            )
        )


@app.command(
    name="train-exit",
    epilog="Example: vllm-selfspec train-exit my_model --prompts my_prompts.jsonl "
    "--exit-layer 3 -o my_head",
)
def train_exit(
    model: Annotated[
        str, typer.Argument(help="Model directory, or name on the Hugging Face Hub.")
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Prompts like those that will be served: JSON lines with prompt or "
            "messages, or a task of bench. More than once for several.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Of the head, its card, the loss curve and the checkpoint with which "
            "the same command goes on where it was stopped.",
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
    skip_layers: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help="Sublayers of those N that drafts leave out, like '{\"mlp\": [1]}': "
            "the exit layer then learns from what is left of them.",
        ),
    ] = "{}",
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
    loss: Annotated[
        Literal["kl", "ce"],
        typer.Option(
            help="kl to the target's distribution, or cross-entropy on its tokens."
        ),
    ] = "kl",
    head: Annotated[
        Literal["shared", "low-rank", "full"],
        typer.Option(help="The target's LM head, or one of its own that starts there."),
    ] = "shared",
    head_rank: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Of a low-rank head. Default: hidden size / 4."
        ),
    ] = None,
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
    from vllm_selfspec.training.texts import TextOptions
    from vllm_selfspec.training.train_exit import Options, run_train_exit
    from vllm_selfspec.training.trainer import Recipe

    with errors_in_one_line():
        texts = TextOptions(
            max_tokens=max_tokens,
            temperatures=tuple(numbers("--temperature", temperature, float, 0)),
            top_k=top_k,
            seed=seed,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
        )
        options = Options(
            model=model,
            prompts=tuple(prompts),
            held_out=tuple(held_out or ()),
            num_prompts=num_prompts,
            max_prompt_tokens=max_prompt_tokens,
            exit_layer=parse_exit_layer(exit_layer),
            skip_layers=json_object("--skip-layers", skip_layers, '{"mlp": [1]}'),
            head=head,
            head_rank=head_rank,
            texts=texts,
            recipe=Recipe(loss, epochs, batch_size, lr, seed),
            save_every=save_every,
            ray=ray,
            cache=cache.expanduser(),
            output=output,
            command=shlex.join(["vllm-selfspec", *sys.argv[1:]]),
        )
        run_train_exit(options)


@app.command()
def catalogue(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the profiles as JSON.")
    ] = False,
) -> None:
    """List the plans that ship, which 'auto' takes for the models they are named by."""
    from vllm_selfspec.plan.catalogue import DIRECTORY, entries

    if as_json:
        found = {name: entry.model_dump() for name, entry in entries().items()}
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("model", "layers", "attention", "mlp", "found by"):
        table.add_column(column, overflow="fold")
    for entry in entries().values():
        lists = entry.skip_layers
        counts = (entry.num_layers, len(lists.attention), len(lists.mlp))
        table.add_row(entry.model, *map(str, counts), entry.note)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"attention, mlp: sublayers skipped. Files: {DIRECTORY}", style="dim")


def numbers(flag: str, text: str, kind: type, least: float) -> list[Any]:
    """The numbers of a list such as `1,4,8`.

    Raises:
        ConfigError: If it is none, or holds one below `least`.
    """
    try:
        found = [kind(piece) for piece in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{flag} takes numbers such as 1,4,8, but {text!r} is not: separate them "
            "with commas"
        ) from error
    if min(found) < least:
        raise ConfigError(
            f"{flag} takes numbers from {least}, but {text!r} holds {min(found)}: "
            "leave it out"
        )
    return found


def arm_groups(text: str) -> list[str]:
    """The arms to compare, of a list such as `selfspec,ngram`.

    Raises:
        ConfigError: If one is not known.
    """
    from vllm_selfspec.bench.arms import GROUPS

    found = [piece.strip() for piece in text.split(",")]
    for piece in found:
        if piece not in GROUPS:
            raise ConfigError(
                f"--arms takes {', '.join(GROUPS)}, but it holds {piece!r}: correct it"
            )
    return found


def parse_exit_layer(text: str) -> int | None:
    """N, or None for `auto`.

    Raises:
        ConfigError: If it is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ConfigError(
            f"--exit-layer takes a number of layers or auto, but it is {text!r}: "
            "correct it"
        )
    return int(text)


def parse_skip_layers(text: str) -> Any:
    """What `--skip-layers` means: a JSON object, else a word or a path.

    Raises:
        ConfigError: If it starts like JSON and is none.
    """
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "--skip-layers takes 'auto', a path, or JSON like "
            f'{{"attention": [3], "mlp": [4]}}, but {text!r:.80} is not JSON '
            f"({error}): put it in single quotes for the shell"
        ) from error


def json_object(
    option: str, text: str, example: str = '{"exit_layer": 3}'
) -> dict[str, Any]:
    """What an option's value means that is a JSON object.

    Raises:
        ConfigError: If it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{option} takes a JSON object such as '{example}', but it is "
            f"{text!r:.80}: correct it, in single quotes for the shell"
        )
    return found
