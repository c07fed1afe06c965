"""What a user may write under `draft_length`, and the stop rule it means.

One rule: a policy's name alone is enough; every parameter has the published value.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_selfspec.draft_length.stop_rules import (
    FIRST_THRESHOLD,
    TARGET_ACCEPTANCE,
    CalibratedThompson,
    StopRule,
    Thompson,
    Threshold,
)
from vllm_selfspec.plan.keys import Keys, shown

Seed = Annotated[int, Field(ge=0, strict=True, description="Of the draws.")]


class Fixed(Keys):
    """As many as `num_speculative_tokens` says."""

    policy: Literal["fixed"] = "fixed"


class ByGoodput(Keys):
    """What brings most tokens per second: see `goodput.Goodput`."""

    policy: Literal["goodput"] = "goodput"


class ThresholdExit(Keys):
    """Stops where the draft is unsure: see `stop_rules.Threshold`."""

    policy: Literal["threshold"] = "threshold"
    start: float = Field(
        default=FIRST_THRESHOLD, ge=0, le=1, description="First threshold."
    )
    target: float = Field(
        default=TARGET_ACCEPTANCE, ge=0, le=1, description="Acceptance aimed at."
    )


class BetaThompson(Keys):
    """Goes on as often as drafts are accepted: see `stop_rules.Thompson`."""

    policy: Literal["thompson"] = "thompson"
    seed: Seed = 0


class CalibrationThompson(Keys):
    """Goes on while it pays, by the corrected confidence: see
    `stop_rules.CalibratedThompson`."""

    policy: Literal["thompson-calibrated"] = "thompson-calibrated"
    seed: Seed = 0


POLICIES: dict[str, type[Keys]] = {
    "goodput": ByGoodput,
    "fixed": Fixed,
    "threshold": ThresholdExit,
    "thompson": BetaThompson,
    "thompson-calibrated": CalibrationThompson,
}


# Those that stop single rows while they draft.
STOPPING = (ThresholdExit, BetaThompson, CalibrationThompson)


def _named(value: Any) -> Any:
    """A policy by its name, or its name and parameters."""
    if isinstance(value, Keys):
        return value
    name = value.get("policy") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(
            f"is {shown(value)}, but must be one of {', '.join(POLICIES)}, or an "
            'object with that as its policy: write it like {"policy": "threshold", '
            '"start": 0.6}'
        )
    return value if isinstance(value, Mapping) else {"policy": value}


DraftLength = Annotated[
    Annotated[
        ByGoodput | Fixed | ThresholdExit | BetaThompson | CalibrationThompson,
        Field(discriminator="policy"),
    ],
    BeforeValidator(_named),
]


def captured_lengths(*longest: int) -> list[int]:
    """Lengths worth a set of CUDA graphs each, up to the longest draft of each source:
    the next one is hardly ever more than half as long again."""
    usual = {k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if k < max(longest)}
    return sorted(usual | {k for k in longest if k})


def schedule_of_all(*longest: int) -> list[tuple[int, int, int]]:
    """A schedule in vLLM's form that names every length which graphs are wanted for.

    vLLM captures them for the numbers of drafts in its table of batch sizes, and for no
    other. Which is used when is decided elsewhere.
    """
    lengths = [0, *captured_lengths(*longest)]
    return [(size, size, k) for size, k in enumerate(lengths, 1)]


def stop_rule(options: Keys, num_slots: int, max_drafts: int) -> StopRule | None:
    """The rule by which rows stop drafting; None where the policy has none."""
    match options:
        case ThresholdExit():
            return Threshold(num_slots, max_drafts, options.start, options.target)
        case BetaThompson():
            return Thompson(num_slots, max_drafts, options.seed)
        case CalibrationThompson():
            return CalibratedThompson(num_slots, max_drafts, seed=options.seed)
    return None
