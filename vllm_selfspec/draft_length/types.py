"""Arrays, as the controllers name them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Slots = NDArray[Any]  # of requests: their places in a controller's arrays
