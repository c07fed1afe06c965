"""`SelfSpecConfig`: what a user may write under `--speculative-config`.

One rule: whatever is accepted here and resolved against a model works; whatever is not
is refused at start-up by an error that names the key, the value and the fix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_selfspec.draft_length.options import DraftLength, Goodput
from vllm_selfspec.plan import catalogue
from vllm_selfspec.plan.exit_card import ExitHeadError, read_exit_card
from vllm_selfspec.plan.profile import (
    MAX_NUM_SPECULATIVE_TOKENS,
    PATH,
    SKIP_SET,
    Keys,
    Profile,
    SkipLayers,
    describe,
    read_profile,
    shown,
)
from vllm_selfspec.plan.skip_set import DEFAULT_SKIP_RATIO, SkipSet, SkipSetError
from vllm_selfspec.plan.target_model import TargetModel

METHOD = "selfspec"
AUTO, ONLINE = "auto", "online"
DEFAULT_NUM_SPECULATIVE_TOKENS = 4


class ConfigError(ValueError):
    """A configuration that selfspec refuses."""


def _form_of(skip_layers: object) -> str | None:
    """Told apart first, so that an error speaks of the form that was meant."""
    if isinstance(skip_layers, str):
        return PATH
    return SKIP_SET if isinstance(skip_layers, Mapping | SkipLayers) else None


SkipLayersOrWord = Annotated[
    # Linux takes no path longer than this.
    Annotated[str, Field(max_length=4096), Tag(PATH)]
    | Annotated[SkipLayers, Tag(SKIP_SET)],
    Discriminator(_form_of),
]


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
    """The keys of `{"method": "selfspec", ...}`."""

    method: Literal["selfspec"] = Field(
        default="selfspec", description="Chooses self-speculative decoding."
    )
    num_speculative_tokens: int = Field(
        default=DEFAULT_NUM_SPECULATIVE_TOKENS,
        ge=1,
        le=MAX_NUM_SPECULATIVE_TOKENS,
        strict=True,
        description="Tokens drafted per request and step at most.",
    )
    skip_layers: SkipLayersOrWord = Field(
        default=AUTO,
        description="'auto', 'online' (as auto, and looks for a better one while "
        'serving), a skip set ({"attention": [...], "mlp": [...]}), or the path of a '
        "JSON profile.",
    )
    online: Online = Field(
        default_factory=Online,
        description="How skip_layers 'online' goes about it: share of the time, and "
        "profile to keep.",
    )
    exit_layer: int | None = Field(
        default=None,
        ge=1,
        lt=10_000,
        strict=True,
        description="Draft with layers 0 to N-1, then the final norm and LM head. "
        "Excludes skip_layers.",
    )
    exit_head: str | None = Field(
        default=None,
        max_length=4096,
        description="Directory of an exit head, as `vllm-selfspec train-exit` writes "
        "it: a trained layer that follows the first N. exit_layer may then be left "
        "out, and skip_layers be a skip set within those N; by default the one that "
        "it was trained with.",
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
        default_factory=Goodput,
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
    def _one_plan(self) -> "SelfSpecConfig":
        if "skip_layers" not in self.model_fields_set:
            return self
        if self.exit_head is not None and not isinstance(self.skip_layers, SkipLayers):
            raise ValueError(
                "with exit_head, skip_layers is a skip set within the layers before "
                f"it, but it is {shown(self.skip_layers)}: write one, like "
                '{"mlp": [1]}, or leave it out'
            )
        if self.exit_layer is not None and self.exit_head is None:
            raise ValueError(
                "exit_layer and skip_layers exclude each other: remove one of them"
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

    @property
    def is_online(self) -> bool:
        """Whether the skip set is looked for while serving."""
        return self.skip_layers == ONLINE

    @classmethod
    def parse(cls, keys: Mapping[str, Any]) -> "SelfSpecConfig":
        """Checks the user's keys.

        Raises:
            ConfigError: If a key is unknown or its value not allowed.
        """
        try:
            return cls.model_validate(dict(keys))
        except ValidationError as error:
            raise ConfigError(f"selfspec configuration: {describe(error)}") from error


def _is_schedule_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple)
        and len(entry) == 3
        and all(type(number) is int for number in entry)
        and 1 <= entry[0] <= entry[1]
        and entry[2] >= 0
    )


@dataclass(frozen=True)
class DraftPlan:
    """How a served model drafts: a configuration resolved against its layers.

    Attributes:
        skip_set: What the draft leaves out.
        source: Where that is from, in words.
        num_speculative_tokens: The draft length it was found to be best at, if any;
            what the user says comes first.
        exit_head: Directory of the exit head that comes after the last layer that is
            not skipped whole, or None.
    """

    skip_set: SkipSet
    source: str
    num_speculative_tokens: int | None = None
    exit_head: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the trip to the worker processes."""
        return {
            "num_layers": self.skip_set.num_layers,
            **self.skip_set.to_dict(),
            "source": self.source,
            "exit_head": self.exit_head,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DraftPlan":
        """The inverse of `to_dict`."""
        skip_set = SkipSet.from_dict(data["num_layers"], data)
        return cls(skip_set, data["source"], exit_head=data.get("exit_head"))


def resolve_plan(config: SelfSpecConfig, target: TargetModel) -> DraftPlan:
    """Turns the user's words into sublayers of a model.

    Raises:
        SkipSetError: If the model has no such layer, or everything would be skipped.
        ProfileError: If a profile is missing, malformed or of another model.
        ExitHeadError: If an exit head is missing, damaged or of another model.
    """
    num_layers = target.num_layers
    if config.exit_head is not None:
        return _exit_head_plan(config, config.exit_head, target)
    if config.exit_layer is not None:
        return DraftPlan(
            SkipSet.early_exit(num_layers, config.exit_layer), "exit_layer"
        )
    if isinstance(config.skip_layers, SkipLayers):
        return _plan_of(config.skip_layers, num_layers, "skip_layers")
    if config.skip_layers == AUTO:
        return _auto_plan(target, "auto")
    if config.is_online:
        kept = config.online.profile
        if kept is None or not Path(kept).exists():
            return _auto_plan(target, "online, from auto")
        return _profile_plan(kept, target, f"online, from profile {kept}")
    path = config.skip_layers
    return _profile_plan(path, target, f"profile {path}")


def _exit_head_plan(
    config: SelfSpecConfig, directory: str, target: TargetModel
) -> DraftPlan:
    card = read_exit_card(Path(directory))
    card.check_fits(target, Path(target.name))
    if config.exit_layer not in (None, card.exit_layer):
        raise ExitHeadError(
            "an exit head follows the layers that it was trained after, and the first "
            f"{card.exit_layer} those are for {directory!r}, but exit_layer is "
            f"{config.exit_layer}: leave it out"
        )
    holes = card.skip_set
    if isinstance(config.skip_layers, SkipLayers):
        holes = _plan_of(config.skip_layers, card.num_layers, "skip_layers").skip_set
    skip_set = SkipSet.before_exit(card.num_layers, card.exit_layer, holes)
    source = f"exit_head {directory}"
    return DraftPlan(skip_set, source, exit_head=str(Path(directory).absolute()))


def _auto_plan(target: TargetModel, word: str) -> DraftPlan:
    entry = catalogue.find(target)
    if entry is not None:
        source = f"{word}: the catalogue's plan for {entry.model}"
        return _plan_of_profile(entry, target.num_layers, source)
    return DraftPlan(
        SkipSet.evenly_spread(target.num_layers),
        f"{word}: no catalogue entry for this model, so {DEFAULT_SKIP_RATIO:.0%} of "
        "the sublayers, evenly spread, first and last layer kept",
    )


def _profile_plan(path: str, target: TargetModel, source: str) -> DraftPlan:
    profile = read_profile(Path(path))
    profile.check_fits(target)
    return _plan_of_profile(profile, target.num_layers, source)


def _plan_of_profile(profile: Profile, num_layers: int, source: str) -> DraftPlan:
    plan = _plan_of(profile.skip_layers, num_layers, source)
    if profile.figures is None:
        return plan
    return replace(plan, num_speculative_tokens=profile.figures.num_speculative_tokens)


def _plan_of(lists: SkipLayers, num_layers: int, source: str) -> DraftPlan:
    try:
        return DraftPlan(SkipSet.from_dict(num_layers, lists.model_dump()), source)
    except SkipSetError as error:
        raise SkipSetError(f"{source}: {error}") from error
