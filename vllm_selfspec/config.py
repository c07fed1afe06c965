"""`SelfSpecConfig`: what a user may write under `--speculative-config`.

One rule: whatever is accepted here and resolved against a model works; whatever is not
is refused at start-up by an error that names the key, the value and the fix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from vllm_selfspec.plan import catalogue
from vllm_selfspec.plan.axes import AXES
from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.axis_skip_layers import AUTO, ONLINE
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.keys import Keys, describe, shown
from vllm_selfspec.plan.profile import (
    MAX_NUM_SPECULATIVE_TOKENS,
    Profile,
    read_profile,
)
from vllm_selfspec.plan.skip_set import DEFAULT_SKIP_RATIO, SkipSet
from vllm_selfspec.plan.source import Source
from vllm_selfspec.plan.sources import MODEL, SOURCES
from vllm_selfspec.plan.target_model import TargetModel

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
        "request whichever brings most; the model alone where steps are scheduled "
        "ahead of the device, as the V2 model runner does).",
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
        "distributions: with the V2 runner max_num_seqs x num_speculative_tokens x "
        "vocabulary x 4 bytes.",
    )
    draft_length: DraftLength = Field(
        default_factory=ByGoodput,
        description="How far to draft: 'goodput' (what brings most tokens per second, "
        "by measured costs and acceptance), 'fixed', 'threshold', 'thompson' or "
        "'thompson-calibrated'.",
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
        if most > self.num_speculative_tokens:
            raise ValueError(
                f"num_speculative_tokens_per_batch_size asks for {shown(most)} tokens, "
                f"more than num_speculative_tokens={self.num_speculative_tokens}: "
                "lower it"
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
                own = _keys_of_axes()
            said = sorted(own & self.model_fields_set)
            if said and not self.may_use(source):
                raise ValueError(
                    f"{said[0]} is of source {source.name!r}, but draft_source is "
                    f"{shown(self.draft_source)}: make it 'auto' or {source.name!r}, "
                    f"or remove {said[0]}"
                )
        return self

    @property
    def says_how_the_model_drafts(self) -> bool:
        """Whether the user wrote a key of an axis."""
        return bool(_keys_of_axes() & self.model_fields_set)

    def may_use(self, source: Source) -> bool:
        """Whether the user lets a source draft."""
        return self.draft_source in (AUTO, source.name)

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


@dataclass(frozen=True)
class ChosenPlan:
    """A configuration resolved against a model.

    Attributes:
        plan: How it drafts.
        source: Where that is from, in words.
        num_speculative_tokens: The draft length it was found to be best at, if any;
            what the user says comes first.
    """

    plan: DraftPlan
    source: str
    num_speculative_tokens: int | None = None


def resolve_plan(
    config: SelfSpecConfig, target: TargetModel, model_drafts: bool = True
) -> ChosenPlan:
    """Turns the user's words into a plan for a model.

    A word or a profile is the plan to start from; without one that is the target
    itself, if any axis is spoken of, and else what `auto` says. Then each axis changes
    it as its own keys say.

    Raises:
        PlanError: If the model has no such parts, or the keys do not go together.
        ProfileError: If a profile is missing, malformed or of another model.
    """
    if not model_drafts or not config.may_use(SOURCES.named(MODEL)):
        return ChosenPlan(DraftPlan(target.num_layers), "draft_source")
    said = _said(config)
    chosen = _start(config, target, has_axes=bool(said))
    plan = chosen.plan
    for axis in AXES:
        plan = axis.resolve(config, target, plan)
    return replace(chosen, plan=plan, source=chosen.source or ", ".join(said))


def _keys_of_axes() -> set[str]:
    """The keys that say how the model drafts."""
    return {key for axis in AXES for key in axis.keys.model_fields}


def _said(config: SelfSpecConfig) -> list[str]:
    """The keys of axes that the user wrote, in words."""
    keys = [key for axis in AXES for key in axis.keys.model_fields]
    values = {
        key: getattr(config, key) for key in keys if key in config.model_fields_set
    }
    return [
        f"{key} {value}" if isinstance(value, str) else key
        for key, value in values.items()
        if value is not None
    ]


def _start(config: SelfSpecConfig, target: TargetModel, has_axes: bool) -> ChosenPlan:
    """The plan that a word of the user's names; the target itself where there is none
    and some axis is spoken of."""
    word = config.skip_layers
    is_said = "skip_layers" in config.model_fields_set
    if not isinstance(word, str) or (has_axes and not is_said):
        return ChosenPlan(DraftPlan(target.num_layers), "")
    if word == AUTO:
        return _auto_plan(target, "auto")
    if word == ONLINE:
        kept = config.online.profile
        if kept is None or not Path(kept).exists():
            return _auto_plan(target, "online, from auto")
        return _profile_plan(kept, target, f"online, from profile {kept}")
    return _profile_plan(word, target, f"profile {word}")


def _auto_plan(target: TargetModel, word: str) -> ChosenPlan:
    entry = catalogue.find(target)
    if entry is not None:
        source = f"{word}: the catalogue's plan for {entry.model}"
        return _plan_of_profile(entry, target.num_layers, source)
    return ChosenPlan(
        DraftPlan.skipping(SkipSet.evenly_spread(target.num_layers)),
        f"{word}: no catalogue entry for this model, so {DEFAULT_SKIP_RATIO:.0%} of "
        "the sublayers, evenly spread, first and last layer kept",
    )


def _profile_plan(path: str, target: TargetModel, source: str) -> ChosenPlan:
    profile = read_profile(Path(path))
    profile.check_fits(target)
    return _plan_of_profile(profile, target.num_layers, source)


def _plan_of_profile(profile: Profile, num_layers: int, source: str) -> ChosenPlan:
    try:
        plan = profile.plan(num_layers)
    except PlanError as error:
        raise type(error)(f"{source}: {error}") from error
    if profile.figures is None:
        return ChosenPlan(plan, source)
    return ChosenPlan(plan, source, profile.figures.num_speculative_tokens)


def _is_schedule_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple)
        and len(entry) == 3
        and all(type(number) is int for number in entry)
        and 1 <= entry[0] <= entry[1]
        and entry[2] >= 0
    )
