"""Stop rules: whether a row that has just drafted a token drafts another.

One rule: the drawn token is kept, then drafting may stop. That keeps sampling lossless.
Rejection sampling makes the first i emitted tokens the target's in distribution for
whatever draft distributions q_1..q_i they were proposed from, provided that token i,
once drawn from q_i, is verified. A stop rule sees tokens 1..i only after they are among
those to be verified; it chooses whether there is a token i + 1, and if there is none
the target itself samples there. So its choice, however it depends on tokens 1..i, only
selects between two lossless ways to go on. Were the token dropped whose draw made the
rule stop, unlikely draws would be lost, and the text biased towards likely ones.

State lies in arrays with a slot for each request; a new request starts from what those
before it have shown.
"""

from typing import Protocol

import numpy as np

from vllm_selfspec.draft_length.trials import logit, sigmoid, trials
from vllm_selfspec.draft_length.types import Bools, Floats, Ints, Slots

# D&V, section 3.2 and its code: see `Threshold`.
TARGET_ACCEPTANCE = 0.9
FIRST_THRESHOLD = 0.8
THRESHOLD_STEP = 0.01
THRESHOLD_KEPT = 0.9
ACCEPTANCE_KEPT = 0.5
# How fast the prior of new requests follows those that are running.
PRIOR_RATE = 0.02
# What a request's own trials weigh against the prior, and how long both are remembered.
PRIOR_TRIALS = 8.0
REMEMBERED_TRIALS = 200.0
CONFIDENCE_LIMIT = 1e-4


class StopRule(Protocol):
    """What a drafting loop asks; arrays are of the rows that are asked about."""

    def admit(self, slot: int) -> None:
        """A new request takes the place `slot`."""
        ...

    def goes_on(self, slots: Slots, step: int, confidence: Floats) -> Bools:
        """Whether to draft another token; asked after every token, the last one too.

        Args:
            slots: The rows that have not stopped, `[n]`.
            step: Of the token that was just drawn, from 0.
            confidence: The draft's probability of that token, `[n]`.
        """
        ...

    def observe(self, slots: Slots, drafted: Ints, accepted: Ints) -> None:
        """Learns from a verification.

        Args:
            slots: The requests that had drafts in it, `[n]`.
            drafted: How many, above 0, `[n]`.
            accepted: How many of them were accepted, `[n]`.
        """
        ...

    def beliefs(self) -> dict[str, float]:
        """What it takes new requests to be like, to be shown."""
        ...


class Threshold:
    """D&V's adaptive exit: stop where the draft is less sure than a threshold.

    After each verification, with AR a running acceptance rate (D&V, section 3.2):

        AR  <- 0.5 AR + 0.5 accepted / drafted
        th' <- th + 0.01 if AR < 0.9; th if the maximum was drafted; else th - 0.01
        th  <- 0.9 th + 0.1 th'

    Attributes:
        threshold: Of each slot.
    """

    def __init__(
        self,
        num_slots: int,
        max_drafts: int,
        start: float = FIRST_THRESHOLD,
        target: float = TARGET_ACCEPTANCE,
    ) -> None:
        """For `num_slots` requests at a time, and drafts of up to `max_drafts`."""
        self.threshold = np.full(num_slots, start)
        self._rate = np.full(num_slots, target)
        self._max_drafts, self._target = max_drafts, target
        self._prior = (start, target)

    def admit(self, slot: int) -> None:
        """See `StopRule`."""
        self.threshold[slot], self._rate[slot] = self._prior

    def goes_on(self, slots: Slots, step: int, confidence: Floats) -> Bools:
        """See `StopRule`."""
        found: Bools = confidence >= self.threshold[slots]
        return found

    def observe(self, slots: Slots, drafted: Ints, accepted: Ints) -> None:
        """See `StopRule`."""
        if not len(slots):
            return
        rate = ACCEPTANCE_KEPT * self._rate[slots]
        rate += (1 - ACCEPTANCE_KEPT) * accepted / drafted
        move = np.where(drafted >= self._max_drafts, 0.0, -THRESHOLD_STEP)
        move = np.where(rate < self._target, THRESHOLD_STEP, move)
        threshold = self.threshold[slots] + (1 - THRESHOLD_KEPT) * move
        self.threshold[slots] = np.clip(threshold, 0.0, 1.0)
        self._rate[slots] = rate
        kept = (1 - PRIOR_RATE) ** len(slots)
        self._prior = (
            kept * self._prior[0] + (1 - kept) * float(threshold.mean()),
            kept * self._prior[1] + (1 - kept) * float(rate.mean()),
        )

    def beliefs(self) -> dict[str, float]:
        """See `StopRule`."""
        return {"threshold": self._prior[0], "acceptance": self._prior[1]}


