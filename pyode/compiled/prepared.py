"""A compiled solve that has been checked, to be done again: that saves more than a small solve costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ops import backend_for, native
from .dynamics import CompiledDynamics

if TYPE_CHECKING:
    from .entry import Entry
    from .plan import Plan


@dataclass
class Prepared:
    """A solve with everything fixed but the numbers of the state and of func's tensors.

    Attributes:
        key: all that it depends on beside the times and these numbers.
        t, version: the times, and how often they had been written to.
        entry, plan: what was compiled.
        trained: which of func's tensors get gradients; None if the library has no gradient.
        eagerly: the same solve by a loop, for gradients of gradients.
    """

    key: tuple[Any, ...]
    t: Tensor
    version: int
    entry: Entry
    plan: Plan
    trained: tuple[int, ...] | None
    eagerly: Callable[[Tensor], Tensor]

    def serves(self, compiled: CompiledDynamics, key: tuple[Any, ...], y0: Tensor, t: Any) -> bool:
        """Whether a solve is the same but for these numbers, and nothing that func was compiled for has changed."""
        return (
            t is self.t
            and key == self.key
            and t._version == self.version
            and y0.is_contiguous()
            and backend_for(y0) is native
            and compiled.unchanged()
            and self._has_gradients(y0)
        )

    def _has_gradients(self, y0: Tensor) -> bool:
        """Whether it has those that are wanted."""
        if not torch.is_grad_enabled():
            return True
        wanted = trained(self.entry.inputs)
        return not self.t.requires_grad and (wanted == self.trained or not (wanted or y0.requires_grad))


def trained(inputs: list[Tensor]) -> tuple[int, ...]:
    """Which tensors gradients are wanted to."""
    return tuple([i for i, x in enumerate(inputs) if x.requires_grad])
