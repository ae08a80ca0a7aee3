"""What a step-size controller is told: the errors of steps, and of a solve's start."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from .._ops.contract import Layout, Phase, RightHandSide
from ..methods import Tableau
from .quadrature import Quadrature

Norm = Callable[[Tensor, list[Tensor]], Any]


class Measure:
    """Error norms, put where a controller finds them.

    Args:
        ops: the solve's backend.
        layout, tableau, rtol, atol, norm, quadrature: as AdaptiveLoop's.
        controller: of the solve.
    """

    def __init__(
        self,
        ops: ModuleType,
        layout: Layout,
        tableau: Tableau,
        rtol: float | Tensor,
        atol: float | Tensor,
        norm: Norm | None,
        quadrature: Quadrature | None,
        controller: Any,
    ) -> None:
        self.ops, self.layout, self.tableau, self.controller = ops, layout, tableau, controller
        self.rtol, self.atol, self.norm, self.quadrature = rtol, atol, norm, quadrature

    def step(self, y: Tensor, y1: Tensor, ks: list[Tensor]) -> None:
        """The error of the step from y to y1."""
        if self.quadrature is not None:
            self.quadrature.finish_step(self.controller)
        self._put(self.tableau.error_weights, y, y1, ks, self.controller.dt, 0)

    def start(self, dynamics: RightHandSide, y: Tensor, k: Tensor, first_step: float | Tensor | None) -> int:
        """Plans the first step, from y with the derivative k; returns the flags (Hairer, Norsett, Wanner I, II.4)."""
        if torch.is_grad_enabled():
            y, k = y.detach(), k.detach()
        slopes = sum(part.n_segments for part in self.controller.layouts)  # where the norms of slopes begin
        if first_step is not None:
            return self._given(y, k, first_step, slopes)
        controller, one = self.controller, self.controller.one
        self._put((1.0,), y, y, [y], one, 0)
        self._put((1.0,), y, y, [k], one, slopes)
        if self.quadrature is not None:
            self.quadrature.measure_slope(controller, one, slopes)
        controller.run(Phase.TRY_FIRST)
        trial = self.ops.stage_combine(self.layout, (1.0,), y, [k], controller.dt)
        # Not under no_grad, for which torch.compile would compile func once more.
        change = [dynamics(controller.stage_times, trial).detach(), k]
        self._put((1.0, -1.0), y, y, change, controller.dt, 0)
        if self.quadrature is not None:
            self.quadrature.measure_change(controller)
        return int(controller.run(Phase.CHOOSE_FIRST))

    def _given(self, y: Tensor, k: Tensor, first_step: float | Tensor, slopes: int) -> int:
        """The same for a first step of the user's: the state and slope have to be finite, no more."""
        controller = self.controller
        for x, slot in ((y, 0), (k, slopes)):
            if self.norm is None:
                controller.error_norm((1.0,), y, y, [x], controller.one, 0.0, 1.0, slot)
            else:  # the user's norm is the only one: those of the segments stay 0
                controller.put_norm(0.0 if bool(x.isfinite().all()) else math.nan, slot)
        if isinstance(first_step, Tensor):
            controller.dt.copy_(first_step)
            first_step = math.nan
        return int(controller.run(Phase.GIVEN_FIRST, first_step))

    def _put(self, weights: tuple[float, ...], y: Tensor, y1: Tensor, ks: list[Tensor], dt: Tensor, slot: int) -> None:
        if self.norm is None:
            self.controller.error_norm(weights, y, y1, ks, dt, self.rtol, self.atol, slot)
            return
        with torch.no_grad():
            error = reference.scaled_step_error(self.layout, weights, y, y1, ks, dt, self.rtol, self.atol)
            errors = []
            if self.quadrature is not None:
                errors = self.quadrature.scaled_errors(weights, dt, at_start=y1 is y, of_values=ks[0] is y)
            self.controller.put_norm(self.norm(error, errors), slot)
