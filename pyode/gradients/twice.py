"""The backward solve of the continuous adjoint with a graph behind it, for gradients of gradients.

It is a solve of (y, a, integrals) as one state, recorded like any other. An evaluation of its dynamics is one node, cut
off from what t, y and a were computed from: derivatives with respect to the parameters are partial ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..circumstances import Circumstances
from ..errors import InvalidValue
from ..state import Dynamics, Func
from .augmented import AugmentedState
from .backsolve import BacksolveConfig
from .backsolve_samples import SampleBacksolveConfig
from .partials import partial_derivatives


class _AdjointSlopes(torch.autograd.Function):
    """f and the vjps of -a with respect to t, y and the parameters; can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, circumstances: Circumstances, f: Func, t: Tensor, y: Tensor, a: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.f, ctx.circumstances = f, circumstances
        ctx.save_for_backward(t, y, a, *params)
        with circumstances.again():
            _, slopes = _slopes(f, t, y, a, params, create_graph=False)
        return tuple(slope.detach() for slope in slopes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # Not once_differentiable, which is silent where only what was saved requires a gradient.
        if torch.is_grad_enabled():
            raise InvalidValue(
                "odeint_adjoint has first and second derivatives, and create_graph=True prepares for a third; leave it "
                "out in the second, or take odeint, which has them all"
            )
        t, y, a, *params = ctx.saved_tensors
        with ctx.circumstances.again():
            inputs, slopes = _slopes(ctx.f, t, y, a, tuple(params), create_graph=True)
            pairs = [(slope, g) for slope, g in zip(slopes, gradients) if slope.requires_grad]
            if not pairs:
                return (None,) * (2 + len(inputs))
            outputs, cotangents = zip(*pairs)
            found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True)
            return None, None, *found[:3], *partial_derivatives(params, found[3:])


