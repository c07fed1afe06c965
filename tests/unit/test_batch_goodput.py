"""What a whole batch drafts where steps are scheduled ahead of the device."""

from typing import Any

import numpy as np
import pytest

from vllm_selfspec.draft_length.batch_goodput import BatchGoodput
from vllm_selfspec.draft_length.costs import NO_CONTEXT, BesideCosts, StepCosts

SLOTS, ROOM = np.arange(2), np.full(2, 16)
MAX_DRAFTS, MAX_COPIED = 4, 8


def goodput(
    uniform: Any = (),
    max_drafts: int = MAX_DRAFTS,
    draft: float = 0.2,
    costs: StepCosts | None = None,
) -> BatchGoodput:
    costs = costs or StepCosts((1, 8, 64), (1.0, 1.2, 4.0), [draft] * 3)
    found = BatchGoodput(2, max_drafts, costs, uniform, MAX_COPIED)
    for slot in SLOTS:
        found.admit(slot)
    return found


def steps(plan: BatchGoodput, num: int, model: float, copies: float) -> list[Any]:
    """Plans of so many steps, where drafts are accepted with these chances."""
    rng, found = np.random.default_rng(0), []
    for _ in range(num):
        one = plan.plan(SLOTS, ROOM)
        found.append(one)
        is_free = one.is_free.any()
        chance = copies if is_free else model
        accepted = np.minimum(rng.geometric(1 - chance, 2) - 1, one.lengths)
        acceptance = plan.free if is_free else plan.acceptance
        acceptance.observe(SLOTS, one.lengths, accepted)
    return found


def shares(plans: list[Any]) -> tuple[float, float]:
    """Of steps that the model drafts for, and that copy."""
    copies = [one.is_free.any() and one.lengths.any() for one in plans]
    return np.mean([one.num_steps > 0 for one in plans]), np.mean(copies)


@pytest.mark.parametrize("uniform", [(), (1, 2, 4, 8)], ids=["rows", "graphs"])
def test_a_batch_takes_the_source_that_brings_more(uniform: Any) -> None:
    plan = goodput(uniform)
    model, copies = shares(steps(plan, 400, model=0.9, copies=0.02)[100:])
    assert model > 0.9 > 0.1 > copies > 0, "and tries the other once in a while"
    model, copies = shares(steps(plan, 1000, model=0.9, copies=0.95)[500:])
    assert copies > 0.9 > 0.1 > model > 0, "texts change"
    model, copies = shares(steps(plan, 1000, model=0.9, copies=0.02)[500:])
    assert model > 0.9


@pytest.mark.parametrize("uniform", [(), (1, 2, 4, 8)], ids=["rows", "graphs"])
def test_copies_are_longer_than_the_model_drafts_and_run_no_step(uniform: Any) -> None:
    plan = goodput(uniform, draft=1.0)
    found = steps(plan, 300, model=0.3, copies=0.97)[-1]
    assert found.is_free.all() and found.num_steps == 0
    assert found.lengths.max() == MAX_COPIED


def test_no_draft_of_the_model_is_longer_than_it_makes_them() -> None:
    plan = goodput((1, 2, 4, 8), draft=0.01)
    assert max(one.num_steps for one in steps(plan, 100, 0.97, 0.1)) == MAX_DRAFTS


def test_where_nothing_is_worth_it_both_are_tried_by_turns_and_seldom() -> None:
    plan = goodput(draft=2.0)
    found = steps(plan, 6000, model=0.01, copies=0.01)[1000:]
    model, copies = shares(found)
    assert 0 < model < 0.01 and 0 < copies < 0.1
    assert all(one.is_trial for one in found if one.lengths.any())


def test_without_the_model_copies_are_all_there_is() -> None:
    plan = goodput(max_drafts=0)
    model, copies = shares(steps(plan, 400, model=0.9, copies=0.9))
    assert copies > 0.9 and model == 0
    model, copies = shares(steps(plan, 4000, model=0.9, copies=0.01)[1000:])
    assert 0 < copies < 0.1, "left alone, and tried again"


