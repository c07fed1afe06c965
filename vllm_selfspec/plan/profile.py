"""`Profile`: a draft plan on disk, with the model it was found for.

One rule: reading a profile only parses JSON and checks it; nothing in it is executed.
"""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from vllm_selfspec.plan.axes import AXES
from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.keys import MAX_FILE_BYTES, Keys, describe, shown
from vllm_selfspec.plan.target_model import TargetModel

# D&V evaluates up to 12. Beyond 32 hardly a draft is accepted whole, while every one
# reserves that many KV slots per request.
MAX_NUM_SPECULATIVE_TOKENS = 32


class ProfileError(ValueError):
    """A profile that cannot be read, or that belongs to another model."""


class Figures(Keys):
    """What a search found a plan to be worth, on its texts and machine.

    The letters are those of the bound E / (v + k c).
    """

    num_speculative_tokens: int = Field(
        ge=1,
        le=MAX_NUM_SPECULATIVE_TOKENS,
        strict=True,
        description="k: the best draft length; drafted at most, unless the user says "
        "how many.",
    )
    acceptance: tuple[float, ...] = Field(
        description="Share of the steps that accept the first i draft tokens, i from 1."
    )
    tokens_per_verification: float = Field(description="E.")
    draft_cost: float = Field(description="c: a draft step over a plain step.")
    verify_cost: float = Field(description="v: verifying k tokens over a plain step.")
    speed_up: float = Field(description="Expected, over plain vLLM.")
    measured_speed_up: float | None = Field(
        default=None, description="The same of real generation in the engine."
    )


class Profile(Keys):
    """What a profile file holds: `{"skip_layers": {...}, "num_layers": N, ...}`.

    Beside the keys here it has one for the value of each axis: see `profile_type`.
    """

    num_layers: int | None = Field(
        default=None,
        ge=1,
        lt=10_000,
        strict=True,
        description="Decoder layers of the model it was found for; checked if given.",
    )
    model: str | None = Field(
        default=None,
        max_length=4096,
        description="Name of the model it was found for; shown, not checked.",
    )
    architecture: dict[str, int | tuple[str, ...]] | None = Field(
        default=None,
        description="Of that model, by keys of its config.json; checked if given.",
    )
    note: str | None = Field(
        default=None, max_length=4096, description="Anything worth remembering."
    )
    figures: Figures | None = Field(
        default=None, description="What a search found it to be worth."
    )
    provenance: dict[str, str | int | float] | None = Field(
        default=None, description="How it was found; shown, not checked."
    )

    def plan(self, num_layers: int) -> DraftPlan:
        """The plan, for a model of so many layers.

        Raises:
            PlanError: If it names what such a model does not have.
        """
        stored = {axis.name: getattr(self, axis.name) for axis in AXES}
        return DraftPlan.from_stored(num_layers, stored)

    def is_for(self, target: TargetModel) -> bool:
        """Whether it was found for such a model, as far as it says."""
        return not self._differences(target)

    def check_fits(self, target: TargetModel) -> None:
        """Raises `ProfileError` if it was found for a model of another architecture."""
        differences = self._differences(target)
        if differences:
            raise ProfileError(
                f"the profile was found for {self.model or 'another model'}, but this "
                f"model has {', '.join(differences)}: use a profile of this model, or "
                "skip_layers 'auto'"
            )

    def _differences(self, target: TargetModel) -> list[str]:
        if self.num_layers not in (None, target.num_layers):
            return [f"{target.num_layers} layers in place of {self.num_layers}"]
        return target.differences(self.architecture or {})


def profile_type() -> type[Profile]:
    """`Profile` with the key of each axis in the table."""
    return _profile_type(tuple(AXES))


@cache
def _profile_type(axes: tuple[Axis, ...]) -> type[Profile]:
    stored: dict[str, Any] = {axis.name: axis.stored for axis in axes}
    return create_model("Profile", __base__=Profile, **stored)


def read_profile(path: Path) -> Profile:
    """Reads and checks a JSON profile.

    Raises:
        ProfileError: If the file is missing, too large, or no valid profile.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"skip_layers is 'auto', a skip set, or the path of a JSON profile, but "
            f"{str(path)!r} cannot be read ({error}): check the path"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise ProfileError(
            f"skip_layers: a profile has at most {MAX_FILE_BYTES} bytes, but "
            f"{str(path)!r} is larger: check the path"
        )
    try:
        keys = json.loads(data, object_pairs_hook=_without_repetition)
        return profile_type().model_validate(keys)
    except (ValueError, RecursionError) as error:
        raise ProfileError(
            f"profile {str(path)!r} is not JSON like "
            '{"skip_layers": {"attention": [3], "mlp": [4]}}'
            f": {describe(error)}: correct it, or use skip_layers 'auto'"
        ) from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses what JSON readers otherwise ignore: all but the last of equal keys."""
    keys = dict(pairs)
    if len(keys) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {shown(twice)} is written twice: remove one")
    return keys
