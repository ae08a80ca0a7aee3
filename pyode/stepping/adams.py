"""The loop of the variable-coefficient Adams method: predict, evaluate, correct, evaluate; then choose order and step.

The strategy is that of Shampine and Gordon's STEP (Computer Solution of Ordinary Differential Equations, 1975, chapter
10): begin at order 1 and raise order and step size together until that no longer pays; from then on change the order
by one where the error estimates of its neighbours say so, and double the step size, keep it, or shrink it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._ops import autograd, backend_of, reference
from .._ops.contract import Grid, Layout, Policy, RightHandSide
from ..control import Times
from ..errors import SolveError, Status
from ..methods.adams import Formulas, Row, VariableAdams, Weights
from ..solution import Stats
from .adaptive import Norm
from .fixed_grid import Outputs

GROWTH = 2.0  # of a step; above it formulas of a high order are not stable
SHRINK = 0.5  # of a rejected step


@dataclass
class Step:
    """An accepted step: what its dense output needs."""

    y: Tensor
    ks: list[Tensor]
    dt: Tensor
    formulas: Formulas
    shift: Tensor | None


class AdamsLoop:
    """A solve by the variable-coefficient Adams method.

    Args:
        dynamics, layout, rtol, atol, policy, grid, times, norm: as AdaptiveLoop's.
        method: which.

    Attributes:
        watcher: called with the loop after every accepted step; if it returns True the solve ends there.
        t_prev, t, y: the ends of the last accepted step, and the state at the latter.
    """

    watcher: Callable[[AdamsLoop], bool] | None = None

    def __init__(
        self,
        dynamics: RightHandSide,
        method: VariableAdams,
        layout: Layout,
        rtol: float | Tensor,
        atol: float | Tensor,
        policy: Policy,
        grid: Grid,
        times: Times,
        norm: Norm | None = None,
    ) -> None:
        self.dynamics, self.method, self.layout = dynamics, method, layout
        self.rtol, self.atol, self.policy, self.times, self.norm = rtol, atol, policy, times, norm
        self.ops = backend_of(layout)
        stops = ((stop, False) for stop in _numbers(grid.step_t)), ((stop, True) for stop in _numbers(grid.jump_t))
        end = [(times.values[-1], False)] if policy.clip else []
        self._stops = sorted((times.sign * stop, is_jump) for stop, is_jump in (*stops[0], *stops[1], *end))
        self.t = self.t_prev = times.values[0]
        self.n_accepted = self.n_rejected = self.n_steps = 0  # the last since the last output
        self._shift: Tensor | None = None  # how far the start has moved: 0, with the gradient of t[0]

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]; those up to its end if the watcher ended the solve.

        Raises:
            SolveError: says why and where the solve could not go on.
        """
        recording, t = torch.is_grad_enabled(), self.times.tensor
        moving = recording and t.requires_grad
        if moving:
            self._shift = (t[0] - t[0].detach()).to("cpu", torch.float64)
        values, sign, passed = self.times.values, self.times.sign, 1
        outputs = Outputs(self, y0, recording)
        self.y, self._unit = y0, torch.ones(1, dtype=torch.float64, device=y0.device)
        self._begin(self.dynamics(t[0].to(device=y0.device, dtype=self.layout.real_dtype), y0), first_step)
        while passed < len(values):
            self._plan()
            if not self._step():
                continue
            while passed < len(values) and sign * (values[passed] - self.t) <= 0:
                outputs.add(self.interpolate(t[passed] if moving else values[passed]))
                passed, self.n_steps = passed + 1, 0
            if self.watcher is not None and self.watcher(self):
                break
            if self._on_jump and passed < len(values):
                self._shift = None  # what comes behind a discontinuity does not move with the start
                behind = self._time(self.t)
                self._begin(self.dynamics(torch.nextafter(behind, behind + sign), self.y))
        return outputs.collect()[:passed]

    @property
    def last_step(self) -> None:
        """None: a solve begins at order 1, to which the size of a step of another order is of no use."""
        return None

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            stats.n_f_evals += self.dynamics.n_evals - evals_before
            stats.n_accepted += self.n_accepted
            stats.n_rejected += self.n_rejected

    def interpolate(self, t: float | Tensor) -> Tensor:
        """The state at a time within the last accepted step; where t is a tensor, with its gradient."""
        step, time = self._last, float(t)
        x: float | Tensor = 1.0 if time == self.t else (time - self.t_prev) / float(step.dt)
        if isinstance(t, Tensor) and t.requires_grad:
            moved = (t - t.detach()).to("cpu", torch.float64)
            if step.shift is not None:
                moved = moved - step.shift
            x = (time - self.t_prev + moved) / step.dt.to(moved)[0]
        return self._combine(step.formulas.dense(x), step.y, step.ks, step.dt)

    def _begin(self, f: Tensor, first_step: float | None = None) -> None:
        """Starts at order 1, with f at the present time and state."""
        self._fs, self._sizes, self._same = [f], list[float](), 0
        self._order, self._climbing, self._failures, self._non_finite = 1, True, 0, False
        self._size = self._first_step(f) if first_step is None else first_step
        self._dt, self._dt_number = self._unit, 1.0

    def _first_step(self, f: Tensor) -> float:
        """The size of a first step of order 1 (Hairer, Norsett, Wanner I, II.4)."""
        y, f, one = self.y.detach(), f.detach(), self._unit
        size, slope = self._norms(((1.0,), (0.0, 1.0)), y, [y, f], one)
        if not math.isfinite(size + slope):
            finite = bool((y.isfinite() & f.isfinite()).all())  # if so, a tolerance is 0 where y is 0
            raise self._error(Status.STEP_TOO_SMALL if finite else Status.NON_FINITE)
        h0 = 1e-6 if size < 1e-5 or slope < 1e-5 else 0.01 * size / slope
        with torch.no_grad():
            trial = self.ops.stage_combine(self.layout, (self.times.sign * h0,), y, [f], one)
            change = self.dynamics(self._time(self.t + self.times.sign * h0), trial)
        curvature = self._norms(((1.0, -1.0),), y, [change.detach(), f], one)[0] / h0
        if not math.isfinite(curvature):
            return h0
        steepest = max(slope, curvature)
        return min(100 * h0, max(1e-6, 1e-3 * h0) if steepest <= 1e-15 else math.sqrt(0.01 / steepest))

    def _plan(self) -> None:
        """Fixes the step to take: within its bounds, not across a prescribed time, not too small to move t."""
        policy, sign = self.policy, self.times.sign
        if self.n_steps >= policy.max_num_steps:
            raise self._error(Status.TOO_MANY_STEPS)
        size = min(max(self._size, policy.min_step), policy.max_step)
        self._t1, self._on_jump = self.t + sign * size, False
        if not sign * (self._t1 - self.t) > 0:
            raise self._error(Status.NON_FINITE if self._non_finite else Status.STEP_TOO_SMALL)
        i = bisect_right(self._stops, (sign * self.t, True))
        if i < len(self._stops):
            stop, is_jump = self._stops[i]
            left = stop - sign * self.t
            if left <= size:
                size, self._t1, self._on_jump = left, sign * stop, is_jump
            elif left < 2 * size:  # two steps of one size, not one and a rest of any size
                size, self._t1 = left / 2, self.t + sign * left / 2
        self._size = size
        if sign * size != self._dt_number:
            self._dt_number = sign * size
            self._dt = torch.full((1,), self._dt_number, dtype=torch.float64, device=self.layout.device)

    def _step(self) -> bool:
        """Tries the step; returns whether it was accurate enough."""
        k, fs, y, dt, size = self._order, self._fs, self.y, self._dt, self._size
        formulas = self.method.formulas(tuple([h / size for h in self._sizes[:k]]), k)
        step = Step(y, [], dt, formulas, self._shift)
        t1 = self._time(self._t1)
        if self._on_jump:
            t1 = torch.nextafter(t1, t1 - self.times.sign)  # f as it is before the discontinuity
        if self._shift is not None and self._on_jump:
            step.dt = dt.to(self._shift) - self._shift
            step.formulas = formulas.stretched(step.dt[0] / self._dt_number)
        elif self._shift is not None:
            t1 = t1 + self._shift.to(t1)
        predicted = self._combine(step.formulas.predictor, y, fs, step.dt)
        ks = [self.dynamics(t1, predicted), *fs]
        error, *lower = self._norms((formulas.error, *formulas.lower), predicted, ks, dt)
        self._non_finite = not math.isfinite(error)
        if error > 1 and size > self.policy.min_step or self._non_finite:
            self._reject(error * formulas.constant, lower)
            return False
        y1 = self._combine(step.formulas.corrector, y, ks, step.dt)
        f1 = self.dynamics(t1, y1)
        (higher,) = self._norms((formulas.higher,), y1, [f1, *fs], dt)
        if not math.isfinite(higher):
            self._non_finite = True
            self._reject(higher, lower)
            return False
        step.ks = [f1, *ks[: k + 1]]
        self._last, self.t_prev, self.t, self.y = step, self.t, self._t1, y1
        self.n_accepted, self.n_steps, self._failures = self.n_accepted + 1, self.n_steps + 1, 0
        self._same = self._same + 1 if self._sizes[:1] == [size] else 1
        higher_known = len(self._sizes) >= k
        self._fs = [f1, *fs[: self.method.max_order - 1]]
        self._sizes = [size, *self._sizes[: self.method.max_order - 2]]
        self._choose(error * formulas.constant, lower, higher if higher_known else None)
        return True

    def _reject(self, error: float, lower: list[float]) -> None:
        self.n_rejected, self.n_steps, self._failures = self.n_rejected + 1, self.n_steps + 1, self._failures + 1
        if self._non_finite and self._size <= self.policy.min_step:
            raise self._error(Status.NON_FINITE)
        self._climbing = False
        if self._wants_lower(error, lower):
            self._order -= 1
        factor = 0.5
        if self._failures >= 3:
            self._order = 1
            if self._failures > 3 and error > 2:
                factor = math.sqrt(0.5 / error)
        self._size *= factor

    def _wants_lower(self, error: float, lower: list[float]) -> bool:
        return bool(lower) and (max(lower) <= error if len(lower) == 2 else lower[0] <= error / 2)

    def _choose(self, error: float, lower: list[float], higher: float | None) -> None:
        k = self._order
        wants_lower = self._wants_lower(error, lower)
        if wants_lower or k == self.method.max_order:
            self._climbing = False
        if self._climbing:
            self._order, self._size = k + 1, 2 * self._size
            return
        if wants_lower:
            self._order, error = k - 1, lower[0]
        elif V_RAISE(self, k) and higher is not None:
            if k == 1:
                if higher < error / 2:
                    self._order, error = k + 1, higher
            elif lower[0] <= min(error, higher):
                self._order, error = k - 1, lower[0]
            elif higher < error and k < self.method.max_order:
                self._order, error = k + 1, higher
        self._size *= V_FACTOR(error, self._order)

    def _time(self, t: float) -> Tensor:
        return torch.full((), t, dtype=self.layout.real_dtype, device=self.layout.device)

    def _norms(self, rows: Sequence[Row], y1: Tensor, ks: list[Tensor], dt: Tensor) -> list[float]:
        """The norm of the scaled error for each row of weights."""
        if self.norm is None:
            return self.ops.error_norms(self.layout, rows, self.y, y1, ks, dt, self.rtol, self.atol)
        with torch.no_grad():
            errors = (
                reference.scaled_step_error(self.layout, row, self.y, y1, ks, dt, self.rtol, self.atol) for row in rows
            )
            return [float(self.norm(error, [])) for error in errors]

    def _combine(self, weights: Weights, y: Tensor, ks: list[Tensor], dt: Tensor) -> Tensor:
        """Returns y + dt sum_j w_j k_j; weights that are a tensor may have a gradient, as dt then may."""
        if isinstance(weights, Tensor):
            scaled = (dt.to(weights) * weights).to(y.device, self.layout.real_dtype)
            return y + sum(w * k for w, k in zip(scaled.unbind(), ks))
        if torch.is_grad_enabled():
            return autograd.stage_combine(self.ops, self.layout, weights, y, ks, dt)
        return self.ops.stage_combine(self.layout, weights, y, ks, dt)  # type: ignore[no-any-return]

    def _error(self, status: Status) -> SolveError:
        dt = self.times.sign * self._size
        return SolveError(status, self.t, dt, self.n_accepted + self.n_rejected)


def V_RAISE(self, k): return self._same >= k + 1
def V_FACTOR(error, k):
    if error * 2 ** (k + 1) <= 0.5: return 2.0
    if error <= 0.5: return 1.0
    return max(0.5, min(0.9, (0.5 / error) ** (1 / (k + 1))))


def _numbers(stops: Tensor | None) -> list[float]:
    return [] if stops is None else stops.tolist()
