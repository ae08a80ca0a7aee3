"""The loop of the variable-coefficient Adams method: predict, evaluate, correct, evaluate."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import autograd, backend_of, reference
from .._ops.contract import Grid, Layout, Policy, RightHandSide, clock_device, neighbour
from ..control import Times
from ..errors import SolveError, Status
from ..methods.adams import Row, VariableAdams, Weights
from ..solution import Stats
from .hooks import NO_HOOKS, Hooks
from .measure import Norm
from .outputs import Collected
from .segment import AdamsSegment, unmoved, weighted
from .strategy import Strategy


class AdamsLoop:
    """A solve by the variable-coefficient Adams method.

    Args:
        dynamics, layout, rtol, atol, policy, grid, times, norm, hooks: as AdaptiveLoop's; the state is one sample.
        method: which.
    """

    last_step = None  # a solve begins at order 1, to which the size of a step of another order is of no use

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
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self.dynamics, self.method, self.layout = dynamics, method, layout
        self.rtol, self.atol, self.policy, self.times, self.norm, self.hooks = rtol, atol, policy, times, norm, hooks
        self.ops = backend_of(layout)
        step_t, jump_t = ([] if stops is None else stops.tolist() for stops in (grid.step_t, grid.jump_t))
        if policy.clip:
            step_t.append(times.values[-1])
        # In the direction of time, each with whether it is a discontinuity.
        self._stops = sorted((times.sign * t, is_jump) for ts, is_jump in ((step_t, False), (jump_t, True)) for t in ts)
        self._unit = torch.ones(1, dtype=torch.float64, device=clock_device(layout.device))
        self.t = times.values[0]
        self._status = Status.RUNNING
        self.n_accepted = self.n_rejected = self.n_steps = 0  # the last since the last output

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape].

        Raises:
            SolveError: says why and where the solve could not go on.
        """
        values, sign, t, hooks = self.times.values, self.times.sign, self.times.tensor, self.hooks
        recording = torch.is_grad_enabled()
        moving = recording and t.requires_grad
        self._shift = (t[0] - t[0].detach()).to("cpu", torch.float64) if moving else None
        outputs, passed = Collected(self.ops, self.layout, len(values), y0, recording), 1
        self.y = y0
        # No view of t, as no later time is one: torch.compile would compile func anew.
        start = self._time(self.t)
        self._begin(self.dynamics(start if self._shift is None else start + self._shift.to(start), y0), first_step)
        while passed < len(values) and self._plan():
            segment = self._step()
            if segment is None:
                continue
            if hooks.watch is not None and (end := hooks.watch(segment)) is not None:
                return torch.stack([y0, end])
            while passed < len(values) and sign * (values[passed] - self.t) <= 0:
                outputs.add(segment.at(values[passed], t[passed] - t[passed].detach() if moving else None))
                passed, self.n_steps = passed + 1, 0
            if self._on_jump and passed < len(values):
                self._shift = None  # what comes behind a discontinuity does not move with the start
                now = self._time(self.t)
                self._begin(self.dynamics(neighbour(now, now.new_tensor(sign)), self.y))
        if passed < len(values):
            hooks.fail(SolveError(self._status, self.t, self._strategy.size, self.n_accepted + self.n_rejected))
            self.y = unmoved(self.y, self._fs[0], self._shift)
        for _ in values[passed:]:
            outputs.add(self.y)
        return outputs.collect()

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            stats.n_f_evals += self.dynamics.n_evals - evals_before
            stats.n_accepted += self.n_accepted
            stats.n_rejected += self.n_rejected

    def _begin(self, f: Tensor, first_step: float | None = None) -> None:
        """Starts at order 1, with f at the present time and state."""
        self._fs, self._sizes = [f], list[float]()  # of the last steps' ends, and of the steps; the latest first
        size = self.times.sign * (self._first_step(f) if first_step is None else first_step)
        self._strategy = Strategy(self.policy, self.method.max_order, size)

    def _first_step(self, f: Tensor) -> float:
        """The size of a first step of order 1 (Hairer, Norsett, Wanner I, II.4)."""
        y, f, one = self.y.detach(), f.detach(), self._unit
        size, slope = self._norms(((1.0,), (0.0, 1.0)), y, [y, f], one)
        if not math.isfinite(size + slope):
            finite = bool((y.isfinite() & f.isfinite()).all())  # if so, a tolerance is 0 where y is 0
            self._status = Status.STEP_TOO_SMALL if finite else Status.NON_FINITE
            return 0.0
        h0 = 1e-6 if size < 1e-5 or slope < 1e-5 else 0.01 * size / slope
        trial = self.ops.stage_combine(self.layout, (self.times.sign * h0,), y, [f], one)
        change = self.dynamics(self._time(self.t + self.times.sign * h0), trial).detach()
        curvature = self._norms(((1.0, -1.0),), y, [change, f], one)[0] / h0
        if not math.isfinite(curvature):
            return h0  # f breaks off nearby
        steepest = max(slope, curvature)
        return min(100 * h0, max(1e-6, 1e-3 * h0) if steepest <= 1e-15 else math.sqrt(0.01 / steepest))

    def _plan(self) -> bool:
        """Fixes the step to take: within its bounds, not across a prescribed time; returns whether there is one."""
        policy, sign, strategy = self.policy, self.times.sign, self._strategy
        size = min(max(abs(strategy.size), policy.min_step), policy.max_step)
        self._t1, self._on_jump = self.t + sign * size, False
        if self._status is Status.RUNNING and self.n_steps >= policy.max_num_steps:
            self._status = Status.TOO_MANY_STEPS
        least = policy.least_ulps * sys.float_info.epsilon * abs(self.t)
        if self._status is Status.RUNNING and (not sign * (self._t1 - self.t) > 0 or size < least):
            self._status = Status.NON_FINITE if strategy.non_finite else Status.STEP_TOO_SMALL
        i = bisect_right(self._stops, (sign * self.t, True))
        if i < len(self._stops):
            stop, is_jump = self._stops[i]
            left = stop - sign * self.t
            if left <= size:
                size, self._t1, self._on_jump = left, sign * stop, is_jump
            elif left < 2 * size and not is_jump:  # two equal steps: formulas do not like a tiny one in their past
                size, self._t1 = left / 2, self.t + sign * left / 2
        strategy.size = sign * size
        return self._status is Status.RUNNING

    def _step(self) -> AdamsSegment | None:
        """Tries the step; returns it if it was accurate enough."""
        k, size, fs, y, hooks = self._strategy.order, self._strategy.size, self._fs, self.y, self.hooks
        if hooks.step is not None:
            hooks.step(self.t, y, abs(size))
        formulas = self.method.formulas(tuple([h / size for h in self._sizes[:k]]), k)
        dt = torch.full((1,), size, dtype=torch.float64, device=self._unit.device)
        step = AdamsSegment(self.layout, self.t, self._t1, size, y, [], dt, formulas, self._shift)
        time = self._end_of(step)
        predicted = self._combine(step.formulas.predictor, y, fs, step.dt)
        ks = [self.dynamics(time, predicted), *fs]
        error, *lower = self._norms((formulas.error, *formulas.lower), predicted, ks, dt)
        if not self._tolerates(error):
            self._reject(error * formulas.constant, lower)
            return None
        y1 = self._combine(step.formulas.corrector, y, ks, step.dt)
        f1 = self.dynamics(time, y1)
        (higher,) = self._norms((formulas.higher,), y1, [f1, *fs], dt)
        if not math.isfinite(higher):
            self._reject(higher, lower)
            return None
        step.ks = [f1, *ks[: k + 1]]
        self.t, self.y = self._t1, y1
        self.n_accepted, self.n_steps = self.n_accepted + 1, self.n_steps + 1
        self._strategy.accept(error * formulas.constant, lower, higher if len(self._sizes) >= k else math.inf)
        most = self.method.max_order
        self._fs, self._sizes = [f1, *fs][:most], [size, *self._sizes][: most - 1]
        if hooks.accept is not None:
            hooks.accept(step.t0, y, abs(size))
        return step

    def _end_of(self, step: AdamsSegment) -> Tensor:
        """The time of a step's end, as func is to see it; sets the step's formulas where they depend on the start."""
        time = self._time(step.t1)
        if self._on_jump:
            if step.shift is not None:  # the step's end does not move with its start
                step.dt = step.dt.to(step.shift) - step.shift
                step.formulas = step.formulas.stretched(step.dt[0] / step.size)
            return neighbour(time, time.new_tensor(-self.times.sign))  # f is as before the discontinuity
        return time if step.shift is None else time + step.shift.to(time)

    def _tolerates(self, error: float) -> bool:
        return error <= 1 or (abs(self._strategy.size) <= self.policy.min_step and math.isfinite(error))

    def _reject(self, error: float, lower: list[float]) -> None:
        """Plans the next attempt at the step."""
        size = abs(self._strategy.size)
        if self.hooks.reject is not None:
            self.hooks.reject(self.t, self.y, size)
        self.n_rejected, self.n_steps = self.n_rejected + 1, self.n_steps + 1
        if not math.isfinite(error) and size <= self.policy.min_step:
            self._status = Status.NON_FINITE
        self._strategy.reject(error, lower)

    def _time(self, t: float) -> Tensor:
        return torch.full((), t, dtype=self.layout.real_dtype, device=self.layout.device)

    def _norms(self, rows: Sequence[Row], y1: Tensor, ks: list[Tensor], dt: Tensor) -> list[float]:
        """The norm of the scaled error for each row of weights."""
        layout, norm, y, rtol, atol = self.layout, self.norm, self.y, self.rtol, self.atol
        if norm is None:
            return [math.sqrt(x) for x in self.ops.mean_square_errors(layout, rows, y, y1, ks, dt, rtol, atol)]
        with torch.no_grad():
            return [
                float(norm(reference.scaled_step_error(layout, row, y, y1, ks, dt, rtol, atol), [])) for row in rows
            ]

    def _combine(self, weights: Weights, y: Tensor, ks: list[Tensor], dt: Tensor) -> Tensor:
        """Returns y + dt sum_j w_j k_j; where the weights are a tensor, with the gradients of these and of dt."""
        if isinstance(weights, Tensor):
            return weighted(self.layout, weights, y, ks, dt)
        if torch.is_grad_enabled():
            return autograd.stage_combine(self.ops, self.layout, weights, y, ks, dt)
        return self.ops.stage_combine(self.layout, weights, y, ks, dt)  # type: ignore[no-any-return]
