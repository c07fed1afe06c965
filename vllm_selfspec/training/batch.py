"""`Batch`: some continuations as tensors, for a student to be asked about at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_selfspec.training.texts import Continuation

# Logits that are alive at once: 128 MiB of float32, and its gradient as much again.
MAX_LOGITS = 1 << 25


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, and what the target says at positions of its own.

    Attributes:
        token_ids: `[num_rows, length]`, filled up with 0 at the end.
        where: Positions whose next token is the target's own, bool, of that shape.
        top_ids: The target's likeliest there, `[num_tokens, k]`, row by row.
        top_logprobs: Their log-probabilities, of the same shape.
    """

    token_ids: torch.Tensor
    where: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    @classmethod
    def of(cls, texts: Sequence[Continuation], device: torch.device) -> "Batch":
        """Of at least one text, on `device`."""
        length = max(len(text.token_ids) for text in texts) - 1
        token_ids = np.zeros((len(texts), length), np.int64)
        where = np.zeros((len(texts), length), np.bool_)
        for row, text in enumerate(texts):
            num = len(text.token_ids) - 1
            token_ids[row, :num] = text.token_ids[:-1]
            where[row, text.first - 1 : num] = True
        columns = [
            token_ids,
            where,
            np.concatenate([text.top_ids for text in texts]),
            np.concatenate([text.top_logprobs for text in texts]),
        ]
        return cls(*(torch.from_numpy(column).to(device) for column in columns))


def pieces(texts: Sequence[Continuation], vocab_size: int) -> Iterator[list[int]]:
    """Numbers of texts to go together, so that their logits fit."""
    chosen: list[int] = []
    num_logits = 0
    for number, text in enumerate(texts):
        more = (len(text.token_ids) - text.first) * vocab_size
        if chosen and num_logits + more > MAX_LOGITS:
            yield chosen
            chosen, num_logits = [], 0
        chosen.append(number)
        num_logits += more
    if chosen:
        yield chosen
