"""The catalogue: draft plans that ship, found for well-known models.

One rule: an entry is used for its own model alone, which is told by its name and by its
architecture; a fine-tune of it has other redundancies.
"""

from functools import cache
from pathlib import Path

from vllm_selfspec.plan.profile import Profile, read_profile
from vllm_selfspec.plan.target_model import TargetModel

DIRECTORY = Path(__file__).resolve().parent / "profiles"


@cache
def entries() -> dict[str, Profile]:
    """All profiles, by file name without `.json`."""
    return {file.stem: read_profile(file) for file in sorted(DIRECTORY.glob("*.json"))}


def find(target: TargetModel) -> Profile | None:
    """The entry of a model; None if there is none."""
    for profile in entries().values():
        name = TargetModel(0, profile.model or "").short_name
        if name == target.short_name and profile.is_for(target):
            return profile
    return None
