"""`resolve_plan`: from what a user wrote to the draft plan of a model.

One rule: what was found for a model comes before what is guessed, and what the user
says before both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.plan import catalogue
from vllm_selfspec.plan.axes import AXES
from vllm_selfspec.plan.axis_skip_layers import AUTO, ONLINE
from vllm_selfspec.plan.calibrated import USEFUL
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.errors import PlanError
from vllm_selfspec.plan.keys import shown
from vllm_selfspec.plan.profile import Figures, Profile, read_profile
from vllm_selfspec.plan.skip_set import DEFAULT_SKIP_RATIO, SkipSet
from vllm_selfspec.plan.sources import MODEL, SOURCES
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel


@dataclass(frozen=True)
class ChosenPlan:
    """A configuration resolved against a model.

    Attributes:
        plan: How it drafts.
        source: Where that is from, in words.
        figures: What it was found to be worth, if it was; the draft length among them
            is taken unless the user says one.
        is_guess: Whether nobody has measured it on this model.
        is_calibrated: Whether its first start here has.
    """

    plan: DraftPlan
    source: str
    figures: Figures | None = None
    is_guess: bool = False
    is_calibrated: bool = False

    @property
    def num_speculative_tokens(self) -> int | None:
        """The draft length it was found to be best at, if any."""
        return None if self.figures is None else self.figures.num_speculative_tokens

    @property
    def is_useless(self) -> bool:
        """Whether the first start has found that it brings nothing."""
        speed_up = 0.0 if self.figures is None else self.figures.speed_up
        return self.is_calibrated and speed_up < USEFUL

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Chance that each draft token is accepted, given those before it, as it was
        found; none where it was not."""
        return () if self.figures is None else conditional(self.figures.acceptance)


def conditional(acceptance: Sequence[float]) -> tuple[float, ...]:
    """Chance of each draft token, given those before, by that of all up to it."""
    pairs = zip(acceptance, (1.0, *acceptance), strict=False)
    return tuple(now / before if before else 0.0 for now, before in pairs)


@dataclass(frozen=True)
class Known:
    """What is known of a model beside its architecture.

    Attributes:
        calibrated: The plan that its first start has found; None if there was none.
        step: Bytes that a decode step reads; None where they are not known.
    """

    calibrated: Profile | None = None
    step: StepCost | None = None


NOTHING_KNOWN = Known()


def resolve_plan(
    config: SelfSpecConfig,
    target: TargetModel,
    model_drafts: bool = True,
    known: Known = NOTHING_KNOWN,
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
    chosen = _start(config, target, known, has_axes=bool(said))
    plan = chosen.plan
    for axis in AXES:
        plan = axis.resolve(config, target, plan)
    return replace(chosen, plan=plan, source=chosen.source or ", ".join(said))


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


def _start(
    config: SelfSpecConfig, target: TargetModel, known: Known, has_axes: bool
) -> ChosenPlan:
    """The plan that a word of the user's names; the target itself where there is none
    and some axis is spoken of."""
    word = config.skip_layers
    is_said = "skip_layers" in config.model_fields_set
    if not isinstance(word, str) or (has_axes and not is_said):
        return ChosenPlan(DraftPlan(target.num_layers), "")
    if word == AUTO:
        return _auto_plan(config, target, known, "auto")
    if word == ONLINE:
        kept = config.online.profile
        if kept is None or not Path(kept).exists():
            return _auto_plan(config, target, known, "online, from auto")
        return _profile_plan(kept, target, f"online, from profile {kept}")
    return _profile_plan(word, target, f"profile {word}")


def _auto_plan(
    config: SelfSpecConfig, target: TargetModel, known: Known, word: str
) -> ChosenPlan:
    if known.calibrated is not None and known.calibrated.is_for(target):
        source = f"{word}: found at this model's first start"
        found = _plan_of_profile(known.calibrated, target.num_layers, source)
        return replace(found, is_calibrated=True)
    entry = catalogue.find(target)
    if entry is not None:
        source = f"{word}: the catalogue's plan for {entry.model}"
        found = _plan_of_profile(entry, target.num_layers, source)
        return replace(found, plan=_with_memory(config, found.plan, known))
    plain = DraftPlan(target.num_layers)
    plan = _with_memory(config, plain, known)
    if plan != plain:
        source = f"{word}: what draft_memory {config.draft_memory} has room for"
        return ChosenPlan(plan, source, is_guess=True)
    return ChosenPlan(
        DraftPlan.skipping(SkipSet.evenly_spread(target.num_layers)),
        f"{word}: no catalogue entry for this model, so {DEFAULT_SKIP_RATIO:.0%} of "
        "the sublayers, evenly spread, first and last layer kept",
        is_guess=True,
    )


def _with_memory(config: SelfSpecConfig, plan: DraftPlan, known: Known) -> DraftPlan:
    """The plan with what `draft_memory` has room for."""
    if not config.draft_memory:
        return plan
    if known.step is None:
        raise ConfigError(
            f"draft_memory is {shown(config.draft_memory)}, but the sizes of this "
            "model's weights are not known: say draft_weights instead"
        )
    return plan.within_memory(known.step, config.memory_beside(known.step.total))


def _profile_plan(path: str, target: TargetModel, source: str) -> ChosenPlan:
    profile = read_profile(Path(path))
    profile.check_fits(target)
    return _plan_of_profile(profile, target.num_layers, source)


def _plan_of_profile(profile: Profile, num_layers: int, source: str) -> ChosenPlan:
    try:
        plan = profile.plan(num_layers)
    except PlanError as error:
        raise type(error)(f"{source}: {error}") from error
    return ChosenPlan(plan, source, profile.figures)
