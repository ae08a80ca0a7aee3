"""Vector-Jacobian products of func: what both backward passes, the exact and the continuous, spend their time on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

# What torch.autograd.grad calls behind its checks: for a network of 2-50-2 they take 22 of 117 us, f's own 32 included.
_run_backward = torch.autograd.Variable._execution_engine.run_backward


def vjp(
    f: Tensor | GradientEdge | None, inputs: tuple[Tensor, ...], g: Tensor, shared: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradients of <g, f> with respect to the inputs; None for those that f does not depend on.

    f may be given by the root of its graph. g is of f's shape, dtype and device. Nothing is kept of the graph, unless
    it is `shared`: func may have computed something once, with a graph, that several evaluations use.
    """
    if not inputs or f is None or (isinstance(f, Tensor) and not f.requires_grad):
        return (None,) * len(inputs)
    if shared:
        try:
            return _run_backward((f,), (g,), True, False, inputs, allow_unreachable=True, accumulate_grad=False)
        except RuntimeError as error:
            if "donated buffers" not in str(error):  # what torch.compile's backward passes can't keep
                raise
    return _run_backward((f,), (g,), False, False, inputs, allow_unreachable=True, accumulate_grad=False)


def accumulate(totals: list[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Adds gradients, where there are any, to totals, in place."""
    pairs = [(total, gradient) for total, gradient in zip(totals, gradients) if gradient is not None]
    if pairs:
        torch._foreach_add_(*map(list, zip(*pairs)))
