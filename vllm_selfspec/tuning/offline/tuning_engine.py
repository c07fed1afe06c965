"""`TuningEngine`: a vLLM engine that scores plans on texts of the target's own.

One rule: the model is the one that vLLM serves, loaded once; a plan is tried by
exchanging the draft view, never by starting another engine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_selfspec.draft_length.costs import ContextCosts, without_interruptions
from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.engine.measured_llm import Batch, MeasuredLLM
from vllm_selfspec.engine.spec_counters import Counts
from vllm_selfspec.engine.workers import use_plan
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.tuning import probing
from vllm_selfspec.tuning.score import Score, Walk, best_score

# CPU attention takes multiples of 32; small blocks make a row's own blocks small.
BLOCK_SIZE = 32
NUM_TIMINGS = 5


@dataclass(frozen=True)
class Text:
    """A prompt and what the target makes of it.

    Attributes:
        token_ids: Of both.
        first: Where the target's own start.
    """

    token_ids: tuple[int, ...]
    first: int

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt, as vLLM takes it."""
        return {"prompt_token_ids": list(self.token_ids[: self.first])}


@dataclass(frozen=True)
class Known:
    """What one engine finds out and others of the same model can go by.

    Attributes:
        num_layers: Of the model.
        texts: What plans are scored on.
        verify_costs: v for 1, 2, ... draft tokens, in contexts as long as the texts.
        draft_costs: Of the parts of a draft step that is the whole target's, over a
            plain step, in such contexts.
    """

    num_layers: int
    texts: tuple[Text, ...]
    verify_costs: tuple[float, ...]
    draft_costs: StepCost

    def draft_cost(self, plan: DraftPlan) -> float:
        """c: a draft step over a plain step."""
        return plan.cost(self.draft_costs).total


