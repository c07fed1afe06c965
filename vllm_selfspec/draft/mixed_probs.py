"""`MixedProbs`: draft distributions of a batch whose rows come from several sources.

One rule: a free token was proposed for certain, so its distribution is one-hot. It is
written out only for the tokens that are verified, when they are.
"""

from collections.abc import Sequence

import torch


class MixedProbs:
    """In place of the tensor `[num_rows, num_steps, vocab_size]` that vLLM's V1 runner
    takes its rows from, as `probs[row, :num_tokens]`: first the model's rows, then
    those of free tokens."""

    def __init__(self, probs: torch.Tensor, free: Sequence[Sequence[int]]) -> None:
        """Of the model's drafts, and the tokens of each free row."""
        self._probs, self._free = probs, free

    def __getitem__(self, key: tuple[int, slice]) -> torch.Tensor:
        """Distributions of a row's first tokens, `[num_tokens, vocab_size]`."""
        row, tokens = key
        num_model_rows, _, vocab_size = self._probs.shape
        if row < num_model_rows:
            return self._probs[row, tokens]
        free = self._free[row - num_model_rows][tokens]
        token_ids = torch.tensor(free, dtype=torch.long, device=self._probs.device)
        one_hot = self._probs.new_zeros(len(free), vocab_size)
        return one_hot.scatter_(1, token_ids[:, None], 1.0)
