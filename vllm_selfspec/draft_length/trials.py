"""What a verification tells of draft tokens, and chances as logits."""

from typing import Any

import numpy as np

from vllm_selfspec.draft_length.types import Bools, Floats, Ints


def trials(drafted: Ints, accepted: Ints, max_drafts: int) -> tuple[Bools, Bools]:
    """Which draft positions were tried, and which were accepted, `[n, max_drafts]`.

    A token is a trial when all before it were accepted.
    """
    positions = np.arange(max_drafts)
    tried = positions < np.minimum(drafted, accepted + 1)[:, None]
    return tried, positions < accepted[:, None]


def sigmoid(z: Any) -> Floats:
    """The chance of a logit."""
    found: Floats = 1 / (1 + np.exp(-z))
    return found


def logit(chance: Floats) -> Floats:
    """The logit of a chance."""
    found: Floats = np.log(chance / (1 - chance))
    return found
