"""The app of docs/ray.md: two replicas behind one API, and one of them is killed."""

import os
import runpy
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.engines import KV_CACHE_BYTES, Engines, greedy, prompts_of
from helpers.environment import IS_SHORT
from helpers.models import NUM_LAYERS

APP = Path(__file__).resolve().parents[2] / "docs" / "ray_serve_app.py"
NAME, DEPLOYMENT = "selfspec", "LLMServer:default"
NUM_REPLICAS, NUM_STREAMS, MAX_TOKENS = 2, 8, 400
# On a tiny model nothing is worth drafting, and nothing of a fixed length is counted by
# us: rows that may stop, and don't.
SPEC = {
    "method": "selfspec",
    "exit_layer": NUM_LAYERS // 2,
    "draft_length": {"policy": "threshold", "start": 0, "target": 0},
    "num_speculative_tokens": 3,
}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
}
# The app says itself how a replica's threads are bound.
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if key in ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE")
}
DRAFTED = "ray_vllm_spec_decode_num_draft_tokens_total"
ACCEPTED = "ray_vllm_spec_decode_num_accepted_tokens_total"
OURS = "ray_vllm_selfspec_draft_length_sum"
# A replica starts in half a minute where nothing else runs, in ten where much does.
PATIENCE_S = 1200

pytestmark = pytest.mark.skipif(IS_SHORT, reason="minutes: make test-all")


@dataclass(frozen=True)
class Streamed:
    """What a client saw of one stream."""

    text: str
    finish_reason: str | None
    error: openai.APIError | None


@dataclass(frozen=True)
class Served:
    """The running app.

    Attributes:
        client: The OpenAI client; it sends nothing again by itself.
        status: Ray Serve's own, of the app.
        metrics_url: Where Ray shows the metrics of all its processes.
    """

    client: openai.OpenAI
    status: Callable[[], Any]
    metrics_url: str

    def stream(
        self, prompt: dict[str, Any], on_start: Callable[[], Any] = lambda: None
    ) -> Streamed:
        """Asks for a text. `on_start` is called when the first of it has come."""
        text, reason = "", None
        try:
            for chunk in self.client.completions.create(
                **self.request(prompt), stream=True
            ):
                if not text:
                    on_start()
                text += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason
        except openai.APIError as error:
            return Streamed(text, reason, error)
        return Streamed(text, reason, None)

    def request(self, prompt: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": "default",
            "prompt": prompt["prompt_token_ids"],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }

    def replicas(self) -> dict[int, psutil.Process]:
        """Processes by id, and none that another Ray on this machine started."""
        title = f"ray::ServeReplica:{NAME}:{DEPLOYMENT}"  # Ray sets it
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found[process.pid] = process
            except psutil.NoSuchProcess:
                continue
        return found

    def counts(self, name: str) -> Counter[str]:
        """Sums of a metric, by replica."""
        with urllib.request.urlopen(self.metrics_url, timeout=60) as page:
            families = text_string_to_metric_families(page.read().decode())
            found: Counter[str] = Counter()
            for family in families:
                for sample in family.samples:
                    if sample.name == name:
                        found[sample.labels["ReplicaId"]] += sample.value
        return found


@pytest.fixture(scope="module")
def served(tiny_models: dict[str, str]) -> Iterator[Served]:
    ray = pytest.importorskip("ray")
    pytest.importorskip("grpc_reflection", reason="needs ray[serve]")
    from ray import serve

    # Of Ray's processes, which take over its ten seconds to start on a busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "300")
    ray.init(
        num_cpus=NUM_REPLICAS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
    )
    app = runpy.run_path(str(APP))
    args = app["Args"](
        model=tiny_models["llama"],
        num_replicas=NUM_REPLICAS,
        cpus=1,
        speculative_config=SPEC,
        engine_kwargs=SETTINGS,
        env_vars=ENVIRONMENT,
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app["build"](args), name=NAME)
    (node,) = ray.nodes()
    yield Served(
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="-",
            max_retries=0,
            timeout=PATIENCE_S,
        ),
        lambda: serve.status().applications[NAME],
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics",
    )
    serve.shutdown()
    ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def expected(tiny_models: dict[str, str], engines: Engines) -> list[str]:
    """Plain vLLM's texts."""
    llm = engines.get(tiny_models["llama"], max_model_len=SETTINGS["max_model_len"])
    prompts = prompts_of(NUM_STREAMS)
    outputs = llm.generate(prompts, greedy(MAX_TOKENS), use_tqdm=False)
    return [out.outputs[0].text for out in outputs]


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"not after {PATIENCE_S} s: {what}"
        time.sleep(1)


