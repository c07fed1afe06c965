"""Engines inside Ray's workers draft as any other does."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from helpers.engines import SETTINGS, Engines, greedy, prompts_of, run, token_ids
from helpers.environment import IS_SHORT, IS_V2
from helpers.models import NUM_LAYERS
from vllm_selfspec.plan.skip_set import SkipSet

ray = pytest.importorskip("ray")

SPEC = {
    "method": "selfspec",
    "exit_layer": NUM_LAYERS // 2,
    "draft_length": "fixed",
    "num_speculative_tokens": 3,
}
MAX_TOKENS = 12 if IS_V2 else 24
# Two engines on two cores: each keeps to one.
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if key.startswith(("VLLM_", "HF_", "OMP_"))
} | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # Workers cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(tiny_models: dict[str, str], engines: Engines) -> list[list[int]]:
    """Plain vLLM's texts."""
    params = greedy(MAX_TOKENS)
    found, _ = run(engines.get(tiny_models["llama"]), prompts_of(6), params)
    return [samples[0] for samples in token_ids(found)]


class Generator:
    """An engine, as a user's Ray actor or Ray Data's would hold it."""

    def __init__(self, model: str) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            model,
            speculative_config=SPEC,
            **SETTINGS,
        )
        self.params = SamplingParams(
            temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True
        )

    def generate(self, prompts: list[Any]) -> list[list[int]]:
        outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outputs]

    def num_drafts(self) -> int:
        from vllm_selfspec.engine.spec_counters import SpecCounters

        return SpecCounters().read().draft_tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of Ray Data."""
        prompts = [{"prompt_token_ids": list(ids)} for ids in batch["prompt"]]
        return {
            "number": batch["number"],
            "token_ids": self.generate(prompts),
            "num_drafts": [self.num_drafts()] * len(prompts),
            "process": [os.getpid()] * len(prompts),
        }


@pytest.mark.v2
@pytest.mark.shows("Engine", "inside Ray actors")
def test_engines_in_ray_actors(
    tiny_models: dict[str, str], expected: list[list[int]]
) -> None:
    actor = ray.remote(num_cpus=1)(Generator)
    actors = [actor.remote(tiny_models["llama"]) for _ in range(2)]
    prompts = prompts_of(6)
    answers = [
        one.generate.remote(part)
        for one, part in zip(actors, (prompts[:3], prompts[3:]), strict=True)
    ]
    first, second = ray.get(answers)
    assert [*first, *second] == expected
    assert min(ray.get([one.num_drafts.remote() for one in actors])) > 0
    for one in actors:
        ray.kill(one)


@pytest.mark.v2
@pytest.mark.shows("Engine", "Ray Data batch job over two engines")
def test_a_ray_data_job_over_two_engines(
    tiny_models: dict[str, str], expected: list[list[int]]
) -> None:
    pytest.importorskip("pyarrow")
    data = pytest.importorskip("ray.data")
    # Or the first to be ready does it all.
    data.DataContext.get_current().wait_for_min_actors_s = 300
    rows = [
        {"number": number, "prompt": prompt["prompt_token_ids"]}
        for number, prompt in enumerate(prompts_of(6))
    ]
    job = data.from_items(rows, override_num_blocks=6).map_batches(
        Generator,
        fn_constructor_args=(tiny_models["llama"],),
        batch_size=1,
        num_cpus=1,
        concurrency=2,
    )
    found = sorted(job.take_all(), key=lambda row: row["number"])
    assert [list(row["token_ids"]) for row in found] == expected
    assert all(row["num_drafts"] for row in found)
    assert len({row["process"] for row in found}) == 2


@pytest.mark.v2
@pytest.mark.shows("Engine", "configuration in the workers of vLLM's Ray executor")
def test_the_configuration_survives_the_trip_into_a_ray_worker(
    tiny_models: dict[str, str],
) -> None:
    """What vLLM's Ray executor sends: vLLM's CPU platform refuses that executor."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(tiny_models["llama"], dtype="float32", speculative_config=SPEC)
    config = args.create_engine_config()
    arrived = ray.get(ray.remote(_arrived).remote(config))
    assert arrived == {
        "drafter": "SelfSpecSpeculator" if IS_V2 else "SelfSpecProposer",
        "skip_set": SkipSet.early_exit(NUM_LAYERS, NUM_LAYERS // 2),
        "seam": True,
        "problems": [],
    }


def _arrived(vllm_config: Any) -> dict[str, Any]:
    """In a worker: what vLLM does there to make a model runner's proposer."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm_selfspec.engine import patcher
    from vllm_selfspec.served_config import plan_of

    drafter: Any
    if vllm_config.use_v2_model_runner:
        import torch
        from vllm.v1.worker.gpu import model_runner

        seam = model_runner.init_speculator
        drafter = seam(vllm_config, torch.device("cpu"), None)
    else:
        from vllm.v1.spec_decode.custom_class_proposer import create_custom_proposer
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        seam = GPUModelRunner.propose_draft_token_ids
        drafter = create_custom_proposer(vllm_config)
    return {
        "drafter": type(drafter).__name__,
        "skip_set": plan_of(vllm_config).skip_set,
        "seam": hasattr(seam, patcher.ATTACHED),
        "problems": patcher.problems,
    }


@pytest.mark.skipif(IS_SHORT, reason="a minute: make test-all")
@pytest.mark.v2
@pytest.mark.shows("Engine", "Ray Data's LLM batch API")
def test_rays_own_batch_api(
    tiny_models: dict[str, str], expected: list[list[int]], tmp_path: Path
) -> None:
    llm = pytest.importorskip("ray.data.llm")
    config = llm.vLLMEngineProcessorConfig(
        model_source=tiny_models["llama"],
        engine_kwargs={"speculative_config": SPEC, **SETTINGS},
        placement_group_config={"bundles": [{"CPU": 1}]},
        # Its engine is gone in the end, but not what it counted.
        runtime_env={"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}},
        log_engine_metrics=False,  # which wants a whole Ray Serve
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    sampling = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    rows = [
        {
            "number": number,
            "prompt": "".join(map(chr, prompt["prompt_token_ids"])),
            "sampling_params": sampling,
        }
        for number, prompt in enumerate(prompts_of(6))
    ]
    found = llm.build_processor(config)(ray.data.from_items(rows)).take_all()
    found.sort(key=lambda row: row["number"])
    assert [list(row["generated_tokens"]) for row in found] == expected
    counters = CollectorRegistry()
    MultiProcessCollector(counters, path=str(tmp_path))
    drafted = "vllm:spec_decode_num_draft_tokens"
    totals = [
        sample.value
        for metric in counters.collect()
        if metric.name == drafted
        for sample in metric.samples
    ]
    assert sum(totals) > 0
