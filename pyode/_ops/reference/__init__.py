"""The ops in plain torch: the oracle of the tests, the pure-Python solver of the benchmarks, and the fallback for
tensors without memory of their own (functorch's wrappers, fake tensors) and for other devices.

What native.py has too is described there, and tested to be the same. All of stage_combine and interpolate_at can be
differentiated, any number of times, with respect to everything.
"""

from __future__ import annotations

from torch import Tensor

from ..contract import Layout
from .controller import Controller
from .interpolant import Interpolant, interpolate, interpolate_at
from .norms import mean_square_errors, scaled_error, scaled_step_error
from .steps import AdamsTable, GridSteps, Steps, Table, stages
from .sums import copy, new_states, opposites, select_rows, stage_combine, stage_vjp

__all__ = [
    "AdamsTable",
    "Controller",
    "GridSteps",
    "Interpolant",
    "Layout",
    "Steps",
    "Table",
    "copy",
    "interpolate",
    "interpolate_at",
    "mean_square_errors",
    "new_states",
    "opposites",
    "scaled_error",
    "scaled_step_error",
    "select_rows",
    "stage_combine",
    "stage_vjp",
    "stages",
    "supports",
]


def supports(y: Tensor) -> bool:
    """Whatever torch can compute with."""
    return y.dtype.is_floating_point or y.dtype.is_complex
