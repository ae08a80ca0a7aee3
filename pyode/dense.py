"""odeint_dense: the solution as a function of time."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from ._ops.contract import clock_device
from .compiling import not_compiled
from .control import single_time
from .errors import InvalidValue
from .problem import pose
from .solving import solve
from .state import Form, Func, State
from .stepping.segment import Segment


class DenseOutput:
    """The solution between two times.

    Attributes:
        t0, t1: its ends.
    """

    def __init__(self, form: Form, segments: list[Segment], t0: float, t1: float, y0: Tensor) -> None:
        self.t0, self.t1 = t0, t1
        self._form, self._segments, self._y0 = form, segments, y0
        self._sign = math.copysign(1.0, t1 - t0)
        self._ends = [self._sign * segment.t1 for segment in segments]

    def __repr__(self) -> str:
        """Its range and number of steps."""
        return f"DenseOutput(t from {self.t0:g} to {self.t1:g}, {len(self._segments)} steps)"

    @not_compiled
    def __call__(self, t: Tensor | float) -> Any:
        """Returns the states at times of any shape: [*t.shape, *y0.shape], or a tuple of such tensors.

        Gradients reach what the solve's own do, and t.

        Raises:
            InvalidValue: a time lies outside.
        """
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu") if not isinstance(t, Tensor) else t
        times = t.reshape(-1)
        values = times.detach().cpu().double().tolist()
        low, high = min(self.t0, self.t1), max(self.t0, self.t1)
        if not all(low <= value <= high for value in values):
            raise InvalidValue(f"t must lie between {low:g} and {high:g}, where the solution is known; it is {t}")
        if not self._segments:  # the solve has failed at its start, the only time that is left
            return self._form.unpack(self._y0.expand(*t.shape, *self._y0.shape), tuple(t.shape))
        places = [min(bisect_left(self._ends, self._sign * value), len(self._ends) - 1) for value in values]
        order = sorted(range(len(values)), key=places.__getitem__)
        times = times.to(clock_device(self._y0.device), torch.float64)
        rows, i = [self._y0[None][:0]], 0
        while i < len(order):
            j = i
            while j < len(order) and places[order[j]] == places[order[i]]:
                j += 1
            rows.append(self._segments[places[order[i]]].sample(times[order[i:j]]))
            i = j
        back = torch.empty(len(order), dtype=torch.long, device="cpu")
        back[order] = torch.arange(len(order), device="cpu")
        states = torch.cat(rows)[back.to(self._y0.device)]
        return self._form.unpack(states.reshape(*t.shape, *self._y0.shape), tuple(t.shape))


@not_compiled
def odeint_dense(
    func: Func,
    y0: State,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    args: tuple[Any, ...] = (),
) -> DenseOutput:
    """Solves dy/dt = func(t, y) from y(t0) = y0 to t1 and returns the solution as a function of time.

    Args:
        func, y0, rtol, atol, method, options, args: as `odeint`'s. A method that does not choose its steps takes one,
            or those that options' step_size or grid_constructor prescribe, with a line or a cubic (interp) on each.
        t0, t1: numbers, or tensors of one number.

    Returns:
        A `DenseOutput`, a function of times between t0 and t1, or where the solve failed if options' on_failure is
        "return".

    Raises:
        What `odeint` raises.
    """
    t = torch.stack([single_time(t0, "t0"), single_time(t1, "t1")])
    problem = pose(func, y0, t, rtol, atol, method, options, args=args)
    segments: list[Segment] = []
    solved = solve(problem, segments.append)
    return DenseOutput(problem.form, segments, problem.times.values[0], solved.end, problem.y0)
