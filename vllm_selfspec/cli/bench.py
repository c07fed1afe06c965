"""`vllm-selfspec bench`: selfspec beside plain vLLM and what else it offers."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_selfspec.bench.tasks import PROMPTS_HELP
from vllm_selfspec.cli.errors import errors_in_one_line
from vllm_selfspec.cli.options import json_object, method_groups, numbers
from vllm_selfspec.packages import raise_if_no_vllm

EPILOG = (
    "Example: vllm-selfspec bench my_model --methods plain,selfspec,ngram "
    "--prompts my_prompts.jsonl --concurrency 1,8 -o report"
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
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            "--task",
            metavar="PROMPTS",
            help=f"{PROMPTS_HELP} More than once for several; the shipped sets by "
            "default.",
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--arms",
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
            """'{"trained_exit_layer": "my_layer", "draft_length": "thompson"}'. """
            "More than once for several.",
        ),
    ] = None,
    concurrency: Annotated[
        str,
        typer.Option(
            "--concurrency", "--streams", metavar="LIST", help="Concurrent requests."
        ),
    ] = "1,4,8,16",
    num_prompts: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Prompts of a set at a concurrency of 1, and at least so many above.",
        ),
    ] = 8,
    per_stream: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Prompts of a set for each concurrent request. With 1 the last "
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
            help="Run vLLM's own serving benchmark against a live server of each "
            "method instead, one at a time; --concurrency bounds the requests that a "
            "server runs at once.",
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
        int,
        typer.Option(min=1, metavar="N", help="With --serve: turns of each method."),
    ] = 1,
) -> None:
    """Compare selfspec with plain vLLM and what else it offers; write a report.

    Everything runs in one process, in turns. Figures are medians of ratios to plain
    vLLM, with the bound that the costs measured in the same run allow.
    """
    from vllm_selfspec.bench.comparison import Load
    from vllm_selfspec.bench.run import BenchOptions, run_bench
    from vllm_selfspec.bench.serve import ServeOptions, parse_goodput, run_serve
    from vllm_selfspec.bench.tasks import SHIPPED

    with errors_in_one_line():
        raise_if_no_vllm("bench")
        loads = [
            Load(n, num_prompts if n == 1 else max(num_prompts, per_stream * n))
            for n in numbers("--concurrency", concurrency, int, 1)
        ]
        options = BenchOptions(
            model=model,
            draft_model=draft_model,
            widen=widen,
            tasks=tuple(prompts or SHIPPED),
            loads=tuple(loads),
            temperatures=tuple(numbers("--temperature", temperature, float, 0)),
            groups=tuple(method_groups(methods)),
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