class Thompson:
    """EESD's Beta-TS: a draw from the posterior of acceptance decides to go on.

    A request's drafts are accepted with an unknown chance, of which Beta(a, b) is what
    is known: a accepted and b rejected ones. After each token a chance is drawn from
    it, and with that chance drafting goes on. Counts fade, so that drift is followed;
    a new request has the population's mean with the weight of `PRIOR_TRIALS`.
    """

    def __init__(self, num_slots: int, max_drafts: int, seed: int = 0) -> None:
        """For `num_slots` requests at a time, and drafts of up to `max_drafts`."""
        self._random = np.random.default_rng(seed)
        self._prior = np.array([0.7, 0.3]) * PRIOR_TRIALS
        self._counts = np.zeros((num_slots, 2))  # accepted, rejected

    def admit(self, slot: int) -> None:
        """See `StopRule`."""
        self._counts[slot] = 0.0

    def posterior(self, slots: Slots) -> Floats:
        """a and b, `[n, 2]`."""
        prior = self._prior * (PRIOR_TRIALS / self._prior.sum())
        found: Floats = prior + self._counts[slots]
        return found

    def goes_on(self, slots: Slots, step: int, confidence: Floats) -> Bools:
        """See `StopRule`."""
        chance = self._random.beta(*self.posterior(slots).T)
        found: Bools = self._random.random(len(slots)) < chance
        return found

    def observe(self, slots: Slots, drafted: Ints, accepted: Ints) -> None:
        """See `StopRule`."""
        new = np.stack([accepted, accepted < drafted], axis=1).astype(float)
        fade = np.exp(-new.sum(axis=1, keepdims=True) / REMEMBERED_TRIALS)
        self._counts[slots] = fade * self._counts[slots] + new
        total = new.sum(axis=0)
        self._prior = np.exp(-total.sum() / REMEMBERED_TRIALS) * self._prior + total
        self._prior = np.maximum(self._prior, 0.05)

    def beliefs(self) -> dict[str, float]:
        """See `StopRule`."""
        return {"acceptance": float(self._prior[0] / self._prior.sum())}


