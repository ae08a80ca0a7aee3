"""Which loop carries out which kind of method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .._ops.contract import Grid, Layout, Policy, RightHandSide
from ..control import Times, number_from
from ..methods import Method, Tableau
from ..methods.adams import VariableAdams
from ..methods.external import ScipySolver
from ..solution import SampleStats, Stats
from .adams import AdamsLoop
from .adaptive import AdaptiveLoop, AtJump
from .external import ScipyLoop
from .fixed_grid import FixedGridLoop
from .hooks import NO_HOOKS, Hooks
from .measure import Norm
from .quadrature import Quadrature


class Loop(Protocol):
    """A solve about to be done, and then done."""

    @property
    def last_step(self) -> float | None:
        """The size of the step taken last, if the method chose it."""

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]."""

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""


@runtime_checkable
class SampleLoop(Loop, Protocol):
    """One that can tell of every sample how it has fared."""

    def status_of_samples(self) -> Tensor:
        """[B] a `Status` each."""

    def stats_of_samples(self) -> SampleStats:
        """What each sample has taken."""

    def ends_of_samples(self) -> Tensor:
        """[B] float64, to which time each has come."""

    def left(self) -> Tensor:
        """Which outputs have not been reached: [T, B], or [T] of the only sample."""


def loop_for(
    method: Method,
    dynamics: RightHandSide,
    layout: Layout,
    times: Times,
    rtol: float | Tensor,
    atol: float | Tensor,
    policy: Policy,
    prescribed: Grid,
    options: dict[str, Any],
    grid: Callable[[], Tensor],
    norm: Norm | None = None,
    quadrature: Quadrature | None = None,
    at_jump: AtJump | None = None,
    hooks: Hooks = NO_HOOKS,
) -> Loop:
    """The loop for a solve by a method.

    Args:
        method: of any kind.
        dynamics, layout, times, rtol, atol, policy, prescribed, norm, quadrature, at_jump, hooks: as AdaptiveLoop's.
        options: the user's.
        grid: returns the times of the steps of a method that does not choose them.
    """
    if not method.adaptive:
        return FixedGridLoop(dynamics, method, layout, times, grid(), options, rtol, atol, quadrature, hooks)
    if isinstance(method, VariableAdams):
        most = int(number_from(options, "max_order", method.max_order, 1, method.max_order))
        method = replace(method, max_order=most)
        return AdamsLoop(dynamics, method, layout, rtol, atol, policy, prescribed, times, norm, hooks)
    if isinstance(method, ScipySolver):
        solver = options.get("solver", "LSODA")
        return ScipyLoop(dynamics, layout, times, rtol, atol, policy, solver, hooks)
    assert isinstance(method, Tableau)
    every = int(number_from(options, "check_every", 1, 1))
    return AdaptiveLoop(
        dynamics, method, layout, rtol, atol, policy, prescribed, times, norm, quadrature, at_jump, hooks, every
    )
