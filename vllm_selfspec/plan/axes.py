"""The table of axes, in the order in which they change a plan, its cost and its view.

To add one: a file beside this with a class that extends `Axis`, and a row. Another
package adds its own by `register`, from a general plugin of vLLM, which runs in every
process.
"""

from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.axis_draft_weights import DraftWeightsAxis
from vllm_selfspec.plan.axis_exit_layer import ExitLayerAxis
from vllm_selfspec.plan.axis_skip_layers import SkipLayersAxis

AXES: list[Axis] = [
    SkipLayersAxis(),
    ExitLayerAxis(),
    DraftWeightsAxis(),
]


def register(axis: Axis) -> None:
    """Adds a row; again is idle."""
    if axis.name not in {known.name for known in AXES}:
        AXES.append(axis)


def axis_named(name: str) -> Axis:
    """The row of that name.

    Raises:
        KeyError: If there is none.
    """
    for axis in AXES:
        if axis.name == name:
            return axis
    raise KeyError(f"there is no axis {name!r}, only {[a.name for a in AXES]}")
