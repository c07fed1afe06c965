"""Does the installed plugin slow vLLM down where selfspec is not asked for?

Measured: time per decode step of plain vLLM on the demo model as it is (9 M parameters,
so that the engine's own work dominates), with the plugin loaded and with
`VLLM_PLUGINS=""`, in processes that take turns. It should be 1.00: the seams that a
plain step passes are one `in` on a dictionary, or none.

    python benchmarks/plugin_overhead.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from vllm_selfspec.bench.provenance import command_line, provenance

MODEL = Path(__file__).resolve().parent / "demo_model"
NUM_TOKENS = 200
NUM_RUNS = 12

CHILD = f"""
import json, time
from vllm import LLM, SamplingParams
llm = LLM({str(MODEL)!r}, dtype="float32", enforce_eager=True, max_model_len=1024,
          max_num_seqs=4, kv_cache_memory_bytes=1 << 26, enable_prefix_caching=False)
params = SamplingParams(temperature=0, max_tokens={NUM_TOKENS}, ignore_eos=True)
times, texts = [], []
for _ in range({NUM_RUNS}):
    start = time.perf_counter()
    out = llm.generate(["def main():"], params, use_tqdm=False)
    times.append((time.perf_counter() - start) / {NUM_TOKENS})
    texts.append(list(out[0].outputs[0].token_ids))
print(json.dumps([min(times[1:]), texts[0]]))
"""


def measure(plugins: str | None) -> tuple[float, list[int]]:
    """Best seconds per step, and the tokens, of one fresh process."""
    env = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "0"}  # no barriers: less noise
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-c", CHILD]
    output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
    seconds, token_ids = json.loads(output.stdout.splitlines()[-1])
    return seconds, token_ids


def main(
    pairs: Annotated[int, typer.Option(help="Processes of each kind.")] = 5,
) -> None:
    """Compare step times with and without the plugin."""
    ratios, steps = [], []
    for number in range(pairs):
        without, plain_ids = measure("")
        with_plugin, ids = measure(None)
        if ids != plain_ids:
            raise SystemExit("the plugin changed the text of plain vLLM")
        ratios.append(with_plugin / without)
        steps.append(without)
        print(f"pair {number + 1} of {pairs}: {ratios[-1]:.3f}", file=sys.stderr)
    print(
        json.dumps(
            {
                **provenance(command_line()),
                "step_ms_without": round(1000 * median(steps), 3),
                "ratio_with_to_without": round(median(ratios), 4),
                "ratios": [round(ratio, 4) for ratio in ratios],
                "same_tokens": True,
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