class TuningEngine:
    """Texts in the KV cache, and the costs of forwards.

    Attributes:
        known: What was found out at the start, or told.
    """

    def __init__(
        self,
        model: str,
        prompts: Sequence[Any],
        max_tokens: int,
        num_drafts: int,
        num_streams: int = 1,
        known: Known | None = None,
        start: DraftPlan | None = None,
        **settings: Any,
    ) -> None:
        """Starts vLLM, lets the target go on with every prompt, and measures costs.

        Args:
            model: Checkpoint directory or Hub name.
            prompts: As vLLM takes them, texts or token ids.
            max_tokens: Generated for each, greedily.
            num_drafts: The longest draft that is scored.
            num_streams: Concurrent requests to tune for.
            known: What another engine has found out; None to find it out.
            start: A plan with all that others may keep beside the target; None where
                that is nothing.
            settings: Of `vllm.LLM`.
        """
        from vllm_selfspec.tuning.probe import MAX_ROWS

        self._num_drafts, self._num_streams = num_drafts, num_streams
        self._max_tokens = max_tokens
        config = {
            "method": "selfspec",
            "draft_source": "model",
            "skip_layers": {},
            **({} if start is None else start.to_keys()),
            "num_speculative_tokens": num_drafts,
            "draft_length": "fixed",
            "num_speculative_tokens_per_batch_size": [[1, MAX_ROWS, num_drafts]],
        }
        self._engine = MeasuredLLM(
            model,
            config,
            enable_prefix_caching=False,  # the probe takes blocks as it likes
            block_size=BLOCK_SIZE,
            max_num_seqs=max(MAX_ROWS, num_streams),
            **settings,
        )
        self._has_read = False
        if known is None:
            texts = tuple(self._generated(prompts))
            num_layers = self._engine.ask(probing.num_layers)[0]
            costs = self._measure_costs(texts, num_layers, start)
            known = Known(num_layers, texts, *costs)
        self.known = known

    def found_out(self) -> Known:
        """`known`, for an engine that is asked from elsewhere."""
        return self.known

    def _generated(self, prompts: Sequence[Any]) -> Iterator[Text]:
        for out in self._generate(prompts).outputs:
            prompt, answer = out.prompt_token_ids, out.outputs[0].token_ids
            yield Text((*prompt, *answer), len(prompt))

    def _generate(self, prompts: Sequence[Any]) -> Batch:
        self._has_read = False  # requests write where the probe has its texts
        return self._engine.generate(prompts, self._max_tokens, ignore_eos=False)

    def right(self, plan: DraftPlan, numbers: Sequence[int]) -> list[Ints]:
        """Right drafts at every position of some texts: see `Probe.num_right`."""
        if not self._has_read:
            token_ids = [text.token_ids for text in self.known.texts]
            self._engine.ask(probing.start_probe, self._num_drafts, token_ids)
            self._has_read = True
        texts = [self.known.texts[number] for number in numbers]
        sizes = [len(text.token_ids) - 1 - text.first for text in texts]
        positions = [
            text.first + np.arange(n) for text, n in zip(texts, sizes, strict=True)
        ]
        which = np.repeat(np.asarray(numbers, np.int64), sizes)
        rows = which, np.concatenate(positions), plan, self._num_drafts
        found = self._engine.ask(probing.num_right, *rows)[0]
        return np.split(found, np.cumsum(sizes)[:-1])

    def score(self, plan: DraftPlan, numbers: Sequence[int]) -> Score:
        """What the plan gains on some texts."""
        right = self.right(plan, numbers)
        cost = self.known.draft_cost(plan)
        return best_score(right, cost, self.known.verify_costs)

    def measure(
        self, plans: Sequence[tuple[DraftPlan, int]], numbers: Sequence[int]
    ) -> list[Score]:
        """D&V's objective: real generation, beside plain vLLM's of the same texts.

        Args:
            plans: Each with how many tokens it drafts.
            numbers: Of the texts.

        Returns:
            Scores of what was measured: the tokens per second over plain vLLM's, and
            the steps that vLLM counted.
        """
        methods: list[tuple[DraftPlan | None, int]] = [(None, 0), *plans]
        seconds, counts = np.zeros(len(methods)), [Counts(0, 0, 0)] * len(methods)
        num_tokens = np.zeros(len(methods))  # a text may end elsewhere in low precision
        starts = range(0, len(numbers), self._num_streams)
        for turn, start in enumerate(starts):
            chosen = numbers[start : start + self._num_streams]
            prompts = [self.known.texts[number].prompt for number in chosen]
            for i in range(len(methods)):  # who is first changes
                which = (turn + i) % len(methods)
                batch = self._drafted(prompts, *methods[which])
                seconds[which] += batch.seconds
                num_tokens[which] += batch.num_tokens
                counts[which] = counts[which] + batch.counts
        rates = num_tokens / seconds
        return [
            Score(
                k,
                float(rates[which] / rates[0]),
                _walk_of(counts[which], k),
                self.known.draft_cost(plan),
                self.known.verify_costs[k - 1],
            )
            for which, (plan, k) in enumerate(plans, 1)
        ]

    def _drafted(self, prompts: Sequence[Any], plan: DraftPlan | None, k: int) -> Batch:
        if plan is not None:
            self._engine.ask(use_plan, plan)
        scheduler = self._engine.llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.dynamic_sd_lookup = [k] * len(scheduler.dynamic_sd_lookup)
        return self._generate(prompts)

    def _measure_costs(
        self, texts: Sequence[Text], num_layers: int, start: DraftPlan | None
    ) -> tuple[tuple[float, ...], StepCost]:
        """`verify_costs` and `draft_costs` of `Known`, where contexts are as long as
        these texts."""
        rows = [self._num_streams * (1 + k) for k in range(self._num_drafts + 1)]
        times = self._engine.ask(probing.time_steps, rows, NUM_TIMINGS)
        alone = without_interruptions(rows, np.max(times, axis=0))
        slowest = np.max(self._engine.ask(probing.time_context), axis=0)
        of_context = ContextCosts(*slowest.tolist())
        num_tokens = int(np.mean([len(text.token_ids) for text in texts]))
        read = self._num_streams * of_context.request + of_context.row * np.array(rows)
        read[1:] += self._num_streams * of_context.several
        plain, *verify = alone + num_tokens * read
        reading = num_tokens * self._num_streams * of_context.draft / plain
        draft = self._measure_draft(num_layers, start).times(alone[0] / plain)
        shares = tuple(float(seconds / plain) for seconds in verify)
        return shares, draft.in_context(num_tokens, float(reading))

    def _measure_draft(self, num_layers: int, start: DraftPlan | None) -> StepCost:
        """The head, an attention and an MLP sublayer in a draft step, over a plain
        step, with the target's weights and with all copies that `start` has."""
        whole = self._sublayers(num_layers, None)
        if start is None or not start.values:
            return whole
        return whole.measured_with_copies(self._sublayers(num_layers, start))

    def _sublayers(self, num_layers: int, beside: DraftPlan | None) -> StepCost:
        how = self._num_streams, NUM_TIMINGS, beside
        found = np.max(self._engine.ask(probing.time_sublayers, *how), axis=0)
        return StepCost.uniform(num_layers, *map(float, found))


def _walk_of(counts: Counts, k: int) -> Walk:
    """The steps that drafted, as vLLM counted them."""
    emitted = counts.drafts + counts.accepted_tokens
    tried_at = (counts.drafts,) * k
    return Walk(emitted, counts.drafts, counts.accepted_at[:k], tried_at)
