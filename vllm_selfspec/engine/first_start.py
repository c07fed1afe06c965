"""What is known of a model when it starts, and whether a plan is to be looked for.

One rule: a plan is looked for once, at the first start of a model on a machine, and
where nobody has said how to draft; the next starts read it (`plan.calibrated`).
"""

import logging
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from vllm_selfspec import __version__
from vllm_selfspec.chosen_plan import ChosenPlan, Known
from vllm_selfspec.config import SelfSpecConfig
from vllm_selfspec.draft_length.options import ByGoodput
from vllm_selfspec.engine.hardware import device_name, num_cores, on_cpu
from vllm_selfspec.engine.used_sources import takes_v2_runner
from vllm_selfspec.engine.versions import vllm_version
from vllm_selfspec.plan.axis_skip_layers import AUTO
from vllm_selfspec.plan.calibrated import Circumstances
from vllm_selfspec.plan.cost import CheckpointError
from vllm_selfspec.plan.hub import DESCRIPTION, identity_of, locate, read_weights
from vllm_selfspec.plan.step_cost import StepCost
from vllm_selfspec.plan.target_model import TargetModel

logger = logging.getLogger("vllm.selfspec")  # below vLLM's logger, so it is shown


class FirstStart:
    """The first start of a model, or one after it.

    Attributes:
        known: What a plan may be chosen by.
    """

    def __init__(
        self,
        config: SelfSpecConfig,
        model_config: Any,
        parallel_config: Any,
        is_ahead: bool,
    ) -> None:
        """Looks up what is known, where `auto` asks for it.

        Args:
            config: The user's.
            model_config: vLLM's, of the target.
            parallel_config: vLLM's.
            is_ahead: Whether steps are scheduled ahead of the device. What was found
                where they are not says nothing there: costs and copies are others.
        """
        self._is_ahead = is_ahead
        self._config, self._circumstances = config, None
        self.known = Known()
        if not (config.is_auto or config.is_online):
            return
        step = step_of(model_config) if config.draft_memory else None
        memory = 0 if step is None else config.memory_beside(step.total)
        found = _circumstances(model_config, parallel_config, memory)
        self._circumstances = found
        is_wanted = config.calibration_seconds and not is_ahead
        calibrated = found.find() if found and is_wanted else None
        self.known = Known(calibrated, step)

    def request(self, chosen: ChosenPlan, is_able: bool) -> dict[str, Any] | None:
        """What to look for, as it travels to the engine; None where nothing is.

        Args:
            chosen: The plan to start from.
            is_able: Whether the engine can try plans.
        """
        seconds = self._config.calibration_seconds
        is_wanted = self._is_left_to_us(chosen) and seconds and is_able
        if not is_wanted or self._is_ahead or self._circumstances is None:
            return None
        return {"seconds": seconds, "circumstances": asdict(self._circumstances)}

    def _is_left_to_us(self, chosen: ChosenPlan) -> bool:
        """Whether nobody has measured the plan, and nobody has asked for it."""
        by_goodput = isinstance(self._config.draft_length, ByGoodput)
        return chosen.is_guess and self._config.is_auto and by_goodput

    def leaves_drafting_to_others(self, chosen: ChosenPlan, request: object) -> bool:
        """Whether the model drafts nothing, because that brings nothing, or because
        nobody knows whether it does, nor will know after this start."""
        if self._config.draft_source != AUTO or self._config.is_online:
            return False
        if chosen.is_useless:
            return True
        is_unknown = self._is_left_to_us(chosen) and request is None
        if not is_unknown or self._config.draft_memory:
            return False
        logger.info(
            "selfspec knows no plan by which this model drafts well, and tries none "
            "here, so copies alone draft: `vllm-selfspec tune` finds one"
        )
        return True


def can_try_plans(engine_args: Any, model_config: Any, parallel_config: Any) -> bool:
    """Whether an engine whose steps are scheduled one after the other can: it has texts
    of this model to try them on, every worker the same, and the V1 runner's draft loop,
    which the probe is for."""
    return (
        not takes_v2_runner()
        and not engine_args.enable_lora
        and parallel_config.data_parallel_size == 1
        and not model_config.skip_tokenizer_init
        and str(engine_args.load_format) != "dummy"
    )


def circumstances_from(request: dict[str, Any]) -> Circumstances:
    """Of what `FirstStart.request` has made."""
    found = dict(request["circumstances"])
    found["versions"] = tuple(tuple(pair) for pair in found["versions"])
    return Circumstances(**found)


def _circumstances(
    model_config: Any, parallel_config: Any, memory: int
) -> Circumstances | None:
    """None where the weights cannot be told from others."""
    import torch

    weights = _identity(model_config)
    if weights is None:
        logger.info(
            "selfspec cannot tell the weights of %s from others, so no plan for them "
            "is looked for or kept: it needs safetensors, or the name of a model that "
            "is in the Hub's cache or can be had from there",
            model_config.model,
        )
        return None
    ranks = parallel_config.tensor_parallel_size
    num = num_cores() if on_cpu() else ranks
    versions = {
        "vllm": vllm_version(),
        "torch": torch.__version__,
        "vllm_selfspec": __version__,
    }
    return Circumstances(
        TargetModel(0, str(model_config.model)).short_name,
        weights,
        f"{model_config.dtype}".removeprefix("torch."),
        f"{num} x {device_name()}",
        tuple(versions.items()),
        memory,
    )


@cache
def _located(model: str, revision: str | None) -> Path:
    """Directory of what describes a model; the Hub is asked for it once."""
    return locate(model, DESCRIPTION, revision)


def _identity(model_config: Any) -> str | None:
    model = str(model_config.model)
    try:
        return identity_of(model, _located(model, model_config.revision))
    except CheckpointError:
        return None


def step_of(model_config: Any) -> StepCost | None:
    """Bytes that a decode step reads; None where they cannot be found out."""
    model = str(model_config.model)
    try:
        return read_weights(model, _located(model, model_config.revision)).step
    except CheckpointError:
        return None
