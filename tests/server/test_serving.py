"""`vllm serve --speculative-config ...` for real: one server, the official client.

The draft skips nothing, so that every draft of this random model is surely accepted.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.cpu_gatherv import path_with_plugin
from helpers.engines import KV_CACHE_BYTES, Engines, greedy
from helpers.environment import CORES, IS_PART, IS_SHORT, IS_V2
from helpers.models import build_tiny_model

NAME = "tiny"
# Long enough that a client leaves long before its request is at an end.
MAX_MODEL_LEN = 8192
NUM_CONCURRENT = 16
# A start takes 20 s on two idle cores, of two engines 60; the rest is for busy ones.
START_DEADLINE_S = 900
EMPTY = (
    '{"method": "selfspec", "draft_source": "model", "draft_length": "fixed", '
    '"skip_layers": {"attention": [], "mlp": []}}'
)

# Of data-parallel engines.
NUM_PROMPTS, NUM_TOKENS = (4, 12) if IS_V2 else (NUM_CONCURRENT, 48)
# In the interpreter a draft costs too much for goodput to make any.
LENGTHS = ["fixed"] if IS_PART else ["goodput", "fixed"]
LONGER = {"max_position_embeddings": MAX_MODEL_LEN}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

PROMPTS = [f"{'ab' * n}: the answer to question {n} is" for n in range(NUM_CONCURRENT)]
GREEDY: dict[str, Any] = {
    "model": NAME,
    "temperature": 0,
    "max_tokens": 48,
    "extra_body": {"ignore_eos": True},
}


def command(model: str, port: int, spec: str, *more: str) -> list[str]:
    """`vllm serve` with everything that makes it small, and `more` flags."""
    flags = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": NAME,
        "--dtype": "float32",
        "--max-model-len": MAX_MODEL_LEN,
        "--max-num-seqs": NUM_CONCURRENT,
        "--kv-cache-memory-bytes": KV_CACHE_BYTES,
        "--speculative-config": spec,
    }
    vllm = str(Path(sys.executable).with_name("vllm"))
    words = [str(word) for flag in flags.items() for word in flag]
    return [vllm, "serve", model, "--enforce-eager", *words, *more]


def environment() -> dict[str, str]:
    """As a user's: engine and server in processes of their own, and a readable log."""
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return env


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    done: Callable[[], bool], what: str, deadline_s: float, interval_s: float = 0.2
) -> None:
    """Waits for `done`; fails, rather than hangs, when the deadline has passed."""
    end = time.monotonic() + deadline_s
    while not done():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(interval_s)


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def is_up(self) -> bool:
        assert self.process.poll() is None, f"the server ended:\n{self.log_tail()}"
        try:
            response = httpx.get(f"{self.url}/health", trust_env=False, timeout=5)
        except httpx.TransportError:
            return False
        return response.status_code == 200

    def metric(self, name: str, engine: int | None = None) -> float:
        """The sum of a Prometheus sample over all its labels, or those of an engine."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
            and (engine is None or sample.labels.get("engine") == str(engine))
        )

    def is_idle(self) -> bool:
        running = self.metric("vllm:num_requests_running")
        return running + self.metric("vllm:num_requests_waiting") == 0


@contextmanager
def serving(model: str, spec: str, log: Path, *more: str) -> Iterator[Server]:
    """Starts a server, with `more` flags, and ends it, with its processes."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(model, port, spec, *more),
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the engine process can be ended with it
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        try:
            wait_until(server.is_up, "the server is up", START_DEADLINE_S, 1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{server.log_tail()}") from None
        yield server
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            continue


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("served")
    return str(build_tiny_model("llama", directory, **LONGER))


@pytest.fixture(scope="module")
def shared_server(
    model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(model, EMPTY, log) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The one server; the end of its log is shown if the test fails."""
    yield shared_server
    print(shared_server.log_tail())


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=120,
        http_client=httpx.Client(trust_env=False),  # no proxy on the way to loopback
    )


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def complete(client: openai.OpenAI, prompt: str, **changed: Any) -> str:
    """The text of one completion."""
    (choice,) = client.completions.create(
        prompt=prompt, **{**GREEDY, **changed}
    ).choices
    assert choice.finish_reason == "length"
    return str(choice.text)


def messages(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def test_a_completion_is_the_text_of_plain_vllm(
    client: openai.OpenAI, model: str, engines: Engines
) -> None:
    plain = engines.get(model).generate(
        PROMPTS[:4],
        greedy(48),
        use_tqdm=False,
    )
    texts = [complete(client, prompt) for prompt in PROMPTS[:4]]
    assert texts == [output.outputs[0].text for output in plain]
    assert len(set(texts)) == 4, "the prompts must matter"


def test_a_streamed_completion_is_the_same_text(client: openai.OpenAI) -> None:
    for prompt in PROMPTS[:3]:
        stream = client.completions.create(prompt=prompt, stream=True, **GREEDY)
        chunks = [choice.text for chunk in stream for choice in chunk.choices]
        assert len(chunks) > 2, "a stream comes in pieces"
        assert "".join(chunks) == complete(client, prompt)


def test_a_streamed_chat_is_the_same_text(client: openai.OpenAI) -> None:
    for prompt in PROMPTS[:3]:
        whole = client.chat.completions.create(messages=messages(prompt), **GREEDY)
        assert whole.usage is not None and whole.usage.completion_tokens == 48
        (choice,) = whole.choices
        assert choice.finish_reason == "length" and choice.message.content
        stream = client.chat.completions.create(
            messages=messages(prompt), stream=True, **GREEDY
        )
        chunks = [c.delta.content or "" for chunk in stream for c in chunk.choices]
        assert len(chunks) > 2, "a stream comes in pieces"
        assert "".join(chunks) == choice.message.content


def test_16_concurrent_requests_get_what_each_gets_alone(
    client: openai.OpenAI,
) -> None:
    alone = [complete(client, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(NUM_CONCURRENT) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt), PROMPTS))
    assert together == alone


def test_clients_that_disconnect_half_way_free_their_place_and_harm_no_one(
    client: openai.OpenAI, server: Server
) -> None:
    alone = complete(client, PROMPTS[1], max_tokens=200)
    before = server.metric("vllm:generation_tokens_total")
    long = {**GREEDY, "max_tokens": 8000}
    streams = [
        client.completions.create(prompt=prompt, stream=True, **long)
        for prompt in PROMPTS[2:6]
    ]
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(complete, client, PROMPTS[1], max_tokens=200)
        for stream in streams:
            for _ in range(3):
                next(stream)
            stream.close()
        assert beside.result() == alone, "the one in the same batch that stayed"
    wait_until(server.is_idle, "no request runs or waits", 60)
    generated = server.metric("vllm:generation_tokens_total") - before
    assert generated < 8000, "they were dropped, where all four would make 32000"
    assert complete(client, PROMPTS[1], max_tokens=200) == alone, "and it still answers"


def test_prometheus_counts_drafts_and_acceptances(
    client: openai.OpenAI, server: Server
) -> None:
    names = [f"vllm:spec_decode_num_{n}_total" for n in ("drafts", "accepted_tokens")]
    before = [server.metric(name) for name in names]
    complete(client, PROMPTS[0])
    wait_until(server.is_idle, "no request runs or waits", 60)
    spent = [
        server.metric(name) - value for name, value in zip(names, before, strict=True)
    ]
    # 48 tokens: one from the prefill, then 5 a step, of which 4 were drafted.
    drafts, accepted = spent
    assert 9 <= drafts <= 12, "as few steps as an exact draft allows"
    assert accepted >= 3 * drafts


def test_an_engine_process_plans_draft_lengths_and_shows_it(
    model: str, tmp_path: Path
) -> None:
    """It loads plugins later than an engine within its own process does."""
    with serving(model, "selfspec", tmp_path / "log") as server:
        assert "selfspec: a step of [1, 2, 3, 4" in server.log.read_text(), "measured"
        client = client_of(server)
        for _ in range(2):  # counts are written with the first step after a second
            complete(client, PROMPTS[0])
            time.sleep(1.2)
        complete(client, PROMPTS[1])
        assert server.metric("vllm:selfspec_steps_total") > 10


def texts_of(llm: Any) -> list[str]:
    """What an engine within a process says to the prompts of data-parallel ones."""
    outputs = llm.generate(PROMPTS[:NUM_PROMPTS], greedy(NUM_TOKENS), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def texts_in_another_process(model: str) -> list[str]:
    """Where a dense model was first, vLLM makes no group of experts any more."""
    call = "import json, sys, conftest, test_serving as t;" + (
        "llm = conftest.Engines().get(sys.argv[1]);"
        "print('TEXTS', json.dumps(t.texts_of(llm)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", call, model],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(li for li in done.stdout.splitlines() if li.startswith("TEXTS"))
    found: list[str] = json.loads(line.removeprefix("TEXTS"))
    return found


def both_ranks_draft(
    model: str, texts: list[str], length: str, log: Path, monkeypatch: Any
) -> None:
    """With one idle beside a busy one, and with both busy."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"0|{CORES - 1}")
    prompts = PROMPTS[:NUM_PROMPTS]
    spec = {"method": "selfspec", "exit_layer": 2, "draft_length": length}
    flags = ("--data-parallel-size", "2", "--api-server-count", "1")
    with (
        serving(model, json.dumps(spec), log, *flags) as server,
        client_of(server) as client,
        ThreadPoolExecutor(NUM_CONCURRENT) as pool,
    ):
        ask = partial(complete, client, max_tokens=NUM_TOKENS)
        assert ask(prompts[0]) == texts[0]
        assert [*pool.map(ask, prompts)] == texts
        wait_until(server.is_idle, "no request runs or waits", 60)
        of_both = [
            [server.metric(f"vllm:{name}_total", engine) for engine in (0, 1)]
            for name in ("generation_tokens", "spec_decode_num_drafts")
        ]
        planned = server.metric("vllm:selfspec_steps_total")
        measured = log.read_text().count("selfspec: a step of")
    assert min(of_both[0]) > 0, "both had requests"
    if length == "fixed":
        assert min(of_both[1]) > 0, "and drafted"
    else:
        assert planned > NUM_TOKENS and measured == 2, "each planned by its own costs"


@pytest.mark.skipif(IS_SHORT, reason="minutes: make test-all")
@pytest.mark.shows(
    "Engine", "data parallelism", v2="not tried: too long in the interpreter"
)
@pytest.mark.parametrize("length", LENGTHS)
def test_two_data_parallel_engines_each_draft(
    length: str,
    model: str,
    tmp_path: Path,
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = texts_of(engines.get(model))
    both_ranks_draft(model, texts, length, tmp_path / "log", monkeypatch)


@pytest.mark.skipif(IS_SHORT, reason="minutes: make test-all")
@pytest.mark.v2
@pytest.mark.shows("Engine", "data parallelism, shared experts")
@pytest.mark.parametrize("length", LENGTHS)
def test_ranks_that_share_experts_draft_in_step(
    length: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They run every forward together: one that drafts alone waits for ever."""
    model = str(build_tiny_model("qwen3_moe", tmp_path, **LONGER, **EXPERTS))
    texts = texts_in_another_process(model)
    monkeypatch.setenv("PYTHONPATH", path_with_plugin(tmp_path))
    both_ranks_draft(model, texts, length, tmp_path / "log", monkeypatch)


def test_an_invalid_plan_ends_vllm_serve_with_our_words(model: str) -> None:
    spec = '{"method": "selfspec", "exit_layer": 99}'
    done = subprocess.run(
        command(model, free_port(), spec),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_DEADLINE_S,
    )
    assert done.returncode != 0
    for words in ("exit_layer is the number of layers a draft runs", "99: use 4"):
        assert words in done.stdout, done.stdout[-3000:]
