"""Dense output: an accepted step, and the solution within it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .._ops import autograd, backend_of, reference
from .._ops.contract import Layout


class Segment(Protocol):
    """An accepted step, from t0 to t1, and the solution within it."""

    t0: float
    t1: float

    def at(self, t: float) -> Tensor:
        """The state at a time within the step, packed; with a graph behind it where gradients are enabled."""

    def sample(self, t: Tensor) -> Tensor:
        """The states at some times, [m] float64, which may carry a gradient: [m, *state]."""


class RungeKuttaSegment:
    """One whose dense output is y + dt sum_j p_j(x) k_j, with a polynomial in the position x for each stage.

    Args:
        layout: the state's.
        polynomial: the method's dense output.
        t0, t1: the step's ends.
        size: the step's size, signed, as it was used.
        y, ks: the state at t0 and the derivatives.
        dt: `size` as a tensor, [1]; with a graph if the step size has a gradient.
        shift: how far the step has moved: 0, with the gradient of the solve's start; None if it hasn't one.
    """

    def __init__(
        self,
        layout: Layout,
        polynomial: reference.Interpolant,
        t0: float,
        t1: float,
        size: float,
        y: Tensor,
        ks: list[Tensor],
        dt: Tensor,
        shift: Tensor | None = None,
    ) -> None:
        self.layout, self.polynomial = layout, polynomial
        self.t0, self.t1, self.size = t0, t1, size
        self.y, self.ks, self.dt, self.shift = y, ks, dt, shift

    def position(self, t: float) -> float:
        """Where in the step a time lies, from 0 to 1."""
        return 1.0 if t == self.t1 else (t - self.t0) / self.size

    def at(self, t: float, moved: Tensor | None = None) -> Tensor:
        """See Segment; `moved` is 0, with the gradient of this time."""
        if moved is None and self.shift is None:
            weights = self.polynomial.weights_at(self.position(t))
            return autograd.stage_combine(backend_of(self.layout), self.layout, weights, self.y, self.ks, self.dt)
        elapsed = torch.tensor(t - self.t0, dtype=torch.float64, device=self.dt.device)
        if moved is not None:
            elapsed = elapsed + moved.to(elapsed)
        return self._at_position(elapsed if self.shift is None else elapsed - self.shift.to(elapsed))

    def sample(self, t: Tensor) -> Tensor:
        """See Segment."""
        elapsed = (t - self.t0).to(self.dt).reshape(-1, *[1] * self.y.dim())
        return self._at_position(elapsed if self.shift is None else elapsed - self.shift.to(elapsed))

    def _at_position(self, elapsed: Tensor) -> Tensor:
        dt, device, dtype = self.dt.reshape(()), self.y.device, self.layout.real_dtype
        x = (elapsed / dt).to(device, dtype)
        return reference.interpolate_at(self.polynomial, x, self.y, self.ks, dt.to(device, dtype))