def all_of(served: Served) -> list[str]:
    """The texts of all prompts, streamed at once."""
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        found = list(pool.map(served.stream, prompts_of(NUM_STREAMS)))
    assert [one.error for one in found] == [None] * NUM_STREAMS
    assert {one.finish_reason for one in found} == {"length"}
    return [one.text for one in found]


def test_streamed_text_is_plain_vllms(served: Served, expected: list[str]) -> None:
    assert len(served.replicas()) == NUM_REPLICAS
    assert all_of(served) == expected


def test_a_chat_is_plain_vllms(
    served: Served, tiny_models: dict[str, str], engines: Engines
) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is a draft?"}]
    llm = engines.get(tiny_models["llama"], max_model_len=SETTINGS["max_model_len"])
    plain = llm.chat(messages, greedy(MAX_TOKENS), use_tqdm=False)
    chunks = served.client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain[0].outputs[0].text


def test_each_replica_shows_what_it_drafted(served: Served) -> None:
    """Ray exports with delay, and our counts, the engine's last second left out."""
    for name in (DRAFTED, ACCEPTED, OURS):
        wait_until(lambda name=name: len(served.counts(name)) == NUM_REPLICAS, name)
    ours, accepted = served.counts(OURS), served.counts(ACCEPTED)
    drafted = served.counts(DRAFTED)  # last, as it grows with what is exported
    for replica in drafted:
        assert 0 < accepted[replica] < drafted[replica]
        assert 0 < ours[replica] <= drafted[replica]


def test_requests_go_on_when_a_replica_is_killed(
    served: Served, expected: list[str]
) -> None:
    earlier = set(served.counts(DRAFTED))
    started = threading.Barrier(NUM_STREAMS + 1)
    wait = partial(started.wait, PATIENCE_S)
    patient = served.client.with_options(max_retries=5)
    prompts = prompts_of(NUM_STREAMS)
    with ThreadPoolExecutor(2 * NUM_STREAMS) as pool:
        unstreamed = [
            pool.submit(
                patient.completions.with_raw_response.create, **served.request(prompt)
            )
            for prompt in prompts
        ]
        streams = [pool.submit(served.stream, prompt, wait) for prompt in prompts]
        wait()
        victim = next(iter(served.replicas().values()))
        engine = victim.children(recursive=True)
        victim.kill()
        answers = [one.result() for one in unstreamed]
        found = [one.result() for one in streams]
    assert [one.parse().choices[0].text for one in answers] == expected
    assert any(one.retries_taken for one in answers), "some were with the dead one"
    cut = [one for one in found if one.error is not None]
    assert 0 < len(cut) < NUM_STREAMS, "each replica had some"
    for one, text in zip(found, expected, strict=True):
        if one.error is None:
            assert (one.text, one.finish_reason) == (text, "length")
        else:
            assert text.startswith(one.text)
            assert "replica died" in one.error.message
    assert not psutil.wait_procs(engine, timeout=60)[1], "its engine went with it"
    assert all_of(served) == expected, "by the other alone"
    wait_until(
        lambda: (
            len(served.replicas()) == NUM_REPLICAS  # the status notices seconds later
            and served.status().deployments[DEPLOYMENT].replica_states
            == {"RUNNING": NUM_REPLICAS}
        ),
        "Ray starts another replica",
    )
    assert victim.pid not in served.replicas()
    assert all_of(served) == expected
    wait_until(lambda: bool(set(served.counts(DRAFTED)) - earlier), "and it drafts")
