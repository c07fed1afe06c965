"""The draft-length controllers do what their papers and docstrings say."""

import itertools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_selfspec.draft_length import goodput
from vllm_selfspec.draft_length.acceptance import NO_GUESS, Acceptance
from vllm_selfspec.draft_length.best_lengths import (
    MARGIN,
    Mix,
    Prompts,
    best_lengths,
    best_mix,
    best_uniform,
)
from vllm_selfspec.draft_length.costs import (
    BesideCosts,
    ContextCosts,
    Contexts,
    StepCosts,
    cleaned,
)
from vllm_selfspec.draft_length.goodput import (
    LONGEST_REST,
    LOOK_STEPS,
    REST,
    TRY_EVERY,
    WHOLE,
    WINDOW,
    Goodput,
    Proposed,
)
from vllm_selfspec.draft_length.looks import LOOK_SHARE, NUM_TIMED, Looks
from vllm_selfspec.draft_length.slots import Slots
from vllm_selfspec.draft_length.stop_rules import (
    CalibratedThompson,
    Thompson,
    Threshold,
)

ROWS = (1, 2, 4, 8, 16, 64)
SIMULATION = Path(__file__).parents[2] / "benchmarks" / "simulate_draft_length.py"


def costs(free_rows: float = 8.0, draft: float = 0.25) -> StepCosts:
    """Of a machine on which so many rows cost what one does."""
    verify = [max(1.0, n / free_rows) + 0.02 * n for n in ROWS]
    return StepCosts(ROWS, verify, [draft * seconds for seconds in verify])


def at(*slots: int) -> Any:
    return np.array(slots)


# Costs


def test_costs_are_those_measured_and_linear_between() -> None:
    found = StepCosts((1, 3, 5), (1.0, 3.0, 4.0), (0.5, 0.5, 1.0))
    assert float(found.verify(3)) == pytest.approx(3.0)
    assert found.verify(np.array([2, 4])) == pytest.approx([2.0, 3.5])
    assert float(found.verify(9)) == pytest.approx(6.0), "with the last slope"
    assert found.draft(np.array([1, 2, 4])) == pytest.approx([0.5, 0.5, 0.75])


def test_a_machine_that_slows_down_changes_no_ratio() -> None:
    found = costs()
    before = float(found.draft(1) / found.verify(5))
    for _ in range(300):
        truth = 3 * float(costs().verify(5) + 4 * costs().draft(1))
        found.observe(5, 1, 4, truth)
    assert float(found.verify(5)) == pytest.approx(3 * float(costs().verify(5)), 0.02)
    assert float(found.draft(1) / found.verify(5)) == pytest.approx(before, 0.05)
    assert float(found.verify(64)) == pytest.approx(3 * float(costs().verify(64)), 0.05)


def test_a_measurement_that_was_interrupted_is_not_believed() -> None:
    rows = (1, 2, 4, 8, 16, 32)
    verify = np.array([1.0, 1.2, 1.5, 2.0, 3.9, 7.0])
    draft = 0.25 * verify
    for found, right in zip(cleaned(rows, verify, draft), (verify, draft), strict=True):
        assert found == pytest.approx(right), "what can be stays"
    for at in range(6):
        interrupted, lucky = verify.copy(), draft.copy()
        interrupted[at] *= 6
        lucky[(at + 1) % 6] *= 0.05  # a difference can be too small, too
        found_verify, found_draft = cleaned(rows, interrupted, lucky)
        assert (found_verify <= 2 * verify + 1e-9).all(), "no more than in two pieces"
        assert (found_verify >= verify - 1e-9).all()
        share = found_draft / found_verify
        assert (share > 0.12).all() and (share < 0.26).all(), "a quarter, or near it"


def test_wrong_costs_are_put_right_by_the_steps_that_are_run() -> None:
    truth, found = costs(draft=0.25), costs(draft=0.75)
    for step in range(600):
        k = (0, 1, 4)[step % 3]
        seconds = truth.verify(1 + k) + k * truth.draft(1)
        found.observe(1 + k, 1, k, float(seconds))
    assert float(found.draft(1) / found.verify(1)) == pytest.approx(0.25, 0.15)


def test_an_interrupted_step_changes_no_ratio_and_is_soon_forgotten() -> None:
    found, seconds = costs(), float(costs().verify(1))
    for _ in range(100):
        found.observe(1, 1, 0, seconds)
    before = float(found.draft(1) / found.verify(1))
    found.observe(1, 1, 0, 1000 * seconds)
    assert float(found.draft(1) / found.verify(1)) == pytest.approx(before, 0.02)
    for _ in range(30):
        found.observe(1, 1, 0, seconds)
    assert float(found.verify(1)) == pytest.approx(seconds, 0.05)


@pytest.mark.parametrize(
    ("rows", "verify"), [((1,), (1.0,)), ((1, 2), (1.0, 0.0)), ((2, 1), (1.0, 1.0))]
)
def test_costs_that_cannot_be_are_refused(rows: Any, verify: Any) -> None:
    with pytest.raises(ValueError, match="costs"):
        StepCosts(rows, verify, verify)


