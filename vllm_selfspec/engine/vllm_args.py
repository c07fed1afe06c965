"""From the user's words to vLLM's own configuration; `served_config` reads it back.

One rule: vLLM sees only what it knows. That is the method `custom_class` with our
proposer, or the registered method `selfspec`; our draft plan lies under
`additional_config["selfspec"]`, which travels to the worker processes.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_selfspec.chosen_plan import ChosenPlan, resolve_plan
from vllm_selfspec.config import METHOD, ConfigError, SelfSpecConfig
from vllm_selfspec.draft_length.options import (
    ByGoodput,
    schedule_of_all,
)
from vllm_selfspec.engine.first_start import FirstStart, can_try_plans
from vllm_selfspec.engine.metrics import share_directory
from vllm_selfspec.engine.support import (
    raise_if_model_cannot_draft,
    raise_if_refused,
    raise_if_unsupported,
)
from vllm_selfspec.engine.used_sources import runs_ahead, used_sources
from vllm_selfspec.plan.axis import Deployment
from vllm_selfspec.plan.axis_skip_layers import AUTO
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.families import UnsupportedModelError
from vllm_selfspec.plan.sources import MODEL, SOURCES
from vllm_selfspec.plan.target_model import TargetModel

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown

PROPOSER_PATH = "vllm_selfspec.draft.v1_proposer.SelfSpecProposer"


def accept_bare_word(parser: Any) -> Any:
    """Lets `--speculative-config selfspec` and `--spec-method selfspec` be parsed."""
    for action in parser._actions:
        if "--speculative-config" in action.option_strings:
            action.type = _bare_word_or(action.type)
        elif "--spec-method" in action.option_strings and action.choices is not None:
            action.choices = [*action.choices, METHOD]
    return parser


def _bare_word_or(parse: Any) -> Any:
    def parse_speculative_config(text: str) -> Any:
        if text == METHOD or text == json.dumps(METHOD):
            return {"method": METHOD}
        return parse(text)

    return parse_speculative_config


def asks_for_selfspec(engine_args: Any) -> bool:
    """Whether these `EngineArgs` name our method."""
    keys = engine_args.speculative_config
    method = keys.get("method") if isinstance(keys, dict) else keys
    return METHOD in (engine_args.spec_method, method)


def translate(engine_args: Any, model_config: Any, parallel_config: Any) -> None:
    """Rewrites `EngineArgs` in vLLM's terms, in place.

    Args:
        engine_args: vLLM's `EngineArgs` that asks for selfspec.
        model_config: The target's `ModelConfig`.
        parallel_config: The target's `ParallelConfig`.

    Raises:
        ConfigError, PlanError, ProfileError: What the user wrote is not allowed.
        UnsupportedModelError: The model or the deployment cannot be drafted for.
    """
    keys = _user_keys(engine_args)
    resolved = _resolve(keys, engine_args, model_config, parallel_config)
    engine_args.spec_method = engine_args.spec_tokens = None
    engine_args.speculative_config = {
        "method": "custom_class",
        "model": PROPOSER_PATH,
        **resolved,
    }


def configure(
    engine_args: Any, model_config: Any, parallel_config: Any
) -> dict[str, Any]:
    """What a vLLM with a registry (`patches/`) calls; there `translate` is not used.

    Returns the keys of vLLM's `SpeculativeConfig`; arguments and errors as there.
    """
    keys = engine_args.speculative_config
    resolved = _resolve(keys, engine_args, model_config, parallel_config)
    return {"method": METHOD, **resolved}


def _resolve(
    keys: dict[str, Any], engine_args: Any, model_config: Any, parallel_config: Any
) -> dict[str, Any]:
    """Checks the user's keys, leaves the draft plan in `additional_config`, and returns
    what `SpeculativeConfig` knows."""
    config = SelfSpecConfig.parse(keys)
    raise_if_unsupported(model_config, parallel_config)
    model_drafts = _model_drafts(config, model_config)
    is_ahead = config.draft_source == AUTO and runs_ahead(engine_args)
    first = FirstStart(config, model_config, parallel_config, is_ahead)
    target = target_of(model_config)
    chosen = resolve_plan(config, target, model_drafts, first.known)
    is_able = can_try_plans(engine_args, model_config, parallel_config)
    calibration = first.request(chosen, is_able) if model_drafts else None
    if first.leaves_drafting_to_others(chosen, calibration):
        model_drafts = False
    deployment = Deployment(
        model_config,
        parallel_config,
        has_loras=bool(engine_args.enable_lora),
        has_connector=engine_args.kv_transfer_config is not None,
    )
    raise_if_refused(chosen.plan, deployment)
    if config.is_online:
        _raise_if_not_tunable(parallel_config)
    used = used_sources(config, engine_args, model_drafts)
    sources = used.options
    share_directory()
    _log(chosen, sources)
    num_model_tokens = _num_drafts(config, chosen) if MODEL in sources else 0
    # Nothing is loaded for drafts that nobody makes.
    plan = chosen.plan if num_model_tokens else DraftPlan(target.num_layers)
    engine_args.additional_config = {
        **engine_args.additional_config,
        METHOD: {
            "plan": plan.to_dict(),
            "draft_length": config.draft_length.model_dump(),
            "online": _online(config),
            "sources": sources,
            "on_device": used.on_device,
            "bounds_lengths": config.num_speculative_tokens_per_batch_size is not None,
            "num_model_tokens": num_model_tokens,
            "acceptance": chosen.acceptance,
            "calibration": calibration,
        },
    }
    longest = [SOURCES.named(name).max_tokens(sources[name]) for name in sources]
    num_drafts = max(num_model_tokens, *longest)
    lengths = [num_drafts]
    if used.on_device is not None and num_model_tokens:
        # More than the model drafts asks the device's source: see `v2_copies`.
        num_drafts = max(num_drafts, num_model_tokens + 1)
        lengths = [num_model_tokens, *longest]
    return {
        "num_speculative_tokens": num_drafts,
        "draft_sample_method": config.draft_sample_method,
        "num_speculative_tokens_per_batch_size": _schedule(config, lengths),
    }


def _model_drafts(config: SelfSpecConfig, model_config: Any) -> bool:
    """Whether the target drafts for itself: where the user lets it and it can. Where it
    cannot, and nobody said that it should, the other sources do."""
    if not config.may_use(SOURCES.named(MODEL)):
        return False
    try:
        raise_if_model_cannot_draft(model_config)
    except UnsupportedModelError as error:
        if config.draft_source != AUTO or config.says_how_the_model_drafts:
            raise
        logger.warning("%s. That is what it does now", error)
        return False
    return True


def _raise_if_not_tunable(parallel_config: Any) -> None:
    if parallel_config.data_parallel_size > 1:
        raise ConfigError(
            "skip_layers 'online' tries skip sets at steps that every engine chooses "
            "for itself, where data-parallel ones run in lockstep, but "
            f"data_parallel_size is {parallel_config.data_parallel_size}: make it 1, "
            "or use a profile of `vllm-selfspec tune`"
        )


def _online(config: SelfSpecConfig) -> dict[str, Any] | None:
    if not config.is_online:
        return None
    found = config.online.model_dump()
    if found["profile"] is not None:  # workers may run elsewhere
        found["profile"] = str(Path(found["profile"]).absolute())
    return found


def target_of(model_config: Any) -> TargetModel:
    """As much of it as plans are told apart by."""
    return TargetModel.of(
        model_config.get_total_num_hidden_layers(),
        str(model_config.model),
        {
            **model_config.hf_text_config.to_dict(),
            "architectures": model_config.hf_config.architectures,
        },
    )


def _log(chosen: ChosenPlan, sources: Mapping[str, Any]) -> None:
    free = [SOURCES.named(name).words for name in sources if name != MODEL]
    model = [f"{chosen.plan} ({chosen.source})"] if MODEL in sources else []
    logger.info("selfspec drafts with: %s", "; ".join([*model, *free]))
    if chosen.is_calibrated and chosen.figures is not None:
        speed_up = f"{chosen.figures.speed_up:.2f}x"
        what = f"are expected to bring {speed_up}"
        if not model:
            what = f"are left out: they would bring {speed_up}"
        if not chosen.figures.speed_up:
            what = "are left out: no plan for them looked promising"
        logger.info("selfspec: the model's own drafts %s", what)


def _num_drafts(config: SelfSpecConfig, chosen: ChosenPlan) -> int:
    """What the user says, or the length that the plan was found to be best at."""
    said = {"num_speculative_tokens", "num_speculative_tokens_per_batch_size"}
    if said & config.model_fields_set:
        return config.num_speculative_tokens
    return chosen.num_speculative_tokens or config.num_speculative_tokens


def _schedule(
    config: SelfSpecConfig, longest: Sequence[int]
) -> list[tuple[int, int, int]] | None:
    """The user's, or one for vLLM to capture CUDA graphs of every length by, up to the
    longest draft of each source."""
    given = config.num_speculative_tokens_per_batch_size
    if given is None and isinstance(config.draft_length, ByGoodput):
        return schedule_of_all(*longest)
    return given


def _user_keys(engine_args: Any) -> dict[str, Any]:
    """`speculative_config` with the flags that vLLM merges into it."""
    config = engine_args.speculative_config or {}
    if config == METHOD:  # the bare word, in Python
        config = {"method": METHOD}
    keys = {str(key).replace("-", "_"): value for key, value in config.items()}
    if len(keys) < len(config):
        raise ConfigError(
            "a key of the speculative config may be written with - or with _, but not "
            f"both: it has {', '.join(map(str, config))}: remove one"
        )
    flags = {
        "--spec-method": ("method", engine_args.spec_method),
        "--spec-model": ("model", engine_args.spec_model),
        "--spec-tokens": ("num_speculative_tokens", engine_args.spec_tokens),
    }
    for flag, (key, value) in flags.items():
        if value is None:
            continue
        if key in keys:  # vLLM's rule and words
            raise ValueError(
                f"{flag} and --speculative-config['{key}'] are mutually exclusive"
            )
        keys[key] = value
    return keys
