"""Plans that were found at a model's first start, kept for the next ones.

One rule: a plan is taken again only under the circumstances it was found in. Whatever
is not as it should be there (no file, a damaged one, a place that cannot be written)
means that it is found anew, never that a server does not start.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_selfspec import whole_file
from vllm_selfspec.plan.profile import Profile, ProfileError, read_profile

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown

# A model's own drafts that are expected to bring less are not made: what they cost in
# attention is certain, what they bring is an estimate of a few texts.
USEFUL = 1.02
PLANS = Path("selfspec") / "plans"  # below vLLM's cache


@dataclass(frozen=True)
class Circumstances:
    """What must be the same.

    Attributes:
        model: Its short name, which is only shown: a copy may have another.
        weights: Fingerprint of the checkpoint.
        dtype: Of its weights as they are served.
        hardware: Name of the device, and how many of its cores or ranks.
        versions: Of what runs on it, by name.
        memory: Bytes that a draft may take beside the target.
    """

    model: str
    weights: str
    dtype: str
    hardware: str
    versions: tuple[tuple[str, str], ...]
    memory: int

    @property
    def file(self) -> Path:
        """Where a plan is kept."""
        same = {key: value for key, value in asdict(self).items() if key != "model"}
        text = json.dumps(same, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return directory() / f"{self.weights}-{key}.json"

    def find(self) -> Profile | None:
        """The plan that was found under them; None where there is none."""
        return _read(self.file)

    def keep(self, document: Mapping[str, Any]) -> None:
        """Keeps a profile, if it can be written; processes that do so at once write one
        after the other, each a whole one."""
        origin = {**document.get("provenance", {}), "memory": self.memory}
        whole = {**document, "note": str(self), "provenance": origin}
        text = f"{json.dumps(whole, indent=2)}\n"
        whole_file.write_if_possible(text, self.file, "calibrated plan", Counter())

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions)
        return (
            f"found at the first start of {self.model}, {self.dtype}, on "
            f"{self.hardware}, for {self.memory} bytes more; {versions}"
        )


def directory() -> Path:
    """Where plans are kept."""
    root = os.environ.get("VLLM_CACHE_ROOT", "~/.cache/vllm")
    return Path(root).expanduser() / PLANS


def newest_of(weights: str, memory: int) -> Profile | None:
    """The plan that was kept last for a checkpoint and so many bytes beside it, under
    whatever other circumstances."""
    files = directory().glob(f"{weights}-*.json")
    for file in sorted(files, key=lambda file: -file.stat().st_mtime):
        found = _read(file)
        if found is not None and (found.provenance or {}).get("memory") == memory:
            return found
    return None


def _read(file: Path) -> Profile | None:
    if not file.exists():
        return None
    try:
        found = read_profile(file)
        if found.figures is None:
            raise ProfileError("it has no figures")
    except ProfileError as error:
        logger.warning("selfspec looks for a draft plan anew: %s", error)
        return None
    return found
