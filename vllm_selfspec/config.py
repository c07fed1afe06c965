"""`SelfSpecConfig`: what a user may write under `--speculative-config`.

One rule: whatever is accepted here and resolved against a model works; whatever is not
is refused at start-up by an error that names the key, the value and the fix.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from vllm_selfspec.draft_length.options import ByGoodput, DraftLength
from vllm_selfspec.plan.axes import AXES
from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.axis_skip_layers import AUTO, ONLINE
from vllm_selfspec.plan.keys import Keys, describe, shown
from vllm_selfspec.plan.profile import MAX_NUM_SPECULATIVE_TOKENS
from vllm_selfspec.plan.source import Source
from vllm_selfspec.plan.sources import MODEL, SOURCES

METHOD = "selfspec"
DEFAULT_NUM_SPECULATIVE_TOKENS = 4


class ConfigError(ValueError):
    """A configuration that selfspec refuses."""


class Online(Keys):
    """How `skip_layers: "online"` looks for a better skip set while serving."""

    share: float = Field(
        default=0.01, gt=0, le=0.5, description="Of the time that it may take."
    )
    profile: str | None = Field(
        default=None,
        max_length=4096,
        description="Where the best one is kept, as a JSON profile: started from if it "
        "is there, written whenever a better one is found.",
    )

    @field_validator("profile")
    @classmethod
    def _can_be_written(cls, profile: str | None) -> str | None:
        if profile is not None and not Path(profile).absolute().parent.is_dir():
            raise ValueError(
                f"is {shown(profile)}, but must lie in a directory that exists: make it"
            )
        return profile


class SelfSpecConfig(Keys):
    """The keys of `{"method": "selfspec", ...}` that are no axis's and no source's."""

    skip_layers: Any  # an axis's, with words that name a whole plan

    method: Literal["selfspec"] = Field(
        default="selfspec", description="Chooses self-speculative decoding."
    )
    draft_source: str = Field(
        default=AUTO,
        description="Where draft tokens come from: 'model' (the target drafts for "
        "itself, by the keys below), 'context' (copies of what followed a request's "
        "last tokens before), 'suffix' (from other outputs, too), or 'auto' (for each "
        "request whichever brings most; for a whole batch, of the first two, where "
        "steps are scheduled ahead of the device, as the V2 model runner does).",
    )
    num_speculative_tokens: int = Field(
        default=DEFAULT_NUM_SPECULATIVE_TOKENS,
        ge=1,
        le=MAX_NUM_SPECULATIVE_TOKENS,
        strict=True,
        description="Tokens that the model drafts per request and step at most.",
    )
    online: Online = Field(
        default_factory=Online,
        description="How skip_layers 'online' goes about it: share of the time, and "
        "profile to keep.",
    )
    draft_sample_method: Literal["greedy", "probabilistic"] = Field(
        default="probabilistic",
        description="vLLM's: how draft tokens are drawn where the target samples. "
        "'probabilistic' draws from the draft's own distribution, of which far more "
        "are accepted; 'greedy' takes the likeliest, and saves the memory of the "
        "distributions: with the V2 runner max_num_seqs x the longest draft or copy x "
        "vocabulary x 2 bytes, or 4 in float32.",
    )
    draft_length: DraftLength = Field(
        default_factory=ByGoodput,
        description="How far to draft: 'goodput' (what brings most tokens per second, "
        "by measured costs and acceptance), 'fixed', 'threshold', 'thompson' or "
        "'thompson-calibrated'.",
    )
    draft_memory: int | str = Field(
        default=0,
        description="Weights that 'auto' may keep beside the target to draft with, in "
        "bytes or as a share of the target's, like '30%'; an int4 copy of all takes "
        "27%. 0 takes none.",
    )
    calibration_seconds: float = Field(
        default=20.0,
        ge=0,
        le=3600,
        description="The most that the first start of a model takes to find the plan "
        "that 'auto' then has; 0 does not look for one.",
    )
    num_speculative_tokens_per_batch_size: list[tuple[int, int, int]] | None = Field(
        default=None,
        description="vLLM's: how many tokens to draft while so many requests run, as "
        "[first, last, tokens] with both ends included; 0 drafts nothing. Sizes "
        "beyond the last entry take that entry.",
    )

    @field_validator("draft_source")
    @classmethod
    def _is_a_source(cls, name: str) -> str:
        known = [AUTO, *(source.name for source in SOURCES)]
        if name not in known:
            raise ValueError(
                f"is {shown(name)}, but must be one of {', '.join(known)}: write that"
            )
        return name

    @field_validator("draft_memory", mode="before")
    @classmethod
    def _is_memory(cls, value: Any) -> Any:
        is_bytes = type(value) is int and value >= 0
        if not is_bytes and _share_of(value) is None:
            raise ValueError(
                f"is {shown(value)}, but must be bytes or a share of the weights from "
                "0% to 100%: write one, like 300000000 or '30%'"
            )
        return value

    @field_validator("num_speculative_tokens_per_batch_size", mode="before")
    @classmethod
    def _is_a_schedule(cls, value: Any) -> Any:
        if value is None:
            return value
        entries = value if isinstance(value, list) else []
        if not entries or not all(map(_is_schedule_entry, entries)):
            raise ValueError(
                f"is {shown(value)}, but must be a list of [first batch size, last, "
                "tokens]: write it like [[1, 8, 4], [9, 64, 0]]"
            )
        starts = [first for first, _, _ in entries]
        if starts != [1, *(last + 1 for _, last, _ in entries[:-1])]:
            raise ValueError(
                f"is {shown(value)}, but must name every batch size from 1 once: "
                "close the gap, or take out what overlaps"
            )
        return value

    @model_validator(mode="after")
    def _schedule_asks_for_no_more_than_is_drafted(self) -> "SelfSpecConfig":
        schedule = self.num_speculative_tokens_per_batch_size or []
        most = max((num_drafts for _, _, num_drafts in schedule), default=0)
        longest, key = self.num_speculative_tokens, "num_speculative_tokens"
        if not self.may_use(SOURCES.named(MODEL)):
            used = [one for one in SOURCES if self.may_use(one)]
            longest = max(one.max_tokens(one.options(self)) for one in used)
            key = f"the longest draft of draft_source {shown(self.draft_source)}"
        if most > longest:
            raise ValueError(
                f"num_speculative_tokens_per_batch_size asks for {shown(most)} tokens, "
                f"more than {key}={longest}: lower it"
            )
        return self

    @model_validator(mode="after")
    def _online_is_asked_for(self) -> "SelfSpecConfig":
        if "online" in self.model_fields_set and not self.is_online:
            raise ValueError(
                "online says how skip_layers 'online' goes about it, but skip_layers "
                f"is {shown(self.skip_layers)}: make it 'online', or remove online"
            )
        return self

    @model_validator(mode="after")
    def _keys_are_of_what_drafts(self) -> "SelfSpecConfig":
        used = {
            key
            for source in SOURCES
            if self.may_use(source)
            for key in source.options(self)
        }
        for source in SOURCES:
            own = set(source.keys.model_fields) - used
            if source.name == MODEL:
                own = keys_of_axes() | {"draft_memory"}
            said = sorted(own & self.model_fields_set)
            if said and not self.may_use(source):
                raise ValueError(
                    f"{said[0]} is of source {source.name!r}, but draft_source is "
                    f"{shown(self.draft_source)}: make it 'auto' or {source.name!r}, "
                    f"or remove {said[0]}"
                )
        return self

    @model_validator(mode="after")
    def _memory_is_autos(self) -> "SelfSpecConfig":
        if "draft_memory" in self.model_fields_set and not self.is_auto:
            raise ValueError(
                f"draft_memory is {shown(self.draft_memory)}, which says what "
                "skip_layers 'auto' may take, but another key says how to draft: "
                "remove one of them"
            )
        return self

    @property
    def is_auto(self) -> bool:
        """Whether the plan to start from is what `auto` finds."""
        is_said = "skip_layers" in self.model_fields_set
        is_free = is_said or not self.says_how_the_model_drafts
        return bool(self.skip_layers == AUTO) and is_free

    @property
    def says_how_the_model_drafts(self) -> bool:
        """Whether the user wrote a key of an axis."""
        return bool(keys_of_axes() & self.model_fields_set)

    def may_use(self, source: Source) -> bool:
        """Whether the user lets a source draft."""
        return self.draft_source in (AUTO, source.name)

    def memory_beside(self, weight_bytes: float) -> int:
        """`draft_memory` in bytes, for a target of so many."""
        share = _share_of(self.draft_memory)
        return int(self.draft_memory) if share is None else int(share * weight_bytes)

    @property
    def is_online(self) -> bool:
        """Whether the skip set is looked for while serving."""
        return bool(self.skip_layers == ONLINE)

    @classmethod
    def parse(cls, keys: Mapping[str, Any]) -> "SelfSpecConfig":
        """Checks the user's keys, those of every axis among them.

        Raises:
            ConfigError: If a key is unknown or its value not allowed.
        """
        try:
            return config_type().model_validate(dict(keys))
        except ValidationError as error:
            raise ConfigError(f"selfspec configuration: {describe(error)}") from error


def config_type() -> type[SelfSpecConfig]:
    """`SelfSpecConfig` with the keys of each axis and source in the tables."""
    return _config_type(tuple(AXES), tuple(SOURCES))


@cache
def _config_type(
    axes: tuple[Axis, ...], sources: tuple[Source, ...]
) -> type[SelfSpecConfig]:
    keys = [*(axis.keys for axis in axes), *(source.keys for source in sources)]
    bases: Any = (*(one for one in keys if one is not Keys), SelfSpecConfig)
    found: type[SelfSpecConfig] = create_model("SelfSpecConfig", __base__=bases)
    return found


def keys_of_axes() -> set[str]:
    """The keys that say how the model drafts."""
    return {key for axis in AXES for key in axis.keys.model_fields}


def _share_of(memory: object) -> float | None:
    """0.3 of `30%`; None of what is no share."""
    if not isinstance(memory, str) or not memory.endswith("%"):
        return None
    try:
        share = float(memory.removesuffix("%")) / 100
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


def _is_schedule_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple)
        and len(entry) == 3
        and all(type(number) is int for number in entry)
        and 1 <= entry[0] <= entry[1]
        and entry[2] >= 0
    )
