"""A solve with given steps, under way from step to step."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._ops import reference
from ..errors import SolveError, Status
from .course import ExplicitSteps, Increment
from .implicit import ImplicitSteps
from .outputs import Collected
from .segment import RungeKuttaSegment, unmoved
from .tape import Passed, Step

if TYPE_CHECKING:
    from .fixed_grid import FixedGridLoop


class GridMarch:
    """A solve with given steps, as `March` is one with steps that are chosen: step, look, settle, and finish.

    Args:
        loop: whose solve it is.
        y0: its start.
    """

    def __init__(self, loop: FixedGridLoop, y0: Tensor) -> None:
        self.loop, self.y, self.y1 = loop, y0, y0
        hooks, values, recording = loop.hooks, loop.times.values, torch.is_grad_enabled()
        # Where times carry a gradient, so do step sizes and positions between: the twin does the work.
        self.moving = recording and (loop.grid.requires_grad or loop.times.tensor.requires_grad)
        self.outputs, self.n_outputs = Collected(loop.ops, loop.layout, len(values), y0, recording), 1
        # Else steps follow each other up to that which passes the next output, or to the end if all end on outputs.
        self.one_by_one = bool(recording or loop.quadrature or hooks.step or hooks.watch or hooks.tape)
        self._parts = loop.parts()
        self._enter(next(self._parts))
        self.on_grid = not self.one_by_one and self.ends == values
        self.steps = loop.steps(self.course)
        self.failure: SolveError | None = None
        self._increment: Increment | None = None
        self._segment: RungeKuttaSegment | None = None

    def _enter(self, part: Tensor) -> None:
        """Goes to the beginning of a part of the grid."""
        self.course, self.ends = self.loop.course(part, self.moving), part.tolist()
        self.at = 0  # of its ends, the one where the solve stands

    def step(self) -> bool:
        """Takes the next step, or several at which nobody looks; False if there is none, or it could not be taken."""
        loop, hooks, steps = self.loop, self.loop.hooks, self.steps
        if self.at == len(self.ends) - 1:
            part = next(self._parts, None)
            if part is None:
                return False
            self._enter(part)
            steps.move_to(self.course)
        n = self.at
        if hooks.step is not None:
            hooks.step(self.ends[n], self.y, abs(self.ends[n + 1] - self.ends[n]))
        if hooks.tape is not None:
            hooks.tape.keep_none()
        try:
            taken = steps.take(n, self._stop(), self.y, self.outputs.out if self.on_grid else None)
        except BaseException:
            loop.counts.n_accepted += max(steps.under_way - n, 0)
            raise
        if isinstance(taken, SolveError):
            self.failure = taken
            return False
        self.n, self.y, self.y1, self._increment = taken
        loop.counts.n_accepted += self.n + 1 - n
        if self.on_grid:
            self.n_outputs = self.outputs.filled = self.n + 1
        return True

    def _stop(self) -> int:
        """Before which step to stop: those until there are taken together."""
        last = len(self.ends) - 1
        if self.one_by_one or self.on_grid:
            return self.at + 1 if self.one_by_one else last
        sign, value = self.loop.times.sign, self.loop.times.values[self.n_outputs]
        return min(bisect_left(self.ends, sign * value, self.at + 1, key=lambda end: sign * end), last)

    def look(self) -> Tensor | None:
        """Shows the step taken last to who looks at steps; returns the state at which the solve ends, if it is to."""
        hooks, quadrature = self.loop.hooks, self.loop.quadrature
        if quadrature is not None:
            assert self._increment is not None
            quadrature.finish_fixed_step(self._increment.weights, self.course.sizes[self.n])
        if hooks.watch is None:
            return None
        end = hooks.watch(self._within())
        if end is not None and hooks.tape is not None:
            hooks.tape.add(self._noted(range(0)), self.y, self.y1)
        return end

    def settle(self) -> None:
        """Adds the outputs that the step taken last has passed, and goes to its end."""
        times, end, first = self.loop.times, self.ends[self.n + 1], self.n_outputs
        values, t, sign = times.values, times.tensor, times.sign
        while self.n_outputs < len(values) and sign * (values[self.n_outputs] - end) <= 0:
            i = self.n_outputs
            if values[i] == end and not self.moving:
                self.outputs.add(self.y1)
            else:
                moved = t[i] - t[i].detach() if self.moving and t.requires_grad else None
                self.outputs.add(self._within().at(values[i], moved))
            self.n_outputs += 1
        if self.loop.hooks.tape is not None:
            self.loop.hooks.tape.add(self._noted(range(first, self.n_outputs)), self.y, self.y1)
        self.y, self.at = self.y1, self.n + 1
        self._increment = self._segment = None  # the derivatives are not to be kept through the next step

    def finish(self) -> Tensor:
        """All outputs; where a step could not be taken, or there was no event, those that are left are the state."""
        loop, values, y = self.loop, self.loop.times.values, self.y
        if self.n_outputs < len(values):
            loop.hooks.fail(self._failure())
            if self.moving and loop.counts.n_accepted > 0:
                y = self._unmoved(y, self.course.grid[self.at])
            if loop.hooks.tape is not None:
                loop.hooks.tape.left = torch.arange(len(values), device=y.device) >= self.n_outputs
            for _ in values[self.n_outputs :]:
                self.outputs.add(y)
        return self.outputs.collect()

    def _failure(self) -> SolveError:
        """Why outputs are left. It is kept no longer: see raise_it."""
        before, now = self.ends[-2:]
        endless = SolveError(Status.TOO_MANY_STEPS, now, now - before, self.loop.counts.n_accepted)
        failure, self.failure = self.failure or endless, None
        return failure

    def _unmoved(self, y: Tensor, time: Tensor) -> Tensor:
        """The state reached at a time, without its motion along the solution with that time."""
        slope = self.loop.dynamics(time.detach().to(y.device, self.loop.layout.real_dtype), y)
        return unmoved(y, slope, time - time.detach())

    def _noted(self, outputs: range) -> Step:
        """The step of a Runge-Kutta method, for a tape; of an implicit one the times are those of its ends."""
        n, steps, course, loop = self.n, self.steps, self.course, self.loop
        assert isinstance(steps, (ExplicitSteps, ImplicitSteps))
        times, weights = steps.times[n], steps.tableau.weights
        if isinstance(steps, ImplicitSteps):
            times = course.grid[[n, n, n + 1]]
        elif loop.cubic:
            times = torch.cat([times, course.grid[n + 1 : n + 2].to(times)])
        values, (t0, t1) = loop.times.values, self.ends[n : n + 2]
        polynomial = _cubic(weights, 0) if loop.cubic else _linear(weights)
        passed = (Passed(i, 0, 1.0 if values[i] == t1 else (values[i] - t0) / (t1 - t0), polynomial) for i in outputs)
        return Step(course.sizes[n], times[1:], times[0], False, tuple(passed))

    def _within(self) -> RungeKuttaSegment:
        """The step taken last, with what lies between its ends."""
        if self._segment is not None:
            return self._segment
        loop, course, step, n = self.loop, self.course, self._increment, self.n
        assert step is not None
        weights, ks = step.weights, step.ks[: len(step.weights)]
        polynomial = _linear(weights)
        if loop.cubic:
            if not any(k is step.slope for k in ks):  # an implicit step may do without it
                weights, ks = (*weights, 0.0), [*ks, step.slope]
            t1 = course.grid[n + 1].to(self.y.device, loop.layout.real_dtype)
            polynomial = _cubic(weights, next(j for j, k in enumerate(ks) if k is step.slope))
            ks = [*ks, loop.dynamics(t1, self.y1)]
        shift = course.grid[n] - course.grid[n].detach() if self.moving else None
        t0, t1 = self.ends[n : n + 2]
        self._segment = RungeKuttaSegment(
            loop.layout, polynomial, t0, t1, t1 - t0, self.y, ks, course.sizes[n], shift, self.y1
        )
        return self._segment


@lru_cache(maxsize=64)
def _linear(weights: tuple[float, ...]) -> reference.Interpolant:
    """The line between a step's ends."""
    return reference.Interpolant(tuple((w,) for w in weights), weights)


@lru_cache(maxsize=64)
def _cubic(weights: tuple[float, ...], slope: int) -> reference.Interpolant:
    """The cubic through a step's ends and with their slopes: the derivative of that index, and one behind them all."""
    rows = [(float(j == slope), 3 * w - 2 * (j == slope), (j == slope) - 2 * w) for j, w in enumerate(weights)]
    return reference.Interpolant((*rows, (0.0, -1.0, 1.0)), (*weights, 0.0))
