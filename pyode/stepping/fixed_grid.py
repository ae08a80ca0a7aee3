"""The loop over a given grid of times, for methods without an error estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._ops import backend_of
from .._ops.contract import Layout, RightHandSide, clock_device
from ..control import ENDLESS, Times, number_from
from ..errors import InvalidType, InvalidValue
from ..methods import ImplicitTableau, Method, Tableau
from ..methods.multistep import FixedAdams
from ..solution import Stats
from .course import MOST_STEPS, Course, ExplicitSteps, Steps
from .grid_march import GridMarch
from .hooks import NO_HOOKS, Hooks
from .implicit import ImplicitSteps
from .multistep import AdamsSteps
from .quadrature import Quadrature

PART = 64  # steps of a grid that are prepared together where the solve may end at any
MOST_COUNTED = 2.0**53
INTERPOLATIONS = ("linear", "cubic")


def check_interp(options: dict[str, Any]) -> None:
    """Raises InvalidValue for an unknown interpolation."""
    interp = options.get("interp", "linear")
    if interp not in INTERPOLATIONS:
        raise InvalidValue(f"options['interp'] must be one of {', '.join(INTERPOLATIONS)}, not {interp!r}")


def grid_of(options: dict[str, Any], times: Times, func: Callable[..., Any], y0: Any) -> Tensor:
    """The times at which steps begin and end, 1-D, as the options step_size or grid_constructor have it.

    Raises:
        InvalidType, InvalidValue: an option is wrong, or the grid does not begin and end where t does.
    """
    t = times.tensor
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise InvalidValue("step_size and grid_constructor are mutually exclusive arguments")
    if constructor is not None:
        if not callable(constructor):
            raise InvalidType(
                "options['grid_constructor'] must be callable as grid_constructor(func, y0, t), "
                f"not a {type(constructor).__name__}"
            )
        grid = constructor(func, y0, t)
        if not isinstance(grid, Tensor) or grid.dim() != 1:
            raise InvalidType("options['grid_constructor'] must return a 1-D tensor of times")
        ends = grid.detach().double().cpu()
        if ends[:1].tolist() != times.values[:1] or ends[-1:].tolist() != times.values[-1:]:
            raise InvalidValue(f"options['grid_constructor'] must return times from t[0] to t[-1]; it returned {grid}")
        if not bool((times.sign * ends.diff() >= 0).all()):
            raise InvalidValue(f"options['grid_constructor'] must return times in order; it returned {grid}")
        return grid
    endless = abs(times.values[-1]) == ENDLESS
    if step_size is None and endless:
        raise InvalidValue(
            "options['step_size'] must be given with event_fn to a method that does not choose its steps"
        )
    if step_size is None or len(t) == 1:
        return t
    size = number_from(options, "step_size", 0.0, -math.inf)
    if not 0 < size < math.inf:
        raise InvalidValue(f"options['step_size'] must be positive and finite, not {step_size!r}")
    if endless:
        return t[0] + torch.arange(MOST_STEPS + 1, dtype=t.dtype, device=t.device) * (times.sign * size)
    # As torchdiffeq counts: the last step is the shorter one.
    n = float(torch.ceil((t[-1] - t[0]).detach().abs() / size + 1))
    if n > MOST_COUNTED:
        raise InvalidValue(f"options['step_size'] = {size:g} makes {n:g} steps, which is too many to count")
    steps = torch.arange(int(n), dtype=t.dtype, device=t.device) * (times.sign * size)
    return torch.cat([(steps + t[0])[:-1], t[-1:]])


class FixedGridLoop:
    """A solve with the steps of a given grid.

    Args:
        dynamics, layout, times, rtol, atol, quadrature, hooks: as AdaptiveLoop's.
        method: one without an error estimate.
        grid: [N] times of the steps' ends.
        options: the user's: interp, "linear" or "cubic", between the grid's times; perturb, whether func sees a step's
            start just behind it and its end just before it; others are the method's.
    """

    def __init__(
        self,
        dynamics: RightHandSide,
        method: Method,
        layout: Layout,
        times: Times,
        grid: Tensor,
        options: dict[str, Any],
        rtol: float | Tensor,
        atol: float | Tensor,
        quadrature: Quadrature | None = None,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self.dynamics, self.method, self.layout, self.times = dynamics, method, layout, times
        self.grid, self.options, self.quadrature, self.hooks = grid, options, quadrature, hooks
        self.rtol, self.atol = rtol, atol
        self.cubic = options.get("interp", "linear") == "cubic"
        self.ops = backend_of(layout)
        self.counts = Stats()
        self.last_step = None

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]."""
        self.counts = Stats()
        march = GridMarch(self, y0)
        while march.step():
            end = march.look()
            if end is not None:
                return torch.stack([y0, end])
            march.settle()
        return march.finish()

    def keep_times(self) -> None:
        """Makes the times this loop's own, for another solve whose steps end there: the user's may change."""
        self.times = self.times.in_tensor(self.times.tensor.detach().clone())
        self.grid = self.times.tensor

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            self.counts.n_f_evals = self.dynamics.n_evals - evals_before
            stats.add(self.counts)

    def parts(self) -> Iterator[Tensor]:
        """The grid, in parts that share an end where someone may end the solve long before its own end."""
        n = max(len(self.grid) - 1, 1)
        size = n if self.hooks.watch is None else PART
        return (self.grid[begin : begin + size + 1] for begin in range(0, n, size))

    def steps(self, course: Course) -> Steps:
        """What takes the steps of a part of the grid."""
        if isinstance(self.method, FixedAdams):
            return AdamsSteps(self.method, course)
        if isinstance(self.method, ImplicitTableau):
            return ImplicitSteps(self.method, course)
        assert isinstance(self.method, Tableau)
        return ExplicitSteps(self.method, course)

    def course(self, grid: Tensor, moving: bool) -> Course:
        """A part of the grid, with a graph where times are `moving`."""
        grid = grid if moving else grid.detach()
        return Course(
            self.dynamics,
            self.layout,
            self.ops,
            self.quadrature,
            grid.to(clock_device(self.layout.device)).double(),
            self.times.sign,
            bool(self.options.get("perturb", False)),
            self.options,
            self.rtol,
            self.atol,
            self.counts,
        )
