"""The loop over a given grid of times, for methods without an error estimate."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._ops import backend_of, reference
from .._ops.contract import Layout, RightHandSide, clock_device
from ..control import ENDLESS, Times, number_from
from ..errors import InvalidType, InvalidValue, SolveError, Status
from ..methods import ImplicitTableau, Method, Tableau
from ..methods.multistep import FixedAdams
from ..solution import Stats
from .course import MOST_STEPS, Course, ExplicitSteps, Increment, Steps
from .hooks import NO_HOOKS, Hooks
from .implicit import ImplicitSteps
from .multistep import AdamsSteps
from .outputs import Collected
from .quadrature import Quadrature
from .segment import RungeKuttaSegment, unmoved
from .tape import Passed, Step

PART = 64  # steps of a grid that are prepared together where the solve may end at any
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
    n = int(torch.ceil((t[-1] - t[0]).detach().abs() / size + 1).item())
    steps = torch.arange(n, dtype=t.dtype, device=t.device) * (times.sign * size)
    return torch.cat([(steps + t[0])[:-1], t[-1:]])


def steps_of(method: Method, course: Course) -> Steps:
    """What takes a method's steps."""
    if isinstance(method, FixedAdams):
        return AdamsSteps(method, course)
    if isinstance(method, ImplicitTableau):
        return ImplicitSteps(method, course)
    assert isinstance(method, Tableau)
    return ExplicitSteps(method, course)


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
        recording = torch.is_grad_enabled()
        # Where times carry a gradient, so do step sizes and positions between: the twin does the work.
        moving = recording and (self.grid.requires_grad or self.times.tensor.requires_grad)
        hooks, t = self.hooks, self.times.tensor
        outputs = Collected(self.ops, self.layout, len(self.times.values), y0, recording)
        values, sign, i, y = self.times.values, self.times.sign, 1, y0
        # Else steps follow each other up to that which passes the next output, or to the end if all end on outputs.
        one_by_one = bool(recording or self.quadrature or hooks.step or hooks.watch or hooks.tape)
        parts = self._parts()
        part = next(parts)
        course, ends = self._course(part, moving), part.tolist()
        steps = steps_of(self.method, course)
        on_grid = not one_by_one and ends == values
        last = n = -1
        failure: SolveError | None = None
        while True:
            if n == len(ends) - 2:
                further = next(parts, None)
                if further is None:
                    break
                course, ends = self._course(further, moving), further.tolist()
                steps.move_to(course)
                last = n = -1
            n += 1
            if hooks.step is not None:
                hooks.step(ends[n], y, abs(ends[n + 1] - ends[n]))
            if hooks.tape is not None:
                hooks.tape.keep_none()
            if n > last:
                last = n if one_by_one else len(ends) - 2 if on_grid else self._step_to(values[i], ends, n)
            try:
                taken = steps.take(n, last + 1, y, outputs.out if on_grid else None)
            except BaseException:
                self.counts.n_accepted += max(steps.under_way - n, 0)
                raise
            if isinstance(taken, SolveError):
                failure = taken
                break
            self.counts.n_accepted += taken.n + 1 - n
            if on_grid:
                i = outputs.filled = taken.n + 1
            n, y, y1, step = taken
            del taken
            if self.quadrature is not None:
                self.quadrature.finish_fixed_step(step.weights, course.sizes[n])
            segment = None
            if hooks.watch is not None:
                segment = self._segment(course, n, ends, y, y1, step, moving)
                end = hooks.watch(segment)
                if end is not None:
                    if hooks.tape is not None:
                        hooks.tape.add(self._noted(steps, n, ends, range(0)), y, y1)
                    return torch.stack([y0, end])
            passed = i
            while i < len(values) and sign * (values[i] - ends[n + 1]) <= 0:
                if values[i] == ends[n + 1] and not moving:
                    outputs.add(y1)
                else:
                    segment = segment or self._segment(course, n, ends, y, y1, step, moving)
                    outputs.add(segment.at(values[i], t[i] - t[i].detach() if moving and t.requires_grad else None))
                i += 1
            if hooks.tape is not None:
                hooks.tape.add(self._noted(steps, n, ends, range(passed, i)), y, y1)
            y = y1
            del step, segment  # the derivatives are not to be kept through the next one
        if i < len(values):  # a step could not be taken, or else there was no event
            if failure is None:
                n += 1
                failure = SolveError(Status.TOO_MANY_STEPS, ends[n], ends[n] - ends[n - 1], self.counts.n_accepted)
            hooks.fail(failure)
            if moving and self.counts.n_accepted > 0:
                y = self._unmoved(y, course.grid[n])
            for _ in values[i:]:
                outputs.add(y)
            if hooks.tape is not None:
                hooks.tape.left = torch.arange(len(values), device=y.device) >= i
        return outputs.collect()

    def keep_times(self) -> None:
        """Makes the times this loop's own, for another solve whose steps end there: the user's may change."""
        self.times = Times(self.times.tensor.detach().clone(), self.times.values)
        self.grid = self.times.tensor

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            self.counts.n_f_evals = self.dynamics.n_evals - evals_before
            stats.add(self.counts)

    def _step_to(self, value: float, ends: list[float], n: int) -> int:
        """The step, from n on, which passes an output time; the last, if none does."""
        sign = self.times.sign
        return min(bisect_left(ends, sign * value, n + 1, key=lambda end: sign * end), len(ends) - 1) - 1

    def _parts(self) -> Iterator[Tensor]:
        """The grid, in parts that share an end where someone may end the solve long before its own end."""
        n = len(self.grid) - 1
        size = n if self.hooks.watch is None else PART
        return (self.grid[begin : begin + size + 1] for begin in range(0, n, size))

    def _course(self, grid: Tensor, moving: bool) -> Course:
        grid = grid if moving else grid.detach()
        grid = grid.to(clock_device(self.layout.device)).double()
        return Course(
            self.dynamics,
            self.layout,
            self.ops,
            self.quadrature,
            grid,
            self.times.sign,
            bool(self.options.get("perturb", False)),
            self.options,
            self.rtol,
            self.atol,
            self.counts,
        )

    def _unmoved(self, y: Tensor, time: Tensor) -> Tensor:
        """The state reached at a time, without its motion along the solution with that time."""
        slope = self.dynamics(time.detach().to(y.device, self.layout.real_dtype), y)
        return unmoved(y, slope, time - time.detach())

    def _noted(self, steps: Any, n: int, ends: list[float], outputs: range) -> Step:
        """Step n of a Runge-Kutta method, for a tape; of an implicit one the times are those of its ends."""
        times, weights = steps.times[n], steps.tableau.weights
        if isinstance(self.method, ImplicitTableau):
            times = steps.course.grid[[n, n, n + 1]]
        elif self.cubic:
            times = torch.cat([times, steps.course.grid[n + 1 : n + 2].to(times)])
        values, (t0, t1) = self.times.values, ends[n : n + 2]
        polynomial = _cubic(weights, 0) if self.cubic else _linear(weights)
        passed = (Passed(i, 0, 1.0 if values[i] == t1 else (values[i] - t0) / (t1 - t0), polynomial) for i in outputs)
        return Step(steps.course.sizes[n], times[1:], times[0], False, tuple(passed))

    def _segment(
        self, course: Course, n: int, ends: list[float], y: Tensor, y1: Tensor, step: Increment, moving: bool
    ) -> RungeKuttaSegment:
        """Step n, from y to y1, with what lies between."""
        weights, ks = step.weights, step.ks[: len(step.weights)]
        polynomial = _linear(weights)
        if self.cubic:
            if not any(k is step.slope for k in ks):  # an implicit step may do without it
                weights, ks = (*weights, 0.0), [*ks, step.slope]
            t1 = course.grid[n + 1].to(y.device, self.layout.real_dtype)
            polynomial = _cubic(weights, next(j for j, k in enumerate(ks) if k is step.slope))
            ks = [*ks, self.dynamics(t1, y1)]
        shift = course.grid[n] - course.grid[n].detach() if moving else None
        size = ends[n + 1] - ends[n]
        dt = course.sizes[n]
        return RungeKuttaSegment(self.layout, polynomial, ends[n], ends[n + 1], size, y, ks, dt, shift, y1)


@lru_cache(maxsize=64)
def _linear(weights: tuple[float, ...]) -> reference.Interpolant:
    """The line between a step's ends."""
    return reference.Interpolant(tuple((w,) for w in weights), weights)


@lru_cache(maxsize=64)
def _cubic(weights: tuple[float, ...], slope: int) -> reference.Interpolant:
    """The cubic through a step's ends and with their slopes: the derivative of that index, and one behind them all."""
    rows = [(float(j == slope), 3 * w - 2 * (j == slope), (j == slope) - 2 * w) for j, w in enumerate(weights)]
    return reference.Interpolant((*rows, (0.0, -1.0, 1.0)), (*weights, 0.0))
