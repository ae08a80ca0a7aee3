"""Dense output: an accepted step, and the solution within it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .._ops import autograd, backend_of, reference
from .._ops.contract import Layout, clock_device
from ..methods.adams import Formulas


class Segment(Protocol):
    """An accepted step, from t0 to t1, and the solution within it."""

    t0: float
    t1: float

    @property
    def polynomial(self) -> reference.Interpolant | None:
        """The dense output, if it is one over the step's stages."""

    def position(self, t: float) -> float:
        """Where in the step a time lies, from 0 to 1."""

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
        y1: the state at t1, if it is at hand.
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
        y1: Tensor | None = None,
    ) -> None:
        self.layout, self.polynomial = layout, polynomial
        self.t0, self.t1, self.size = t0, t1, size
        self.y, self.ks, self.dt, self.shift, self.y1 = y, ks, dt, shift, y1

    def position(self, t: float) -> float:
        """See Segment."""
        return 1.0 if t == self.t1 else (t - self.t0) / self.size

    def at(self, t: float, moved: Tensor | None = None) -> Tensor:
        """See Segment; `moved` is 0, with the gradient of this time."""
        if moved is None and self.shift is None and self.y1 is not None and t == self.t1:
            return self.y1
        weights, ops = self.polynomial.weights_at(self.position(t)), backend_of(self.layout)
        if moved is None and self.shift is None:
            return autograd.stage_combine(ops, self.layout, weights, self.y, self.ks, self.dt)
        elapsed = torch.tensor(t - self.t0, dtype=torch.float64, device=self.dt.device)
        if moved is not None:
            elapsed = elapsed + moved.to(elapsed)
        state = self._at_position(elapsed if self.shift is None else elapsed - self.shift.to(elapsed))
        with torch.no_grad():  # the graph changes no bits
            exact: Tensor = ops.stage_combine(self.layout, weights, self.y, self.ks[: len(weights)], self.dt)
        return exact + (state - state.detach())

    def sample(self, t: Tensor) -> Tensor:
        """See Segment."""
        elapsed = (t - self.t0).to(self.dt).reshape(-1, *[1] * self.y.dim())
        return self._at_position(elapsed if self.shift is None else elapsed - self.shift.to(elapsed))

    def _at_position(self, elapsed: Tensor) -> Tensor:
        dt, device, dtype = self.dt.reshape(()), self.y.device, self.layout.real_dtype
        x = (elapsed / dt).to(device, dtype)
        return reference.interpolate_at(self.polynomial, x, self.y, self.ks, dt.to(device, dtype))


class BatchSegment:
    """A step of B samples, some of which have accepted it; states are [B, D] here.

    Args:
        layout, polynomial, y, ks: as RungeKuttaSegment's.
        controller: of all samples, which has just judged the step; times are on the `clock_device`.
        dt: [B] the step sizes as they were used, with a graph if they have a gradient.
        shift: [B] how far each step has moved; None if that has no gradient.
    """

    def __init__(
        self,
        layout: Layout,
        polynomial: reference.Interpolant,
        controller: Any,
        y: Tensor,
        ks: list[Tensor],
        dt: Tensor,
        shift: Tensor | None,
    ) -> None:
        self.layout, self.polynomial, self.controller = layout, polynomial, controller
        self.y, *self.ks = (x.reshape(layout.samples, layout.size) for x in (y, *ks))
        self.shift = shift
        # Copies: the next step's take their places. The twin's controller keeps its clock on the host everywhere.
        clock = clock_device(layout.device)
        self.t0, self.t1, self.size = (
            controller.field(name).to(clock, copy=True) for name in ("t_prev", "t", "dt_prev")
        )
        self.accepted = controller.field("accepted").to(clock) != 0
        self.dt = dt.to(clock) if dt.requires_grad else self.size

    def position(self, t: Tensor) -> Tensor:
        """Where in the step times lie, [B], from 0 to 1."""
        return torch.where(t == self.t1, 1.0, (t - self.t0) / torch.where(self.size == 0, 1.0, self.size))

    def at(self, t: Tensor, some: Tensor | None = None) -> Tensor:
        """The states at a time for each sample, [B] float64: [B, D], or of `some` of them only, by their indices.

        Samples that stood still are given their state.
        """
        rows: Any = slice(None) if some is None else some.to(self.t0.device)
        here = rows if some is None else some.to(self.y.device)
        t, t0, t1, dt = (v[rows] for v in (t.to(self.t0), self.t0, self.t1, self.dt))
        elapsed = t - t0 - (0.0 if self.shift is None else self.shift.to(t0)[rows])
        x = elapsed / torch.where(dt.detach() == 0, torch.ones_like(dt), dt)
        x = torch.where(t == t1, x - (x - 1).detach(), x)  # exactly 1 at the end
        x, dt = (v.unsqueeze(-1).to(self.y.device, self.layout.real_dtype) for v in (x, dt))
        return reference.interpolate_at(self.polynomial, x, self.y[here], [k[here] for k in self.ks], dt)