# A token of context, in seconds, for each request, row and row of a draft step.
OF_CONTEXT = ContextCosts(1e-3, 2e-4, 5e-4, 3e-4)


def long_costs(of_context: ContextCosts = OF_CONTEXT) -> StepCosts:
    return StepCosts(ROWS, [1.0] * len(ROWS), [0.25] * len(ROWS), of_context)


def test_what_is_read_of_contexts_comes_on_top() -> None:
    found = long_costs().within(2, Contexts(1000.0, 100.0))
    assert float(found.verify(5)) == pytest.approx(1 + 2 * 1.0 + 5 * 0.2)
    assert found.draft(np.array([1, 2])) == pytest.approx([0.25 + 0.05, 0.25 + 0.1])
    assert found.beside(2) == pytest.approx(2 * 0.3), "of requests with several rows"
    nothing = long_costs().within(2, Contexts())
    assert float(nothing.verify(5)) == pytest.approx(1.0)
    mean = Contexts.of(np.array([100, 300]), np.array([100, 200]))
    assert mean == (200.0, 150.0) and Contexts.of(at(), at()) == (0, 0)


def test_what_drafting_takes_beside_forwards_must_be_earned() -> None:
    flat = dict(num_rows=ROWS, verify=[1.0] * 6, draft=[1e-6] * 6)
    survival, room = np.cumprod(np.full((2, 4), 0.2), axis=1), np.full(2, 4)
    for beside, pays in ((0.0, True), (0.1, True), (0.5, False)):
        costs = StepCosts(**flat, beside=BesideCosts(beside / 2, beside / 4))
        prompts = Prompts(8, 0.5)
        assert best_lengths(survival, room, costs).any() == pays
        assert best_lengths(survival, room, costs, prompts).any() == pays
        uniform = best_uniform(survival, room, costs, (1, 4), prompts)
        assert uniform.lengths.any() == pays


@pytest.mark.parametrize(("looks", "finds_out"), [(True, True), (False, False)])
def test_steps_that_draft_are_told_from_plain_ones(
    looks: bool, finds_out: bool
) -> None:
    """Measured one by one, all steps seem to take 5.5; run ahead of the device a plain
    one takes 4.4, and one with drafts 6. At a chance of 0.15 that is not worth it, and
    who never looks at plain steps takes the machine for slow."""
    verify, beside = [5.5] * len(ROWS), BesideCosts(0.15, 0.015)
    costs = StepCosts(ROWS, verify, [1e-6] * len(ROWS), beside=beside)
    plan = Goodput(8, 8, costs, (1, 2, 4, 8), looks_at_plain_steps=looks)
    slots, room, rng = np.arange(8), np.full(8, 8), np.random.default_rng(0)
    for slot in slots:
        plan.admit(slot)
    lengths = [8]
    for _ in range(400):
        length, following = lengths[-1], plan.plan(slots, room).lengths
        accepted = np.minimum(rng.geometric(0.85, 8) - 1, length)
        plan.acceptance.observe(slots, np.full(8, length), accepted)
        seconds = (6.0 if length else 4.4) * np.exp(0.03 * rng.standard_normal())
        costs.observe(8 * (1 + length), 8, int(following.max()), seconds, 8)
        lengths.append(int(following.max()))
    assert (np.mean(np.array(lengths[200:]) > 0) < 0.05) == finds_out


def test_who_rests_is_asked_nothing_and_misses_nothing() -> None:
    """With and without the short cut every step drafts the same, trials included."""
    asked, short = (Goodput(2, 4, costs(draft=2.0), (1, 2, 4)) for _ in range(2))
    decided: list[list[bool]] = [[], []]
    slots, room, num_rests = at(0, 1), np.full(2, 4), 0
    for plan in (asked, short):
        plan.admit(0), plan.admit(1)
    for _ in range(3000):
        decided[0].append(bool(asked.plan(slots, room).lengths.any()))
        rests = short.rest()
        num_rests += rests
        tried = not rests and bool(short.plan(slots, room).lengths.any())
        decided[1].append(tried)
    assert decided[0] == decided[1] and any(decided[0])
    assert num_rests > 2000


def test_where_nothing_may_be_drafted_a_plain_step_is_known_to_be_plain() -> None:
    plan = Goodput(1, 0, costs(), max_free=4)
    plan.admit(0)
    assert not plan.rest(), "nothing was decided yet"
    assert not plan.plan(at(0), np.array([4])).lengths.any()
    assert plan.rest() and plan.plain > 0


def look(looks: Looks, saved: float, took: float, num_rows: int = 16) -> bool:
    """A step of 60 ms, in which they look if that is due."""
    is_due = looks.is_due(num_rows)
    if is_due:
        looks.brought(saved)
        looks.took(took, num_rows)
    looks.passed(0.06)
    return is_due


