"""A fixed grid under way, what its steps are, and those of explicit Runge-Kutta methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._ops import autograd, reference
from .._ops.contract import Layout, RightHandSide, neighbour
from ..errors import SolveError
from ..methods import Tableau
from ..solution import Stats
from .quadrature import Quadrature

MOST_STEPS = 20_000  # to an event, as in torchdiffeq


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
        inwards = torch.where(last, -sign, torch.where(c == 0, sign, 0.0)).to(times)
        times = neighbour(times.detach(), inwards) + (times - times.detach())
    return times


@lru_cache(maxsize=64)
def table_of(ops: ModuleType, tableau: Tableau) -> Any:
    """A tableau's stages, as a backend takes them."""
    return ops.Table(tableau.rows, tableau.weights, tableau.error_weights)


@dataclass(eq=False)
class Course:
    """A fixed grid, or a part of it, under way: what a method needs to take its steps.

    Attributes:
        dynamics, layout, ops, quadrature: as AdaptiveLoop's.
        grid: [N] float64 times of the steps' ends, on the `clock_device`; with a graph where times carry a gradient.
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
    sign: float
    perturb: bool
    options: dict[str, Any]
    rtol: float | Tensor
    atol: float | Tensor
    counts: Stats

    @cached_property
    def all_sizes(self) -> Tensor:
        """[N - 1] step sizes, float64."""
        return self.grid[1:] - self.grid[:-1]

    @cached_property
    def sizes(self) -> Tensor | Sequence[Tensor]:
        """The same, each [1]."""
        sizes = self.all_sizes.unsqueeze(1)
        return sizes.unbind() if 0 < len(sizes) < MOST_STEPS else sizes

    def grid_steps(self, times: Tensor, iterating: bool = False) -> Any:
        """The backend's way to take steps.

        Where gradients are enabled, it is the twin's, with autograd's nodes; and on a GPU, where a step iterates.
        """
        if torch.is_grad_enabled():
            combine = partial(autograd.stage_combine, self.ops)
        elif iterating and self.layout.device.type != "cpu":
            combine = self.ops.stage_combine
        else:
            return self.ops.GridSteps(self.layout, times, self.all_sizes)
        return reference.GridSteps(self.layout, times, self.all_sizes, combine)

    def stage_times(self, abscissae: tuple[float, ...]) -> Tensor:
        """See `stage_times`."""
        times = stage_times(self.grid, abscissae, self.layout.real_dtype, self.sign, self.perturb)
        return times.to(self.layout.device)

    def combine(self, weights: tuple[float, ...], y: Tensor, ks: list[Tensor], dt: Tensor) -> Tensor:
        """Returns y + dt sum_j w_j k_j, with a graph behind it where gradients are enabled."""
        if torch.is_grad_enabled():
            return autograd.stage_combine(self.ops, self.layout, weights, y, ks, dt)
        return self.ops.stage_combine(self.layout, weights, y, ks, dt)  # type: ignore[no-any-return]


class Taken(NamedTuple):
    """Steps taken: the number of the last one, the state at its start and that at its end, and its increment."""

    n: int
    y: Tensor
    y1: Tensor
    increment: Increment


class Steps(Protocol):
    """What takes a method's steps."""

    @property
    def under_way(self) -> int:
        """The number of the step begun last; -1 before there is one."""

    def move_to(self, course: Course) -> None:
        """Goes on with the next part of the grid, whose steps are numbered from 0 again."""

    def take(self, begin: int, end: int, y: Tensor, out: Tensor | None = None) -> Taken | SolveError:
        """Takes steps from `begin` on, one or more, before `end`; returns why, if the first of them can't be taken.

        The states at the ends of all of them but the last are written to `out`, if it is given: that of step n to row
        n + 1.
        """


class ExplicitSteps:
    """The steps of an explicit Runge-Kutta method."""

    def __init__(self, tableau: Tableau, course: Course) -> None:
        self.tableau, self.table = tableau, table_of(course.ops, tableau)
        self.move_to(course)

    def move_to(self, course: Course) -> None:
        """See Steps."""
        self.course, self.times = course, course.stage_times((0.0, *self.tableau.abscissae))
        self.grid_steps = course.grid_steps(self.times)

    @property
    def under_way(self) -> int:
        """See Steps."""
        return int(self.grid_steps.under_way)

    def take(self, begin: int, end: int, y: Tensor, out: Tensor | None = None) -> Taken:
        """See Steps; where gradients are enabled, one."""
        end = begin + 1 if torch.is_grad_enabled() else end
        ks: list[Any] = [None] * (len(self.table.rows) + 1)
        y, y1 = self.grid_steps.take(self.table, y, ks, self.course.dynamics, begin, end, out)
        return Taken(end - 1, y, y1, Increment(self.tableau.weights, ks, ks[0]))
