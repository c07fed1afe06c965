"""`Profile`: a skip set on disk, with the model it was found for.

One rule: reading a profile only parses JSON and checks it; nothing in it is executed.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_selfspec.plan.target_model import TargetModel

# A layer index. The upper bound is far above any model; it keeps a malformed profile
# from costing memory before it is checked against the model.
LayerIndex = Annotated[int, Field(ge=0, lt=10_000, strict=True)]
MAX_PROFILE_BYTES = 1_000_000
# D&V evaluates up to 12. Beyond 32 hardly a draft is accepted whole, while every one
# reserves that many KV slots per request.
MAX_NUM_SPECULATIVE_TOKENS = 32
MAX_SHOWN = 100  # characters of a value in a message
MAX_FINDINGS = 3

# How `skip_layers` may be written. Pydantic puts the form into a finding's location.
PATH, SKIP_SET = SKIP_LAYERS_FORMS = ("path", "skip set")

# Rule and fix for what pydantic finds; its own words speak of Python's types.
RULES = {
    "int_type": "must be a whole number: write one, without quotes",
    "string_type": "must be text: put it in quotes",
    "tuple_type": "must be a list of layer indices: write one, like [3, 4]",
    "model_type": "must be a JSON object: write one, in braces",
    "literal_error": "must be {expected}: write that",
    "greater_than_equal": "must be at least {ge}: raise it",
    "less_than_equal": "must be at most {le}: lower it",
    "less_than": "must be less than {lt}: lower it",
    "string_too_long": "must have at most {max_length} characters: shorten it",
    "union_tag_not_found": "must be 'auto', 'online', the path of a JSON profile, or a "
    "skip set: "
    'write one, like {{"attention": [3], "mlp": [4]}}',
}


class ProfileError(ValueError):
    """A profile that cannot be read, or that belongs to another model."""


class Keys(BaseModel):
    """A JSON object that refuses an unknown key with the list of known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, keys: Any) -> Any:
        if isinstance(keys, Mapping):
            for key in keys:
                if key not in cls.model_fields:
                    raise ValueError(
                        f"there is no key {shown(key)}: remove it, or use one of "
                        f"{', '.join(cls.model_fields)}"
                    )
        return keys


class SkipLayers(Keys):
    """Sublayers to skip while drafting, by 0-based layer index."""

    attention: tuple[LayerIndex, ...] = Field(
        default=(), description="Layers whose attention sublayer the draft skips."
    )
    mlp: tuple[LayerIndex, ...] = Field(
        default=(), description="Layers whose MLP sublayer the draft skips."
    )


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
    """What a profile file holds: `{"skip_layers": {...}, "num_layers": N, ...}`."""

    skip_layers: SkipLayers = Field(description="The skip set.")
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
            f"skip_layers: a profile has at most {MAX_PROFILE_BYTES} bytes, but "
            f"{str(path)!r} is larger: check the path"
        )
    try:
        keys = json.loads(data, object_pairs_hook=_without_repetition)
        return Profile.model_validate(keys)
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


def describe(error: Exception) -> str:
    """What was found wrong, in one line: key, value, rule and fix of each finding."""
    if not isinstance(error, ValidationError):
        return str(error) or type(error).__name__
    items = error.errors(include_url=False)
    findings = [_finding(item) for item in items[:MAX_FINDINGS]]
    if len(items) > MAX_FINDINGS:
        findings.append(f"and {len(items) - MAX_FINDINGS} more")
    return "; ".join(findings)


def _finding(item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"] if part not in SKIP_LAYERS_FORMS)
    if item["type"] == "value_error":  # one of our own validators: it says it all
        text = str(item["msg"]).removeprefix("Value error, ")
        return f"{key}{' ' if text.startswith('is ') else ': '}{text}" if key else text
    if item["type"] == "missing":
        return f"{key} is missing: add it"
    if item["type"] in RULES:
        rule = RULES[item["type"]].format_map(item.get("ctx", {}))
    else:
        rule = f"that is not allowed: {item['msg']}"
    return f"{key or 'the whole'} is {shown(item['input'])}, but {rule}"


def shown(value: object) -> str:
    """`value` in a message: short, however large or deeply nested it is."""
    try:
        text = _repr.repr(value)
        return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
    except ValueError:  # an int of more digits than Python converts to text
        return f"({type(value).__name__} too long to show)"


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 80
