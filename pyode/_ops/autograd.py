"""The ops as nodes of autograd's graph: a stage is one node.

Step sizes are constants. A node's backward pass is the fused op's transpose; where its own gradient is wanted it is
done in plain torch, which can be differentiated any number of times.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .batched import is_batched
from .contract import Layout, RightHandSide


def plain(x: Tensor) -> Tensor:
    """The same numbers as they lie in memory: contiguous, without a conjugation or negation still to be done."""
    if not x.is_contiguous():
        x = x.contiguous()
    return x.resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x


Sum = tuple[ModuleType, Layout, tuple[float, ...], Tensor]  # ops, layout, weights, dt


class _StageCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Sum, y: Tensor, *ks: Tensor) -> Tensor:
        ctx.op = op
        ops, layout, weights, dt = op
        return ops.stage_combine(layout, weights, y, list(ks), dt)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ops, layout, weights, dt = ctx.op
        _, _, *wanted = ctx.needs_input_grad
        if not all(wanted):
            weights = tuple(w if want else 0.0 for w, want in zip(weights, wanted, strict=True))
        if torch.is_grad_enabled() or is_batched(g):
            ops = reference
        return None, g, *ops.stage_vjp(layout, weights, plain(g), dt)


# What `apply` comes to where no functorch transform is active, which `native.supports` has seen to: it takes 2 us less.
_apply = super(torch.autograd.Function, _StageCombine).apply


def stage_combine(
    ops: ModuleType, layout: Layout, weights: tuple[float, ...], y: Tensor, ks: list[Tensor], dt: Tensor
) -> Tensor:
    """Returns y + dt sum_j w_j k_j, differentiable with respect to y, the ks, and dt if it requires a gradient.

    dt must not change afterwards.
    """
    ks = ks[: len(weights)]
    if dt.requires_grad:
        return reference.stage_combine(layout, weights, y, ks, dt)
    if ops is not reference and (y.requires_grad or any(k.requires_grad for k in ks)):
        return _apply((ops, layout, weights, dt), y, *ks)  # type: ignore[no-any-return, no-untyped-call]
    return ops.stage_combine(layout, weights, y, ks, dt)  # type: ignore[no-any-return]


def stages(
    ops: ModuleType,
    layout: Layout,
    table: Any,
    y: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    times: tuple[Tensor, ...],
    dynamics: RightHandSide,
) -> Tensor:
    """See native.stages; every stage is a node."""
    return reference.stages(layout, table, y, ks, dt, times, dynamics, partial(stage_combine, ops))
