"""The steps of an implicit Runge-Kutta method on a fixed grid."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from ..circumstances import Circumstances
from ..control import number_from
from ..errors import InvalidValue, SolveError, Status
from ..methods import ImplicitTableau
from ..state import Dynamics
from .course import Course, Increment, Taken
from .newton import Newton


class ImplicitSteps:
    """The steps of an implicit Runge-Kutta method.

    What is solved for is the stages' derivatives, k = f(y + dt a k), flat and real: x. A solution is never put into f
    again, which would multiply its rounding by the Lipschitz constant of a stiff f (Hairer, Wanner II, IV.8).

    Args:
        tableau: the method.
        course: see there. Of its options max_iters (100) bounds the iterations of Newton, and newton_tol (1e-12, but
            no less than two rounding units of the state's dtype) the error of a stage's state in relation to the
            largest number of the state, or of its part of a tuple.
    """

    def __init__(self, tableau: ImplicitTableau, course: Course) -> None:
        if torch._C._are_functorch_transforms_active():  # Newton differentiates by ways that they do not allow
            raise InvalidValue(f"{tableau.name!r} is not for torch.func's grad, jvp and vmap; take an explicit method")
        self.tableau = tableau
        self.move_to(course)
        layout, options = course.layout, course.options
        self.dtype = torch.promote_types(layout.real_dtype, torch.float32)
        width = 2 if layout.dtype.is_complex else 1
        self.parts = [width * (end - begin) for begin, end in zip(layout.segments, layout.segments[1:])]
        rounding = 2 * torch.finfo(layout.real_dtype).eps
        self.newton = Newton(
            width * layout.size * len(tableau.blocks[0]),
            number_from(options, "newton_tol", max(1e-12, rounding), 0, 1),
            int(number_from(options, "max_iters", 100, 1, 2**31)),
            course.counts,
        )

    def move_to(self, course: Course) -> None:
        """See Steps."""
        self.course, self.times = course, course.stage_times((0.0, *self.tableau.abscissae))
        self.under_way = -1
        self.circumstances = None
        if torch.is_grad_enabled():  # a backward pass evaluates func, too
            assert isinstance(course.dynamics, Dynamics)
            self.circumstances = Circumstances(course.dynamics.func, course.layout.device)

    def take(self, begin: int, end: int, y: Tensor, out: Tensor | None = None) -> Taken | SolveError:
        """See Steps; takes one, or returns an error: NOT_CONVERGED, or NON_FINITE where f became inf or nan."""
        self.under_way = begin
        step = self._step(begin, y)
        if isinstance(step, SolveError):
            return step
        return Taken(begin, y, self.course.combine(step.weights, y, step.ks, self.course.sizes[begin]), step)

    def _step(self, n: int, y: Tensor) -> Increment | SolveError:
        """Step n, from y, or why it can't be taken."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # inference tensors can't be differentiated
                return self._step(n, y.clone())
        course, tableau, dt = self.course, self.tableau, self.course.sizes[n]
        start, *times = (t.clone() if t.is_inference() else t for t in self.times[n].unbind())
        slope = (course.dynamics if tableau.first_is_explicit else course.dynamics.trial)(start, y)
        ks = [slope] * len(tableau.weights)
        at, over = y.detach(), dt.detach()
        failure = partial(_failure, course.grid.detach()[n : n + 2], course.counts.n_accepted)
        size = partial(self._size, at, over)
        for block in tableau.blocks if y.numel() else ():
            guess = self._vector([slope.detach()] * len(block))
            equation = partial(self._derivatives, block, times, at, [k.detach() for k in ks], over)
            x = self.newton.solve(equation, guess, size)
            if x is None:
                return failure(Status.NOT_CONVERGED if self.newton.finite else Status.NON_FINITE)
            if self.circumstances is not None:
                equation = partial(self._under, self.circumstances, block, times, y, ks.copy(), dt)
                x = self.newton.differentiable(equation, x, size, partial(failure, Status.NOT_CONVERGED), (y,))
            for i, k in zip(block, self._states(x, y)):
                ks[i] = k.to(y.dtype)
        if course.quadrature is not None:
            for i in (i for block in tableau.blocks for i in block):
                course.dynamics(times[i], course.combine(tableau.rows[i], y, ks, dt))
        return Increment(tableau.weights, ks, slope)

    def _under(self, circumstances: Circumstances, *arguments: Any) -> Tensor:
        """The same as `_derivatives` under the circumstances of the forward pass."""
        with circumstances.again():
            return self._derivatives(*arguments)

    def _derivatives(
        self, block: tuple[int, ...], times: list[Tensor], y: Tensor, ks: list[Tensor], dt: Tensor, x: Tensor
    ) -> Tensor:
        """F at the states of a block's stages, whose derivatives are x; the other stages' are in ks."""
        course, ks = self.course, ks.copy()
        for i, k in zip(block, self._states(x, y)):
            ks[i] = k
        states = [reference.stage_combine(course.layout, self.tableau.rows[i], y, ks, dt) for i in block]
        return self._vector([course.dynamics.trial(times[i], state) for i, state in zip(block, states)])

    def _vector(self, ks: list[Tensor]) -> Tensor:
        """Derivatives of stages as one real vector."""
        stacked = torch.stack(ks)
        return (torch.view_as_real(stacked) if stacked.is_complex() else stacked).reshape(-1).to(self.dtype)

    def _states(self, x: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """The inverse, but that half precision stays widened."""
        if like.is_complex():
            return torch.view_as_complex(x.view(-1, *like.shape, 2)).unbind()
        return x.view(-1, *like.shape).unbind()

    def _size(self, y: Tensor, dt: Tensor, x: Tensor) -> Tensor:
        """What an error of x is measured by: the largest number of y, or of dt k, in the same part, over dt."""
        moved = x.view(-1, sum(self.parts)).abs().amax(0)
        sizes = torch.maximum(self._vector([y]).abs() / dt.abs().to(y.device, self.dtype), moved)
        largest = [part.amax().expand_as(part) if len(part) else part for part in torch.split(sizes, self.parts)]
        return torch.cat(largest).clamp_min(torch.finfo(self.dtype).tiny).repeat(len(x) // len(sizes))


def _failure(ends: Tensor, n: int, status: Status) -> SolveError:
    """That of the step between these two times, behind n others."""
    t0, t1 = ends.tolist()
    return SolveError(status, t0, t1 - t0, n)