class AdamsSegment:
    """One of the variable-coefficient Adams method.

    Args:
        layout, t0, t1, size, y, dt, shift: as RungeKuttaSegment's; dt and shift, if they have a gradient, on the CPU.
        ks: f at t1, f as predicted there, f at t0 and where the steps before began.
        formulas: the step's.
    """

    polynomial = None

    def __init__(
        self,
        layout: Layout,
        t0: float,
        t1: float,
        size: float,
        y: Tensor,
        ks: list[Tensor],
        dt: Tensor,
        formulas: Formulas,
        shift: Tensor | None = None,
    ) -> None:
        self.layout, self.formulas = layout, formulas
        self.t0, self.t1, self.size = t0, t1, size
        self.y, self.ks, self.dt, self.shift = y, ks, dt, shift

    def position(self, t: float) -> float:
        """See Segment."""
        return 1.0 if t == self.t1 else (t - self.t0) / self.size

    def at(self, t: float, moved: Tensor | None = None) -> Tensor:
        """See RungeKuttaSegment."""
        if moved is None and self.shift is None:
            weights = self.formulas.dense(self.position(t))
            return autograd.stage_combine(backend_of(self.layout), self.layout, weights, self.y, self.ks, self.dt)
        elapsed = torch.tensor(t, dtype=torch.float64, device="cpu")
        return self.sample(elapsed if moved is None else elapsed + moved.to(elapsed))

    def sample(self, t: Tensor) -> Tensor:
        """See Segment; of t's shape, then the state's."""
        elapsed = t.to("cpu", torch.float64) - self.t0
        dt = self.dt.to(elapsed)
        weights = self.formulas.dense_at((elapsed if self.shift is None else elapsed - self.shift) / dt.reshape(()))
        return weighted(self.layout, weights, self.y, self.ks, dt)


def weighted(layout: Layout, weights: Tensor, y: Tensor, ks: list[Tensor], dt: Tensor) -> Tensor:
    """Returns y + dt sum_j w_j k_j for weights [..., n], with their gradients and dt's: [..., *state]."""
    each = (dt.to(weights) * weights).to(y.device, layout.real_dtype).unbind(-1)
    return sum((w.reshape((*w.shape, *[1] * y.dim())) * k for w, k in zip(each, ks)), y)


def unmoved(y: Tensor, slope: Tensor, shift: Tensor | None) -> Tensor:
    """The state at the time where a solve stands, whose steps have moved with its start.

    Args:
        y, slope: the state, and its derivative; where that is not finite, the state stays as it is.
        shift: as RungeKuttaSegment's.
    """
    if shift is None:
        return y
    finite = slope.isfinite()
    if not bool(finite.all()):  # whatever made it so has no finite gradient either
        slope = torch.where(finite, slope.detach(), 0.0)
    return y - slope * shift.to(device=y.device, dtype=y.real.dtype)
