"""`VllmEngine` and `HuggingFaceEngine`: run prompts for a method, some at a time.

One rule: a run is timed from outside, step by step, and measured from inside by hooks
that every PyTorch module offers; nothing of vLLM is changed.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_selfspec.bench.methods import Method
from vllm_selfspec.engine.measured_llm import MeasuredLLM, drafter_of
from vllm_selfspec.engine.spec_counters import Counts


@dataclass(frozen=True)
class Request:
    """One finished request.

    Attributes:
        token_ids: What was generated.
        text: The same as text.
        latency: Seconds from submission to the last token.
        first_token: Seconds from submission to the first token.
    """

    token_ids: tuple[int, ...]
    text: str
    latency: float
    first_token: float


# Seconds of a forward and its LM head, by role and number of token rows.
Forwards = dict[tuple[str, int], list[float]]
TARGET, DRAFT = "target", "draft"


@dataclass(frozen=True)
class Run:
    """A set of prompts, run through.

    Attributes:
        requests: In the order of the prompts.
        seconds: Wall time of all of it.
        counts: What speculation did.
        forwards: Times of single forwards.
        steady: See `Pace.steady`.
        steady_forwards: What forwards take of it; 0 where they are not timed.
    """

    requests: tuple[Request, ...]
    seconds: float
    counts: Counts = Counts(0, 0, 0)
    forwards: Forwards = field(default_factory=dict)
    steady: float = 0.0
    steady_forwards: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(len(request.token_ids) for request in self.requests)

    def forward_seconds(self, role: str) -> float:
        """What all forwards of the target, or of what drafts, took together."""
        return sum(sum(times) for (of, _), times in self.forwards.items() if of == role)


@dataclass(frozen=True)
class Sampling:
    """How to generate, the same for every method and request."""

    temperature: float
    max_tokens: int
    seed: int | None = None
    ends: bool = False  # where the model would; otherwise each has max_tokens
    top_k: int = 0  # all tokens
    top_p: float = 1.0


class Engine(Protocol):
    """What the comparison asks of a method's engine."""

    method: Method
    max_streams: int | None  # None: any number
    tokenizer: Any

    def run(self, prompts: Sequence[str], num_streams: int, sampling: Sampling) -> Run:
        """Generates for every prompt, `num_streams` of them at a time."""
        ...


