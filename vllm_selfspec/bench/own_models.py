"""The repository's own models, each widened to the cost of a big one, once.

One rule: they are data of a clone, found where that lies; an installed package has none
of them, and says what to name instead.
"""

from pathlib import Path

from rich.console import Console

from vllm_selfspec.plan.cost import CheckpointError
from vllm_selfspec.plan.hub import locate

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
# By name; and how often they are widened: 8 times makes 0.54 B parameters for a CPU, 16
# times 2.2 B for a GPU.
OWN_MODELS = {"demo": "demo_model", "plain": "plain_model"}
WIDEN_CPU, WIDEN_GPU = 8, 16
# The small one gets a fiftieth of the target's weights, usual for a draft model.
OWN_DRAFT_MODEL, DRAFT_PART = "small_model", 4


def find_model(name: str, factor: int | None, console: Console) -> Path:
    """The checkpoint directory of `name`; one of our own is widened first, `factor`
    times or as suits the machine.

    Raises:
        CheckpointError: If it is one of our own and this is no clone, or cannot be had.
    """
    if name in OWN_MODELS:
        return widened(OWN_MODELS[name], factor or usual_factor(), console)
    return locate(name)


def find_draft_model(model: str, factor: int | None, console: Console) -> Path | None:
    """The small model that drafts for one of our own, widened in proportion; None for
    any other model."""
    if model not in OWN_MODELS:
        return None
    part = max(1, (factor or usual_factor()) // DRAFT_PART)
    return widened(OWN_DRAFT_MODEL, part, console)


def usual_factor() -> int:
    """How often a model is widened on this machine."""
    from vllm.platforms import current_platform

    return WIDEN_CPU if current_platform.is_cpu() else WIDEN_GPU


def widened(name: str, factor: int, console: Console) -> Path:
    """A model of the repository, so many times as wide; made once.

    Raises:
        CheckpointError: If this is no clone of the repository.
    """
    source = BENCHMARKS / name
    if not source.is_dir():
        raise CheckpointError(
            f"{name} is part of the repository, not of the installed package: name a "
            "model's directory or Hub name, or run in a clone"
        )
    from vllm_selfspec.bench.widen import widen

    console.print(
        f"Widening {name} {factor} times: same outputs, {factor**2} times the cost ..."
    )
    return widen(source, REPOSITORY / ".cache" / f"{name}_x{factor}", factor)


def widened_exit_layer(directory: Path, model: str, wide: Path) -> Path:
    """The exit layer of a model of our own, as wide as that was made.

    Args:
        directory: Of the exit layer.
        model: The model's name in `OWN_MODELS`.
        wide: The widened model.
    """
    from vllm_selfspec.bench.widen import widen_exit_layer
    from vllm_selfspec.plan.exit_card import read_exit_card

    card = read_exit_card(directory)
    name = f"{wide.name}_exit_{card.exit_layer}_{card.tensors[:8]}"
    source = BENCHMARKS / OWN_MODELS[model]
    return widen_exit_layer(directory, source, wide, REPOSITORY / ".cache" / name)
