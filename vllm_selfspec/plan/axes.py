"""The table of axes, in the order in which they change a plan, its cost and its view.

To add one: a file beside this with a class that extends `Axis`, and a row; or
`AXES.register`, from another package.
"""

from vllm_selfspec.plan.axis import Axis
from vllm_selfspec.plan.axis_draft_weights import DraftWeightsAxis
from vllm_selfspec.plan.axis_draft_window import DraftWindowAxis
from vllm_selfspec.plan.axis_exit_layer import ExitLayerAxis
from vllm_selfspec.plan.axis_skip_layers import SkipLayersAxis
from vllm_selfspec.plan.table import Table

AXES: Table[Axis] = Table(
    "axis",
    [
        SkipLayersAxis(),
        ExitLayerAxis(),
        DraftWeightsAxis(),
        DraftWindowAxis(),
    ],
)
