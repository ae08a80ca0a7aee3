"""The steps of Adams methods of fixed step size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from ..control import number_from
from ..errors import warn
from ..methods import TABLEAUS
from ..methods.multistep import (
    HIGHEST_EXPLICIT_IN_FLOAT32,
    HIGHEST_ORDER,
    LOWEST_ORDER,
    FixedAdams,
    bashforth,
    moulton,
)
from .course import Course, ExplicitSteps, Increment, Taken


class AdamsSteps:
    """The steps of an Adams method; the first ones are rk4's."""

    def __init__(self, method: FixedAdams, course: Course) -> None:
        self.start = ExplicitSteps(TABLEAUS["rk4"], course)
        self.implicit = implicit = method.implicit and bool(course.options.get("implicit", True))
        exact = implicit or course.layout.real_dtype is torch.float64
        default = HIGHEST_ORDER if exact else HIGHEST_EXPLICIT_IN_FLOAT32
        max_order = int(number_from(course.options, "max_order", default, 1, HIGHEST_ORDER))
        if max_order < LOWEST_ORDER:
            warn(f"max_order is below {LOWEST_ORDER}, so the solver reduces to `rk4`.")
        self.most = max_order - 1
        self._move_to(course)
        orders = range(1, self.most + 1)
        # Over f at a step's end and the values of f before it.
        self.predictors = tuple((0.0, *bashforth(n)) for n in orders)
        self.correctors = tuple(moulton(n + 1) for n in orders) if implicit else ()
        max_iters = int(number_from(course.options, "max_iters", 4, 1))
        table = reference.AdamsTable if isinstance(self.grid_steps, reference.GridSteps) else course.ops.AdamsTable
        self.table = table(self.predictors, self.correctors, max_iters)
        self.slopes: list[Tensor] = []  # the newest first

    def move_to(self, course: Course) -> None:
        """See Steps."""
        self.start.move_to(course)
        self._move_to(course)

    def _move_to(self, course: Course) -> None:
        self.course = course
        self.grid_steps = course.grid_steps(course.stage_times((0.0, 1.0)), self.implicit)

    @property
    def under_way(self) -> int:
        """See Steps."""
        return max(self.start.under_way, int(self.grid_steps.under_way))

    def take(self, begin: int, end: int, y: Tensor, out: Tensor | None = None) -> Taken:
        """See Steps."""
        if len(self.slopes) + 1 < LOWEST_ORDER - 1 or self.most < LOWEST_ORDER - 1:
            taken = self.start.take(begin, begin + 1, y)
            self.slopes = [taken.increment.slope, *self.slopes][: self.most]
            return taken
        course, m = self.course, len(self.slopes)
        ks: list[Any] = [self.slopes[0], *self.slopes, *[None] * (self.most - m)]
        y, y1, m, n, solved = self.grid_steps.take_adams(
            self.table, y, ks, m, course.dynamics, begin, end, course.rtol, course.atol, out
        )
        self.slopes = ks[1 : m + 1]
        increment = Increment((self.correctors or self.predictors)[m - 1], ks[: m + 1], ks[1])
        if not solved:
            warn("Functional iteration did not converge. Solution may be incorrect.")
            self.slopes.pop()  # a lower order is more stable
        return Taken(n, y, y1, increment)
