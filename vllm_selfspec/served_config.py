"""What an engine that was started does: read from its `VllmConfig`, in any process.

One rule: it is asked in plain engines too, of which selfspec must cost nothing. So
loading this imports nothing, and what needs more is imported where it is.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_selfspec.config import Online
    from vllm_selfspec.plan.draft_plan import DraftPlan
    from vllm_selfspec.plan.keys import Keys

# Beside `selfspec` in the `additional_config` that the draft view is compiled with.
DRAFT_PART = "selfspec_part"
# Whether an engine of this process drafts with selfspec.
_is_in_use = False


def uses_selfspec(vllm_config: Any) -> bool:
    """Whether this `VllmConfig` was made by `vllm_args.translate`."""
    config = vllm_config.additional_config
    return isinstance(config, dict) and "selfspec" in config


def compile_key(vllm_config: Any) -> dict[str, Any]:
    """`additional_config` as far as compiled code depends on it: of what is told here
    the draft view's on the draft plan, the target's on those axes whose values are made
    when it is loaded."""
    from vllm_selfspec.plan.axes import AXES

    config = vllm_config.additional_config
    plan = config["selfspec"]["plan"]
    if DRAFT_PART not in config:
        exchangeable = {axis.name for axis in AXES if axis.is_exchangeable}
        plan = {name: plan[name] for name in plan.keys() - exchangeable}
    return {**config, "selfspec": {"plan": plan}}


def plans_draft_lengths(vllm_config: Any) -> bool:
    """Whether the draft lengths are chosen step by step, for the whole batch."""
    return _policy(vllm_config) == "goodput"


def plans_in_worker(vllm_config: Any) -> bool:
    """Whether that is done in the worker, once a step has sampled: where steps are
    scheduled one after the other. Otherwise the scheduler does, ahead of the device."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return plans_draft_lengths(vllm_config) and not is_async


def num_model_tokens(vllm_config: Any) -> int:
    """The most that the model drafts for a request and step; 0 where it does not."""
    return int(vllm_config.additional_config["selfspec"]["num_model_tokens"])


def sources_of(vllm_config: Any) -> dict[str, dict[str, Any]]:
    """The draft sources by name, with the values of their keys."""
    found: dict[str, dict[str, Any]] = vllm_config.additional_config["selfspec"][
        "sources"
    ]
    return found


def source_on_device(vllm_config: Any) -> str | None:
    """The free source that proposes on the device, for steps that are scheduled ahead;
    None where no one does. One that could looks at tokens on the host where vLLM has
    decided otherwise, as it does on CPUs."""
    if not uses_selfspec(vllm_config):
        return None
    if vllm_config.scheduler_config.async_scheduling is False:
        return None
    found: str | None = vllm_config.additional_config["selfspec"].get("on_device")
    return found


def has_free_sources(vllm_config: Any) -> bool:
    """Whether anything but the model drafts that looks at tokens on the host."""
    from vllm_selfspec.plan.sources import MODEL

    if not uses_selfspec(vllm_config) or source_on_device(vllm_config):
        return False
    return bool(sources_of(vllm_config).keys() - {MODEL})


def num_device_tokens(vllm_config: Any) -> int:
    """The most that a source on the device proposes for a request and step; 0 where
    there is none."""
    source = source_on_device(vllm_config)
    if source is None:
        return 0
    from vllm_selfspec.plan.sources import SOURCES

    return SOURCES.named(source).max_tokens(sources_of(vllm_config)[source])


def longest_drafts(vllm_config: Any) -> tuple[int, int]:
    """The most that is drafted for a request and step by what drafts for a whole batch:
    the model, and a source on the device."""
    return num_model_tokens(vllm_config), num_device_tokens(vllm_config)


def bounds_lengths(vllm_config: Any) -> bool:
    """Whether the user bounds the lengths by batch size; otherwise vLLM's schedule is
    only there for the graphs that are captured by it."""
    return bool(vllm_config.additional_config["selfspec"]["bounds_lengths"])


def plans_rows(vllm_config: Any) -> bool:
    """Whether a worker decides row by row: how far, or from which source."""
    return plans_in_worker(vllm_config) or has_free_sources(vllm_config)


def needs_v1_runner(vllm_config: Any) -> str | None:
    """What the V2 runner's CUDA graphs of drafts would hold, and must not; or None."""
    if tunes_online(vllm_config):
        return "skip_layers 'online' exchanges skip sets"
    return None


def tunes_online(vllm_config: Any) -> bool:
    """Whether a better skip set is looked for while serving."""
    if not uses_selfspec(vllm_config):
        return False
    return vllm_config.additional_config["selfspec"].get("online") is not None


def stops_rows(vllm_config: Any) -> bool:
    """Whether single rows stop drafting; lengths are then known on the host alone."""
    return _policy(vllm_config) not in (None, "goodput", "fixed")


def needs_host_tokens(vllm_config: Any) -> bool:
    """Whether tokens must be on the host before the next step is scheduled: to stop
    single rows, or to look at what free sources have."""
    return stops_rows(vllm_config) or has_free_sources(vllm_config)


def _policy(vllm_config: Any) -> str | None:
    """The name of the draft-length policy; None where selfspec is not used."""
    if not uses_selfspec(vllm_config):
        return None
    options = vllm_config.additional_config["selfspec"].get("draft_length", {})
    return str(options.get("policy", "fixed"))


def is_in_use() -> bool:
    """Whether an engine of this process drafts with selfspec."""
    return _is_in_use


def mark_in_use() -> None:
    """Tells the seams without access to a config that an engine here uses selfspec."""
    global _is_in_use
    _is_in_use = True


def draft_length_of(vllm_config: Any) -> "Keys":
    """The policy that `translate` put into this `VllmConfig`."""
    from vllm_selfspec.draft_length.options import POLICIES

    options = vllm_config.additional_config["selfspec"]["draft_length"]
    return POLICIES[options["policy"]].model_validate(options)


def online_of(vllm_config: Any) -> "Online | None":
    """How to look for a better skip set while serving; None where that is not asked."""
    from vllm_selfspec.config import Online

    options = vllm_config.additional_config["selfspec"].get("online")
    return None if options is None else Online.model_validate(options)


def calibration_of(vllm_config: Any) -> dict[str, Any] | None:
    """What to look for a draft plan by at this start; None where that is not to be
    done: see `engine.first_start`."""
    if not uses_selfspec(vllm_config):
        return None
    found: dict[str, Any] | None = vllm_config.additional_config["selfspec"].get(
        "calibration"
    )
    return found


def acceptance_of(vllm_config: Any) -> tuple[float, ...]:
    """Chance that each draft token of the model is accepted, as it was found before;
    none where it was not."""
    found = vllm_config.additional_config["selfspec"].get("acceptance", ())
    return tuple(map(float, found))


def plan_of(vllm_config: Any) -> "DraftPlan":
    """The draft plan that `translate` put into this `VllmConfig`."""
    from vllm_selfspec.plan.draft_plan import DraftPlan

    return DraftPlan.from_dict(vllm_config.additional_config["selfspec"]["plan"])
