"""`run_serve`: vLLM's own serving benchmark against a live server of each method.

One rule: one server runs at a time, and gets the same requests at the same moments as
every other; the methods take turns, so that a drifting machine hits all alike.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_selfspec import whole_file
from vllm_selfspec.bench import serve_report
from vllm_selfspec.bench.inputs import positions_for, tell_what_is_left_out
from vllm_selfspec.bench.methods import PLAIN, Method
from vllm_selfspec.bench.own_models import find_model
from vllm_selfspec.bench.run import (
    SEED,
    BenchOptions,
    conditions,
    describe,
    engine_settings,
    find_draft_model,
    find_methods,
    prepare,
    progress_bar,
)
from vllm_selfspec.bench.tasks import Prompt, Task, load_all
from vllm_selfspec.config import ConfigError
from vllm_selfspec.packages import raise_if_lacking

START_DEADLINE_S = 900.0  # a large model under CUDA graphs takes minutes
STOP_DEADLINE_S = 60.0
SERVED_NAME = "model"
# What is kept of vLLM's report: milliseconds, and tokens and requests a second.
KEPT = (
    "completed",
    "failed",
    "duration",
    "output_throughput",
    "request_goodput",
    *(
        f"{which}_{of}_ms"
        for of in ("ttft", "tpot", "e2el")
        for which in ("p50", "p99")
    ),
    "spec_decode_acceptance_rate",
    "spec_decode_acceptance_length",
)


class ServerError(RuntimeError):
    """A server that did not start, or ended."""


@dataclass(frozen=True)
class ServeOptions:
    """What the user asked for beyond `BenchOptions`.

    Attributes:
        rates: Requests a second, arriving as a Poisson process.
        num_prompts: Requests at each rate.
        goodput: Limits a good request keeps, as in vLLM's `--goodput`: milliseconds by
            `ttft`, `tpot`, `e2el`.
        repeats: How often every method has its turn.
    """

    rates: tuple[float, ...]
    num_prompts: int
    goodput: dict[str, float]
    repeats: int


def parse_goodput(text: str) -> dict[str, float]:
    """The limits of a list such as `ttft:2000,tpot:200`.

    Raises:
        ConfigError: If it is none.
    """
    found = {}
    for piece in text.split(","):
        name, _, value = piece.strip().partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or found[name] <= 0:
            raise ConfigError(
                "--goodput takes milliseconds by ttft, tpot, e2el such as "
                f"ttft:2000,tpot:200, but {piece!r} is not: correct it"
            )
    return found


def run_serve(options: BenchOptions, serve: ServeOptions) -> None:
    """Serves with every method in turn and writes `serve.json`, `.md` and `.html`.

    The requests are the prompts of all tasks, mixed, at the first of the temperatures.
    Ctrl-C stops the server that runs, and reports the turns that were finished; so does
    a server that fails.

    Raises:
        CheckpointError: If a model cannot be found or read.
        MissingPackageError: If the report needs a package that is not installed.
        TaskError: If a task cannot be read, or its prompts are too long.
        UnsupportedModelError: If the model cannot be drafted for.
        ServerError: If a server does not start, or ends before its turn does.
    """
    console = Console(highlight=False)
    prepare()
    # The server has a process of its own for the engine, as a user's has.
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # what it asks is here
    tasks = load_all(options.tasks)
    raise_if_lacking("bench --serve", ["matplotlib", "pandas"], "bench")
    model = find_model(options.model, options.widen, console)
    draft = find_draft_model(options, console)
    groups = [group for group in options.groups if group != "hf"]
    methods = find_methods(options, groups, model, draft)
    assert options.output is not None, "a server's requests and logs need a place"
    whole_file.make_directory(options.output)
    tell_what_is_left_out(options, methods, console)
    asked = _mixed(tasks, serve.num_prompts * len(serve.rates))
    max_model_len = positions_for([asked], options, model)
    bench = _ServeBench(options, serve, model, options.output, max_model_len)
    bench.write_requests(asked.prompts)
    of_all = {
        **conditions(options, model),
        "rates": serve.rates,
        "num_prompts": serve.num_prompts,
        "goodput": serve.goodput,
        "temperature": options.temperatures[0],
        "methods": [describe(method) for method in methods],
    }
    points: list[dict[str, Any]] = []
    try:
        _take_turns(bench, methods, points, console)
    finally:
        if points:  # also where a server has failed
            document = {**of_all, "points": _counted(points)}
            serve_report.write(document, options.output, console)


def _mixed(tasks: Sequence[Task], num: int) -> Task:
    """The first `num` prompts of the tasks in turn; from the first again where there
    are fewer."""
    longest = max(len(task.prompts) for task in tasks)
    found = [
        task.prompts[i]
        for i in range(longest)
        for task in tasks
        if i < len(task.prompts)
    ]
    name = ", ".join(task.name for task in tasks)
    return Task(name, tuple(found[i % len(found)] for i in range(num)))


def _take_turns(
    bench: "_ServeBench",
    methods: list[Method],
    points: list[dict[str, Any]],
    console: Console,
) -> None:
    """Adds what is measured to `points`, a row for each turn and rate."""
    total = bench.serve.repeats * len(methods) * len(bench.serve.rates)
    try:
        with progress_bar(console) as progress:
            bar = progress.add_task("", total=total)

            def say(what: str) -> None:
                progress.update(bar, description=what)
                if not console.is_terminal:  # a log has no bar
                    console.print(f"{len(points)} of {total}: {what}")

            for repeat, method in product(range(bench.serve.repeats), methods):
                for point in bench.turn(method, say):
                    points.append({"repeat": repeat, "method": method.name, **point})
                    progress.update(bar, advance=1)
    except KeyboardInterrupt:
        if not points:
            raise
        console.print("Stopped; this is what was finished.")


def _counted(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the number of texts that are plain vLLM's in place of the texts."""
    plain = {
        (point["repeat"], point["rate"]): point["texts"]
        for point in points
        if point["method"] == PLAIN
    }
    found = []
    for point in points:
        texts = point["texts"]
        expected = plain[point["repeat"], point["rate"]]
        same = sum(a == b for a, b in zip(texts, expected, strict=True))
        rest = {key: value for key, value in point.items() if key != "texts"}
        found.append({**rest, "same_texts": same, "texts": len(texts)})
    return found


