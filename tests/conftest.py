"""Shared by all tests: tiny random models, and engines that are started once.

Engines run inside the test process (vLLM's own switch), so that one starts in a
fraction of a second. None is ever shut down: vLLM's shutdown tears down state that all
engines of a process share.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CORES = os.cpu_count() or 1
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{CORES - 1}")
# A spinning barrier takes a hundred times longer where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

from vllm_selfspec.spec_counters import Counts, SpecCounters  # noqa: E402

# `make test-v2` runs with vLLM's V2 model runner, under Triton's interpreter.
IS_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
# 1 for everything, as in `make test-all`, or `shown`: each row of the support table,
# but not every case of it.
TEST_ALL = os.environ.get("SELFSPEC_TEST_ALL", "")
IS_SHORT = not TEST_ALL
# The interpreter takes seconds for a step; what it runs of a long list is a part then.
IS_PART = IS_V2 and TEST_ALL in ("", "shown")

DEMO_MODEL = Path(__file__).resolve().parents[1] / "benchmarks" / "demo_model"
NUM_LAYERS = 4
VOCAB_SIZE = 128
KV_CACHE_BYTES = 16 << 20

# Wide enough that a random model's next token is not a near-tie in float32, where the
# order of summation differs between one row and several.
INITIALIZER_RANGE = 0.2

TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def build_tiny_model(family: str, directory: Path, **overrides: Any) -> Path:
    """Saves a random model of `family` and a one-token-per-letter tokenizer.

    None leaves a key of `TINY` out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    extra = {"sliding_window": 48} if family == "mistral" else {}
    keys = {**TINY, **extra, **overrides}
    keys = {key: value for key, value in keys.items() if value is not None}
    config = AutoConfig.for_model(family, **keys)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones otherwise, which would hide a lost norm
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    path = directory / family
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def build_tokenizer() -> Any:
    """Token i is the character i, so any text of ASCII is a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(i): i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=chr(1)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=chr(0),
        bos_token=chr(0),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


_shown: dict[tuple[str, str], bool] = {}
_of_v2: dict[tuple[str, str], str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "note in FILE which rows of the README's support table were shown"
    parser.addoption("--support", metavar="FILE", type=Path, help=help)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    for marker in item.iter_markers("shows"):
        _of_v2[marker.args] = marker.kwargs.get("v2", "")
        if report.failed:
            _shown[marker.args] = False
        elif report.when == "call" and report.passed:
            _shown.setdefault(marker.args, True)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--support")
    if file is None:
        return
    rows = sorted((*row, ok, _of_v2[row]) for row, ok in _shown.items())
    file.write_text(json.dumps(rows))


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    if IS_V2:
        from triton_cpu_stub.mends import mend

        mend()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Path of a tiny random model for each supported family."""
    directory = tmp_path_factory.mktemp("models")
    return {family: str(build_tiny_model(family, directory)) for family in FAMILIES}


class Engines:
    """vLLM engines by configuration, each started when first asked for.

    Attributes:
        others: Started elsewhere, to be kept with these.
    """

    def __init__(self) -> None:
        self.others: list[Any] = []
        self._engines: dict[str, Any] = {}

    def get(self, model: str, spec: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """The `vllm.LLM` of this configuration. `spec` is the speculative config.

        Unless it says otherwise the draft length is fixed, because on tiny models
        nothing is worth drafting, and drafts are greedy, as most tests are.
        """
        from vllm import LLM

        settings: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "disable_log_stats": False,
            "seed": 0,
            **kwargs,
        }
        key = repr((model, spec, sorted(settings.items(), key=str)))
        if key not in self._engines:
            config = None
            if spec is not None:
                config = {
                    "method": "selfspec",
                    "draft_length": "fixed",
                    "draft_sample_method": "greedy",
                    **spec,
                }
            llm = LLM(model, speculative_config=config, **settings)
            self._engines[key] = llm
            _counters[id(llm)] = SpecCounters()
        return self._engines[key]

    def leave(self) -> None:
        """To the end of the process, but for those with workers of their own. An engine
        that shuts down collects garbage some times over, which takes minutes with
        dozens."""
        for llm in [*self._engines.values(), *self.others]:
            core = llm.llm_engine.engine_core
            if llm.llm_engine.vllm_config.parallel_config.world_size == 1:
                core._finalizer.detach()
            else:
                core.shutdown()


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    found = Engines()
    yield found
    found.leave()


_counters: dict[int, SpecCounters] = {}


def counter(llm: Any, name: str) -> int:
    """Value of one of vLLM's own counters, such as `vllm:num_preemptions`."""
    return _counters[id(llm)].total(name)


def run(
    llm: Any, prompts: list[Any], params: Any, **kwargs: Any
) -> tuple[list[Any], Counts]:
    """Generates; returns vLLM's outputs and what speculation did meanwhile."""
    read = _counters[id(llm)].read
    before = read()
    outputs = llm.generate(prompts, params, use_tqdm=False, **kwargs)
    return outputs, read() - before


def scheduler_of(llm: Any) -> Any:
    """The engine's scheduler, in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def with_costs(llm: Any, costs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans by costs that a step's real time does not change: a tiny model's are no
    model's."""
    from vllm_selfspec.draft_length.costs import StepCosts
    from vllm_selfspec.draft_length.goodput import Goodput

    scheduler = scheduler_of(llm)
    limits = (scheduler.max_num_running_reqs, scheduler.num_spec_tokens)
    scheduler.planner.goodput = Goodput(*limits, StepCosts(*costs))
    monkeypatch.setattr(StepCosts, "observe", lambda *_: None)


def drafter_of(runner: Any) -> Any:
    """Our part of vLLM's model runner, V1 or V2; None in a plain engine."""
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def greedy(max_tokens: int) -> Any:
    """vLLM's `SamplingParams` of a request that generates so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def token_ids(outputs: list[Any]) -> list[list[list[int]]]:
    """Token ids by request and sample."""
    return [[list(sample.token_ids) for sample in out.outputs] for out in outputs]


def prompts_of(num: int, seed: int = 0, shortest: int = 3) -> list[dict[str, Any]]:
    """Random prompts of different lengths."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = [shortest + 7 * i for i in range(num)]
    return [
        {"prompt_token_ids": rng.integers(2, VOCAB_SIZE, size=n).tolist()}
        for n in lengths
    ]
