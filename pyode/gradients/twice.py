"""The backward solve of the continuous adjoint with a graph behind it, for gradients of gradients.

It is a solve of (y, a, integrals) as one state, recorded like any other. An evaluation of its dynamics is one node, cut
off from what t, y and a were computed from: derivatives with respect to the parameters are partial ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..circumstances import Circumstances
from ..errors import InvalidValue
from ..state import Dynamics
from .augmented import AugmentedState
from .backsolve import BacksolveConfig


class _AdjointSlopes(torch.autograd.Function):
    """f and the vjps of -a with respect to t, y and the parameters; can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, circumstances: Circumstances, f: Dynamics, t: Tensor, y: Tensor, a: Tensor, *params: Tensor
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
            return None, None, *torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)


def _slopes(
    f: Dynamics, t: Tensor, y: Tensor, a: Tensor, params: tuple[Tensor, ...], create_graph: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs, cut off from what they were computed from, and what _AdjointSlopes returns for them."""
    with torch.enable_grad():
        t, y, a = (x.detach().requires_grad_() for x in (t, y, a))
        k = f(t, y)
        found: tuple[Tensor | None, ...] = (None,) * (2 + len(params))
        if k.requires_grad:
            found = torch.autograd.grad(k, (t, y, *params), -a, allow_unused=True, create_graph=create_graph)
        zeros = (torch.zeros_like(x) for x in (t, y, *params))
        return [t, y, a, *params], [k, *(zero if g is None else g for g, zero in zip(found, zeros))]


def backsolve_with_graph(
    odeint: Callable[..., Tensor],
    circumstances: Circumstances,
    f: Dynamics,
    t: Tensor,
    config: BacksolveConfig,
    ys: Tensor,
    gradients: Tensor,
    params: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
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
    time = torch.zeros((), dtype=ys.real.dtype if ys.is_complex() else ys.dtype, device=ys.device)
    integrals = [time, *(torch.zeros_like(p) for p in params)]
    like = AugmentedState(torch.stack([ys[0], gradients[0]]), integrals)
    rtol, atol = (x if isinstance(x, float) else float(x.min()) for x in (config.rtol, config.atol))

    def slopes(t: Tensor, flat: Tensor) -> Tensor:
        (y, a), *_ = like.unpack(flat)
        k, by_t, by_y, *by_params = _AdjointSlopes.apply(circumstances, f, t, y, a, *params)  # type: ignore[no-untyped-call]
        return like.pack([torch.stack([k, by_y]), by_t, *by_params])

    def norm(flat: Tensor) -> Any:
        z, *its = like.unpack(flat)
        return config.norm((its[0], *z.unbind(), *its[1:]))

    options = {**config.options, "norm": norm}
    a, at = torch.zeros_like(gradients[0]), [torch.zeros_like(x) for x in t.unbind()]
    for i in reversed(range(len(t))):
        a = a + gradients[i]
        if i == 0:
            break
        # Moving an output time moves the output along f.
        k = f(t[i].to(time), ys[i])
        effect = torch.sum((k.conj() * gradients[i]).real if k.is_complex() else k * gradients[i])
        at[i], integrals[0] = effect.to(t), integrals[0] - effect
        z = torch.stack([ys[i], a])
        flat = odeint(slopes, like.pack([z, *integrals]), t[[i, i - 1]], rtol, atol, config.method.name, options)[-1]
        (_, a), *integrals = like.unpack(flat)
    at[0] = integrals[0].to(t)
    return a, torch.stack(at), integrals[1:]
