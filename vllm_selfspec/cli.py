"""The command `vllm-selfspec`: look at a plan before serving it, and try it.

One rule: loading this module imports neither torch nor vLLM; a subcommand that needs
them imports them itself.
"""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_selfspec import __version__, versions
from vllm_selfspec.bench.serve import ServerError
from vllm_selfspec.bench.tasks import TaskError
from vllm_selfspec.config import (
    DEFAULT_NUM_SPECULATIVE_TOKENS,
    MAX_NUM_SPECULATIVE_TOKENS,
    METHOD,
    ConfigError,
    DraftPlan,
    SelfSpecConfig,
    resolve_plan,
)
from vllm_selfspec.cost import (
    CheckpointError,
    ModelWeights,
    bound,
    expected_tokens,
    locate,
)
from vllm_selfspec.profile import ProfileError
from vllm_selfspec.skip_set import SUBLAYERS, SkipSet, SkipSetError
from vllm_selfspec.support import UnsupportedModelError, family_of

TABLE_K = (1, 2, 4, 8)
TABLE_ACCEPTANCE = (0.6, 0.8, 0.9, 1.0)
LAYERS_PER_LINE = 60  # with labels and gaps a line stays under 80 columns
LAYERS_PER_GROUP = 10
SPEED_UP_NOTE = (
    "a: chance that a draft token is accepted. Below 1.00x drafts cost more than\n"
    "they save. Verifying k + 1 tokens is taken to cost one step, as it does while\n"
    "reading the weights is what takes the time."
)

# What the user wrote is wrong, like an unknown option; the rest is the model's fault.
USAGE_ERRORS = (ConfigError, SkipSetError, ProfileError, TaskError)
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
    except ServerError as error:  # with the lines of its log
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
    from vllm_selfspec.demo import run_demo

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