class VllmEngine:
    """A `MeasuredLLM`, driven step by step."""

    max_streams: int | None = None

    def __init__(self, method: Method, model: str, settings: dict[str, Any]) -> None:
        self.method = method
        self.measured = MeasuredLLM(model, method.speculative_config, **settings)
        self.tokenizer = self.measured.tokenizer
        self._timer = ForwardTimer.of(self.measured)
        self._num_requests = 0

    def run(self, prompts: Sequence[str], num_streams: int, sampling: Sampling) -> Run:
        """Keeps `num_streams` requests in flight until all prompts are done."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            ignore_eos=not sampling.ends,
            output_kind=RequestOutputKind.DELTA,
        )
        self._timer.forwards.clear()
        before = self.measured.counts()
        flight = _Flight(self.measured.llm.llm_engine, params)
        waiting = deque(enumerate(prompts, self._num_requests))
        self._num_requests += len(prompts)
        pace, of_forwards, started = Pace(), Pace(), time.perf_counter()
        while waiting or flight.is_busy:
            while waiting and flight.num_requests < num_streams:
                number, prompt = waiting.popleft()
                flight.submit(str(number), prompt)
            is_full = flight.num_requests == num_streams
            begun, forwards_begun = time.perf_counter(), self._timer.seconds
            what = *flight.step(), is_full
            pace.add(time.perf_counter() - begun, *what)
            of_forwards.add(self._timer.seconds - forwards_begun, *what)
        seconds = time.perf_counter() - started
        return Run(
            tuple(flight.finished()),
            seconds,
            self.measured.counts() - before,
            {key: list(times) for key, times in self._timer.forwards.items()},
            pace.steady,
            of_forwards.steady,
        )


@dataclass
class Pace:
    """Steps of a run, by what they did: decode alone while all places are taken; read
    prompts, too; or decode alone for fewer requests, as at the end of a batch.

    Attributes:
        full: Tokens, and the seconds they took, of the first kind.
        reading: Of the second.
        rest: Of the third.
    """

    full: list[float] = field(default_factory=lambda: [0, 0.0])
    reading: list[float] = field(default_factory=lambda: [0, 0.0])
    rest: list[float] = field(default_factory=lambda: [0, 0.0])

    def add(
        self, seconds: float, num_tokens: int, num_begun: int, is_full: bool
    ) -> None:
        """A step.

        Args:
            seconds: That it took.
            num_tokens: That it emitted.
            num_begun: Requests whose first token is among them.
            is_full: Whether as many requests ran as may at a time.
        """
        kind = self.reading if num_begun else self.full if is_full else self.rest
        kind[0] += num_tokens
        kind[1] += seconds

    @property
    def steady(self) -> float:
        """Seconds of a token where each request that ends makes room for another at
        once: what a token takes in full batches, and its share of what reading prompts
        takes on top of that. A batch that ends says how long its slowest request was,
        and hardly gains by others that ended sooner.
        """
        kinds = (self.full, self.reading, self.rest)
        num_tokens = sum(tokens for tokens, _ in kinds)
        if not self.full[0]:
            return sum(seconds for _, seconds in kinds) / max(num_tokens, 1)
        in_full = self.full[1] / self.full[0]
        return in_full + (self.reading[1] - self.reading[0] * in_full) / num_tokens


class _Flight:
    """The requests of one run, from submission to their last token."""

    def __init__(self, engine: Any, params: Any) -> None:
        self._engine, self._params = engine, params
        self._submitted: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._tokens: dict[str, list[int]] = {}
        self._texts: dict[str, list[str]] = {}

    @property
    def num_requests(self) -> int:
        return len(self._submitted) - len(self._last)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._tokens.values()))

    @property
    def is_busy(self) -> bool:
        return self.num_requests > 0

    def submit(self, request_id: str, prompt: str) -> None:
        self._engine.add_request(request_id, prompt, self._params)
        self._submitted[request_id] = time.perf_counter()
        self._tokens[request_id], self._texts[request_id] = [], []

    def step(self) -> tuple[int, int]:
        """Returns the tokens that it emitted, and how many requests began with it."""
        before = self.num_tokens, len(self._first)
        outputs = self._engine.step()
        now = time.perf_counter()
        for output in outputs:
            (sample,) = output.outputs
            self._tokens[output.request_id] += sample.token_ids
            self._texts[output.request_id].append(sample.text)
            self._first.setdefault(output.request_id, now)
            if output.finished:
                self._last[output.request_id] = now
        return self.num_tokens - before[0], len(self._first) - before[1]

    def finished(self) -> Iterator[Request]:
        for request_id, submitted in self._submitted.items():
            yield Request(
                tuple(self._tokens[request_id]),
                "".join(self._texts[request_id]),
                self._last[request_id] - submitted,
                self._first[request_id] - submitted,
            )


class ForwardTimer:
    """Times every forward of the target and of what drafts, LM head included.

    The LM head is not part of a model's forward in vLLM; its time is added to the
    forward before it. Under CUDA graphs no module is called, and nothing is timed.

    Attributes:
        forwards: Since it was last cleared.
        seconds: Of all of them, since it was made.
    """

    def __init__(self, target: Any, draft: Any | None) -> None:
        self.forwards: Forwards = {}
        self.seconds = 0.0
        self._roles = {id(target): TARGET}
        self._started = 0.0
        self._latest: list[float] = []
        modules = [target]
        if draft is not None:
            self._roles[id(draft)] = DRAFT
            # A draft view is a shallow copy of the target, and shares its hooks.
            if draft._forward_hooks is not target._forward_hooks:
                modules.append(draft)
        heads = {id(m.logits_processor): m.logits_processor for m in modules}
        for module in (*modules, *heads.values()):
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop, with_kwargs=True)

    @classmethod
    def of(cls, measured: MeasuredLLM) -> "ForwardTimer":
        """A timer in an engine."""
        runner = measured.runner
        drafter = drafter_of(runner)
        view = getattr(drafter, "_view", drafter)
        return cls(runner.model, getattr(view, "model", None))

    def _start(self, module: Any, args: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        role = self._roles.get(id(module))
        if role is None:  # an LM head
            if self._latest:
                self._latest[-1] += seconds
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        num_tokens = -1 if tokens is None else int(tokens.shape[0])
        self._latest = self.forwards.setdefault((role, num_tokens), [])
        self._latest.append(seconds)


class HuggingFaceEngine:
    """`transformers`' own `generate`, one request at a time."""

    max_streams: int | None = 1

    def __init__(self, method: Method, model: Any, tokenizer: Any) -> None:
        self.method, self._model, self.tokenizer = method, model, tokenizer

    def with_method(self, method: Method) -> "HuggingFaceEngine":
        """The same model for another method."""
        return HuggingFaceEngine(method, self._model, self.tokenizer)

    def run(self, prompts: Sequence[str], num_streams: int, sampling: Sampling) -> Run:
        """Generates for one prompt after another.

        Raises:
            ValueError: If more than one is wanted at a time: assisted generation runs
                one.
        """
        if num_streams != 1:
            raise ValueError(f"it runs 1 request at a time, not {num_streams}")
        started = time.perf_counter()
        requests = tuple(self._generate(prompt, sampling) for prompt in prompts)
        return Run(requests, time.perf_counter() - started)

    def _generate(self, prompt: str, sampling: Sampling) -> Request:
        import torch

        inputs = self.tokenizer(prompt, return_tensors="pt")
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options["temperature"] = sampling.temperature
            options |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        start = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                max_new_tokens=sampling.max_tokens,
                min_new_tokens=None if sampling.ends else sampling.max_tokens,
                pad_token_id=0,
                **options,
                **self.method.generate,
            )
        seconds = time.perf_counter() - start
        token_ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        return Request(
            tuple(token_ids), self.tokenizer.decode(token_ids), seconds, seconds
        )


def run_by_turns(
    engines: Mapping[str, Engine],
    prompts: Sequence[str],
    num_streams: int,
    sampling: Sampling,
    turn: int,
) -> dict[str, Run]:
    """Generates for the same prompts by each engine.

    Args:
        engines: By name; one may have several.
        prompts: Texts.
        num_streams: Requests at a time.
        sampling: Of all of them.
        turn: Who is first changes with it, so that nobody always has a machine that is
            at rest, or prompts that are in its caches.
    """
    names = [*engines]
    first = turn % len(names)
    order = names[first:] + names[:first]
    return {name: engines[name].run(prompts, num_streams, sampling) for name in order}
