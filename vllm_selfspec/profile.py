"""`Profile`: a skip set on disk, with the model it was found for.

One rule: reading a profile only parses JSON and checks it; nothing in it is executed.
"""

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# A layer index. The upper bound is far above any model; it keeps a malformed profile
# from costing memory before it is checked against the model.
LayerIndex = Annotated[int, Field(ge=0, lt=10_000, strict=True)]
MAX_PROFILE_BYTES = 1_000_000


class ProfileError(ValueError):
    """A profile that cannot be read, or that belongs to another model."""


class SkipLayers(BaseModel):
    """Sublayers to skip while drafting, by 0-based layer index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: tuple[LayerIndex, ...] = Field(
        default=(), description="Layers whose attention sublayer the draft skips."
    )
    mlp: tuple[LayerIndex, ...] = Field(
        default=(), description="Layers whose MLP sublayer the draft skips."
    )


class Profile(BaseModel):
    """What a profile file holds: `{"skip_layers": {...}, "num_layers": N, ...}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    skip_layers: SkipLayers = Field(description="The skip set.")
    num_layers: int | None = Field(
        default=None,
        ge=1,
        lt=10_000,
        description="Decoder layers of the model it was found for; checked if given.",
    )
    model: str | None = Field(
        default=None,
        max_length=4096,
        description="Name of the model it was found for; shown, not checked.",
    )
    note: str | None = Field(
        default=None, max_length=4096, description="Anything worth remembering."
    )

    def check_fits(self, num_layers: int) -> None:
        """Raises `ProfileError` if it was found for a model of another depth."""
        if self.num_layers is not None and self.num_layers != num_layers:
            raise ProfileError(
                f"the profile was found for a model of {self.num_layers} layers"
                f"{f' ({self.model})' if self.model else ''}, but this model has "
                f"{num_layers}: use a profile of this model, or skip_layers 'auto'"
            )


def read_profile(path: Path) -> Profile:
    """Reads and checks a JSON profile.

    Raises:
        ProfileError: If the file is missing, too large, or no valid profile.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_PROFILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"skip_layers is 'auto', a skip set, or the path of a JSON profile, but "
            f"{str(path)!r} cannot be read ({error}): check the path"
        ) from error
    if len(data) > MAX_PROFILE_BYTES:
        raise ProfileError(
            f"a profile has at most {MAX_PROFILE_BYTES} bytes, but {str(path)!r} is "
            "larger: check the path"
        )
    try:
        return Profile.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise ProfileError(
            f'a profile is JSON like {{"skip_layers": {{"attention": [3], "mlp": [4]}}}}'
            f", but {str(path)!r} is not one: {describe(error)}"
        ) from error


def describe(error: Exception) -> str:
    """A validation error in one line: key, rule and value of each finding."""
    if not isinstance(error, ValidationError):
        return str(error) or type(error).__name__
    findings = []
    for item in error.errors(include_url=False, include_context=False):
        if item["type"] == "value_error":  # one of our own validators: it says it all
            findings.append(item["msg"].removeprefix("Value error, "))
            continue
        key = ".".join(str(part) for part in item["loc"]) or "top level"
        value = "" if item["type"] == "missing" else f", found {item['input']!r:.80}"
        findings.append(f"{key}: {item['msg']}{value}")
    return "; ".join(findings)
