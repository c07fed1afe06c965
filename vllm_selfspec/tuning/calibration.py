"""`calibrate`: at a model's first start, finds the plan that it drafts by.

One rule: what `tune` counts in minutes is counted here on fewer texts in seconds, with
the same probe, costs and score. What comes of it is a plan, or that the model's own
drafts are worth nothing, and then its steps are plain vLLM's and copies alone draft.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.bench.tasks import load
from vllm_selfspec.chosen_plan import conditional
from vllm_selfspec.config import DEFAULT_NUM_SPECULATIVE_TOKENS
from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.draft_length.types import Floats, Ints
from vllm_selfspec.engine.first_start import circumstances_from, step_of
from vllm_selfspec.engine.scheduler import measured
from vllm_selfspec.engine.vllm_args import target_of
from vllm_selfspec.engine.workers import adopt_plan, use_costs
from vllm_selfspec.plan.axis_draft_weights import TYPICAL_ACCEPTANCE
from vllm_selfspec.plan.calibrated import USEFUL
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.served_config import calibration_of, has_free_sources, plan_of
from vllm_selfspec.tuning import probing
from vllm_selfspec.tuning.candidates import Choice, greedy_path, single_changes
from vllm_selfspec.tuning.score import Score, best_score

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown

TASKS, NUM_PROMPTS = ("chat", "code"), 4  # shipped prompts, of each
MAX_PROMPT_TOKENS, NUM_TOKENS = 64, 32
MAX_DRAFTS = DEFAULT_NUM_SPECULATIVE_TOKENS
# Positions that a plan is first looked at in; what is promising is in all of them.
NUM_LOOKS, NUM_FINALISTS = 64, 3
# A look at that few texts is off by some percent either way.
HOPE = 0.93
# Of the time, what the search may take; the rest is for measuring what it found.
SEARCH_SHARE = 0.6
# Of the search's, what looking at single sublayers may take at most.
RANKING_SHARE = 0.5
EXITS = (6, 4, 3, 2)  # after a sixth of the layers, and so on
PATH_COSTS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # c of the plans that are grown

Ask = Callable[..., list[Any]]


@dataclass(frozen=True)
class Found:
    """A plan that was looked at closely.

    Attributes:
        plan: How it drafts.
        right: Right drafts at every position, text by text.
        score: What it is worth to one request at a time.
    """

    plan: DraftPlan
    right: Sequence[Ints]
    score: Score

    @property
    def is_useful(self) -> bool:
        """Whether it is worth the steps that it takes."""
        return self.score.speed_up >= USEFUL

    @property
    def may_be_useful(self) -> bool:
        """The same once it is compiled, as far as that can be told."""
        return self.score.speed_up >= HOPE * USEFUL

    def with_costs(self, costs: StepCosts) -> "Found":
        """With what its forwards were measured to take."""
        plain = float(costs.verify(1))
        verify = costs.verify(1 + np.arange(1, MAX_DRAFTS + 1)) / plain
        cost = float(costs.draft(1)) / plain
        return replace(self, score=best_score(self.right, cost, [*verify]))

    def __str__(self) -> str:
        score = self.score
        return (
            f"{self.plan.outline()}, expected to bring {score.speed_up:.2f}x to one "
            f"request at a time (c {score.draft_cost:.2f}, "
            f"{score.walk.acceptance[0]:.0%} of first tokens right)"
        )


def calibrate_or_go_on(vllm_config: Any, executor: Any) -> None:
    """`calibrate`; what goes wrong there is no reason not to serve."""
    try:
        calibrate(vllm_config, executor)
    except Exception:  # of any type: it tries what this model may never have run
        logger.exception("selfspec could not look for a draft plan")
        _go_on_without(vllm_config, executor)


def _go_on_without(vllm_config: Any, executor: Any) -> None:
    """Leaves drafting to others, or where there are none to a plan that nobody has
    measured."""
    plan = None if has_free_sources(vllm_config) else plan_of(vllm_config)
    executor.collective_rpc(adopt_plan, args=(plan,))
    executor.collective_rpc(use_costs, args=(measured(executor),))


def calibrate(vllm_config: Any, executor: Any) -> None:
    """Finds a plan, has the workers draft by it, and keeps it for the next start.

    Args:
        vllm_config: Of the engine, with a request for this.
        executor: vLLM's, with workers that are ready to run.
    """

    def ask(function: Callable[..., Any], *args: Any) -> list[Any]:
        found: list[Any] = executor.collective_rpc(function, args=args)
        return found

    request = calibration_of(vllm_config)
    assert request is not None
    started = time.monotonic()
    logger.info(
        "selfspec looks for the plan that this model drafts best by, once, for about "
        "%.0f s; calibration_seconds 0 starts without",
        request["seconds"],
    )
    guess = plan_of(vllm_config)
    start = guess.with_value("skip_layers", SkipSet.of(guess.num_layers))
    deadline = started + SEARCH_SHARE * request["seconds"]
    search = Calibration(ask, start, deadline)
    found = search.best() if search.reads(_prompts(vllm_config.model_config)) else None
    ask(probing.stop_probe)
    if not search.has_texts:
        logger.info("selfspec has no text to try plans on, or too small a KV cache")
        _go_on_without(vllm_config, executor)
        return
    if found is None and not search.saw_exits:
        logger.info(
            "selfspec had no time to try plans within calibration_seconds %g, so it "
            "will try again at the next start: raise calibration_seconds",
            request["seconds"],
        )
        _go_on_without(vllm_config, executor)
        return
    # Where nothing else drafts, whether it pays is decided step by step.
    must_draft = not has_free_sources(vllm_config)
    plan = guess if found is None else found.plan
    drafts = must_draft or (found is not None and found.may_be_useful)
    ask(adopt_plan, plan if drafts else None)
    costs = measured(executor)
    if drafts and found is not None:
        found = found.with_costs(costs)
        if not (must_draft or found.is_useful):
            drafts = False
            ask(adopt_plan, None)
    acceptance = () if found is None else conditional(found.score.walk.acceptance)
    ask(use_costs, costs, acceptance)
    what = "no plan looked promising" if found is None else str(found)
    logger.info(
        "selfspec: %s%s; found in %.1f s",
        what if drafts else f"this model's own drafts bring nothing ({what})",
        "" if drafts else ", so copies alone draft",
        time.monotonic() - started,
    )
    _tell_what_memory_brings(vllm_config, search, found)
    document = _document(vllm_config, plan, found)
    circumstances_from(request).keep(document)


class Calibration:
    """Looks at plans.

    Attributes:
        num_layers: Of the model.
        start: The plan that others are made from.
        has_texts: Whether there is anything to try plans on.
        saw_exits: Whether there was time for the plans that are tried first.
        verify: v for 1, 2, ... draft tokens of one request.
    """

    has_texts = saw_exits = False

    def __init__(self, ask: Ask, start: DraftPlan, deadline: float) -> None:
        """Times forwards.

        Args:
            ask: Has all workers do something, and returns their answers.
            start: With what may be kept beside the target, and nothing skipped.
            deadline: Of `time.monotonic`.
        """
        self._ask, self.start, self._deadline = ask, start, deadline
        self.num_layers = start.num_layers
        rows = [1 + k for k in range(1 + MAX_DRAFTS)]
        seconds = np.max(ask(probing.time_steps, rows, 1), axis=0)
        self.verify: Floats = np.maximum.accumulate(seconds[1:] / seconds[0])
        parts = np.max(ask(probing.time_sublayers, 1, 1), axis=0)
        self._parts = StepCost.uniform(start.num_layers, *map(float, parts))

    def reads(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Has the target go on with prompts; what it says is what drafts must say.
        Returns whether there is anything to try plans on."""
        if not prompts:
            return False
        texts = self._ask(probing.start_probe_on, NUM_TOKENS, prompts)[0]
        if not texts:
            return False
        firsts = np.array([len(prompt) for prompt in prompts[: len(texts)]])
        sizes = np.array([len(text) for text in texts]) - 1 - firsts
        self._numbers = np.repeat(np.arange(len(texts)), sizes)
        self._splits = np.cumsum(sizes)[:-1]
        before = np.repeat(np.cumsum(sizes) - sizes, sizes)
        self._positions = np.arange(sizes.sum()) - before + np.repeat(firsts, sizes)
        self.has_texts = True
        return True

    def best(self) -> Found | None:
        """The plan that is worth most; None where none looks promising."""
        looks = {plan: self._look(plan) for plan in self._candidates()}
        by_worth = sorted(looks, key=lambda plan: -looks[plan])
        found: list[Found] = []
        for plan in by_worth[:NUM_FINALISTS]:
            if looks[plan] < HOPE * USEFUL or (found and self._time_left < 0):
                break
            rows = np.arange(len(self._positions))
            right = np.split(self._num_right(plan, rows, MAX_DRAFTS), self._splits)
            cost = plan.cost(self._parts).total
            found.append(Found(plan, right, best_score(right, cost, [*self.verify])))
        return max(found, key=lambda one: one.score.speed_up, default=None)

    @property
    def _time_left(self) -> float:
        return self._deadline - time.monotonic()

    def _candidates(self) -> Iterator[DraftPlan]:
        """Plans that differ from the target, as long as there is time."""
        if self.start.values:
            yield self.start
        for part in EXITS:
            if self.num_layers // part and self._time_left > 0:
                skip_set = SkipSet.early_exit(self.num_layers, self.num_layers // part)
                yield self.start.with_value("skip_layers", skip_set)
        self.saw_exits = self._time_left > 0
        yield from self._grown()

    def _grown(self) -> Iterator[DraftPlan]:
        """What leaves out more and more, the least missed first."""
        wanted = list(PATH_COSTS)
        for plan in greedy_path(self.start, self._losses()):
            share = plan.cost(self._parts).total / self.start.cost(self._parts).total
            if wanted and share <= wanted[0]:
                wanted = [cost for cost in wanted if cost < share]
                if self._time_left < 0:
                    return
                yield plan

    def _losses(self) -> dict[Choice, float]:
        """What making each single change loses, over what it saves: of as many as there
        is time for."""
        until = time.monotonic() + RANKING_SHARE * self._time_left
        before = self.start.cost(self._parts).total
        sure = self._share_right(self.start)
        found: dict[Choice, float] = {}
        changes = [*single_changes(self.start).items()]
        random.Random(0).shuffle(changes)
        for choice, plan in changes:
            saved = before - plan.cost(self._parts).total
            if saved > 0 and time.monotonic() < until:
                found[choice] = (sure - self._share_right(plan)) / saved
        return found

    def _look(self, plan: DraftPlan) -> float:
        """What a plan is worth if every draft token is as likely as the first."""
        chance = self._share_right(plan)
        k = np.arange(1, MAX_DRAFTS + 1)
        cost = plan.cost(self._parts).total
        worth = (1 + np.cumsum(chance**k)) / (self.verify + k * cost)
        return float(worth.max())

    def _share_right(self, plan: DraftPlan) -> float:
        num = len(self._positions)
        rows = np.linspace(0, num - 1, min(NUM_LOOKS, num)).astype(np.int64)
        return float((self._num_right(plan, rows, 1) > 0).mean())

    def _num_right(self, plan: DraftPlan, rows: Ints, num_drafts: int) -> Ints:
        at = self._numbers[rows], self._positions[rows]
        found: Ints = self._ask(probing.num_right, *at, plan, num_drafts)[0]
        return found


def _prompts(model_config: Any) -> list[list[int]]:
    """Of the shipped ones, as the model's chat template has them; none where its
    tokenizer cannot be had."""
    from vllm.tokenizers import cached_tokenizer_from_config

    chosen = [p for task in TASKS for p in load(task).sample(NUM_PROMPTS).prompts]
    most = min(MAX_PROMPT_TOKENS, model_config.max_model_len - NUM_TOKENS - 1)
    try:
        tokenizer: Any = cached_tokenizer_from_config(model_config)
        found = [tokenizer.encode(p.render(tokenizer))[-most:] for p in chosen]
    except Exception as error:  # of many types
        logger.info("selfspec cannot use the tokenizer: %s", error)
        return []
    return [token_ids for token_ids in found if token_ids] if most > 0 else []


def _tell_what_memory_brings(
    vllm_config: Any, search: Calibration, found: Found | None
) -> None:
    """One line, where a copy of the weights in fewer bits was not made, and promises
    more than what was found."""
    model_config = vllm_config.model_config
    step = step_of(model_config)
    if step is None or vllm_config.quant_config is not None:
        return
    if search.start.extra_bytes(step):
        return
    plan = DraftPlan(search.num_layers).within_memory(step, step.total)
    k = np.arange(1, MAX_DRAFTS + 1)
    emitted = 1 + np.cumsum(TYPICAL_ACCEPTANCE**k)
    most = float((emitted / (search.verify + k * plan.share(step))).max())
    if most > max(1.0, 0.0 if found is None else found.score.speed_up):
        share = plan.extra_bytes(step) / step.total
        logger.info(
            'selfspec: with "draft_memory": "%.0f%%" (%.0f MB) drafts in 4 bits are '
            "expected to bring about %.1fx",
            np.ceil(100 * share),
            plan.extra_bytes(step) / 1e6,
            most,
        )


def _document(vllm_config: Any, plan: DraftPlan, found: Found | None) -> dict[str, Any]:
    """The profile; what its keys mean is told in `plan.profile`."""
    target = target_of(vllm_config.model_config)
    figures: dict[str, Any] = {
        "num_speculative_tokens": MAX_DRAFTS,
        "acceptance": [],
        "tokens_per_verification": 1.0,
        "draft_cost": 1.0,
        "verify_cost": 1.0,
        "speed_up": 0.0,
    }
    if found is not None:
        walk = found.score.walk
        figures |= {
            "acceptance": [round(share, 4) for share in walk.acceptance],
            "tokens_per_verification": round(walk.tokens_per_verification, 4),
            "draft_cost": round(found.score.draft_cost, 4),
            "verify_cost": round(found.score.verify_cost, 4),
            "speed_up": round(found.score.speed_up, 4),
        }
    return {
        **plan.to_dict(),
        "model": target.name,
        "architecture": dict(target.architecture),
        "figures": figures,
        "provenance": provenance(None),
    }