def test_looking_in_vain_takes_a_small_share_of_the_time() -> None:
    looks = Looks()
    look(looks, 0.0, took=1.0)  # it was interrupted
    num = sum(look(looks, 0.0, took=0.001) for _ in range(1000))
    assert 0.7 * LOOK_SHARE < num * 0.001 / (1000 * 0.06) < LOOK_SHARE
    looks.brought(0.0), looks.passed(0.06)
    assert looks.is_due(2) and not looks.is_due(16), "few are asked more often"


def test_what_looks_bring_is_looked_for() -> None:
    looks = Looks()
    for _ in range(NUM_TIMED):
        assert look(looks, 0.0, took=0.5)
    assert not look(looks, 0.0, took=0.5), "in vain so far"
    looks.brought(1e-3)
    assert look(looks, 0.0, took=0.5), "what was found may go on"
    assert not look(looks, 0.0, took=0.5)
    # A request at a time: one look in five saves a quarter of a step.
    looks = Looks()
    looks.brought(0.015)
    found = [look(looks, 0.015 * (i % 5 == 0), 3e-4, 1) for i in range(100)]
    assert all(found)
    found = [look(looks, 0.0, 3e-4, 1) for _ in range(100)]
    assert found[0] and not all(found[50:]), "until they bring nothing any more"


def test_plain_steps_are_looked_at_less_and_less_often() -> None:
    plan = Goodput(1, 4, costs(), (1, 2, 4), looks_at_plain_steps=True)
    plan.admit(0)
    seen = [plan.plan(at(0), np.array([4])).lengths.any() for _ in range(1200)]
    plain = np.flatnonzero(~np.array(seen))
    looks = plain.reshape(-1, LOOK_STEPS)
    assert (np.diff(looks) == 1).all(), "some in a row"
    apart = looks[1:, 0] - looks[:-1, -1]
    assert apart.tolist() == [9, 17, 33, 65, 129, 257, 257, 257]
    plan._rest, plan._price, plan._drafting = 3, 1e9, 256  # of others, before a look
    assert not plan.plan(at(0), np.array([4])).lengths.any()
    assert not plan.rest(), "who would draft does not rest after it"
    usual = Goodput(1, 4, costs(), (1, 2, 4))
    usual.admit(0)
    assert all(usual.plan(at(0), np.array([4])).lengths.any() for _ in range(100))


def test_a_window_pays_where_contexts_are_long() -> None:
    """A draft step of all weights costs a step; what a window leaves out is what there
    is to gain."""
    of_context = ContextCosts(1e-3, 1e-4, 1.1e-3)
    same = StepCosts(ROWS, [1.0] * len(ROWS), [1.0] * len(ROWS), of_context)
    survival, room = np.cumprod(np.full((1, 4), 0.9), axis=1), np.array([4])
    for contexts, pays in (
        (Contexts(100.0, 100.0), False),
        (Contexts(8000.0, 8000.0), False),
        (Contexts(8000.0, 500.0), True),
    ):
        found = best_lengths(survival, room, same.within(1, contexts))
        assert bool(found.any()) is pays, contexts


@pytest.mark.parametrize(
    ("whole", "window", "better"),
    [(0.95, 0.5, WHOLE), (0.9, 0.85, WINDOW), (0.3, 0.3, WINDOW)],
)
def test_drafts_read_what_brings_more(whole: float, window: float, better: int) -> None:
    """A window that drafts as well is taken because it is cheaper; one that does not is
    left, whichever was looked at first."""
    costs = StepCosts(ROWS, [1.0] * 6, [0.1] * 6, ContextCosts(1e-4, 0.0, 1e-4))
    plan = Goodput(1, 8, costs, has_window=True)
    plan.admit(0)
    rng, contexts = np.random.default_rng(0), Contexts(4000.0, 500.0)
    reads = []
    for _ in range(400):
        found = plan.plan(at(0), np.array([8]), contexts=contexts)
        k = int(found.lengths[0])
        chance = whole if found.reads == WHOLE else window
        right = rng.random(k) < chance
        accepted = k if right.all() else int(right.argmin())
        kinds = np.array([found.reads])
        plan.acceptance.observe(at(0), np.array([k]), np.array([accepted]), kinds)
        reads.append(found.reads)
    late = np.array(reads[200:])
    assert (late == better).mean() > 0.9
    assert (late != better).any(), "tried again now and then"
    short = plan.plan(at(0), np.array([8]), contexts=Contexts(300.0, 300.0))
    assert short.reads == WHOLE


