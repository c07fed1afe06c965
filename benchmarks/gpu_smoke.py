"""Does selfspec keep its promises on a GPU? Eager, in CUDA graphs, and compiled.

    python benchmarks/gpu_smoke.py -o benchmarks/results/gpu.json
    python benchmarks/gpu_smoke.py --rehearse      # small, on whatever device is here

- agreement: in float32 the text is plain vLLM's, and CUDA graphs accept what eager
  drafting accepts. (A graph that replays stale metadata shows as lost acceptance, never
  as another text: verification hides it.)
- memory: weights, KV blocks and device memory in use, beside plain vLLM's.
- speed: tokens/s at 1, 8, 32 and 128 streams, engines in turns, medians of ratios.

Every part starts its engines in a process of its own and is saved when it is done, so a
machine that goes away leaves what was measured; a part that is in the file is not
measured again.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from corpus import texts
from rich.console import Console

from vllm_selfspec.bench.provenance import command_line, provenance
from vllm_selfspec.bench.widen import widen
from vllm_selfspec.engine.spec_counters import SpecCounters

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_MODEL = REPOSITORY / "benchmarks" / "demo_model"
CACHE = REPOSITORY / ".cache"
PLAIN = "plain vLLM"
PLANS: dict[str, dict[str, Any]] = {
    "auto": {},
    "exit_layer 3": {"exit_layer": 3},
    "probabilistic": {"exit_layer": 3, "draft_sample_method": "probabilistic"},
}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {},
}
PARTS = ("agreement", "memory", "speed")
PROMPT_CHARACTERS = 400
CONTEXT_LENGTH = 1024


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        factors: How often the demo model is widened, by dtype: 16 makes 2 B parameters.
        modes: The engine modes.
        streams: Concurrent requests, for the speed.
        num_tokens: Generated a request.
        rounds: Turns a number of streams.
        kv_cache_bytes: Of each engine, where the blocks are not what is measured.
    """

    factors: dict[str, int]
    modes: tuple[str, ...]
    streams: tuple[int, ...]
    num_tokens: int
    rounds: int
    kv_cache_bytes: int


FULL = Scale(
    factors={"float32": 4, "bfloat16": 16},
    modes=("eager", "graphs", "compiled"),
    streams=(1, 8, 32, 128),
    num_tokens=128,
    rounds=3,
    kv_cache_bytes=8 << 30,
)
SMALL = Scale(
    factors={"float32": 1, "bfloat16": 1},
    modes=("eager",),
    streams=(1, 4),
    num_tokens=16,
    rounds=1,
    kv_cache_bytes=64 << 20,
)


def prompts(num: int, seed: int = 0) -> list[str]:
    """Pieces of source files that the demo model was not trained on."""
    rng = random.Random(seed)
    held_out = [text for _, text in texts(held_out=True)]
    found = []
    while len(found) < num:
        text = rng.choice(held_out)
        start = rng.randrange(max(1, len(text) - PROMPT_CHARACTERS))
        found.append(text[start : start + rng.randint(40, PROMPT_CHARACTERS)])
    return found


@dataclass(frozen=True)
class Sample:
    """One batch."""

    token_ids: list[list[int]]
    seconds: float
    acceptance: float | None


class Engine:
    """Plain vLLM, or selfspec with one of `PLANS`."""

    def __init__(self, model: Path, plan: str, settings: dict[str, Any]) -> None:
        from vllm import LLM

        spec = None
        if plan != PLAIN:
            spec = {"method": "selfspec", "draft_source": "model", **PLANS[plan]}
            spec["draft_length"] = "fixed"
        self.llm: Any = LLM(str(model), speculative_config=spec, **settings)
        self._counters = SpecCounters()

    def generate(self, batch: list[str], num_tokens: int, **sampling: Any) -> Sample:
        """Runs `batch` as concurrent requests."""
        from vllm import SamplingParams

        params: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True}
        params |= {"temperature": 0, **sampling}
        before, start = self._counters.read(), time.perf_counter()
        outputs = self.llm.generate(batch, SamplingParams(**params), use_tqdm=False)
        seconds = time.perf_counter() - start
        acceptance = (self._counters.read() - before).acceptance
        return Sample(
            [list(out.outputs[0].token_ids) for out in outputs],
            seconds,
            None if acceptance is None else round(acceptance, 4),
        )


def settings_of(
    scale: Scale, mode: str, dtype: str, backend: str | None
) -> dict[str, Any]:
    """What all engines of a process have in common."""
    return {
        "dtype": dtype,
        "max_model_len": CONTEXT_LENGTH,
        "max_num_seqs": max(scale.streams),
        "disable_log_stats": False,
        "enable_prefix_caching": False,  # prompts repeat; each run does all of it
        "seed": 0,
        **({"attention_config": {"backend": backend}} if backend else {}),
        **MODES[mode],
    }


def engines_of(
    scale: Scale, mode: str, dtype: str, backend: str | None
) -> dict[str, Engine]:
    """One of each, in a KV cache of fixed size, sharing the device."""
    settings = {
        **settings_of(scale, mode, dtype, backend),
        "kv_cache_memory_bytes": scale.kv_cache_bytes,
        "gpu_memory_utilization": 0.8 / (1 + len(PLANS)),
    }
    model = model_of(scale, dtype)
    return {plan: Engine(model, plan, settings) for plan in (PLAIN, *PLANS)}


def model_of(scale: Scale, dtype: str) -> Path:
    """The widened demo model, made once."""
    factor = scale.factors[dtype]
    return widen(DEMO_MODEL, CACHE / f"demo_model_x{factor}_{dtype}", factor, dtype)