def read_architecture(path: Path) -> tuple[str, int]:
    """vLLM's architecture name of the model in `path`, and its number of layers.

    Raises:
        CheckpointError: If its config.json is missing, or names neither.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
        return str(config["architectures"][0]), int(config["num_hidden_layers"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(
            "a model directory holds a config.json with architectures and "
            f"num_hidden_layers, but {str(file)!r} does not "
            f"({type(error).__name__}: {error}): check the path"
        ) from error


@dataclass(frozen=True)
class Preview:
    """What a user gets to know of a plan before serving it.

    Attributes:
        model: As the user named it.
        architecture: vLLM's name of it.
        keys: The user's keys, from which the plan follows.
        plan: The plan vLLM would draft with.
        weights: Bytes of the model's parts.
    """

    model: str
    architecture: str
    keys: dict[str, Any]
    plan: DraftPlan
    weights: ModelWeights

    @classmethod
    def of(cls, model: str, keys: dict[str, Any]) -> "Preview":
        """Resolves the user's keys against the model on disk or on the Hub.

        Raises:
            ConfigError, SkipSetError, ProfileError: What the user wrote is not allowed.
            UnsupportedModelError: The model cannot be drafted for.
            CheckpointError: The model cannot be found or read.
        """
        config = SelfSpecConfig.parse(keys)
        path = locate(model)
        architecture, num_layers = read_architecture(path)
        family_of(architecture)
        weights = ModelWeights.from_checkpoint(path)
        if weights.num_layers != num_layers:
            raise CheckpointError(
                f"config.json and weights must be of one model, but {str(path)!r} has "
                f"{num_layers} layers in one and {weights.num_layers} in the other: "
                "download it again"
            )
        plan = resolve_plan(config, num_layers)
        return cls(model, architecture, keys, plan, weights)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.weights.num_layers

    @property
    def draft_share(self) -> float:
        """The `c` of the bound."""
        return self.weights.draft_share(self.plan.skip_set)

    def speed_up(self, k: int, acceptance: float) -> float:
        """The most that drafting `k` tokens can win."""
        return bound(expected_tokens(acceptance, k), k, self.draft_share)

    def command(self) -> str:
        """How to serve the model with this plan, quoted for a shell."""
        config = json.dumps({"method": METHOD, **self.keys}) if self.keys else METHOD
        return shlex.join(["vllm", "serve", self.model, "--speculative-config", config])

    def streamed(self) -> dict[str, tuple[int, int]]:
        """Bytes a step of target and draft reads, by part."""
        skip_set, parts = self.plan.skip_set, {}
        for sublayer in SUBLAYERS:
            sizes: tuple[int, ...] = getattr(self.weights, sublayer)
            skipped = sum(sizes[i] for i in getattr(skip_set, sublayer))
            parts[sublayer] = (sum(sizes), sum(sizes) - skipped)
        parts["head"] = (self.weights.head, self.weights.head)
        parts["total"] = (self.weights.streamed, self.weights.draft_streamed(skip_set))
        return parts

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form of all that `print` shows."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "num_layers": self.num_layers,
            "skippable_sublayers": list(SUBLAYERS),
            "plan": {"source": self.plan.source, **self.plan.skip_set.to_dict()},
            "streamed_bytes": {
                part: {"target": target, "draft": draft}
                for part, (target, draft) in self.streamed().items()
            },
            "draft_share": self.draft_share,
            "speed_up_bound": [
                {
                    "num_speculative_tokens": k,
                    "acceptance": acceptance,
                    "bound": self.speed_up(k, acceptance),
                }
                for k in TABLE_K
                for acceptance in TABLE_ACCEPTANCE
            ],
            "ceiling": 1 / self.draft_share,
            "command": self.command(),
        }

    def print(self, console: Console) -> None:
        """Prints it for a terminal of 80 columns or more."""
        for heading, body in (
            ("Model", self._summary()),
            ("Sublayers", self._map(console)),
            ("Read per step", self._streamed_table()),
            ("Speed-up at most", self._speed_up_table()),
        ):
            console.print(heading, style="bold cyan")
            console.print(Padding(body, (0, 0, 1, 2), expand=False))
        console.print("Serve it", style="bold cyan")
        console.print(f"  {self.command()}", markup=False, soft_wrap=True)

    def _summary(self) -> Table:
        family = family_of(self.architecture)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in {
            "name": self.model,
            "architecture": f"{self.architecture}, {self.num_layers} layers",
            "may be skipped": f"{family.attention} and {family.mlp} of every layer, "
            f"but not all {2 * self.num_layers} of them",
            "draft plan": _outline(self.plan.skip_set),
            "chosen by": self.plan.source,
        }.items():
            table.add_row(label, Text(value))
        return table

    def _map(self, console: Console) -> Group:
        """The sublayers as rows of symbols under the numbers of their layers."""
        runs, skipped = "#." if console.options.ascii_only else "\u2588\u00b7"
        num_skipped = self.plan.skip_set.num_skipped
        num_run = 2 * self.num_layers - num_skipped
        lines = [Text(f"{runs} {num_run} run   {skipped} {num_skipped} skipped", "dim")]
        for start in range(0, self.num_layers, LAYERS_PER_LINE):
            layers = range(self.num_layers)[start : start + LAYERS_PER_LINE]
            tens = [f"{i:<10}" for i in layers if i % LAYERS_PER_GROUP == 0]
            lines.append(Text(f"{'layer':<11}{' '.join(tens)}".rstrip(), "dim"))
            for sublayer in SUBLAYERS:
                holes = getattr(self.plan.skip_set, sublayer)
                marks = "".join(skipped if i in holes else runs for i in layers)
                lines.append(Text(f"{sublayer:<11}{_in_groups(marks)}"))
        return Group(*lines)

    def _streamed_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("")
        for column in ("target", "draft", "share"):
            table.add_column(column, justify="right")
        table.add_column("")
        for part, (target, draft) in self.streamed().items():
            share = draft / target if target else 1.0  # a part may have no weights
            name, style = ("= c", "bold") if part == "total" else ("", "")
            sizes = decimal(target), decimal(draft)
            table.add_row(part, *sizes, f"{share:.1%}", name, style=style)
        return table

    def _speed_up_table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("draft tokens k", justify="center")
        for acceptance in TABLE_ACCEPTANCE:
            table.add_column(f"a = {acceptance}", justify="right")
        for k in TABLE_K:
            row = [self.speed_up(k, acceptance) for acceptance in TABLE_ACCEPTANCE]
            cells = [Text(f"{x:.2f}x", "green" if x > 1 else "red") for x in row]
            table.add_row(str(k), *cells)
        ceiling = f"ceiling 1/c = {1 / self.draft_share:.2f}x"
        return Group(
            table,
            Text(f"{ceiling}, for ever longer drafts that are all accepted", "bold"),
            Text(SPEED_UP_NOTE, "dim"),
        )


def _outline(skip_set: SkipSet) -> str:
    """One line, however deep the model; the map says which layers."""
    if not skip_set.num_skipped or skip_set.exit_layer is not None:
        return str(skip_set)
    counts = (f"{s} in {len(getattr(skip_set, s))}" for s in SUBLAYERS)
    return f"skips {' and '.join(counts)} of {skip_set.num_layers} layers"


def _in_groups(marks: str) -> str:
    """`marks` with a gap before every tenth, so that a layer is easily counted."""
    starts = range(0, len(marks), LAYERS_PER_GROUP)
    return " ".join(marks[i : i + LAYERS_PER_GROUP] for i in starts)


def decimal(num_bytes: int) -> str:
    """`1_073_844_224` as `1.07 GB`."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    num_decimals = max(3 - len(str(int(size))), 0) if units[0] != "B" else 0
    return f"{size:.{num_decimals}f} {units[0]}"


if __name__ == "__main__":
    main()
