"""`Source`: somewhere that draft tokens come from.

One rule: a source proposes, and never decides. Which source drafts a row, how far, or
whether anything is drafted at all is one decision, by expected tokens per second, in
`draft_length.goodput`.

The model itself is a source whose steps cost time, so it runs where that was decided.
All others are free: what they propose is known before the decision. A token of theirs
is proposed for certain, a distribution with all its mass on one token; so verification
accepts it with the target's own chance of it, and otherwise draws from the target's
distribution without it. The output is the target's whatever was proposed (Leviathan et
al. 2023, appendix A.1, with q one-hot).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vllm_selfspec.plan.keys import Keys


@dataclass(frozen=True)
class Proposal:
    """What a free source proposes for a row.

    Attributes:
        token_ids: The next tokens, `[num_tokens]`; none if there is nothing to propose.
        kind: Proposals of a kind are as likely to be accepted as each other; from 0 to
            one less than the source has `guesses`.
    """

    token_ids: NDArray[np.int32]
    kind: int = 0


NOTHING = Proposal(np.zeros(0, np.int32))


class Proposer(ABC):
    """A free source at work, in a worker. What it keeps of a row between two steps must
    do no harm when the row is preempted, edited or ended: a stale proposal is rejected,
    and costs its rows of a verification."""

    @abstractmethod
    def propose(self, req_id: str, token_ids: NDArray[np.int32]) -> Proposal:
        """What comes next in a row.

        Args:
            req_id: The request's name.
            token_ids: All its tokens so far, prompt and output, `[num_tokens]`; not to
                be written to.
        """

    def keep(self, req_ids: Collection[str]) -> None:
        """Called before a step's proposals: all other requests have ended."""
        return


# Of what is accepted nothing is known: it is worth a try.
UNKNOWN = (0.7, 0.7)


class Source(ABC):
    """One row of the table.

    Attributes:
        name: What `draft_source` calls it.
        keys: The user's configuration keys, with bounds and descriptions; each has a
            default. No other source or axis has a key of that name.
        guesses: For each kind of its proposals the chance that the first token is
            accepted, and that another is whose forerunner was, before any was seen.
        speculator: What proposes for all rows on the device, where the V2 runner's
            steps are scheduled ahead of it, as `module:name`: a `SelfSpecSpeculator`
            that does so when it is asked for more tokens than the model drafts. None
            where the source looks at tokens on the host. Workers alone import it.
    """

    name: ClassVar[str]
    keys: ClassVar[type[Keys]] = Keys
    guesses: ClassVar[tuple[tuple[float, float], ...]] = (UNKNOWN,)
    speculator: ClassVar[str | None] = None

    @property
    @abstractmethod
    def words(self) -> str:
        """What it is, in a few words, as in "drafts with: ..."."""

    def refusal(self) -> str | None:
        """Why it cannot be used here, and what to do; None if it can.

        With `draft_source` 'auto' it is left out then.
        """
        return None

    def options(self, config: Any) -> dict[str, Any]:
        """The values of its keys in a `SelfSpecConfig`, as JSON has them."""
        return {key: getattr(config, key) for key in self.keys.model_fields}

    def options_on_device(self, config: Any) -> dict[str, Any]:
        """The same for its speculator."""
        return self.options(config)

    @abstractmethod
    def max_tokens(self, options: Mapping[str, Any]) -> int:
        """The most that a proposal has; 0 of the model, which is bounded by
        `num_speculative_tokens`."""

    @abstractmethod
    def proposer(self, options: Mapping[str, Any]) -> Proposer | None:
        """The source at work, of which a worker makes one; None of the model, whose
        steps are the draft view's."""


class ModelSource(Source):
    """The target, by the draft plan."""

    name = "model"
    guesses = ()

    @property
    def words(self) -> str:
        return "the target, by the draft plan"

    def max_tokens(self, options: Mapping[str, Any]) -> int:
        return 0

    def proposer(self, options: Mapping[str, Any]) -> None:
        return None