def test_the_model_is_asked_at_once_where_copies_are_worth_nothing_any_more() -> None:
    plan = goodput()
    steps(plan, 300, model=0.9, copies=0.97)
    assert plan.plan(SLOTS, ROOM).is_free.all()
    plan.free.expect([0.01] * MAX_COPIED)
    found = [plan.plan(SLOTS, ROOM) for _ in range(2)]
    assert found[-1].num_steps and (found[0].num_steps or found[0].is_trial)


def test_requests_copy_as_far_as_each_has_shown() -> None:
    plan = goodput(draft=1.0)
    plan.acceptance.expect([0.1])
    for _ in range(50):
        plan.free.observe(SLOTS, np.full(2, 8), np.array([8, 0]))
    found = plan.plan(SLOTS, ROOM)
    assert found.lengths[0] == MAX_COPIED > found.lengths[1]


def test_a_trial_costs_no_more_than_was_saved_up_for() -> None:
    """The model's drafts bring much here, and a step of copies loses them."""
    plan = goodput((1, 2, 4, 8), draft=0.05)
    found = steps(plan, 3000, model=0.95, copies=0.01)[500:]
    _, copies = shares(found)
    assert 0 < copies < 0.02


def told_late(plan: BatchGoodput, num: int, late: int, chance: float) -> list[Any]:
    """Plans of steps of which a plain one takes 1, one that drafts 1.1 and every draft
    step 0.5, where each time is seen so many steps late; copies bring 0.02 tokens."""
    rng, found, times = np.random.default_rng(0), [], [1.0] * late
    lengths, num_steps, is_free = np.zeros(2, np.int64), 0, False
    for _ in range(num):
        times.append(1.0 + 0.1 * bool(lengths.any()) + 0.5 * num_steps)
        one = plan.plan(SLOTS, ROOM)
        rows = 2 + int(lengths.sum())
        plan.observe_step(rows, 2, one.num_steps, times.pop(0), NO_CONTEXT)
        likely = 0.02 if is_free else chance
        accepted = np.minimum(rng.geometric(1 - likely, 2) - 1, lengths)
        (plan.free if is_free else plan.acceptance).observe(SLOTS, lengths, accepted)
        lengths, num_steps, is_free = one.lengths, one.num_steps, one.is_free.any()
        found.append(one)
    return found


def by_flat_costs(max_drafts: int) -> BatchGoodput:
    costs = StepCosts((1, 64), (1.3, 1.31), (0.2, 0.2), beside=BesideCosts(0.04))
    return goodput((1, 2, 4, 8), max_drafts, costs=costs)


@pytest.mark.parametrize("late", [0, 1])
def test_times_that_are_seen_a_step_late_are_not_taken_for_those_of_others(
    late: int,
) -> None:
    """At start-up, when each step is waited for, all take about as long. To see what a
    plain one takes, a single one would be no good."""
    plan = by_flat_costs(max_drafts=0)
    _, copies = shares(told_late(plan, 400, late, chance=0.0)[100:])
    assert copies < 0.05
    assert float(plan.costs.verify(2)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("late", [0, 1])
def test_draft_steps_that_run_after_the_result_are_not_thought_cheap(late: int) -> None:
    plan = by_flat_costs(MAX_DRAFTS)
    model, _ = shares(told_late(plan, 600, late, chance=0.4)[300:])
    assert model < 0.1, "1.4 tokens in 1.6"
    plan = by_flat_costs(MAX_DRAFTS)
    model, _ = shares(told_late(plan, 600, late, chance=0.97)[300:])
    assert model > 0.9, "4.7 tokens in 3.1"


def test_a_source_that_nobody_knows_is_tried_at_once() -> None:
    """At a chance of a half, as with nothing known, its drafts are not worth it."""
    costs = StepCosts((1, 64), (1.0, 1.1), (0.6, 0.6), beside=BesideCosts(0.1))
    plan = goodput((1, 2, 4, 8), costs=costs)
    model, _ = shares(steps(plan, 150, model=0.97, copies=0.01)[50:])
    assert model > 0.8
