"""`TwoStreams`: texts as the target runs them, and as drafts with holes run them.

One rule: the second stream sees what a draft in the engine sees. A draft that leaves
out sublayers before the exit layer reads the target's K and V of all tokens that were
there when it began, and its own of those since. Told where the draft of each token
began, one forward runs the target's stream and all drafts of a text side by side.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_selfspec.draft_length.types import Ints


def begins_of_one_length(num: int, length: int) -> Ints:
    """Where the draft of each of `num` tokens began: every draft has `length` tokens.

    The first token is sampled before anything is drafted, so it is alone.
    """
    at = np.arange(num)
    return np.where(at == 0, 0, 1 + (at - 1) // length * length)


def begins_at_random(num: int, longest: int, chance: np.random.Generator) -> Ints:
    """Where the draft of each of `num` tokens began: lengths from 1 to `longest`."""
    ends = chance.integers(1, longest, num, endpoint=True).cumsum()
    begins = np.concatenate(([0], ends))
    return begins[np.searchsorted(ends, np.arange(num), side="right")]


@dataclass(frozen=True)
class TwoStreams:
    """One after the other in each row, as a model takes them.

    Attributes:
        token_ids: `[num_rows, length + num_drafted]`.
        position_ids: Of the same shape.
        mask: Whom each sees, bool, `[num_rows, 1, length + num_drafted, the same]`.
        where: What was asked for, in the second stream, of the shape of `token_ids`.
        length: Of the first.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    where: torch.Tensor
    length: int

    @classmethod
    def of(
        cls, token_ids: torch.Tensor, where: torch.Tensor, begins: torch.Tensor
    ) -> "TwoStreams":
        """Of whole texts; only what is asked for is drafted.

        Args:
            token_ids: `[num_rows, length]`.
            where: The positions to draft from, bool, of the same shape; in each row
                one stretch.
            begins: The position where the draft of each of them began, row by row,
                `[where.sum()]`.
        """
        num_rows, length = token_ids.shape
        device = token_ids.device
        num_own = where.sum(1, keepdim=True)
        steps = torch.arange(int(num_own.max()), device=device)
        is_own = steps < num_own  # [num_rows, num_drafted]
        own = (where.int().argmax(1, keepdim=True) + steps).clamp_max(length - 1)
        began = torch.zeros_like(own)
        began[is_own] = begins
        every = torch.arange(length, device=device)
        by_target = every[:, None] >= every
        of_target = every < began[:, :, None]  # verified when the draft began
        of_draft = (own[:, None] >= began[:, :, None]) & (steps <= steps[:, None])
        # Filled up at the end of a row; nobody asks for these, but all see something.
        of_draft |= steps == steps[:, None]
        mask = token_ids.new_zeros(
            (num_rows, 1, *[length + len(steps)] * 2), dtype=torch.bool
        )
        mask[:, 0, :length, :length] = by_target
        mask[:, 0, length:, :length] = of_target
        mask[:, 0, length:, length:] = of_draft
        return cls(
            torch.cat((token_ids, token_ids.gather(1, own)), 1),
            torch.cat((every.expand(num_rows, -1), own), 1),
            mask,
            torch.cat((torch.zeros_like(where), is_own), 1),
            length,
        )
