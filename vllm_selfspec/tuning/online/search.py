"""`OnlineSearch`: finds a better skip set while serving, by duels.

One rule: no clock and no chance of its own. Workers of one engine that are shown the
same rows decide the same, and so draft with the same sublayers.

A candidate is first one of the plans that `tune` starts from, too, evenly spread sets
and early exits: far from each other, so that few rows tell. Then it is the incumbent
with one or two sublayers switched, or, now and then, such a plan or one that served
before: another task may want it. Both say the next token on the same rows of contexts,
so that what is hard in a text is hard for both. The candidate takes over when it is
better beyond noise, by expected tokens per second; it is given up when it is worse
beyond noise, or was not better after many rows. Which sublayers to switch is drawn from
what earlier duels showed (Thompson sampling), where SWIFT draws at random and by a
Gaussian process (arXiv 2410.06916, section 4.2).

When the incumbent's drafts are accepted more or less often than they used to be, the
texts have changed: plans that served before and the simple ones are tried again.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.tuning.candidates import changed
from vllm_selfspec.tuning.online.text_change import TextChange

# Deviations that count as more than noise.
BEYOND_NOISE = 2.0
# Rows before anything is concluded, and after which a candidate has had its chance.
MIN_ROWS, MAX_ROWS = 64, 1024
# And for one of a list, of which another may be far better.
MAX_ROWS_LISTED = 128
# What switching a sublayer gains is, before it was tried, nothing give or take this
# share of plain vLLM's speed; and what was seen counts by this much less each duel.
USUAL_GAIN = 0.05
FADE = 0.98
# Plans that served before and may be wanted again: how many, and how often one of them,
# or a simple one, is tried in place of a new one.
MAX_FORMER, FORMER_SHARE = 8, 0.2
PAIR_SHARE = 0.3  # of the new candidates switch two sublayers
# What a candidate that switches more has won says little of any single sublayer.
MAX_TOLD_APART = 2

# Expected tokens per second over plain vLLM's of a plan whose draft tokens are right
# with a given chance.
Speed = Callable[[DraftPlan, float], float]


@dataclass
class _Switch:
    """What is known of switching one sublayer.

    Attributes:
        gain: Gains that were seen, each over its variance, added up.
        precision: One over those variances, added up.
    """

    gain: float = 0.0
    precision: float = 0.0

    def draw(self, chance: random.Random) -> float:
        """A gain by the posterior, the prior being N(0, USUAL_GAIN^2)."""
        precision = self.precision + USUAL_GAIN**-2
        return chance.gauss(self.gain / precision, precision**-0.5)


@dataclass
class _Duel:
    """Rows that both sides were asked about.

    Attributes:
        num: Rows.
        right: Rows on which the incumbent was right.
        right_candidate: The candidate.
        right_both: Both.
    """

    num: int = 0
    right: int = 0
    right_candidate: int = 0
    right_both: int = 0

    def add(self, right: Sequence[bool], right_candidate: Sequence[bool]) -> None:
        pairs = [*zip(right, right_candidate, strict=True)]
        self.num += len(pairs)
        self.right += sum(a for a, _ in pairs)
        self.right_candidate += sum(b for _, b in pairs)
        self.right_both += sum(a and b for a, b in pairs)


class OnlineSearch:
    """One incumbent against one candidate at a time.

    Attributes:
        incumbent: What drafts.
        candidate: What is tried beside it.
        num_duels: That were decided.
        num_adopted: How often the incumbent was replaced.
        num_changes: Of the texts, that were noticed.
    """

    def __init__(self, start: DraftPlan, seed: int = 0) -> None:
        """With `start` for the first incumbent."""
        self.incumbent = start
        self.num_duels = self.num_adopted = self.num_changes = 0
        self._chance = random.Random(seed)
        self._choices = start.choices(is_exchangeable=True)
        self._switches = {name: _Switch() for name in self._choices}
        self._served: Counter[DraftPlan] = Counter()  # batches of rows, by incumbent
        self._simple = [*start.candidates(is_exchangeable=True)]
        self._texts = TextChange()
        self._try_first(self._simple)

    def _try_first(self, plans: Iterable[DraftPlan]) -> None:
        """Before new ones."""
        self._to_try = iter(plans)
        self._begin()

    def _former(self) -> list[DraftPlan]:
        """Plans that served, those that did so longest first."""
        return [plan for plan, _ in self._served.most_common(MAX_FORMER)]

    def _begin(self) -> None:
        self.candidate = self._propose()
        self._duel = _Duel()

    def _propose(self) -> DraftPlan:
        self._is_listed = True
        for plan in self._to_try:
            if plan != self.incumbent:
                return plan
        self._is_listed = False
        others = [p for p in (*self._former(), *self._simple) if p != self.incumbent]
        if others and self._chance.random() < FORMER_SHARE:
            return self._chance.choice(others)
        drawn = {which: s.draw(self._chance) for which, s in self._switches.items()}
        promising = sorted(drawn, key=lambda which: -drawn[which])
        ways = [[which] for which in promising]
        if self._chance.random() < PAIR_SHARE:
            ways.insert(0, promising[:2])
        for way in ways:
            found = changed(self.incumbent, [self._switched(name) for name in way])
            if found is not None:
                return found
        raise AssertionError("a model has at least two sublayers")

    def _switched(self, name: str) -> tuple[str, Any]:
        """A parameter, and another value than the incumbent's."""
        now = self.incumbent.params()[name]
        others = [value for value in self._choices[name] if value != now]
        return name, others[0] if len(others) == 1 else self._chance.choice(others)

    def verified(self, accepted: Sequence[bool]) -> None:
        """Learns what verifications said, and tries what is known where the texts have
        changed.

        Args:
            accepted: Whether the incumbent's first draft token was, by request that
                had one.
        """
        if self._texts.is_told_by(accepted):
            self.num_changes += 1
            # The rows of this duel are of other texts. No plan is tried twice.
            self._try_first(dict.fromkeys([*self._former(), *self._simple]))

    def observe(
        self, right: Sequence[bool], right_candidate: Sequence[bool], speed: Speed
    ) -> bool:
        """Learns from rows of contexts.

        Args:
            right: Whether the incumbent says the token that came, by row.
            right_candidate: Whether the candidate does.
            speed: What that is worth at present.

        Returns:
            Whether the incumbent was replaced.
        """
        self._served[self.incumbent] += 1
        self._duel.add(right, right_candidate)
        if self._duel.num < MIN_ROWS:
            return False
        gain, noise = self._gain(speed)
        is_better = gain > BEYOND_NOISE * noise
        most = MAX_ROWS_LISTED if self._is_listed else MAX_ROWS
        is_hopeless = gain < -noise or self._duel.num >= most
        if is_better or is_hopeless:
            self._conclude(gain, noise, is_better)
        return is_better

    def _gain(self, speed: Speed) -> tuple[float, float]:
        """How much faster the candidate is, and the deviation of that."""
        duel = self._duel
        # None right of few rows is no proof of never.
        shares = [
            (n + 0.5) / (duel.num + 1) for n in (duel.right, duel.right_candidate)
        ]
        plans = (self.incumbent, self.candidate)
        values = [speed(*pair) for pair in zip(plans, shares, strict=True)]
        step = 0.01
        slopes = [
            (value - speed(plan, share - step)) / step
            for plan, share, value in zip(plans, shares, values, strict=True)
        ]
        p, q = shares
        covariance = duel.right_both / duel.num - p * q
        variance = (
            slopes[0] ** 2 * p * (1 - p)
            + slopes[1] ** 2 * q * (1 - q)
            - 2 * slopes[0] * slopes[1] * covariance
        ) / duel.num
        # Where all rows agreed, one more of each kind could still come.
        least = (slopes[1] / duel.num) ** 2
        return values[1] - values[0], sqrt(max(variance, least, 1e-12))

    def _conclude(self, gain: float, noise: float, is_better: bool) -> None:
        self.num_duels += 1
        before, after = self.incumbent.params(), self.candidate.params()
        switched = [name for name in self._choices if before[name] != after[name]]
        for switch in self._switches.values():
            switch.gain *= FADE
            switch.precision *= FADE
        if len(switched) <= MAX_TOLD_APART:
            for switch in map(self._switches.__getitem__, switched):
                switch.gain += gain / len(switched) / noise**2
                switch.precision += noise**-2
                if is_better:  # from now on it would be switched back
                    switch.gain = -switch.gain
        if is_better:
            self.incumbent = self.candidate
            self.num_adopted += 1
            self._texts = TextChange()
        self._begin()
