"""The steps of Adams methods of fixed step size."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from ..control import number_from
from ..methods import TABLEAUS
from ..methods.multistep import (
    HIGHEST_EXPLICIT_IN_FLOAT32,
    HIGHEST_ORDER,
    LOWEST_ORDER,
    FixedAdams,
    bashforth,
    moulton,
)
from .course import Course, ExplicitSteps, Increment


class AdamsSteps:
    """The steps of an Adams method; the first ones are rk4's."""

    def __init__(self, method: FixedAdams, course: Course) -> None:
        self.course, self.implicit = course, method.implicit
        self.times = course.stage_times((0.0, 1.0))
        self.start = ExplicitSteps(TABLEAUS["rk4"], course)
        exact = method.implicit or course.layout.real_dtype is torch.float64
        default = HIGHEST_ORDER if exact else HIGHEST_EXPLICIT_IN_FLOAT32
        max_order = int(number_from(course.options, "max_order", default, 1, HIGHEST_ORDER))
        if max_order < LOWEST_ORDER:
            warnings.warn(f"max_order is below {LOWEST_ORDER}, so the solver reduces to `rk4`.", stacklevel=2)
        self.most = max_order - 1
        self.max_iters = int(number_from(course.options, "max_iters", 4, 1))
        self.slopes: list[Tensor] = []  # the newest first
        self.zero: Tensor | None = None  # a state of zeros, and a step size of one
        self.one: Tensor | None = None

    def __call__(self, n: int, y: Tensor) -> Increment:
        """Step n, from y."""
        if len(self.slopes) + 1 < LOWEST_ORDER - 1 or self.most < LOWEST_ORDER - 1:
            step = self.start(n, y)
            self.slopes = [step.slope, *self.slopes][: self.most]
            return step
        first, last = self.times[n].unbind()
        slope = self.course.dynamics(first, y)
        self.slopes = [slope, *self.slopes][: self.most]
        step = Increment(bashforth(len(self.slopes)), self.slopes, slope)
        return self._correct(y, step, self.course.sizes[n], last) if self.implicit else step

    def _correct(self, y: Tensor, step: Increment, dt: Tensor, last: Tensor) -> Increment:
        """Solves the implicit formula by functional iteration from the predicted step."""
        course, past = self.course, self.slopes
        weights = moulton(len(past) + 1)
        recording = torch.is_grad_enabled()
        before = self._rise(step, dt)
        for _ in range(self.max_iters):
            state = course.combine(step.weights, y, step.ks, dt) if recording else y + before
            step = Increment(weights, [course.dynamics(last, state), *past], past[0])
            after = self._rise(step, dt)
            if self._agree(before, after):
                return step
            before = after
        warnings.warn("Functional iteration did not converge. Solution may be incorrect.", stacklevel=2)
        self.slopes = past[:-1]  # a lower order is more stable
        return step

    def _rise(self, step: Increment, dt: Tensor) -> Tensor:
        """What a step adds to the state, without a graph."""
        if self.zero is None:
            self.zero, self.one = torch.zeros_like(step.slope).detach(), torch.ones_like(dt).detach()
        ks = step.ks
        if torch.is_grad_enabled():
            ks, dt = [k.detach() for k in ks], dt.detach()
        course = self.course
        rise: Tensor = course.ops.stage_combine(course.layout, step.weights, self.zero, ks, dt)
        return rise

    def _agree(self, a: Tensor, b: Tensor) -> bool:
        """Whether every number of two steps' rises agrees within the tolerances, relative to the rises."""
        course = self.course
        change: Any = (a, b, [b, a], self.one, course.rtol, course.atol)
        (mean,) = course.ops.mean_square_errors(course.layout, ((1.0, -1.0),), *change)
        if mean >= 1 or mean * a.numel() < 1:  # then the largest square is, too
            return bool(mean < 1)
        return bool(reference.scaled_step_error(course.layout, (1.0, -1.0), *change).abs().max() < 1)
