"""A fixed grid under way, what its steps are, and those of explicit Runge-Kutta methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import autograd
from .._ops.contract import Layout, RightHandSide
from ..methods import Tableau
from ..solution import Stats
from .quadrature import Quadrature


class Increment(NamedTuple):
    """A step: y1 = y + dt sum_j weights_j ks_j, and with slope = f(t0, y) what dense output needs."""

    weights: tuple[float, ...]
    ks: list[Tensor]
    slope: Tensor


def stage_times(
    grid: Tensor, abscissae: tuple[float, ...], dtype: torch.dtype, sign: float, perturb: bool = False
) -> Tensor:
    """The times at which a step's stages lie, for all steps: [N - 1, stages], in the dtype that func sees.

    Args:
        grid: [N] float64 times of the steps' ends.
        abscissae: of the stages, from 0 to 1.
        dtype: that func sees.
        sign: +1 where time runs forwards, -1 where backwards.
        perturb: whether func sees a step's start just behind it and its end just before it.
    """
    c = torch.tensor(abscissae, dtype=torch.float64, device=grid.device)
    times = grid[:-1, None] + c * (grid[1:] - grid[:-1])[:, None]
    last = c == 1
    times = torch.where(last, grid[1:, None], times).to(dtype)
    if perturb:
        ahead = torch.nextafter(times, times + sign).detach()
        behind = torch.nextafter(times, times - sign).detach()
        exact = times
        times = torch.where(last, behind, torch.where(c == 0, ahead, times.detach()))
        times = times + (exact - exact.detach())
    return times


@dataclass
class Course:
    """A fixed grid under way: what a method needs to take its steps.

    Attributes:
        dynamics, layout, ops, quadrature: as AdaptiveLoop's.
        grid: [N] float64 times of the steps' ends, on the state's device; with a graph where times carry a gradient.
        sizes: N - 1 step sizes, each [1] float64.
        sign: +1 where time runs forwards, -1 where backwards.
        perturb: whether func sees a step's start just behind it and its end just before it.
        options: the user's.
        rtol, atol: of the solve, for methods that iterate.
        counts: of the solve, to which a method adds those of its own.
    """

    dynamics: RightHandSide
    layout: Layout
    ops: ModuleType
    quadrature: Quadrature | None
    grid: Tensor
    sizes: Tensor | Sequence[Tensor]
    sign: float
    perturb: bool
    options: dict[str, Any]
    rtol: float | Tensor
    atol: float | Tensor
    counts: Stats

    def stage_times(self, abscissae: tuple[float, ...]) -> Tensor:
        """See `stage_times`."""
        return stage_times(self.grid, abscissae, self.layout.real_dtype, self.sign, self.perturb)

    def combine(self, weights: tuple[float, ...], y: Tensor, ks: list[Tensor], dt: Tensor) -> Tensor:
        """Returns y + dt sum_j w_j k_j, with a graph behind it where gradients are enabled."""
        if torch.is_grad_enabled():
            return autograd.stage_combine(self.ops, self.layout, weights, y, ks, dt)
        return self.ops.stage_combine(self.layout, weights, y, ks, dt)  # type: ignore[no-any-return]


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
