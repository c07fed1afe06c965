"""`used_sources`: which draft sources an engine uses, and where they look at tokens.

One rule: what a user asks for is used or refused by name. What is left to us is used
where it costs nothing: asynchronous scheduling, which sources on the host would switch
off, is worth more to the V2 runner's users than copies to most.
"""

from dataclasses import dataclass
from typing import Any

from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.draft_length.options import STOPPING, ByGoodput
from vllm_selfspec.plan.source import Source
from vllm_selfspec.plan.sources import MODEL, SOURCES


@dataclass(frozen=True)
class UsedSources:
    """What drafts.

    Attributes:
        options: The values of their keys, by the names of the sources.
        on_device: The one that proposes for all rows on the device, if one does.
    """

    options: dict[str, dict[str, Any]]
    on_device: str | None = None


def used_sources(
    config: SelfSpecConfig, engine_args: Any, model_drafts: bool
) -> UsedSources:
    """Chooses; switches asynchronous scheduling off where it must be.

    Args:
        config: The user's.
        engine_args: vLLM's `EngineArgs`.
        model_drafts: Whether the model drafts.

    Raises:
        ConfigError: If what was asked for is not installed, or goes not together.
    """
    usable = _usable(config, model_drafts)
    stops = isinstance(config.draft_length, STOPPING)
    ahead = _ahead_of_the_device(usable, config)
    if not stops and runs_ahead(engine_args) and ahead.options:
        return ahead
    free = [source.name for source in usable if source.name != MODEL]
    if stops:
        what = f"draft_length {config.draft_length.policy!r} stops single requests"
        _schedule_after_drafting(engine_args, f"{what} while they draft")
    elif free:
        what = f"draft_source {free[0]!r} looks at the newest tokens"
        _schedule_after_drafting(engine_args, what)
    return UsedSources({source.name: source.options(config) for source in usable})


def _usable(config: SelfSpecConfig, model_drafts: bool) -> list[Source]:
    sources = [
        source
        for source in SOURCES
        if config.may_use(source) and (model_drafts or source.name != MODEL)
    ]
    refusals = {source.name: source.refusal() for source in sources}
    if refusals.get(config.draft_source) is not None:
        raise ConfigError(
            f"draft_source is {config.draft_source!r}, but "
            f"{refusals[config.draft_source]}"
        )
    return [source for source in sources if refusals[source.name] is None]


def _ahead_of_the_device(usable: list[Source], config: SelfSpecConfig) -> UsedSources:
    """What drafts where steps are scheduled ahead: the model, and beside it, or in its
    place, the first source that proposes on the device. None where what was asked for
    cannot.

    Which of both a step drafts from is told by the length that `goodput` asks for, so
    where lengths come from elsewhere the model drafts alone.
    """
    found = {one.name: one.options(config) for one in usable if one.name == MODEL}
    by_goodput = isinstance(config.draft_length, ByGoodput)
    is_bounded = config.num_speculative_tokens_per_batch_size is not None
    device = next((one for one in usable if one.speculator is not None), None)
    if device is None or (found and (is_bounded or not by_goodput)):
        return UsedSources(found)
    return UsedSources(
        {**found, device.name: device.options_on_device(config)}, device.name
    )


def runs_ahead(engine_args: Any) -> bool:
    """Whether steps would be scheduled ahead of the device: vLLM will say so for sure
    when the configuration is whole."""
    from vllm import envs

    if engine_args.async_scheduling is False:
        return False
    is_asked = bool(engine_args.async_scheduling)
    return (is_asked and envs.VLLM_USE_V2_MODEL_RUNNER is None) or takes_v2_runner()


def takes_v2_runner() -> bool:
    """Whether vLLM would take its V2 runner, as far as can be said before then."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    asked = envs.VLLM_USE_V2_MODEL_RUNNER
    return bool(HAS_TRITON if asked is None else asked)


def _schedule_after_drafting(engine_args: Any, what: str) -> None:
    """Switches asynchronous scheduling off: a step that is scheduled before the drafts
    of the last one are known would verify, and reserve, the full length for each."""
    if engine_args.async_scheduling:
        raise ConfigError(
            f"{what}, so a step is scheduled after that, but async_scheduling is True: "
            "leave it out, or use draft_source 'model' with draft_length 'goodput' or "
            "'fixed'"
        )
    engine_args.async_scheduling = False
