"""Many gradients at once, as is_grads_batched=True and jacobian(vectorize=True) of torch.autograd want them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

is_batched = torch._C._functorch.is_legacy_batchedtensor
Backward = Callable[..., tuple[Any, ...]]


def one_by_one(backward: Backward) -> Backward:
    """The backward pass of a node that chooses its way by numbers, which many gradients at once would hide.

    Torch calls it once, under a vmap, with tensors in which all of them lie; it is done for one after the other.
    """

    @wraps(backward)
    def for_each(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if not any(map(is_batched, gradients)):
            return backward(ctx, *gradients)
        level = _level()
        several = [torch._remove_batch_dim(g, level, 1, 0).unbind() if is_batched(g) else None for g in gradients]
        n = next(len(gs) for gs in several if gs is not None)
        rows = zip(*([g] * n if gs is None else gs for g, gs in zip(gradients, several)))
        columns = zip(*(backward(ctx, *row) for row in rows))
        return tuple(
            None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level) for column in columns
        )

    return for_each


def _level() -> int:
    """That of the innermost vmap; autograd's threads for devices, which don't know, are under one."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return max(level, 1)