def test_what_contexts_cost_is_learnt_from_steps_of_others() -> None:
    truth = long_costs()
    found = long_costs(ContextCosts(2e-4, 2e-4, 2e-3))
    for step in range(1500):
        k, length = (0, 1, 4)[step % 3], (100.0, 2000.0, 8000.0)[step // 3 % 3]
        contexts = Contexts(length, length)
        real = truth.within(1, contexts)
        seconds = float(real.verify(1 + k) + k * real.draft(1))
        found.observe(1 + k, 1, k, seconds, 1, contexts)
    for length in (0.0, 1000.0, 8000.0):
        mine, real = (c.within(1, Contexts(length, length)) for c in (found, truth))
        ratio = [float(c.draft(1) / c.verify(5)) for c in (mine, real)]
        assert ratio[0] == pytest.approx(ratio[1], 0.15), length


# The best lengths


def rate_of(lengths: Any, survival: Any, of: StepCosts) -> float:
    tokens = len(lengths) + sum(
        row[:k].sum() for row, k in zip(survival, lengths, strict=True)
    )
    steps = max(lengths)
    rows = len(lengths) + sum(lengths)
    seconds = of.verify(rows) + steps * of.draft(len(lengths))
    return float(tokens / seconds)


@pytest.mark.parametrize("seed", range(20))
def test_no_lengths_are_better_than_the_best(seed: int) -> None:
    random = np.random.default_rng(seed)
    survival = np.cumprod(random.uniform(0.3, 1.0, (3, 4)), axis=1)
    of = costs(free_rows=random.uniform(2, 12), draft=random.uniform(0.05, 0.5))
    room = random.integers(0, 5, 3)
    found = best_lengths(survival, room, of)
    assert (found <= room).all()
    everything = itertools.product(*(range(most + 1) for most in room))
    best = max(rate_of(lengths, survival, of) for lengths in everything)
    reached = rate_of(found, survival, of)
    # Not drafting is given a small advantage.
    assert reached >= best / (1 + (0 if found.any() else MARGIN)) - 1e-9


def test_the_busier_the_machine_the_less_is_drafted() -> None:
    lengths = [
        best_lengths(np.cumprod(np.full((n, 6), 0.8), axis=1), np.full(n, 6), costs())
        for n in (1, 4, 16)
    ]
    totals = [found.mean() for found in lengths]
    assert totals[0] >= 3 and totals[0] > totals[1] > totals[2]


def test_beside_prompts_a_row_is_drafted_only_for_what_a_token_is_worth() -> None:
    # Eight rows are free, and of more every one costs an eighth of a step.
    many = np.cumprod(np.full((4, 6), 0.6), axis=1), np.full(4, 6)
    alone = best_lengths(*many, costs())
    beside = best_lengths(*many, costs(), Prompts(56, 1.0))
    assert alone.sum() > 0 == beside.sum()
    # Where rows stay free, prompts change nothing.
    flat = StepCosts(ROWS, [1.0] * len(ROWS), [0.1] * len(ROWS))
    unchanged = best_lengths(*many, flat, Prompts(32, 1.0))
    assert (best_lengths(*many, flat) == unchanged).all()
    # Prompts that hardly ever come change little.
    seldom = best_lengths(*many, costs(), Prompts(56, 0.02))
    often = best_lengths(*many, costs(), Prompts(56, 0.9))
    assert (seldom == alone).all() and seldom.sum() > often.sum()


def test_a_uniform_length_is_the_best_of_those_there_are() -> None:
    survival = np.cumprod(np.full((2, 8), 0.8), axis=1)
    room, lengths = np.full(2, 8), (1, 2, 4, 8)
    found = best_uniform(survival, room, costs(), lengths).lengths
    rates = {k: rate_of([k, k], survival, costs()) for k in lengths}
    assert found.tolist() == [max(rates, key=lambda k: rates[k])] * 2
    dear = best_uniform(survival, room, costs(free_rows=0.1), lengths)
    assert dear.lengths.sum() == 0
    short = best_uniform(survival, np.array([8, 1]), costs(), lengths)
    assert short.lengths[1] == 1
    many_steps = best_uniform(survival, room, costs(draft=2.0), lengths)
    free = best_uniform(survival, room, costs(draft=2.0), lengths, is_free=True)
    assert many_steps.lengths.sum() == 0 < free.lengths.sum() and free.is_free.all()


def test_a_request_that_is_never_right_is_not_drafted_for() -> None:
    survival = np.cumprod([[0.9] * 4, [0.01] * 4], axis=1)
    found = best_lengths(survival, np.array([4, 4]), costs())
    assert found[0] > 0 == found[1]


# Mixed sources


def mixed_rate(
    choice: Any, model: Any, free: Any, of: StepCosts, num_reqs: int
) -> float:
    """Tokens per second of a choice of (source, length) for each row."""
    chances = [(model, free)[is_free][r][:k] for r, (is_free, k) in enumerate(choice)]
    drafting = [k for is_free, k in choice if not is_free and k]
    seconds = float(of.verify(num_reqs + sum(k for _, k in choice)))
    if drafting:
        seconds += max(drafting) * float(of.draft(len(drafting)))
    return (num_reqs + sum(c.sum() for c in chances)) / seconds


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_of_sources_is_much_better_than_the_one_made(seed: int) -> None:
    """Each row takes the source that brings more at every number of steps, which is
    not always best of all, but never far from it."""
    random = np.random.default_rng(seed)
    of = costs(free_rows=random.uniform(2, 12), draft=random.uniform(0.05, 0.5))
    model = np.cumprod(random.uniform(0.3, 1.0, (3, 3)), axis=1)
    free = np.cumprod(random.uniform(0.0, 1.0, (3, 4)), axis=1)
    free[random.integers(3)] = 0.0  # nothing is proposed there
    ways = [(False, k) for k in range(4)] + [(True, k) for k in range(1, 5)]
    best = max(
        mixed_rate(choice, model, free, of, 3)
        for choice in itertools.product(ways, repeat=3)
    )
    mix = best_mix(model, free, of)
    made = zip(mix.is_free.tolist(), mix.lengths.tolist(), strict=True)
    assert mixed_rate([*made], model, free, of, 3) > 0.95 * best


def test_where_all_rows_copy_no_step_is_run() -> None:
    model, free = np.full((2, 3), 0.9), np.full((2, 6), 0.95)
    of = costs(free_rows=64)
    mix = best_mix(np.cumprod(model, axis=1), np.cumprod(free, axis=1), of)
    assert mix.is_free.all() and mix.lengths.min() > 3


def test_a_row_without_a_proposal_is_drafted_for_by_the_model() -> None:
    model, free = np.full((2, 3), 0.9), np.array([[0.95] * 6, [0.0] * 6])
    of = costs(free_rows=64, draft=0.05)
    mix = best_mix(np.cumprod(model, axis=1), np.cumprod(free, axis=1), of)
    assert mix.is_free[0] and not mix.is_free[1]
    assert mix.lengths[0] > 3 >= mix.lengths[1] > 0


def test_a_kind_that_was_given_up_is_tried_again_and_found_out() -> None:
    plan = Goodput(1, 4, costs(), max_free=8, free_guesses=[*NO_GUESS, *NO_GUESS])
    nothing, room = np.zeros(1, int), np.array([8])
    for _ in range(20):
        plan.acceptance.observe(at(0), np.array([4]), np.array([4]))
        plan.free.observe(at(0), np.array([8]), nothing, np.array([1]))
    copied = [0, 0]
    for good in (False, True):
        for _ in range(20 * TRY_EVERY):
            found = plan.plan(
                at(0), room, proposed=Proposed(np.array([8]), np.array([1]))
            )
            if found.is_free[0]:
                copied[good] += 1
                kept = found.lengths if good else nothing
                plan.free.observe(at(0), found.lengths, kept, np.array([1]))
    assert copied[False] <= 20, "once in a while"
    assert copied[True] > 10 * TRY_EVERY


@pytest.mark.parametrize("num_reqs", [1, 16])
def test_trials_of_copies_take_no_more_than_their_share(num_reqs: int) -> None:
    """Sixteen requests pass over a copy sixteen times a step, and a row of theirs costs
    what the step earns by several."""
    of = StepCosts((1, 16, 64), [1.0, 1.0, 4.0], [1.0] * 3, beside=BesideCosts(0.1))
    plan = Goodput(num_reqs, 0, of, max_free=8, free_guesses=NO_GUESS)
    slots, nothing = np.arange(num_reqs), np.zeros(num_reqs, int)
    copies = Proposed(np.full(num_reqs, 8), nothing)
    for slot in slots:
        plan.admit(slot)
    seconds, trials = 0.0, 0
    for i in range(4000):
        found = plan.plan(slots, np.full(num_reqs, 8), proposed=copies)
        if found.lengths.any():
            plan.free.observe(slots, found.lengths, nothing, nothing)
        if i >= 1000:
            rows = num_reqs + found.lengths.sum()
            seconds += float(of.verify(rows)) + 0.1 * found.lengths.any()
            trials += found.lengths.any()
    assert trials > 10 and seconds < 1.007 * 3000


# Acceptance


def test_kinds_of_drafts_are_told_apart() -> None:
    found = Acceptance(num_slots=2, max_drafts=3, guesses=[*NO_GUESS, *NO_GUESS])
    for _ in range(100):
        found.observe(at(0, 1), np.array([3, 3]), np.array([0, 3]), np.array([0, 1]))
    found.admit(0)
    bad, good = (found.survival(at(0), np.array([kind]))[0] for kind in (0, 1))
    assert bad[0] < 0.05 and good[2] > 0.85


def test_kinds_begin_with_what_is_guessed_of_them() -> None:
    found = Acceptance(1, 3, guesses=[(0.3, 0.45), (0.9, 0.92)])
    for kind, (first, then) in enumerate([(0.3, 0.45), (0.9, 0.92)]):
        chances = [first, first * then, first * then * then]
        kinds = np.array([kind])
        assert found.survival(at(0), kinds)[0] == pytest.approx(chances)
    for _ in range(40):
        found.observe(at(0), np.array([2]), np.array([2]), np.array([0]))
    found.admit(0)
    survival = found.survival(at(0), np.array([0]))[0]
    assert survival[1] > 0.8, "a guess is soon outweighed"


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.03), (0.1, 0.8)])
def test_texts_that_change_are_soon_found_out(before: float, after: float) -> None:
    found, rng = Acceptance(num_slots=1, max_drafts=4), np.random.default_rng(0)

    def see(chance: float, num_steps: int) -> float:
        for step in range(num_steps):
            if step % 30 == 0:
                found.admit(0)
            accepted = np.minimum(rng.geometric(1 - chance, 1) - 1, 4)
            found.observe(at(0), np.array([4]), accepted)
        return float(found.population()[0])

    assert see(before, 1000) == pytest.approx(before, abs=0.05)
    assert see(after, 60) == pytest.approx(after, abs=0.15)


