"""Vector-Jacobian products of func: what both backward passes, the exact and the continuous, spend their time on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._ops import backend_for
from .._ops.autograd import plain
from .._ops.contract import clock_device
from .._ops.memory import unit_steps

MOST_TERMS = 16  # of a sum, as many as a table has stages at most

# What torch.autograd.grad calls behind its checks: for a network of 2-50-2 they take 22 of 117 us, f's own 32 included.
# It takes roots, gradients, keep_graph, create_graph, inputs, allow_unreachable, accumulate_grad.
_run_backward = torch.autograd.Variable._execution_engine.run_backward


class Vjp:
    """Vector-Jacobian products of the evaluations of one func.

    Their graphs may have a part in common, of what was computed once for all of them. So they are kept, but where
    torch.compile made them, whose backward passes can't.
    """

    def __init__(self) -> None:
        self._keep = True

    def __call__(
        self, f: Tensor | GradientEdge | None, inputs: tuple[Tensor, ...], g: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients of <g, f> with respect to the inputs; None for those that f does not depend on.

        f may be given by the root of its graph. g is of f's shape, dtype and device.
        """
        if not inputs or f is None or (isinstance(f, Tensor) and not f.requires_grad):
            return (None,) * len(inputs)
        try:
            return _run_backward((f,), (g,), self._keep, False, inputs, True, False)
        except RuntimeError as error:
            if not self._keep or "donated buffers" not in str(error):
                raise
            self._keep = False
            return self(f, inputs, g)


class Totals:
    """Sums of gradients. Several are added at a time, as each addition costs more than its numbers do.

    They are added as a step's derivatives are: in their order, to the same bits on every device.

    Args:
        like: what they are the gradients of.
    """

    MOST = 1 << 18  # bytes to be held until they are added

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._sums = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in like]
        self._adders = [_adder(x) for x in self._sums]
        self._held: list[Sequence[Tensor | None]] = []
        self._room: int | None = None  # how many times gradients may be held

    def restart(self, sums: Sequence[Tensor] | None = None) -> None:
        """Begins again, from zero or the sums given."""
        self._sums, self._held = [torch.zeros_like(x) for x in self._sums] if sums is None else list(sums), []

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds gradients, where there are any."""
        if self._room is None:  # they may be views of much more
            size = sum(g.untyped_storage().nbytes() for g in gradients if g is not None)
            self._room = min(MOST_TERMS, self.MOST // max(1, size))
        self._held.append(gradients)
        if len(self._held) >= self._room:
            self.settled()

    def settled(self) -> list[Tensor]:
        """The sums of all that has been added."""
        for i, column in enumerate(zip(*self._held)):
            gradients = [plain(g) for g in column if g is not None]
            if gradients:
                self._sums[i] = self._adders[i]((1.0,) * len(gradients), self._sums[i], gradients)
        self._held = []
        return self._sums


def _adder(total: Tensor) -> Callable[[tuple[float, ...], Tensor, list[Tensor]], Tensor]:
    """A function of weights, a total and tensors like it that returns their sum."""
    ops, n = backend_for(total), total.numel()
    combine = partial(ops.stage_combine, ops.Layout(1, n, (0, n), total.dtype, total.device))
    return partial(combine, dt=unit_steps(1, clock_device(total.device)))
