"""Do two draft sources together bring as much as the better one, and what is lost?

    python benchmarks/replay.py record MODEL -o FILE.npz
    python benchmarks/replay.py play FILE.npz ... -o FILE.json

Of two engines one is always a few per cent faster, whatever they draft: a choice that
costs as much cannot be seen in timings. So what a model said is recorded once: its
greedy tokens, at which of them its int4 draft was right, and what its forwards take.
What is drafted, from which source and how far, is then decided anew over what was
recorded, by the code that decides while serving, in time that passes by those costs.

Three things are simpler than life: a draft is right where it would be after the
target's own tokens, all forwards of a kind and size take the same, but for noise that
the planner sees and the sums do not, and the host takes no time.
"""

import math
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import real

from vllm_selfspec import whole_file
from vllm_selfspec.bench.machine import prepare_environment
from vllm_selfspec.bench.methods import MODEL_ALONE
from vllm_selfspec.bench.page import markdown_table
from vllm_selfspec.bench.tasks import SHIPPED
from vllm_selfspec.config import METHOD, SelfSpecConfig
from vllm_selfspec.draft.free_sources import FreeSources, Request
from vllm_selfspec.draft_length.acceptance import NO_GUESS
from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.draft_length.goodput import Goodput, Plan, Proposed
from vllm_selfspec.engine.measured_llm import MeasuredLLM, drafter_of
from vllm_selfspec.plan.source import NOTHING, Proposal
from vllm_selfspec.plan.sources import SOURCES

app = typer.Typer(add_completion=False, no_args_is_help=True)

DRAFTS = {
    "method": METHOD,
    **MODEL_ALONE,
    "draft_weights": "int4",
    "draft_length": "fixed",
    "num_speculative_tokens": 1,
}
NUM_PROMPTS, MAX_TOKENS = 32, 96  # of a task; of a request
AT_A_TIME = 16  # requests, while recording
STREAMS = (1, 4, 8, 16)
MODEL, COPIES, BOTH = "int4", "copies", "int4 and copies"
MIXED = "all at once"
NUM_SEEDS = 3
NOISE = 0.1  # deviation of the logarithm of a step's time, as the planner sees it


@dataclass(frozen=True)
class Recording:
    """What a model said, and what its forwards take.

    Attributes:
        task: Of each request, `[num_reqs]`.
        num_prompt_tokens: Of each, `[num_reqs]`.
        prompts: Their tokens, one prompt after the other.
        texts: What followed each, `[num_reqs, num_tokens]`.
        is_right: Whether the draft of a token, after those before it, is that token.
        num_rows: Of forwards that were timed, ascending, `[num_knots]`.
        verify: Seconds of the target's, `[num_knots]`.
        draft: Seconds of a draft step, `[num_knots]`.
    """

    task: np.ndarray
    num_prompt_tokens: np.ndarray
    prompts: np.ndarray
    texts: np.ndarray
    is_right: np.ndarray
    num_rows: np.ndarray
    verify: np.ndarray
    draft: np.ndarray

    @classmethod
    def load(cls, file: Path) -> "Recording":
        with np.load(file) as found:
            return cls(**{name: found[name] for name in found})

    def save(self, file: Path) -> None:
        np.savez_compressed(file, **vars(self))

    def prompt(self, request: int) -> np.ndarray:
        """Its token ids."""
        end = int(self.num_prompt_tokens[: request + 1].sum())
        found: np.ndarray = self.prompts[end - self.num_prompt_tokens[request] : end]
        return found

    def by_task(self) -> list[np.ndarray]:
        """Numbers of the requests of each task, in the order of the recording."""
        tasks = dict.fromkeys(self.task.tolist())
        return [np.flatnonzero(self.task == task) for task in tasks]

    def costs(self) -> StepCosts:
        """What forwards take."""
        return StepCosts(self.num_rows.tolist(), self.verify, self.draft)

    def plain_pace(self, num_streams: int) -> float:
        """Tokens per second of plain steps of so many requests."""
        return num_streams / float(self.costs().verify(num_streams))


@dataclass
class Live:
    """A request that is replayed.

    Attributes:
        request: Its number in the recording.
        token_ids: Of its prompt and its whole text, `[num_tokens]`.
        at: How many of them are known by now.
    """

    request: int
    token_ids: np.ndarray
    at: int

    @property
    def num_left(self) -> int:
        """Tokens to come."""
        return len(self.token_ids) - self.at


