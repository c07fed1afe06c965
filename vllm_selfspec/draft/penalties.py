"""`Penalties`: of tokens that a request has already, as vLLM applies them, on a CPU.

One rule: only the logits of those tokens are touched. vLLM counts and scales over the
whole vocabulary for each row, and does not apply penalties to drafts, so that the
target, to which they are applied, rejects what repeats itself.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.v1.sample.metadata import SamplingMetadata


class Penalties:
    """Those of the requests of a batch, as of one step."""

    def __init__(self, sampling: SamplingMetadata) -> None:
        """For a batch in which there are some."""
        assert sampling.prompt_token_ids is not None
        self._prompts = sampling.prompt_token_ids.numpy()
        self._of_prompts: dict[int, np.ndarray] = {}  # each once, of those asked for
        self._outputs = sampling.output_token_ids
        self._repetition = sampling.repetition_penalties
        self._frequency = sampling.frequency_penalties
        self._presence = sampling.presence_penalties

    def applied(
        self, req: int, logits: torch.Tensor, drafted: Sequence[int]
    ) -> torch.Tensor:
        """The logits after a request's tokens and some drafts, `[vocab_size]`, float32.

        Args:
            req: The request's row.
            logits: `[vocab_size]`.
            drafted: The draft tokens before.
        """
        repetition = self._repetition[req]
        frequency, presence = self._frequency[req], self._presence[req]
        logits = logits.to(torch.float32, copy=True)
        said = np.array([*self._outputs[req], *drafted], np.int64)
        tokens, counts = np.unique(said[said >= 0], return_counts=True)
        if req not in self._of_prompts:
            self._of_prompts[req] = np.unique(self._prompts[req])
        seen = np.union1d(self._of_prompts[req], tokens)
        # vLLM pads the prompts of a batch with a token of a number too high.
        place = torch.from_numpy(seen[seen < len(logits)])
        of_seen = logits[place]
        # As vLLM rounds: 1 / penalty first.
        logits[place] *= torch.where(of_seen > 0, 1.0 / repetition, repetition)
        place = torch.from_numpy(tokens)
        logits[place] -= frequency * torch.from_numpy(counts)
        logits[place] -= presence
        return logits

    def of_step(
        self, logits: torch.Tensor, before: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The logits of a draft step, `[num_reqs, vocab_size]`, float32.

        Args:
            logits: Of the same.
            before: The draft tokens of former steps, `[num_reqs]` each.
        """
        drafted = [*zip(*(tokens.tolist() for tokens in before), strict=True)]
        rows = zip(logits, drafted or [()] * len(logits), strict=True)
        return torch.stack([self.applied(req, *row) for req, row in enumerate(rows)])
