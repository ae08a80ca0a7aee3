"""A compiled solve as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops.autograd import plain
from .._ops.batched import is_batched, one_by_one
from .native import Solve
from .plan import Plan, RowStates


class _Recorded(torch.autograd.Function):
    """A solve as one node: the forward pass notes its steps, the backward pass undoes them."""

    @staticmethod
    def forward(
        ctx: Any,
        what: tuple[Plan, list[Tensor], Callable[[Tensor], Tensor], RowStates | None],
        ended: list[Solve],
        y0: Tensor,
        *wanted: Tensor,
    ) -> Tensor:
        plan, inputs, _, states = what
        ys, solve, lent = plan.run_noting(y0, inputs, states)
        ended.append(solve)
        ctx.what, ctx.solve, ctx.lent = what, solve, lent
        ctx.start, ctx.wanted, ctx.versions = y0, wanted, _versions(y0, inputs)  # save_for_backward takes longer
        return ys

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        y0, wanted = ctx.start, ctx.wanted
        _, inputs, eagerly, _ = ctx.what
        if _versions(y0, inputs) != ctx.versions:
            raise RuntimeError(
                "y0 or a tensor that func uses, needed for gradient computation, has been modified by an inplace "
                "operation since the solve"
            )
        if torch.is_grad_enabled():  # this gradient is to have one itself
            needed = ctx.needs_input_grad[2:]
            asked = [x for x, need in zip([y0, *wanted], needed) if need]
            with torch.enable_grad():
                ys = eagerly(y0)
            found = iter(torch.autograd.grad(ys, asked, gradient, create_graph=True, allow_unused=True))
            return None, None, *(next(found) if need else None for need in needed)
        undone = one_by_one(_undone) if is_batched(gradient) else _undone
        return None, None, *undone(ctx, gradient)


def _undone(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    plan, inputs, *_ = ctx.what
    start, of_wanted = plan.undo(ctx.solve, plain(gradient), ctx.start, inputs, ctx.wanted)
    return start, *of_wanted


def _versions(y0: Tensor, inputs: list[Tensor]) -> list[int] | None:
    """How often each has been written to; None if one is from inference mode, and does not tell."""
    try:
        return [y0._version, *[x._version for x in inputs]]
    except RuntimeError:
        return None


# What `apply` comes to where no functorch transform is active, which `native.supports` has seen to: it takes 2 us less.
_apply = super(torch.autograd.Function, _Recorded).apply


def solve_recorded(
    plan: Plan,
    inputs: list[Tensor],
    eagerly: Callable[[Tensor], Tensor],
    y0: Tensor,
    t: Tensor,
    states: RowStates | None = None,
) -> tuple[Tensor, Solve]:
    """A solve with a gradient to y0, to those inputs that want one and to t if it does, and how it ended.

    Args:
        plan: of a library that has these gradients.
        inputs: the tensors that func has closed over.
        eagerly: the same solve by a loop, for gradients of gradients.
        y0: the packed state.
        t: the output times.
        states: where rows with steps of their own tell how they ended.
    """
    ended: list[Solve] = []
    what = plan, inputs, eagerly, states
    wanted = [x for x in inputs if x.requires_grad]
    if t.requires_grad:
        wanted.append(t)
    ys: Tensor = _apply(what, ended, y0, *wanted)  # type: ignore[no-untyped-call]
    return ys, ended[0]
