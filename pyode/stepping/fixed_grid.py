"""The loop over a given grid of times, for methods without an error estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._ops import autograd, backend_of
from .._ops.contract import Layout, RightHandSide
from ..control import Times, number_from
from ..errors import InvalidType, InvalidValue
from ..methods import ImplicitTableau, Method, Tableau
from ..solution import Stats
from .course import Course, Increment
from .implicit import ImplicitSteps
from .quadrature import Quadrature

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
        grid = constructor(func, y0, t)
        if not isinstance(grid, Tensor) or grid.dim() != 1:
            raise InvalidType("options['grid_constructor'] must return a 1-D tensor of times")
        ends = grid.detach().double().tolist()[:: max(len(grid) - 1, 1)]
        if ends != [times.values[0], times.values[-1]]:
            raise InvalidValue(f"options['grid_constructor'] must return times from t[0] to t[-1]; it returned {grid}")
        return grid
    if step_size is None or len(t) == 1:
        return t
    size = number_from(options, "step_size", 0.0, -math.inf)
    if not 0 < size < math.inf:
        raise InvalidValue(f"options['step_size'] must be positive and finite, not {step_size!r}")
    # As torchdiffeq counts: the last step is the shorter one.
    n = int(torch.ceil((t[-1] - t[0]).detach().abs() / size + 1).item())
    steps = torch.arange(n, dtype=t.dtype, device=t.device) * (times.sign * size)
    return torch.cat([(steps + t[0])[:-1], t[-1:]])


class ExplicitSteps:
    """The steps of an explicit Runge-Kutta method."""

    def __init__(self, tableau: Tableau, course: Course) -> None:
        self.tableau, self.course = tableau, course
        self.times = course.stage_times((0.0, *tableau.abscissae))
        ops = course.ops
        self.stages = partial(autograd.stages, ops) if torch.is_grad_enabled() else ops.stages

    def __call__(self, n: int, y: Tensor) -> Increment:
        """Step n, from y."""
        course, rows = self.course, self.tableau.rows
        first, *times = self.times[n].unbind()
        ks = [course.dynamics(first, y)] * (len(rows) + 1)
        if rows:
            self.stages(course.layout, rows, y, ks, course.sizes[n], tuple(times), course.dynamics)
        return Increment(self.tableau.weights, ks, ks[0])


def steps_of(method: Method, course: Course) -> Callable[[int, Tensor], Increment]:
    """What takes a method's steps: a function of a step's number and the state at its start."""
    if isinstance(method, ImplicitTableau):
        return ImplicitSteps(method, course)
    assert isinstance(method, Tableau)
    return ExplicitSteps(method, course)


class FixedGridLoop:
    """A solve with the steps of a given grid.

    Args:
        dynamics, layout, times, quadrature: as AdaptiveLoop's.
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
        quadrature: Quadrature | None = None,
    ) -> None:
        self.dynamics, self.method, self.layout, self.times = dynamics, method, layout, times
        self.grid, self.options, self.quadrature = grid, options, quadrature
        self.cubic = options.get("interp", "linear") == "cubic"
        self.ops = backend_of(layout)
        self.counts = Stats()
        self.last_step = None

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]."""
        recording = torch.is_grad_enabled()
        # Where times carry a gradient, so do step sizes and positions between: the twin does the work.
        moving = recording and (self.grid.requires_grad or self.times.tensor.requires_grad)
        course = self._course(y0, moving)
        steps = steps_of(self.method, course)
        ends, sizes = self.grid.tolist(), course.sizes
        outputs = Outputs(self, y0, recording)
        values, sign, i, y = self.times.values, self.times.sign, 1, y0
        for n, dt in enumerate(sizes):
            step = steps(n, y)
            y1 = course.combine(step.weights, y, step.ks, dt)
            self.counts.n_accepted += 1
            if self.quadrature is not None:
                self.quadrature.finish_fixed_step(step.weights, dt)
            while i < len(values) and sign * (values[i] - ends[n + 1]) <= 0:
                at_end = values[i] == ends[n + 1] and not moving
                outputs.add(y1 if at_end else self._between(course, i, n, ends, y, y1, step, moving))
                i += 1
            y = y1
            del step  # its derivatives are not to be kept through the next one
        return outputs.collect()

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            self.counts.n_f_evals = self.dynamics.n_evals - evals_before
            stats.add(self.counts)

    def _course(self, y0: Tensor, moving: bool) -> Course:
        grid = self.grid if moving else self.grid.detach()
        grid = grid.to(y0.device, torch.float64)
        sizes = grid[1:] - grid[:-1]
        return Course(
            self.dynamics,
            self.layout,
            self.ops,
            self.quadrature,
            grid,
            sizes.unsqueeze(1).unbind() if len(sizes) else (),
            self.times.sign,
            bool(self.options.get("perturb", False)),
            self.options,
            self.counts,
        )

    def _between(
        self, course: Course, i: int, n: int, ends: list[float], y: Tensor, y1: Tensor, step: Increment, moving: bool
    ) -> Tensor:
        """The state at output time i, which step n has passed."""
        dt = course.sizes[n]
        x: Any = (self.times.values[i] - ends[n]) / (ends[n + 1] - ends[n])
        if moving:
            grid, t = self.grid, self.times.tensor
            x = ((t[i] - grid[n]) / (grid[n + 1] - grid[n])).to(device=y.device, dtype=self.layout.real_dtype)
        if not self.cubic:
            if moving:
                between: Tensor = y + x * (y1 - y)
                return between
            return course.combine(tuple(w * x for w in step.weights), y, step.ks, dt)
        t1 = (self.grid if moving else self.grid.detach())[n + 1].to(device=y.device, dtype=self.layout.real_dtype)
        slope1 = self.dynamics(t1, y1)
        if moving:
            h = dt.to(self.layout.real_dtype)
            cubic: Tensor = y + (3 - 2 * x) * x * x * (y1 - y) + h * x * (1 - x) * ((1 - x) * step.slope - x * slope1)
            return cubic
        rise = (3 - 2 * x) * x * x
        weights = (*(w * rise for w in step.weights), x * (1 - x) ** 2, -x * x * (1 - x))
        return course.combine(weights, y, [*step.ks[: len(step.weights)], step.slope, slope1], dt)


class Outputs:
    """The states at the output times: copied to their place, or with a graph behind them, kept until the end."""

    def __init__(self, loop: FixedGridLoop, y0: Tensor, recording: bool) -> None:
        self.loop = loop
        self.states = [y0]
        shape = (len(loop.times.values), *y0.shape)
        self.out = None if recording else torch.empty(shape, dtype=y0.dtype, device=y0.device)
        self.places = iter(() if self.out is None else self.out.unbind())
        if self.out is not None:
            self.add(y0)

    def add(self, y: Tensor) -> None:
        """Adds the next one."""
        if self.out is None:
            self.states.append(y)
        else:
            self.loop.ops.copy(self.loop.layout, y, next(self.places))

    def collect(self) -> Tensor:
        """All of them, [T, ...]."""
        return torch.stack(self.states) if self.out is None else self.out