def test_requests_that_differ_are_no_change_of_texts() -> None:
    """As far as those of one text do: their logits deviate by a half."""
    found, rng = Acceptance(num_slots=1, max_drafts=4), np.random.default_rng(1)
    kept = []
    for _ in range(100):
        found.admit(0)
        chance = 1 / (1 + np.exp(-(0.8 + 0.5 * rng.standard_normal())))
        for _ in range(40):
            accepted = np.minimum(rng.geometric(1 - chance, 1) - 1, 4)
            found.observe(at(0), np.array([4]), accepted)
            kept.append(found.num_tried(0))
    assert np.mean(np.array(kept[400:]) > 100) > 0.95, "what was seen is not forgotten"


def test_a_new_request_is_taken_to_be_like_those_before_it() -> None:
    found = Acceptance(num_slots=2, max_drafts=3)
    for _ in range(600):
        found.observe(at(0), np.array([3]), np.array([1]))
    found.admit(1)
    assert found.population()[0] == pytest.approx(1, abs=0.03)
    assert found.population()[1] == pytest.approx(0, abs=0.03)
    assert found.survival(at(1))[0, 0] > 0.95 > 0.05 > found.survival(at(1))[0, 1]


def test_a_position_never_tried_is_taken_to_be_like_the_one_before() -> None:
    found = Acceptance(num_slots=1, max_drafts=4)
    for _ in range(50):
        found.observe(at(0), np.array([1]), np.array([1]))
    assert found.population() == pytest.approx(np.full(4, 1), abs=0.02)


