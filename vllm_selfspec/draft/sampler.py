"""`DraftSampler`: draws the draft tokens of the V1 runner.

One rule: it draws as the target does. Verification is lossless whatever is drawn, but
what is drawn as the target draws is accepted more often. So drafts keep to the target's
temperature, top-k and top-p, and on a CPU to its penalties, and those of a request with
a seed are drawn with the very noise that the target's tokens will be.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

from vllm_selfspec.draft import seeded
from vllm_selfspec.draft.drawing import drawn, largest
from vllm_selfspec.draft.penalties import Penalties
from vllm_selfspec.draft.seeded import for_rows
from vllm_selfspec.draft.truncation import (
    SAMPLING_EPS,
    distribution,
    limits_of,
    scaled,
    truncated,
)


@dataclass(frozen=True)
class Drawn:
    """The draft tokens of a step.

    Attributes:
        token_ids: int32, `[num_rows]`.
        probs: What they were drawn from, `[num_rows, vocab_size]`; None where all are
            their maximum.
        logits: What that, or the largest, is of: after penalties. Those that were drawn
            from on a GPU have been written to.
    """

    token_ids: torch.Tensor
    probs: torch.Tensor | None
    logits: torch.Tensor


class DraftSampler:
    """Draws tokens as `draft_sample_method` says."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        speculative_config: Any = vllm_config.speculative_config
        self._is_probabilistic = (
            speculative_config.draft_sample_method == "probabilistic"
        )
        self._use_fp64_gumbel = vllm_config.model_config.use_fp64_gumbel
        self._penalties: Penalties | None = None  # of the rows that are drafted for
        self._steps: list[torch.Tensor] = []  # their tokens so far

    def begin(self) -> None:
        """Before the first draft step of some rows."""
        self._penalties = None
        self._steps.clear()

    def draws(self, sampling: SamplingMetadata) -> bool:
        """Whether any row is drawn at random; the others are their maximum."""
        return self._is_probabilistic and not sampling.all_greedy

    def sample(
        self,
        logits: torch.Tensor,
        sampling: SamplingMetadata,
        target_sampler: Sampler,
    ) -> Drawn:
        """The next draft token of each row.

        Args:
            logits: `[num_rows, vocab_size]`; may be written to.
            sampling: Of those rows, the same in each step. Each seeded row's generator
                goes one draw on.
            target_sampler: The sampler that draws the target's tokens.
        """
        if not sampling.no_penalties and logits.device.type == "cpu":
            if self._penalties is None:
                self._penalties = Penalties(sampling)
            logits = self._penalties.of_step(logits, self._steps)
        if self.draws(sampling):
            found = Drawn(*self._at_random(logits, sampling, target_sampler), logits)
        else:
            found = Drawn(largest(logits).int(), None, logits)
        self._steps.append(found.token_ids)
        return found

    def _at_random(
        self,
        logits: torch.Tensor,
        sampling: SamplingMetadata,
        target_sampler: Sampler,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, int32, and what they were drawn from, those of rows with a seed by
        their own noise."""
        rows = [*sampling.generators]
        # A copy: vLLM's function divides the logits themselves.
        seeded_logits = logits[rows]
        token_ids, probs = self._drawn(logits, sampling)
        if rows:
            of_rows = for_rows(sampling, np.array(rows))
            seeded_logits = _limited(seeded_logits, of_rows)
            seeded_logits = scaled(seeded_logits, of_rows.temperature)
            generators = [*sampling.generators.values()]
            of_seeds = seeded.draw(target_sampler, seeded_logits, generators)
            token_ids[rows] = of_seeds.int()
        return token_ids, probs

    def _drawn(
        self, logits: torch.Tensor, sampling: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, int32, and what they were drawn from, `[num_rows, vocab_size]`. On
        GPUs by vLLM's function."""
        if logits.device.type != "cpu":
            token_ids, probs = compute_probs_and_sample_next_token(
                _limited(logits, sampling), sampling, self._use_fp64_gumbel
            )
            return token_ids.int(), probs
        assert sampling.temperature is not None
        rows = zip(logits, limits_of(sampling), strict=True)
        probs = torch.stack([distribution(*row, is_draft=True) for row in rows])
        token_ids = drawn(probs)
        if not sampling.all_random:
            is_greedy = sampling.temperature < SAMPLING_EPS
            token_ids = torch.where(is_greedy, largest(probs), token_ids)
        return token_ids.int(), probs


def _limited(logits: torch.Tensor, sampling: SamplingMetadata) -> torch.Tensor:
    assert sampling.temperature is not None
    return truncated(logits, sampling.temperature, sampling.top_k, sampling.top_p)
