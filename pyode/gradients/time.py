"""What moving the times of a solve does to it: the gradients of its start, its steps' ends and its output times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._ops import reference
from .._ops.contract import Layout, wide_dtype
from ..methods import Tableau
from ..stepping.tape import Step


class TimeGradients:
    """Gathers, for every step, the gradient of its start (its size as it is), and that of its size.

    Args:
        method: of the solve.
        steps: those of the solve.
        layout: the state's.
        n_outputs: how many output times there are.
        grid: the steps' ends as a function of the output times, if the method does not choose them.
    """

    def __init__(
        self,
        method: Tableau,
        steps: list[Step],
        layout: Layout,
        n_outputs: int,
        grid: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.steps, self.layout, self.grid = steps, layout, grid
        self.abscissae = (0.0, *method.abscissae)
        self.outputs = torch.zeros(n_outputs, dtype=wide_dtype(layout.device), device=layout.device)
        self.starts, self.sizes = self.outputs.new_zeros(len(steps)), self.outputs.new_zeros(len(steps))

    def add_evaluation(self, n: int, i: int, gradient: Tensor | None) -> None:
        """Adds that of the time at which evaluation i of step n was made, the one at its end if i is -1."""
        if gradient is not None:
            self.starts[n] += gradient
            self.sizes[n] += gradient * (1.0 if i < 0 else self.abscissae[i])

    def add_start(self, n: int, g: Tensor, k: Tensor) -> None:
        """Adds what moving step n along a derivative k does, to which it gives the gradient g."""
        self.starts[n] += _inner(g, k)

    def add_sums(self, n: int, g: Tensor, k: Tensor) -> None:
        """Adds what the size of step n does in sums of a derivative k, to which they give the gradient g."""
        self.sizes[n] += _inner(g, k) / self.steps[n].dt[0].to(self.sizes)

    def add_outputs(self, n: int, ks: list[Tensor], gradient: Tensor) -> None:
        """Adds what moving the outputs within step n does, from all its derivatives and all outputs' gradients."""
        step = self.steps[n]
        for m, x in zip(step.outputs, step.positions):
            assert step.polynomial is not None
            slopes = step.polynomial.slopes_at(x)
            zero, one = torch.zeros_like(ks[0]), torch.ones(1, dtype=torch.float64)
            effect = _inner(gradient[m], reference.stage_combine(self.layout, slopes, zero, ks, one))
            self.outputs[m] += effect
            self.starts[n] -= effect
            self.sizes[n] -= x * effect

    def of(self, t: Tensor) -> Tensor:
        """The gradient of the output times t, when all has been added."""
        if self.grid is None:
            # All steps move with the start, but the end of one at a discontinuity does not, nor what comes behind it.
            jump = next((n for n, step in enumerate(self.steps) if step.on_jump), len(self.steps))
            self.outputs[0] += self.starts[: jump + 1].sum() - self.sizes[jump : jump + 1].sum()
            return self.outputs.to(t)
        ends = torch.nn.functional.pad(self.starts - self.sizes, (0, 1))
        ends[1:] += self.sizes
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            grid = self.grid(t)[: len(ends)]
            if not grid.requires_grad:
                return self.outputs.to(t)
        (through,) = torch.autograd.grad(grid, t, ends.to(grid))
        return through + self.outputs.to(t)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product."""
    return torch.sum((a.conj() * b).real if a.is_complex() else a * b).to(wide_dtype(a.device))