def test_one_bad_token_does_not_keep_a_position_from_being_tried() -> None:
    found = Acceptance(1, 8)
    for _ in range(20):
        found.observe(at(0), np.array([3]), np.array([3]))
    before = found.population()[3]
    found.observe(at(0), np.array([7]), np.array([3]))
    after = found.population()
    assert before > after[3] > 0.85, "it is never tried where it is not worth drafting"
    for _ in range(200):
        found.observe(at(0), np.array([7]), np.array([3]))
    assert found.population()[3] < 0.2, "but what is always wrong is found out"


def test_a_request_shows_how_it_differs() -> None:
    found = Acceptance(num_slots=2, max_drafts=2)
    for _ in range(60):
        found.observe(at(0, 1), np.array([2, 2]), np.array([2, 0]))
    good, bad = found.survival(at(0, 1))[:, 0]
    assert good > 0.75 and bad < 0.25, "where the usual chance is a half"
    for _ in range(300):
        found.observe(at(1), np.array([0]), np.array([0]))
    assert found.survival(at(1))[0, 0] > bad + 0.1, "what it showed fades"


def test_untried_tokens_teach_nothing() -> None:
    found = Acceptance(num_slots=1, max_drafts=4)
    found.observe(at(0), np.array([4]), np.array([1]))
    first = found.population()
    assert first[0] > first[1] and first[2] == first[3] == pytest.approx(first[1])


# Goodput


def run(plan: Goodput, chance: float, steps: int, of: StepCosts, seed: int = 0) -> Any:
    """Seconds and tokens of some steps of one request."""
    random, seconds, tokens = np.random.default_rng(seed), 0.0, 0
    for _ in range(steps):
        lengths = plan.plan(at(0), np.array([8])).lengths
        fate = np.cumprod(random.random(8) < chance).sum()
        accepted = np.minimum(lengths, fate)
        spent = float(of.verify(1 + lengths[0]) + lengths[0] * of.draft(1))
        plan.acceptance.observe(at(0), lengths, accepted)
        plan.costs.observe(1 + int(lengths[0]), 1, int(lengths[0]), spent)
        seconds, tokens = seconds + spent, tokens + int(accepted[0]) + 1
    return seconds, tokens


def test_a_draft_that_is_always_wrong_costs_next_to_nothing() -> None:
    plan = Goodput(1, 8, costs())
    run(plan, 0.0, 30, costs())
    seconds, tokens = run(plan, 0.0, 1000, costs())
    assert tokens / seconds > 0.99 / float(costs().verify(1))


def test_a_draft_that_turns_good_is_found_out() -> None:
    plan = Goodput(1, 8, costs())
    run(plan, 0.0, 500, costs())
    run(plan, 0.95, 1500, costs())
    seconds, tokens = run(plan, 0.95, 300, costs())
    assert tokens / seconds > 2 / float(costs().verify(1))


def test_a_trial_is_one_token_for_everybody() -> None:
    plan = Goodput(2, 8, costs(free_rows=0.1))
    trials = 0
    for _ in range(2000):
        found = plan.plan(at(0, 1), np.array([8, 0]))
        assert found.lengths.tolist() in ([0, 0], [1, 0])
        assert found.is_trial == found.lengths.any()
        trials += found.is_trial
        plan.acceptance.observe(at(0, 1), found.lengths, found.lengths)
    assert 0 < trials < 100