def agreement(scale: Scale, mode: str, backend: str | None) -> dict[str, Any]:
    """Texts that are plain vLLM's, and acceptance, by plan and number of streams."""
    engines = engines_of(scale, mode, "float32", backend)
    report: dict[str, Any] = {plan: {} for plan in engines}
    for num_streams in scale.streams:
        batch = prompts(num_streams)
        plain: Sample | None = None
        for plan, engine in engines.items():
            sample = engine.generate(batch, scale.num_tokens)
            sampled = engine.generate(batch, scale.num_tokens, temperature=0.7, seed=1)
            plain = plain or sample
            pairs = zip(plain.token_ids, sample.token_ids, strict=True)
            report[plan][num_streams] = {
                "same_texts": sum(a == b for a, b in pairs),
                "texts": num_streams,
                "acceptance": sample.acceptance,
                "acceptance_at_temperature_0.7": sampled.acceptance,
            }
    return report


def memory(scale: Scale, mode: str, backend: str | None, plan: str) -> dict[str, Any]:
    """What one engine takes, alone on the device at vLLM's default settings."""
    import torch

    on_gpu = torch.cuda.is_available()
    settings = settings_of(scale, mode, "bfloat16", backend)
    if not on_gpu:
        settings["kv_cache_memory_bytes"] = scale.kv_cache_bytes
    engine = Engine(model_of(scale, "bfloat16"), plan, settings)
    engine.generate(prompts(max(scale.streams)), scale.num_tokens)
    runner = engine.llm.collective_rpc(lambda worker: worker.model_runner)[0]
    report = {
        "weight_bytes": weight_bytes(runner),
        "kv_blocks": engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
    }
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        report |= {
            "device_bytes_in_use": total - free,
            "torch_peak_bytes": torch.cuda.max_memory_allocated(),
        }
    return report


def weight_bytes(runner: Any) -> int:
    """Bytes of all distinct parameters, the drafter's included."""
    drafter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    models = [runner.model, *([drafter._view.model] if drafter is not None else [])]
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for model in models
        for p in model.parameters()
    }
    return sum(storages.values())


def speed(scale: Scale, mode: str, backend: str | None) -> dict[str, Any]:
    """Tokens per second and the median ratio to plain vLLM, run in turns."""
    engines = engines_of(scale, mode, "bfloat16", backend)
    report: dict[str, Any] = {plan: {} for plan in engines}
    for num_streams in scale.streams:
        batch = prompts(num_streams)
        rates: dict[str, list[float]] = {plan: [] for plan in engines}
        accepted: dict[str, float | None] = {}
        for number in range(1 + scale.rounds):
            for plan, engine in engines.items():
                sample = engine.generate(batch, scale.num_tokens)
                if number:  # the first turn warms up
                    rates[plan].append(num_streams * scale.num_tokens / sample.seconds)
                    accepted[plan] = sample.acceptance
        for plan, found in rates.items():
            ratios = [a / b for a, b in zip(found, rates[PLAIN], strict=True)]
            report[plan][num_streams] = {
                "tokens_per_second": round(median(found), 1),
                "speed_up": round(median(ratios), 4),
                "speed_ups": [round(ratio, 4) for ratio in ratios],
                "acceptance": accepted[plan],
            }
    return report


def steps(scale: Scale, parts: list[str]) -> dict[str, list[str]]:
    """The processes to run, by the name of what they measure: function, arguments."""
    found = {}
    for part in parts:
        for mode in scale.modes:
            if part != "memory":
                found[f"{part}/{mode}"] = [part, mode]
                continue
            for plan in (PLAIN, "exit_layer 3"):
                found[f"{part}/{mode}/{plan}"] = [part, mode, plan]
    return found


def run_step(words: list[str], is_small: bool, backend: str | None) -> Any:
    """One process of this script; what it measured, or how it failed."""
    command = [sys.executable, __file__, "--step", json.dumps(words)]
    command += ["--rehearse"] if is_small else []
    command += ["--attention-backend", backend] if backend else []
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **env}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def main(
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="JSON file; goes on with what is missing in it."
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(PARTS)}; all by default."),
    ] = None,
    attention_backend: Annotated[
        str | None, typer.Option(help="vLLM's, such as TRITON_ATTN; its choice.")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="The demo model as it is, few tokens, on any device.")
    ] = False,
    step: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Check identity, acceptance, memory and speed on this machine's GPU."""
    scale = SMALL if rehearse else FULL
    if step is not None:
        name, mode, *rest = json.loads(step)
        measure = {"agreement": agreement, "memory": memory, "speed": speed}[name]
        print(json.dumps(measure(scale, mode, attention_backend, *rest)))
        return
    console = Console(stderr=True, highlight=False)
    import torch

    if not torch.cuda.is_available() and not rehearse:
        raise typer.BadParameter(
            "there is no CUDA device here: run it where there is one, or add --rehearse"
        )
    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(
            f"--part is one of {', '.join(PARTS)}, but it is {', '.join(unknown)}"
        )
    report: dict[str, Any] = {
        **provenance(command_line()),
        "attention_backend": attention_backend,
        "scale": vars(scale),
        "results": {},
    }
    if output and output.exists():
        report["results"] = json.loads(output.read_text())["results"]
    todo = {
        name: words
        for name, words in steps(scale, part or list(PARTS)).items()
        if "failed" in report["results"].get(name, {"failed": None})
    }
    for number, (name, words) in enumerate(todo.items(), 1):
        console.print(f"{number} of {len(todo)}: {name}")
        report["results"][name] = run_step(words, rehearse, attention_backend)
        if output:
            partial = output.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(output)
    print(json.dumps(report["results"], indent=1))
    failed = [name for name, found in report["results"].items() if "failed" in found]
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/red]")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
