"""Vector-Jacobian products of func: what both backward passes, the exact and the continuous, spend their time on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

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
    """Sums of gradients. Small ones are added many at a time, as each addition costs more than its numbers do.

    Args:
        like: what they are the gradients of.
    """

    MOST = 1 << 18  # bytes to be held until they are added

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._sums = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in like]
        self._held: list[Sequence[Tensor | None]] = []
        self._room: int | None = None  # how many times gradients may be held

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds gradients, where there are any."""
        if self._room is None:  # they may be views of much more
            size = sum(g.untyped_storage().nbytes() for g in gradients if g is not None)
            self._room = self.MOST // max(1, size)
        self._held.append(gradients)
        if len(self._held) >= self._room:
            self.settled()

    def settled(self) -> list[Tensor]:
        """The sums of all that has been added."""
        columns = [[g for g in column if g is not None] for column in zip(*self._held)]
        self._held = []
        pairs = [(total, gs) for total, gs in zip(self._sums, columns) if gs]
        if pairs:
            totals, several = zip(*pairs)
            torch._foreach_add_(totals, [gs[0] if len(gs) == 1 else torch.stack(gs).sum(0) for gs in several])
        return self._sums