def trials_in(plan: Goodput, num_steps: int, is_right: bool) -> list[int]:
    """The steps of one request in which drafting is tried; nothing else drafts."""
    found = []
    for step in range(num_steps):
        planned = plan.plan(at(0), np.array([8]))
        found += [step] * planned.is_trial
        accepted = planned.lengths if is_right else 0 * planned.lengths
        plan.acceptance.observe(at(0), planned.lengths, accepted)
    return found


def test_what_is_not_worth_it_is_asked_again_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And at once for other requests, and after something was verified."""
    asked: list[int] = []

    def nothing(survival: Any, *_: Any) -> Any:
        asked.append(num := len(survival))
        return Mix(np.zeros(num, np.int64), np.zeros(num, bool), 0.0)

    monkeypatch.setattr(goodput, "best_mix", nothing)
    plan = Goodput(2, 8, costs())
    for rest in (REST, 2 * REST, LONGEST_REST, LONGEST_REST):  # longer and longer
        asked.clear()
        plan._owed = -np.inf  # for a trial
        for _ in range(1 + rest):
            assert not plan.plan(at(0), np.array([8])).is_trial
        assert asked == [1]
    plan.plan(at(0), np.array([8]))
    assert asked == [1, 1]
    plan._owed = 0.0
    plan.plan(at(1), np.array([8]))
    plan.plan(at(0, 1), np.array([8, 8]))
    assert asked == [1, 1, 1, 2]
    plan.admit(1)
    plan.plan(at(0, 1), np.array([8, 8]))
    assert asked == [1, 1, 1, 2, 2]
    while not plan.plan(at(0, 1), np.array([8, 8])).is_trial:
        pass
    num_asked = len(asked)
    plan.plan(at(0, 1), np.array([8, 8]))
    assert len(asked) == num_asked + 1


def test_each_trial_in_vain_makes_the_next_one_wait_longer() -> None:
    plan = Goodput(1, 8, costs(draft=2.0))
    found = np.array(trials_in(plan, 30_000, is_right=False))
    waits = np.diff(found)
    assert (np.diff(waits[:6]) > 0).all(), waits
    assert waits[-1] > 3 * waits[0]
    assert waits[-1] == pytest.approx(waits[-2], rel=0.1), "to a limit"


def test_a_trial_that_was_right_makes_the_next_one_come_soon() -> None:
    plan = Goodput(1, 8, costs(draft=2.0))
    in_vain = np.diff(trials_in(plan, 30_000, is_right=False))
    again = np.diff(trials_in(plan, 8_000, is_right=True))
    assert again[1:].mean() < 0.3 * in_vain[-3:].mean()


def test_what_was_found_before_is_what_new_requests_are_like() -> None:
    acceptance = Acceptance(2, 3)
    acceptance.expect([0.9, 0.5])
    found = acceptance.population()
    assert found[:2] == pytest.approx([0.9, 0.5], abs=0.08)
    assert found[2] == pytest.approx(found[1], abs=0.02), "like the one before it"
    acceptance.admit(1)
    assert acceptance.survival(at(1))[0, 0] == pytest.approx(found[0])
    for _ in range(60):
        acceptance.observe(at(0), np.array([1]), np.array([0]))
    assert acceptance.population()[0] < 0.45, "and is soon outweighed"


def test_no_room_and_no_requests_draft_nothing() -> None:
    plan = Goodput(2, 8, costs())
    assert plan.plan(at(0, 1), np.array([0, 0])).num_steps == 0
    assert plan.plan(np.zeros(0, int), np.zeros(0, int)).num_steps == 0
    assert plan.plan(at(0), np.array([2])).num_steps <= 2


# Stop rules


def test_threshold_moves_as_in_draft_and_verify() -> None:
    rule = Threshold(1, max_drafts=4, start=0.8, target=0.9)
    rule.observe(at(0), np.array([3]), np.array([0]))  # AR 0.45, too low: up
    assert rule.threshold[0] == pytest.approx(0.9 * 0.8 + 0.1 * 0.81)
    rule = Threshold(1, max_drafts=4, start=0.8, target=0.9)
    rule.observe(at(0), np.array([3]), np.array([3]))  # AR 0.95: down
    assert rule.threshold[0] == pytest.approx(0.9 * 0.8 + 0.1 * 0.79)
    rule = Threshold(1, max_drafts=4, start=0.8, target=0.9)
    rule.observe(at(0), np.array([4]), np.array([4]))  # the maximum was drafted
    assert rule.threshold[0] == pytest.approx(0.8)
    assert rule.goes_on(at(0, 0), 0, np.array([0.79, 0.81])).tolist() == [False, True]


def test_threshold_of_a_new_request_is_what_others_found() -> None:
    rule = Threshold(2, max_drafts=4)
    for _ in range(2000):
        rule.observe(at(0), np.array([3]), np.array([0]))
    rule.admit(1)
    assert rule.threshold[1] == pytest.approx(rule.threshold[0], abs=0.1)
    assert rule.threshold[1] > 0.9


def test_thompson_goes_on_as_often_as_drafts_are_accepted() -> None:
    rule = Thompson(1, max_drafts=8)
    random = np.random.default_rng(0)
    for _ in range(400):
        drafted = np.array([4])
        accepted = np.minimum(4, np.cumprod(random.random(8) < 0.75).sum())
        rule.observe(at(0), drafted, np.array([accepted]))
    went = np.mean([rule.goes_on(at(0), 0, np.ones(1))[0] for _ in range(4000)])
    # Posterior of some 200 remembered trials: deviation 0.03; the draws add 0.007.
    assert went == pytest.approx(0.75, abs=0.1)
    rule = Thompson(2, max_drafts=8)
    for _ in range(400):
        rule.observe(at(0), np.array([4]), np.array([0]))
    rule.admit(1)
    a, b = rule.posterior(at(1))[0]
    assert a / (a + b) < 0.1, "a new request starts from the population"


def told(random: Any, num: int, shift: float, scale: float) -> Any:
    """Fate and confidence of tokens whose logits are `shift + scale * told`."""
    logit = random.normal(0.5, 1.5, num)
    fate = random.random(num) < 1 / (1 + np.exp(-(shift + scale * logit)))
    return fate, 1 / (1 + np.exp(-logit))


def taught(rule: CalibratedThompson, shift: float, scale: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(1500):
        fate, confidence = told(random, 2, shift, scale)
        for step in range(2):
            rule.goes_on(at(0), step, confidence[step : step + 1])
        rule.observe(at(0), np.array([2]), np.array([np.cumprod(fate).sum()]))


def test_calibration_finds_how_confidence_and_acceptance_go_together() -> None:
    rule = CalibratedThompson(1, max_drafts=4)
    taught(rule, shift=-1.0, scale=0.5, seed=1)
    # Some 200 remembered trials: the posterior's deviations are about 0.2.
    assert rule._mean == pytest.approx([-1.0, 0.5], abs=0.5)
    taught(rule, shift=1.0, scale=1.5, seed=2)
    assert rule._mean == pytest.approx([1.0, 1.5], abs=0.7), "a drift is followed"


def test_calibrated_drafts_further_where_the_draft_is_surer() -> None:
    rule = CalibratedThompson(1, max_drafts=8)
    taught(rule, shift=0.0, scale=1.0, seed=1)
    went = [
        np.mean([rule.goes_on(at(0), 0, np.array([s]))[0] for _ in range(200)])
        for s in (0.05, 0.5, 0.99)
    ]
    assert went[0] <= went[1] <= went[2] and went[0] < 0.5 < went[2]


# All of them, where the best is known


@pytest.fixture(scope="module")
def shares() -> dict[str, dict[str, float]]:
    """Tokens per second over the oracle's, by controller and scene."""
    script = runpy.run_path(str(SIMULATION))
    found: dict[str, dict[str, float]] = {}
    for scene in script["SCENES"]:
        slots = script["World"](scene, 0).num_slots
        rates = {
            name: script["rate"](script["simulate"](scene, one, 0, 1200))
            for name, one in script["controllers"](slots, 0).items()
        }
        for name, rate in rates.items():
            found.setdefault(name, {})[scene.name] = rate / rates["oracle"]
    return found


