"""`OnlineTuner`: looks for a better skip set while serving, in a share of the time.

One rule: it never touches what is generated. Rows of verified contexts run through a
view without writing any K or V, and whether they say the token that came next is all
that is learnt. A row of position t reads the target's own K and V up to t, where a
draft reads its own for t: nearly what a draft is asked, for many positions at once.
(SWIFT, arXiv 2410.06916, section 4.2, scores on the context, too; for one stream.)

Workers of an engine must run the same forwards. They see the same tokens, and decide by
costs that they were all told: what is measured here is only shown.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vllm_selfspec import served_config, whole_file
from vllm_selfspec.bench.provenance import provenance
from vllm_selfspec.config import Online
from vllm_selfspec.draft.stats import DraftStats
from vllm_selfspec.draft_length.costs import StepCosts
from vllm_selfspec.draft_length.types import Ints
from vllm_selfspec.engine.vllm_args import target_of
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel
from vllm_selfspec.served_config import online_of, plan_of
from vllm_selfspec.tuning.online.search import OnlineSearch, Speed

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown

MAX_ROWS = 32  # of contexts, scored at once
# Of a request, the newest positions only: a sliding window has forgotten what older
# ones would read.
MAX_AGE = 64
MAX_KNOWN = 4096  # costs that are remembered

# The tokens that a plan says after some positions, `[num_rows]`, given rows of the
# batch, `[num_rows]`, and positions in them, `[num_rows]`.
NextTokens = Callable[[DraftPlan, Ints, Ints], Ints]


@dataclass(frozen=True)
class OnlineCosts:
    """What forwards cost, the same for all workers.

    Attributes:
        steps: Of verifications, and of draft steps of the plan `measured`.
        measured: That plan.
        parts: Of a draft step that is the whole target's, over a plain step.
    """

    steps: StepCosts
    measured: DraftPlan
    parts: StepCost

    def draft(self, num_rows: int, plan: DraftPlan) -> float:
        """Seconds of a draft step of `plan`."""
        share = plan.cost(self.parts).total / self.measured.cost(self.parts).total
        return share * float(self.steps.draft(num_rows))

    def verify(self, num_rows: int) -> float:
        """Seconds of a verification."""
        return float(self.steps.verify(num_rows))

    def speed(self, num_reqs: int, max_drafts: int) -> Speed:
        """Expected speed-up of a batch of so many requests, at its best length."""
        k = np.arange(1, max_drafts + 1)
        plain = self.verify(num_reqs)
        verify = self.steps.verify(num_reqs * (1 + k)) / plain

        def speed(plan: DraftPlan, chance: float) -> float:
            emitted = 1 + np.cumsum(chance**k)
            return float(
                (emitted / (verify + k * self.draft(num_reqs, plan) / plain)).max()
            )

        return speed


class OnlineTuner:
    """Scores candidates beside a proposer.

    Attributes:
        search: What drafts, and what is tried.
        seconds_spent: On scoring, as measured.
    """

    def __init__(
        self,
        start: DraftPlan,
        options: Online,
        max_drafts: int,
        max_num_reqs: int,
        save: Callable[[DraftPlan], None] | None = None,
        stats: DraftStats | None = None,
    ) -> None:
        """Starts from a skip set.

        Args:
            start: What drafts first.
            options: The user's.
            max_drafts: The longest draft.
            max_num_reqs: Rows that the engine's attention has room for.
            save: Keeps a plan that was adopted.
            stats: Where duels are shown.
        """
        self.search = OnlineSearch(start)
        self._share, self._max_drafts = options.share, max_drafts
        self._num_rows = min(MAX_ROWS, max_num_reqs)
        self._save, self._stats = save, stats
        self._costs: OnlineCosts | None = None
        self._owed = 0.0  # seconds that scoring may take by now
        self._seen: dict[str, int] = {}  # the first position not scored yet
        self._started, self.seconds_spent = time.perf_counter(), 0.0

    @classmethod
    def of(cls, vllm_config: Any) -> "OnlineTuner | None":
        """As configured; None where skip sets stay as they are."""
        options = online_of(vllm_config)
        if options is None:
            return None
        save, stats = None, DraftStats(vllm_config)
        if options.profile is not None and vllm_config.parallel_config.rank == 0:
            target = target_of(vllm_config.model_config)
            save = Saving(Path(options.profile), target, stats.failed_writes)
        return cls(
            plan_of(vllm_config),
            options,
            served_config.num_model_tokens(vllm_config),
            vllm_config.scheduler_config.max_num_seqs,
            save,
            stats,
        )

    def use_costs(self, costs: OnlineCosts) -> None:
        """Told to all workers once they are ready; nothing is scored before."""
        self._costs = costs
        # Asked at every step, of which most come again.
        self._verify = lru_cache(MAX_KNOWN)(costs.verify)
        self._draft = lru_cache(MAX_KNOWN)(costs.draft)

    def after_step(
        self,
        input_batch: Any,
        num_verified: int,
        num_steps: int,
        accepted: Sequence[bool],
        next_tokens: NextTokens,
    ) -> DraftPlan | None:
        """Scores, if the time that it takes was saved up.

        Args:
            input_batch: vLLM's, with the tokens of this step.
            num_verified: Token rows of the target's forward.
            num_steps: Draft steps.
            accepted: Whether the first draft token was, by request that had one.
            next_tokens: Asks a plan.

        Returns:
            The skip set to draft with from now on, if it is another one.
        """
        if self._costs is None:
            return None
        self.search.verified(accepted)
        num_reqs = len(input_batch.req_ids)
        plans = (self.search.incumbent, self.search.candidate)
        price = sum(self._draft(self._num_rows, plan) for plan in plans)
        step = self._verify(num_verified)
        step += num_steps * self._draft(num_reqs, plans[0])
        self._owed = min(self._owed + self._share * step, price)
        if self._owed < price:
            return None
        rows, positions = self._unseen(input_batch)
        if len(rows) < self._num_rows:
            return None
        self._owed = 0.0
        started = time.perf_counter()
        came = input_batch.token_ids_cpu[rows, positions + 1]
        right, right_candidate = (
            (next_tokens(plan, rows, positions) == came).tolist() for plan in plans
        )
        speed = self._costs.speed(num_reqs, self._max_drafts)
        is_adopted = self.search.observe(right, right_candidate, speed)
        self.seconds_spent += time.perf_counter() - started
        if self._stats is not None:
            self._stats.publish("online", self.beliefs)
        return self._adopted() if is_adopted else None

    def _unseen(self, input_batch: Any) -> tuple[Ints, Ints]:
        """Rows of the batch and positions that were not scored yet: as many of each
        request as there are, up to what is scored at once; or fewer."""
        req_ids = input_batch.req_ids
        self._seen = {r: at for r, at in self._seen.items() if r in req_ids}
        found = []
        for row, req_id in enumerate(req_ids):
            # From the last token of its prompt on, the target says what comes next.
            first = int(input_batch.num_prompt_tokens[row]) - 1
            # Of what this step computed, some may be rejected drafts.
            end = int(input_batch.num_computed_tokens_cpu[row])
            first = max(first, end - MAX_AGE, self._seen.get(req_id, 0))
            found.append((max(0, end - first), row, end))
        rows: list[int] = []
        positions: list[int] = []
        # What requests with few leave over goes to those with more.
        for number, (most, row, end) in enumerate(sorted(found)):
            equal = -(-(self._num_rows - len(rows)) // (len(found) - number))
            num = min(most, equal)
            rows += [row] * num
            positions += range(end - num, end)
        if len(rows) == self._num_rows:
            self._seen |= {req_ids[row]: found[row][2] for row in rows}
        return np.array(rows, np.int64), np.array(positions, np.int64)

    def _adopted(self) -> DraftPlan:
        found = self.search.incumbent
        logger.info(
            "selfspec drafts with: %s (online: %d of %d candidates adopted, in %.1f%% "
            "of the time)",
            found,
            self.search.num_adopted,
            self.search.num_duels,
            100 * self.share_spent,
        )
        if self._save is not None:
            self._save(found)
        return found

    @property
    def share_spent(self) -> float:
        """Of the time since the start."""
        return self.seconds_spent / (time.perf_counter() - self._started)

    def beliefs(self) -> dict[str, float]:
        """To be shown."""
        return {
            "online_candidates": self.search.num_duels,
            "online_adopted": self.search.num_adopted,
            "online_share_of_time": self.share_spent,
        }


class Saving:
    """Writes the profile of a model's plan."""

    def __init__(
        self, file: Path, target: TargetModel, failed_writes: Counter[str]
    ) -> None:
        self._file, self._target = file, target
        self._failed_writes = failed_writes

    def __call__(self, plan: DraftPlan) -> None:
        document = {
            **plan.to_dict(),
            "model": self._target.name,
            "architecture": dict(self._target.architecture),
            "note": "found online, while serving",
            "provenance": provenance(None),
        }
        text = f"{json.dumps(document, indent=2)}\n"
        whole_file.write_if_possible(text, self._file, "profile", self._failed_writes)


def start(worker: Any, costs: OnlineCosts) -> None:
    """Tells a worker's tuner the costs."""
    worker.model_runner.drafter.tuner.use_costs(costs)


def costs_of(
    steps: StepCosts, measured: DraftPlan, sublayers: Sequence[Sequence[float]]
) -> OnlineCosts:
    """From what the workers measured: a step is done when the slowest is."""
    head, attention, mlp = (float(max(times)) for times in zip(*sublayers, strict=True))
    parts = StepCost.uniform(measured.num_layers, head, attention, mlp)
    return OnlineCosts(steps, measured, parts)
