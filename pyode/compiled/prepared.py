"""A compiled solve that has been checked, to be done again: that saves more than a small solve costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._ops import backend_for, native
from .._ops.native import Kind
from .arguments import WithArgs
from .dynamics import CompiledDynamics
from .native import TIME

if TYPE_CHECKING:
    from .entry import Entry
    from .plan import Plan


@dataclass(eq=False)
class Prepared:
    """A solve with everything fixed but the numbers of the state and of func's tensors.

    Attributes:
        kind: all else that it depends on.
        entry, plan: what was compiled; whatever tensors are in `args`.
        wanted: to which of func's tensors there are gradients, TIME among them if to the times; None if there are none.
    """

    kind: Kind
    entry: Entry
    plan: Plan
    wanted: tuple[int, ...] | None

    def serves(
        self, compiled: CompiledDynamics | WithArgs, kind: Kind, y0: Tensor, t: Tensor
    ) -> tuple[list[Tensor], bool] | None:
        """Whether a solve is of the same kind, and nothing that func was compiled for has changed.

        Returns:
            If so, the tensors that func uses, and whether gradients are wanted.
        """
        if kind != self.kind or torch.is_autocast_enabled("cpu") or not compiled.unchanged():
            return None
        inputs = compiled.inputs_of(self.entry)
        wanted = wanted_of(inputs, y0, t)
        if wanted is None:
            return inputs, False
        return (inputs, True) if wanted == self.wanted else None


def solved_natively(y0: Tensor) -> bool:
    """Whether compiled code may solve from a state: on the CPU, not empty, and no transform or autocast is at work."""
    return y0.is_cpu and y0.numel() > 0 and backend_for(y0) is native and not torch.is_autocast_enabled("cpu")


def wanted_of(inputs: list[Tensor], y0: Tensor, t: Tensor) -> tuple[int, ...] | None:
    """To which of func's tensors gradients are wanted, and TIME if to the times; None if not even to y0."""
    if not torch.is_grad_enabled():
        return None
    wanted = tuple([i for i, x in enumerate(inputs) if x.requires_grad])
    if t.requires_grad:
        return (*wanted, TIME)
    return wanted if wanted or y0.requires_grad else None