def test_goodput_is_near_the_oracle_everywhere(
    shares: dict[str, dict[str, float]],
) -> None:
    for scene, share in shares["goodput"].items():
        assert share > 0.9, scene
    plain = shares["fixed 0"]
    assert shares["goodput"]["hopeless"] > 0.98 * plain["hopeless"]


def test_no_fixed_length_is_near_the_oracle_everywhere(
    shares: dict[str, dict[str, float]],
) -> None:
    fixed = [found for name, found in shares.items() if name.startswith("fixed")]
    assert all(min(found.values()) < 0.9 for found in fixed)


def test_calibration_gains_on_thompson_wherever_drafting_pays(
    shares: dict[str, dict[str, float]],
) -> None:
    for scene in ("easy", "middling", "by request", "drifting"):
        assert shares["thompson-calibrated"][scene] > shares["thompson"][scene], scene


def test_who_waits_gives_up_a_place_that_another_needs() -> None:
    """A worker knows of preempted requests, too: more than a step may have."""
    slots, begun = Slots(2), []
    slots.admit(["a", "b"], ["a", "b"], begun.append)
    place = int(slots.of(["b"])[0])
    slots.admit(["a"], ["a", "b"], begun.append)
    assert "b" in slots, "it waits, and nobody needs its place"
    slots.admit(["a", "c"], ["a", "b", "c"], begun.append)
    assert "b" not in slots and int(slots.of(["c"])[0]) == place
    slots.admit(["b", "c"], ["a", "b", "c"], begun.append)
    assert len(begun) == 4 and "a" not in slots
    with pytest.raises(IndexError):
        slots.admit(["a", "b", "c"], ["a", "b", "c"], begun.append)