def _slopes(
    f: Func, t: Tensor, y: Tensor, a: Tensor, params: tuple[Tensor, ...], create_graph: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs, cut off from what they were computed from, and what _AdjointSlopes returns for them."""
    with torch.enable_grad():
        t, y, a = (x.detach().requires_grad_() for x in (t, y, a))
        k = f(t, y)
        if not k.requires_grad:
            return [t, y, a, *params], [k, *(torch.zeros_like(x) for x in (t, y, *params))]
        by_t, by_y, *by_params = torch.autograd.grad(
            k, (t, y, *params), -a, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        return [t, y, a, *params], [k, by_t, by_y, *partial_derivatives(params, by_params, create_graph)]


class _Interval:
    """The backward solve over one output interval, as a solve of (y, a, integrals) in one tensor.

    Args:
        circumstances: of the forward solve.
        params: the tensors whose gradients are wanted.
        solve: solve(slopes, flat, t, norm) returns the state at the second of two times, with a graph behind it.
        norm: of (t, y, adj_y, *params).
    """

    def __init__(
        self,
        circumstances: Circumstances,
        params: tuple[Tensor, ...],
        solve: Callable[..., Tensor],
        norm: Callable[[tuple[Tensor, ...]], Any],
    ) -> None:
        self.circumstances, self.params, self.solve, self.norm = circumstances, params, solve, norm

    def back(self, f: Func, t: Tensor, y: Tensor, a: Tensor, integrals: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns a and the integrals, of time and the params, at the second of two times, from those at the first."""
        z = torch.stack([y, a])
        like = AugmentedState(z, integrals)

        def slopes(t: Tensor, flat: Tensor) -> Tensor:
            (y, a), *_ = like.unpack(flat)
            k, by_t, by_y, *by_params = _AdjointSlopes.apply(self.circumstances, f, t, y, a, *self.params)  # type: ignore[no-untyped-call]
            return like.pack([torch.stack([k, by_y]), by_t, *by_params])

        def norm(flat: Tensor) -> Any:
            z, time, *others = like.unpack(flat)
            return self.norm((time, *z.unbind(), *others))

        (_, a), *integrals = like.unpack(self.solve(slopes, like.pack([z, *integrals]), t, norm))
        return a, integrals

    def start(self, ys: Tensor) -> list[Tensor]:
        """The integrals where they begin."""
        time = torch.zeros((), dtype=ys.real.dtype if ys.is_complex() else ys.dtype, device=ys.device)
        return [time, *(torch.zeros_like(p) for p in self.params)]


def backsolve_with_graph(
    odeint: Callable[..., Tensor],
    circumstances: Circumstances,
    f: Dynamics,
    t: Tensor,
    config: BacksolveConfig,
    ys: Tensor,
    gradients: Tensor,
    params: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns the gradients with respect to y0 (packed), t and the parameters, differentiable once.

    Args:
        odeint: records a graph.
        circumstances, f: the forward solve's, and its dynamics.
        t: the output times.
        config: see there.
        ys: [T, ...] the forward solve's outputs, packed.
        gradients: [T, ...] those that arrive at them.
        params: the tensors whose gradients are wanted.
    """
    rtol, atol = _least(config.rtol), _least(config.atol)

    def solve(slopes: Func, flat: Tensor, t: Tensor, norm: Any) -> Tensor:
        return odeint(slopes, flat, t, rtol, atol, config.method.name, {**config.options, "norm": norm})[-1]

    interval = _Interval(circumstances, params, solve, config.norm)
    integrals = interval.start(ys)
    a, at = torch.zeros_like(gradients[0]), [torch.zeros_like(x) for x in t.unbind()]
    for i in reversed(range(len(t))):
        a = a + gradients[i]
        if i == 0:
            break
        # Moving an output time moves the output along f.
        k = f(t[i].to(integrals[0]), ys[i])
        effect = torch.sum((k.conj() * gradients[i]).real if k.is_complex() else k * gradients[i])
        at[i], integrals[0] = effect.to(t), integrals[0] - effect
        a, integrals = interval.back(f, t[[i, i - 1]], ys[i], a, integrals)
    at[0] = integrals[0].to(t)
    return a, torch.stack(at), integrals[1:]


def backsolve_samples_with_graph(
    odeint: Callable[..., Tensor],
    circumstances: Circumstances,
    func: Func,
    times: Tensor,
    config: SampleBacksolveConfig,
    ys: Tensor,
    gradients: Tensor,
    segments: tuple[int, ...],
    params: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same for samples, whose states are all as accurate as the tolerances want the worst of them.

    They take their steps together, over intervals that are stretched to the length of 1. So the times are parameters
    of the dynamics; what is told of them in the options of the solve, discontinuities and longest steps, is not heeded.

    Args:
        func: of times [B] and packed states [B, D].
        times: [T, B] float64, with a graph if their gradients are wanted.
        ys, gradients: [T, B, D].
        segments: of the norm of a state.
    """
    rtol, atol = _least(config.rtol), _least(config.atol)

    def stretched(start: Tensor, end: Tensor, x: Tensor, y: Tensor) -> Tensor:
        size = (end - start).to(y.device, y.real.dtype if y.is_complex() else y.dtype)[:, None]
        k = func(start + x.to(start) * (end - start), y)
        return torch.where(size == 0, 0.0, k * size)

    def solve(slopes: Func, flat: Tensor, t: Tensor, norm: Any) -> Tensor:
        return odeint(slopes, flat, t, rtol, atol, config.tableau.name, {"norm": norm})[-1]

    def norm(whole: tuple[Tensor, ...]) -> Tensor:
        both = torch.stack(whole[1:3]).abs().square()
        parts = [both[..., begin:end].mean(-1).reshape(-1) for begin, end in pairwise(segments)]
        return torch.cat([both.new_zeros(1), *parts]).max().sqrt()

    moved = (times,) if times.requires_grad else ()
    interval = _Interval(circumstances, (*moved, *params), solve, norm)
    integrals = interval.start(ys)
    a, both_ends = torch.zeros_like(gradients[0]), torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")
    for i in reversed(range(1, len(times))):
        f = partial(stretched, times[i - 1], times[i])
        a, integrals = interval.back(f, both_ends, ys[i], a + gradients[i], integrals)
    _, *found = integrals
    return a + gradients[0], found.pop(0) if moved else torch.zeros_like(times), found


def _least(tolerance: float | Tensor) -> float:
    return tolerance if isinstance(tolerance, float) else float(tolerance.min())