@dataclass
class Tally:
    """What the requests of a task had: tokens, and their share of the steps' time."""

    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def pace(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    def add(self, other: "Tally") -> None:
        """Those of others, too."""
        self.num_tokens += other.num_tokens
        self.seconds += other.seconds


class Replay:
    """A server of which all is known but what it decides."""

    def __init__(
        self, recording: Recording, num_streams: int, sources: str = BOTH, seed: int = 0
    ) -> None:
        """For so many requests at a time, that draft from `MODEL`, `COPIES` or both."""
        self._recording, self._num_streams = recording, num_streams
        self._costs = recording.costs()
        self._random = np.random.default_rng(seed)
        config = SelfSpecConfig.parse({})
        context = SOURCES.named("context")
        options = {} if sources == MODEL else {context.name: context.options(config)}
        self._sources = FreeSources(options)
        self._goodput = Goodput(
            num_streams,
            0 if sources == COPIES else config.num_speculative_tokens,
            recording.costs(),
            max_free=self._sources.max_tokens,
            free_guesses=self._sources.guesses or NO_GUESS,
        )
        self._live: dict[int, Live] = {}

    def run(self, order: Sequence[int]) -> dict[str, Tally]:
        """Serves requests, until one ends and nobody waits for its place: what the last
        ones take says more of how few they are than of drafts.

        Returns:
            What those of each task had.
        """
        waiting, found = deque(order), defaultdict[str, Tally](Tally)
        while True:
            for slot in set(range(self._num_streams)) - self._live.keys():
                if not waiting:
                    return found
                self._admit(slot, int(waiting.popleft()))
            self._step(found)

    def _admit(self, slot: int, request: int) -> None:
        prompt = self._recording.prompt(request)
        token_ids = np.concatenate([prompt, self._recording.texts[request]])
        self._live[slot] = Live(request, token_ids, len(prompt) + 1)
        self._goodput.admit(slot)

    def _step(self, found: dict[str, Tally]) -> None:
        """Drafts, verifies, and learns from it, for all who are there."""
        goodput, slots = self._goodput, np.array(sorted(self._live), np.int64)
        live = [self._live[slot] for slot in slots.tolist()]
        proposals, kinds = self._proposals(live, slots)
        num_free = np.array([len(one.token_ids) for one in proposals], np.int64)
        proposed = Proposed(num_free, kinds) if num_free.any() else None
        room = np.array([one.num_left - 1 for one in live], np.int64)
        plan = goodput.plan(slots, room, proposed=proposed)
        drafted, is_free = plan.lengths, plan.is_free
        accepted = np.array(
            [
                self._num_accepted(one, int(num), proposal if free else None)
                for one, num, proposal, free in zip(
                    live, drafted, proposals, is_free, strict=True
                )
            ],
            np.int64,
        )
        of_model, of_free = ~is_free, is_free & (drafted > 0)
        goodput.acceptance.observe(slots, drafted * of_model, accepted * of_model)
        if of_free.any():
            goodput.free.observe(slots, drafted * of_free, accepted * of_free, kinds)
        seconds = self._seconds(plan)
        for slot, one, num in zip(slots.tolist(), live, accepted.tolist(), strict=True):
            one.at += num + 1
            task = found[str(self._recording.task[one.request])]
            task.num_tokens += num + 1
            task.seconds += seconds / len(live)
            if not one.num_left:
                del self._live[slot]

    def _seconds(self, plan: Plan) -> float:
        """What a step takes. The planner is told, with noise."""
        num_reqs, steps = len(plan.lengths), plan.num_steps
        num_rows = num_reqs + int(plan.lengths.sum())
        num_drafting = int(((plan.lengths > 0) & ~plan.is_free).sum())
        seconds = float(self._costs.verify(num_rows))
        seconds += steps * float(self._costs.draft(num_drafting))
        seen = seconds * math.exp(NOISE * self._random.standard_normal())
        self._goodput.costs.observe(num_rows, num_drafting, steps, seen, num_reqs)
        return seconds

    def _proposals(
        self, live: Sequence[Live], slots: np.ndarray
    ) -> tuple[Sequence[Proposal], np.ndarray]:
        """The copies, and their kinds, `[num_live]`."""
        if not self._sources.num_kinds:
            return [NOTHING] * len(live), np.zeros(len(live), np.int64)
        asked = [Request(str(one.request), one.token_ids[: one.at]) for one in live]
        return self._sources.propose(asked, slots, self._goodput.free)

    def _num_accepted(self, one: Live, num: int, proposal: Proposal | None) -> int:
        """Of so many draft tokens: of a proposal, or the model's for None."""
        if proposal is None:
            at = one.at - int(self._recording.num_prompt_tokens[one.request])
            is_right = self._recording.is_right[one.request, at : at + num]
        else:
            following = one.token_ids[one.at : one.at + num]
            is_right = proposal.token_ids[:num] == following
        return int(np.cumprod(is_right).sum())


def paces(recording: Recording, num_streams: int) -> dict[str, dict[str, float]]:
    """Tokens per second over plain steps', by what is asked and by sources, over
    several orders: of the tasks one after the other, and of all at once."""
    total: dict[tuple[str, str], Tally] = defaultdict(Tally)
    for seed in range(NUM_SEEDS):
        random = np.random.default_rng(seed)
        # So that those who are there at first and at last do not count for much.
        times = max(1, num_streams // 2)
        tasks = [np.tile(random.permutation(of), times) for of in recording.by_task()]
        in_order = np.concatenate(tasks)
        mixed = random.permutation(in_order)
        for sources in (MODEL, COPIES, BOTH):
            how = recording, num_streams, sources, seed
            for task, tally in Replay(*how).run(in_order).items():
                total[task, sources].add(tally)
            for tally in Replay(*how).run(mixed).values():
                total[MIXED, sources].add(tally)
    plain = recording.plain_pace(num_streams)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for (asked, sources), tally in total.items():
        found[asked][sources] = round(tally.pace / plain, 4)
    return dict(found)


@app.command()
def record(
    model: Annotated[str, typer.Argument(help="Checkpoint directory.")],
    output: Annotated[Path, typer.Option("-o", help="The recording, FILE.npz.")],
    num_prompts: Annotated[int, typer.Option(help="Of each task.")] = NUM_PROMPTS,
) -> None:
    """Has a model say what it says, and times its forwards: on a quiet machine."""
    from vllm_selfspec.engine.measure import measure_costs

    prepare_environment()
    llm = MeasuredLLM(model, DRAFTS, **real.settings_of(model, eager=False))
    num_rows, verify, draft = llm.ask(measure_costs)[0]
    drafts = _noted_drafts(llm)
    task_of, prompts, texts, is_right = [], [], [], []
    for task in SHIPPED:
        asked = real.prompts_of(task, num_prompts, "replay")
        rendered = [prompt.render(llm.tokenizer) for prompt in asked]
        for first in range(0, num_prompts, AT_A_TIME):
            drafts.clear()
            batch = llm.generate(rendered[first : first + AT_A_TIME], MAX_TOKENS)
            for out in batch.outputs:
                prompt, text = out.prompt_token_ids, out.outputs[0].token_ids
                at = enumerate(text, len(prompt))
                task_of.append(task)
                prompts.append(prompt)
                texts.append(text)
                is_right.append([drafts.get((out.request_id, i)) == t for i, t in at])
            done = min(first + AT_A_TIME, num_prompts)
            print(f"{task}: {done} of {num_prompts}", flush=True)
    Recording(
        np.array(task_of),
        np.array([*map(len, prompts)]),
        np.concatenate(prompts).astype(np.int32),
        np.array(texts, np.int32),
        np.array(is_right),
        np.array(num_rows),
        np.array(verify),
        np.array(draft),
    ).save(output)


def _noted_drafts(llm: MeasuredLLM) -> dict[tuple[str, int], int]:
    """From now on: what an engine drafts, by request and position. Nothing of it is
    verified, so there is a draft of each token."""
    from vllm_selfspec.draft.v1_drafts import Drafts

    drafter = drafter_of(llm.runner)
    propose, drafts = drafter.propose_for_runner, dict[tuple[str, int], int]()

    def note(runner: Any, *args: Any) -> Drafts:
        found = propose(runner, *args)
        for row, req_id in enumerate(runner.input_batch.req_ids):
            position = int(runner.input_batch.num_tokens_no_spec[row])
            for token in found.token_ids[row]:
                # vLLM's name of a request within the engine goes on with a dash.
                drafts[req_id.split("-")[0], position] = token
        return Drafts([[] for _ in found.token_ids])

    drafter.propose_for_runner = note
    return drafts


@app.command()
def play(
    recordings: Annotated[list[Path], typer.Argument(help="Files of `record`.")],
    output: Annotated[Path, typer.Option("-o", help="The JSON.")],
) -> None:
    """Replays recordings, and prints how both sources compare with each alone."""
    found: dict[str, dict[str, Any]] = {}
    for file in recordings:
        recording, of_model = Recording.load(file), found.setdefault(file.stem, {})
        for num_streams in STREAMS:
            of_model[str(num_streams)] = paces(recording, num_streams)
            print(f"{file.stem}, {num_streams} at a time: done", flush=True)
    whole_file.write_json(found, output)
    print(markdown(found))


def markdown(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The table of `play`'s JSON."""
    head = ("model", "requests", "asked", MODEL, COPIES, BOTH, "of the better")
    rows = []
    for model, by_streams in found.items():
        for num_streams, by_asked in by_streams.items():
            rows += [
                (model, num_streams, asked, *_figures(paces))
                for asked, paces in by_asked.items()
            ]
    return "\n".join(markdown_table(head, rows))


def _figures(paces: Mapping[str, float]) -> Iterator[str]:
    yield from (f"{paces[sources]:.2f}x" for sources in (MODEL, COPIES, BOTH))
    yield f"{paces[BOTH] / max(paces[MODEL], paces[COPIES]):.3f}"


if __name__ == "__main__":
    app()
