"""What moving the times of a solve does to it: the gradients of its start, its steps' ends and its output times."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .._ops.contract import Layout, clock_device
from ..methods import Tableau
from ..stepping.tape import Passed, Step
from .arrivals import inner


def through_grid(grid: Callable[[Tensor], Tensor], t: Tensor, ends: Tensor, outputs: Tensor) -> Tensor:
    """The gradient of the output times t, from those of the steps' ends and of the outputs where they lie.

    Args:
        grid: the steps' ends as a function of the output times.
        t: [T].
        ends, outputs: [N + 1] and [T].
    """
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        found = grid(t)[: len(ends)]
    if not found.requires_grad:
        return outputs.to(t)
    (through,) = torch.autograd.grad(found, t, ends.to(found))
    return through + outputs.to(t)


class TimeGradients:
    """Gathers, for every step, the gradient of its start (its size as it is), and that of its size.

    Args:
        method: of the solve.
        steps: those of the solve.
        layout: the state's.
        n_outputs: how many output times there are.
    """

    def __init__(
        self,
        method: Tableau,
        steps: list[Step],
        layout: Layout,
        n_outputs: int,
    ) -> None:
        self.steps, self.samples = steps, layout.samples
        self.abscissae = (0.0, *method.abscissae)
        self.outputs = torch.zeros(n_outputs, layout.samples, dtype=torch.float64, device=clock_device(layout.device))
        self.starts, self.sizes = (self.outputs.new_zeros(len(steps), layout.samples) for _ in range(2))

    def add_evaluation(self, n: int, i: int, gradient: Tensor | None) -> None:
        """Adds that of the time at which evaluation i of step n was made, the one at its end if i is -1."""
        if gradient is not None:
            gradient = gradient.to(self.starts)
            self.starts[n] += gradient
            self.sizes[n] += gradient * (1.0 if i < 0 else self.abscissae[i])

    def add_end(self, n: int, g: Tensor, k: Tensor) -> None:
        """Adds what moving the end of step n along a derivative k does, to which it gives the gradient g."""
        effect = inner(g, k, self.samples)
        self.starts[n] += effect
        self.sizes[n] += effect

    def add_sums(self, n: int, g: Tensor, k: Tensor) -> None:
        """Adds what the size of step n does in sums of a derivative k, to which they give the gradient g."""
        effect, dt = inner(g, k, self.samples), self.steps[n].dt.to(self.sizes.device)
        self.sizes[n] += effect / dt if self.samples == 1 else torch.where(dt == 0, 0.0, effect / dt)

    def add_outputs(self, n: int, effects: Iterable[tuple[Passed, Tensor]]) -> None:
        """Adds what moving the outputs within step n along the solution does."""
        for passed, effect in effects:
            if passed.timed:
                self.outputs[passed.index, passed.samples] += effect
            self.starts[n, passed.samples] -= effect
            self.sizes[n, passed.samples] -= passed.position * effect

    def of(self, t: Tensor) -> Tensor:
        """The gradient of the output times t, [T] or [T, B], of steps that were chosen, when all has been added."""
        if self.steps:
            # All steps move with the start, but the end of one at a discontinuity does not, nor what comes behind it.
            jumps = [
                torch.as_tensor(step.on_jump, device=self.sizes.device).expand(self.samples) for step in self.steps
            ]
            on_jump = torch.stack(jumps)
            before = on_jump.cumsum(0) - on_jump.long() == 0
            self.outputs[0] += (self.starts * before - self.sizes * (before & on_jump)).sum(0)
        of_times = self.outputs[: len(t)]
        return (of_times if t.dim() == 2 else of_times.sum(1)).to(t)

    def of_ends(self) -> Tensor:
        """The gradient of the ends of steps that were given, [N + 1]."""
        starts, sizes = self.starts[:, 0], self.sizes[:, 0]
        ends = torch.nn.functional.pad(starts - sizes, (0, 1))
        ends[1:] += sizes
        return ends