@dataclass(frozen=True)
class _ServeBench:
    """One method's turn after another."""

    options: BenchOptions
    serve: ServeOptions
    model: Path
    output: Path
    max_model_len: int

    def requests_file(self, rate: float) -> Path:
        return self.output / "requests" / f"{rate:g}.jsonl"

    def write_requests(self, prompts: Sequence[Prompt]) -> None:
        """One file for each rate, with prompts that no other rate has where there are
        enough: what remembers answers (suffix decoding) has not seen them."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
        num = self.serve.num_prompts
        for index, rate in enumerate(self.serve.rates):
            chosen = prompts[index * num :][:num]
            rows = ({"prompt": prompt.render(tokenizer)} for prompt in chosen)
            lines = (json.dumps(row) + "\n" for row in rows)
            whole_file.write("".join(lines), self.requests_file(rate))

    def turn(
        self, method: Method, say: Callable[[str], None]
    ) -> Iterator[dict[str, Any]]:
        """Starts a server for `method` and measures it at every rate."""
        say(f"{method.name}: starts")
        log = (
            self.output
            / "logs"
            / f"{method.name.replace(',', '').replace(' ', '_')}.log"
        )
        whole_file.make_directory(log.parent)
        with _serving(self.command(method), log) as server:
            server.warm_up()
            for rate in self.serve.rates:
                say(f"{method.name}: {rate:g} requests a second")
                yield {"rate": rate, **self.measure(server, rate)}

    def command(self, method: Method) -> list[str]:
        """`vllm serve` for `method`, its port left out."""
        settings = engine_settings(self.options, self.max_model_len)
        words = [str(Path(sys.executable).with_name("vllm")), "serve", str(self.model)]
        words += ["--host", "127.0.0.1", "--served-model-name", SERVED_NAME]
        for key, value in settings.items():
            flag = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        if method.speculative_config:
            words += ["--speculative-config", json.dumps(method.speculative_config)]
        return words

    def measure(self, server: "_Server", rate: float) -> dict[str, Any]:
        """`vllm bench serve` at one rate, run in this process."""
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        flags = {
            "--backend": "openai",
            "--base-url": server.url,
            "--model": SERVED_NAME,
            "--tokenizer": self.model,
            "--dataset-name": "custom",
            "--dataset-path": self.requests_file(rate),
            "--num-prompts": self.serve.num_prompts,
            "--custom-output-len": self.options.max_tokens,
            "--request-rate": rate,
            "--temperature": self.options.temperatures[0],
            "--percentile-metrics": "ttft,tpot,e2el",
            "--metric-percentiles": "50,99",
            "--seed": SEED,  # the same arrivals for every method
            "--ready-check-timeout-sec": 0,  # it would send a prompt of the benchmark
        }
        words = [str(word) for flag in flags.items() for word in flag]
        words += ["--ignore-eos", "--skip-chat-template", "--disable-shuffle"]
        words += ["--save-detailed", "--disable-tqdm", "--goodput"]
        words += [f"{name}:{limit}" for name, limit in self.serve.goodput.items()]
        with server.log.open("a") as log, contextlib.redirect_stdout(log):
            found = main(parser.parse_args(words))
        if found["completed"] < self.serve.num_prompts:
            raise server.failed(
                f"answered {found['completed']} of {self.serve.num_prompts} requests"
            )
        point = {key: found[key] for key in KEPT if key in found}
        return {**point, "texts": found["generated_texts"]}


@dataclass(frozen=True)
class _Server:
    """A running `vllm serve`."""

    process: subprocess.Popen[bytes]
    command: list[str]
    url: str
    log: Path

    def wait_until_up(self) -> None:
        end = time.monotonic() + START_DEADLINE_S
        while not self._is_healthy():
            if self.process.poll() is not None:
                raise self.failed(f"ended with status {self.process.returncode}")
            if time.monotonic() > end:
                raise self.failed(f"is not up after {START_DEADLINE_S:.0f} s")
            time.sleep(0.5)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def warm_up(self) -> None:
        """One request, so that no method's first is slower than its others."""
        body = {"model": SERVED_NAME, "prompt": "Hello", "max_tokens": 16}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps({**body, "ignore_eos": True}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                answer.read()
        except OSError as error:
            raise self.failed(f"did not answer the first ({error})") from error

    def failed(self, what: str) -> ServerError:
        tail = self.log.read_text(errors="replace").strip().splitlines()[-20:]
        return ServerError(
            f"a server must answer every request, but {shlex.join(self.command)} "
            f"{what}: see {self.log}, which ends with\n" + "\n".join(tail)
        )

    def stop(self) -> None:
        """Ends it and its engine, by force if it does not by itself."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):  # all of its group have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def _serving(command: list[str], log: Path) -> Iterator[_Server]:
    """A server, up and running; in a group of its own, so that Ctrl-C is ours alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [*command, "--port", str(port)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = _Server(process, command, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.stop()
