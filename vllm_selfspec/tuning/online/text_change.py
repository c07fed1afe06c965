"""`TextChange`: notices that the texts which are served have changed.

One rule: it goes by what verifications say of the incumbent's first draft tokens, which
every step brings for nothing; rows that are scored are a hundredth of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import mean, variance

# Verifications of a batch: some requests', because those of one are alike.
BATCH = 128
# Batches that tell a change, those before that are looked at, and how many at least.
NUM_RECENT, NUM_USUAL, MIN_USUAL = 3, 24, 4
# Deviations. A false alarm costs trials that were made before; this many are rare.
CHANGED = 3.0


@dataclass
class TextChange:
    """Of one plan's drafts.

    Attributes:
        shares: Of first draft tokens that were accepted, by batch, the oldest first.
    """

    shares: list[float] = field(default_factory=list)
    _num: int = 0
    _accepted: int = 0

    def is_told_by(self, accepted: Sequence[bool]) -> bool:
        """Whether the newest batches, with these verifications, are unlike those
        before. Then it begins anew with the newest."""
        self._num += len(accepted)
        self._accepted += sum(accepted)
        if self._num < BATCH:
            return False
        # None wrong of few is no proof of never.
        self.shares.append((self._accepted + 0.5) / (self._num + 1))
        self.shares = self.shares[-NUM_USUAL - NUM_RECENT :]
        self._num = self._accepted = 0
        usual, recent = self.shares[:-NUM_RECENT], self.shares[-NUM_RECENT:]
        if len(usual) < MIN_USUAL:
            return False
        share = mean(usual)
        # Verifications of one text are not independent, so batches may differ by more.
        spread = max(variance(usual), share * (1 - share) / BATCH)
        noise = sqrt(spread * (1 / len(usual) + 1 / NUM_RECENT))
        is_changed = abs(mean(recent) - share) > CHANGED * noise
        if is_changed:
            self.shares = recent
        return is_changed
