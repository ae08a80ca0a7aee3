"""A compiled solve that has been checked, to be done again: that saves more than a small solve costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ops import backend_for, native
from .arguments import WithArgs
from .dynamics import CompiledDynamics
from .native import TIME

if TYPE_CHECKING:
    from .entry import Entry
    from .plan import Plan


@dataclass
class Prepared:
    """A solve with everything fixed but the numbers of the state and of func's tensors.

    Attributes:
        key: all that it depends on beside the times and these numbers.
        t, version: the times, and how often they had been written to.
        entry, plan: what was compiled; whatever tensors are in `args`.
        wanted: to which of func's tensors there are gradients, TIME among them if to the times; None if there are none.
    """

    key: tuple[Any, ...]
    t: Tensor
    version: int
    entry: Entry
    plan: Plan
    wanted: tuple[int, ...] | None

    def serves(
        self, compiled: CompiledDynamics | WithArgs, key: tuple[Any, ...], y0: Tensor, t: Any
    ) -> tuple[list[Tensor], bool] | None:
        """Whether a solve is the same but for these numbers, and nothing that func was compiled for has changed.

        Returns:
            If so, the tensors that func uses, and whether gradients are wanted.
        """
        if not (
            t is self.t
            and key == self.key
            and t._version == self.version
            and y0.is_contiguous()
            and solved_natively(y0)
            and compiled.unchanged()
        ):
            return None
        inputs = compiled.inputs_of(self.entry)
        wanted = wanted_of(inputs, y0, t)
        if wanted is None:
            return inputs, False
        return (inputs, True) if wanted == self.wanted else None


def solved_natively(y0: Tensor) -> bool:
    """Whether compiled code may solve from a state: on the CPU, not empty, and no transform or autocast is at work."""
    return y0.is_cpu and y0.numel() > 0 and backend_for(y0) is native and not torch.is_autocast_enabled("cpu")


def key_of(y0: Any, rtol: Any, atol: Any, *others: Any) -> tuple[Any, ...] | None:
    """All that a solve depends on beside the times, if it is a plain one; others are compared by ==."""
    if type(y0) is not Tensor or type(rtol) is not float or type(atol) is not float:
        return None
    return (y0.shape, y0.dtype, rtol, atol, *others)


def wanted_of(inputs: list[Tensor], y0: Tensor, t: Tensor) -> tuple[int, ...] | None:
    """To which of func's tensors gradients are wanted, and TIME if to the times; None if not even to y0."""
    if not torch.is_grad_enabled():
        return None
    wanted = tuple([i for i, x in enumerate(inputs) if x.requires_grad])
    if t.requires_grad:
        return (*wanted, TIME)
    return wanted if wanted or y0.requires_grad else None