class CalibratedThompson:
    """Calibration-TS: the posterior of acceptance, corrected by the draft's confidence.

    Model. A draft that gives its token the probability s is right with the chance

        P(accepted | s) = sigmoid(w . x),   x = (1, logit s),

    which for w = (0, 1) says that its confidence is the truth, and else how it must be
    corrected: w_0 < 0 for a draft that is too sure, w_1 < 1 for one whose confidence
    says little. Before anything is seen w ~ N((0, 1), P^-1).

    Update. After a verification the log posterior gains, for every tried token (all
    accepted ones and the first rejected) with y = 1 if it was accepted and
    p = sigmoid(w . x),

        y log p + (1 - y) log(1 - p),   gradient (y - p) x,   Hessian -p (1 - p) x x^T.

    One Newton step from the last mean m keeps the posterior Gaussian (Laplace):

        P <- P + sum p (1 - p) x x^T,   m <- m + P^-1 sum (y - p) x.

    Before it P fades towards the prior's, P <- g P + (1 - g) P_0, so that a drifting
    draft is followed.

    Decision. In each propose every row draws its own w from the posterior and acts as
    would be best were it the truth. With S the chance under w that all tokens so far
    are accepted, one more token brings S t tokens, t being the mean of p(w) over the
    last tokens of the request, for the price of a draft step and a row to verify. It is
    drafted if that is no worse than what the engine makes of its time, which is the
    tokens per plain step E / (v + k c) so far. As the posterior narrows this is the
    best length; while it is wide, some rows draft too far and some too short, which is
    what narrows it.
    """

    def __init__(
        self,
        num_slots: int,
        max_drafts: int,
        token_cost: float = 0.25,
        seed: int = 0,
    ) -> None:
        """For `num_slots` requests at a time, and drafts of up to `max_drafts`.

        Args:
            num_slots: Requests at a time.
            max_drafts: The longest draft.
            token_cost: Of a draft token, drafted and verified, over a plain step.
            seed: Of the draws.
        """
        self._random = np.random.default_rng(seed)
        self._mean = np.array([0.0, 1.0])
        self._first_precision = np.diag([2.0, 4.0])
        self._precision = self._first_precision.copy()
        self._token_cost = token_cost
        self._rate = 1.0  # tokens per plain step's time
        self._usual = np.full(num_slots, 0.7)  # t
        self._drawn = np.tile(self._mean, (num_slots, 1))
        self._survival = np.ones(num_slots)
        # Of the tokens being drafted, [num_slots, max_drafts]
        self._confidence = np.full((num_slots, max_drafts), 0.5)

    def admit(self, slot: int) -> None:
        """See `StopRule`."""
        self._usual[slot] = self._usual.mean()

    def goes_on(self, slots: Slots, step: int, confidence: Floats) -> Bools:
        """See `StopRule`."""
        if step == 0:
            spread = np.linalg.cholesky(np.linalg.inv(self._precision))
            noise = self._random.standard_normal((len(slots), 2))
            self._drawn[slots] = self._mean + noise @ spread.T
            self._survival[slots] = 1.0
        self._confidence[slots, step] = confidence
        chance = sigmoid((self._drawn[slots] * _features(confidence)).sum(axis=-1))
        self._survival[slots] *= chance
        self._usual[slots] += 0.1 * (chance - self._usual[slots])
        gain = self._survival[slots] * self._usual[slots]
        found: Bools = gain >= self._rate * self._token_cost
        return found

    def observe(self, slots: Slots, drafted: Ints, accepted: Ints) -> None:
        """See `StopRule`."""
        tried, taken = trials(drafted, accepted, self._confidence.shape[1])
        is_accepted = taken[tried]
        x = _features(self._confidence[slots][tried])
        chance = sigmoid(x @ self._mean)
        kept = np.exp(-len(x) / REMEMBERED_TRIALS)
        self._precision = kept * self._precision + (1 - kept) * self._first_precision
        self._precision += (x * (chance * (1 - chance))[:, None]).T @ x
        step = np.linalg.solve(self._precision, x.T @ (is_accepted - chance))
        self._mean = self._mean + step
        tokens = float((accepted + 1).mean()) if len(slots) else 1.0
        spent = 1 + self._token_cost * float(drafted.mean() if len(slots) else 0)
        self._rate += 0.05 * (tokens / spent - self._rate)

    def beliefs(self) -> dict[str, float]:
        """See `StopRule`."""
        bias, scale = map(float, self._mean)
        return {"confidence_bias": bias, "confidence_scale": scale}


def _features(confidence: Floats) -> Floats:
    """x, `[..., 2]`."""
    s = np.clip(confidence, CONFIDENCE_LIMIT, 1 - CONFIDENCE_LIMIT)
    return np.stack([np.ones_like(s), logit(s)], axis=-1)
