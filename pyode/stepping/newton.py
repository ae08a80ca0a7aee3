"""Newton's method for x = phi(x), and the derivative of its solution.

phi is any function of a vector that torch can differentiate; for an implicit Runge-Kutta method it maps the stages'
derivatives to f at the states that they make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops.batched import one_by_one
from ..errors import InvalidValue
from ..solution import Stats
from .krylov import norm_of
from .linear import DIRECT_UNKNOWNS, STAGNATED, Direct, Krylov, Linearization, Map

LEAST_DAMPING = 2.0**-10


class Newton:
    """Solves x = phi(x), one such equation after the other.

    The corrections d solve (I - J) d = phi(x) - x, with the Jacobian J of an earlier x or an earlier equation as long
    as each is much shorter than the one before. A correction behind which the next one is no shorter is halved: the
    natural monotonicity test.

    Args:
        n: unknowns of each equation.
        tolerance: of x, in relation to its size.
        max_iters: iterations for one equation.
        counts: n_newton and n_krylov are added to.

    Attributes:
        finite: whether phi was finite where the last search ended.

    Source:
        Hairer, Wanner II, IV.8, for the estimate of the error and the reuse of the Jacobian; Deuflhard, Newton Methods
        for Nonlinear Problems (2004), section 3.3, for the damping.
    """

    def __init__(self, n: int, tolerance: float, max_iters: int, counts: Stats) -> None:
        self.tolerance, self.max_iters, self.counts = tolerance, max_iters, counts
        self.linear = Direct() if n <= DIRECT_UNKNOWNS else Krylov(tolerance, counts)
        self.finite = True
        self._begun = False

    def solve(self, phi: Map, guess: Tensor, size: Map) -> Tensor | None:
        """Returns x; None if it was not found.

        Args:
            phi: [N] to [N].
            guess: [N]. Where it is further from a solution than zero, by its residual, zero takes its place.
            size: from x to what its numbers' errors are measured by, positive, 0-dim or [N].
        """
        linear = self.linear
        at = Linearization(phi, guess)
        if not norm_of(at.residual) <= norm_of(guess):
            at = Linearization(phi, torch.zeros_like(guess))
        if not self._begun:
            self._begun = linear.renew(at)
        correction, damping = linear.solve(at.residual, size(at.value.detach())), 1.0
        for _ in range(self.max_iters):
            self.counts.n_newton += 1
            trial = Linearization(phi, at.x.detach() + damping * correction)
            scale = size(trial.x.detach())
            length = _largest(correction, scale)
            after = linear.solve(trial.residual, scale)
            rate = _largest(after, scale) / length if length else 0.0
            if not rate < 1:
                if length <= STAGNATED * self.tolerance:
                    return trial.x.detach()
                if linear.renew(at):
                    correction, damping = linear.solve(at.residual, scale), 1.0
                else:
                    damping /= 2
                if damping < LEAST_DAMPING:
                    break
                continue
            if rate > linear.slow and linear.renew(trial):
                after = linear.solve(trial.residual, scale)
            at, correction = trial, after
            if damping == 1 and max(rate, linear.precision) * _largest(correction, scale) <= self.tolerance:
                return at.x.detach() + correction
            damping = min(1.0, 2 * damping)
        self.finite = bool(trial.value.isfinite().all())
        return None

    def differentiable(
        self, phi: Map, x: Tensor, size: Map, failure: Callable[[], Exception], held: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """x, which solves x = phi(x), with a graph to all that phi uses besides x, by the implicit function theorem.

        The graph can be differentiated once. Where its backward pass does not converge it raises the failure; and an
        error if one of the tensors held by phi, which it calls again, has been written to.
        """
        value = phi(x)
        if not value.requires_grad:
            return x
        return _Solution.apply(self, phi, size, failure, held, x, value)  # type: ignore[no-any-return, no-untyped-call]


class _Solution(torch.autograd.Function):
    """x = phi(x): a gradient g of x is u = (I - J')^-1 g as a gradient of phi's value."""

    @staticmethod
    def forward(
        ctx: Any,
        newton: Newton,
        phi: Map,
        size: Map,
        failure: Callable[[], Exception],
        held: tuple[Tensor, ...],
        x: Tensor,
        value: Tensor,
    ) -> Tensor:
        ctx.newton, ctx.phi, ctx.size, ctx.failure = newton, phi, size, failure
        ctx.save_for_backward(x, *held)
        return x.clone()

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # Not once_differentiable, which only tells those who differentiate all the way back.
        if torch.is_grad_enabled():
            raise InvalidValue(
                "the gradient of an implicit step can't be differentiated, for which create_graph=True prepares; leave "
                "it out, or take odeint_adjoint, whose gradient can be, or an explicit method"
            )
        (g,), (x, *_), newton = gradients, ctx.saved_tensors, ctx.newton
        at = Linearization(ctx.phi, x)
        u = newton.linear.solve_transposed(at, g, ctx.size(x), newton.tolerance)
        if u is None and bool(g.isfinite().all()):
            raise ctx.failure()
        u = torch.full_like(g, torch.nan) if u is None else u
        return None, None, None, None, None, None, u


def _largest(x: Tensor, scale: Tensor) -> float:
    """The largest number of x, each measured by its scale."""
    return float((x / scale).abs().max())
