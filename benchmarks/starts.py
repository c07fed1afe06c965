"""How long does an engine take to start with the bare flag, first and later?

Measured: seconds from the start of a process to the first token of an answer, each
start a process of its own, with a cache directory that is empty at first. What bounds
them is plain vLLM's own start, beside which the first one of a model may take 20 s (the
key `calibration_seconds`) to look for a plan, and later ones nothing. A start with a
plan of other sublayers or weights compiles those once.

    python benchmarks/starts.py .cache/models/qwen2.5-coder-0.5b -o FILE.json
    python benchmarks/starts.py MODEL --memory 30% -o FILE.json
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_selfspec import whole_file
from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.page import markdown_table
from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.plan.calibrated import PLANS

# Also told of a plan that another version has found.
ENGINE = """
import json, sys, vllm_selfspec
keys = json.loads(sys.argv[1])
vllm_selfspec.__version__ = keys.pop("as_version", vllm_selfspec.__version__)
from vllm import LLM, SamplingParams
llm = LLM(**keys)
llm.generate(["def first("], SamplingParams(max_tokens=1), use_tqdm=False)
print("ANSWERED", flush=True)
"""
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 512 << 20,
}
FOUND_IN = re.compile(r"found in ([0-9.]+) s")
console = Console(stderr=True)


@dataclass
class Started:
    """An engine's start.

    Attributes:
        seconds: To the first token.
        looked: Seconds that it looked for a plan; 0 where it had one.
    """

    seconds: float
    looked: float


class Starts:
    """Starts of one model, that share a cache directory."""

    def __init__(self, model: str, memory: str, cache: Path) -> None:
        self._model, self._cache = model, cache
        self._config = {"method": "selfspec"} | (
            {"draft_memory": memory} if memory else {}
        )

    @property
    def plans(self) -> Path:
        """Where found plans are kept."""
        return self._cache / PLANS

    def process(self, drafts: bool = True, **keys: Any) -> subprocess.Popen[str]:
        """Starts one."""
        config = {"speculative_config": self._config} if drafts else {}
        told = json.dumps({"model": self._model, **SETTINGS, **config, **keys})
        return subprocess.Popen(
            [sys.executable, "-c", ENGINE, told],
            env={**os.environ, "VLLM_CACHE_ROOT": str(self._cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def together(self, *processes: subprocess.Popen[str]) -> list[Started]:
        """Waits for all of them.

        Raises:
            RuntimeError: If one fails.
        """
        began = time.monotonic()

        def wait(process: subprocess.Popen[str]) -> Started:
            said, _ = process.communicate()
            if "ANSWERED" not in said:
                raise RuntimeError(f"an engine did not start:\n{said[-3000:]}")
            looked = sum(map(float, FOUND_IN.findall(said)))
            return Started(time.monotonic() - began, looked)

        with ThreadPoolExecutor() as pool:
            return [*pool.map(wait, processes)]

    def cases(self) -> Iterator[tuple[str, list[Started]]]:
        """Name and starts, in an order in which each finds what it is about."""
        yield "plain vLLM, nothing compiled", self.together(self.process(drafts=False))
        yield "plain vLLM", self.together(self.process(drafts=False))
        yield "first start", self.together(self.process())
        yield "second start", self.together(self.process())
        yield "third start", self.together(self.process())
        (file,) = self.plans.glob("*.json")
        file.write_text(file.read_text()[:100])
        yield "plan damaged", self.together(self.process())
        yield "plan of another version", self.together(self.process(as_version="0.0"))
        shutil.rmtree(self.plans)
        yield "two at once", self.together(self.process(), self.process())
        shutil.rmtree(self.plans)
        self.plans.write_text("")  # root may write everywhere, but not below a file
        yield "plan cannot be kept", self.together(self.process())


def markdown(*documents: dict[str, Any]) -> str:
    """A table, one column a run."""
    columns = ["", *(f"`draft_memory` {one['memory'] or 0}" for one in documents)]
    names = documents[0]["starts"]
    rows = [
        [name, *(_cell(one["starts"][name]) for one in documents)] for name in names
    ]
    said = "{model}, {date}: {hardware}, {num_cores} cores; vLLM {vllm}, compiled."
    return "\n".join([said.format(**documents[0]), "", *markdown_table(columns, rows)])


def _cell(starts: list[dict[str, float]]) -> str:
    return "; ".join(
        f"{one['seconds']:.0f} s"
        + f" ({one['looked']:.0f} of them for a plan)" * bool(one["looked"])
        for one in starts
    )


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint directory.")],
    output: Annotated[Path, typer.Option("-o", help="For the JSON.")],
    memory: Annotated[str, typer.Option(help="The key `draft_memory`.")] = "",
) -> None:
    """Prints a line a case, JSON last."""
    prepare_environment()
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"  # what was found is told there
    words = [f"python benchmarks/starts.py {Path(model).name}"]
    words += [f"--memory {memory}"] * bool(memory)
    document = {
        **provenance(" ".join(words)),
        "model": Path(model).name,
        "memory": memory,
        "starts": {},
    }
    with tempfile.TemporaryDirectory() as cache:
        for name, found in Starts(model, memory, Path(cache)).cases():
            document["starts"][name] = [vars(one) for one in found]
            console.print(f"{name}: {_cell(document['starts'][name])}")
            whole_file.write_json(document, output)
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
