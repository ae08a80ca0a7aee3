"""Undoing the steps of implicit methods: each is taken again with direct mode's graph, and that is gone through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops.autograd import plain
from .._ops.contract import clock_device
from ..state import Dynamics
from .arrivals import inner
from .reversal import Reversal
from .survey import Survey
from .time import through_grid


class RetakenReversal(Reversal):
    """See Reversal; of a method whose steps depend on nothing but the state at their start."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        n = len(self.steps)
        assert self.recipe.retake is not None
        self.retake = self.recipe.retake
        self.end_gradients = torch.zeros(n + 1, dtype=torch.float64, device=clock_device(self.end.device))
        self.survey: Survey | None = Survey(self.params, self.recipe.warns)
        self.output_gradients = self.end_gradients.new_zeros(len(self.gradient))

    def of_times(self, t: Tensor) -> Tensor:  # noqa: D102
        assert self.recipe.grid is not None
        return through_grid(self.recipe.grid, t, self.end_gradients, self.output_gradients[: len(t)])

    def _run(self, states: dict[int, Tensor]) -> Tensor:
        lam = self.arrivals.at_last_state(self.left)
        if self.time and self.steps and self.left is not None:
            # That state is wanted at the time where it stands, and moves with the end of the last step.
            t = self.steps[-1].times[-1].to(self.end.device, self.layout.real_dtype)
            slope = Dynamics(self.recipe.func, self.recipe.form, self.end)(t, self.end)
            self.end_gradients[-1] -= inner(lam, torch.where(slope.isfinite(), slope, 0.0))[0]
        for n, y in self.backwards(states):
            lam = self._undo(n, y, lam)
        return lam + self.arrivals.at_start(self.steps, self.left)

    def advance(self, y: Tensor, begin: int, end: int) -> Tensor:  # noqa: D102
        with torch.no_grad():
            for step in self.steps[begin:end]:
                y = self.retake(step, y, step.times, step.times[:0])[-1]
        return y

    def _undo(self, n: int, y: Tensor, lam: Tensor) -> Tensor:
        """Undoes step n, from y, with the gradient lam at its end; returns that at its start."""
        step, y = self.steps[n], y.detach().requires_grad_()
        ends = step.times.detach()
        x = torch.tensor([passed.position for passed in step.outputs], dtype=ends.dtype, device=ends.device)
        inside = torch.where(x == 1.0, ends[1], ends[0] + x * (ends[1] - ends[0]))
        leaves = [y]
        if self.time:
            leaves += [ends.requires_grad_(), inside.requires_grad_()]
        states = self.retake(step, y, ends, inside)
        if self.survey is not None and self.survey.look(states, tuple(leaves)) is not None:
            self.survey = None
        rows = [passed.index for passed in step.outputs]
        found = self.vjp(states, (*leaves, *self.params), torch.cat([self.gradient[rows], lam[None]]))
        if self.time:
            of_ends, of_inside = found[1:3]
            if of_ends is not None:
                self.end_gradients[n : n + 2] += of_ends
            if of_inside is not None:
                for passed, gradient in zip(step.outputs, of_inside.unbind()):
                    self.output_gradients[passed.index] += gradient * passed.timed
        self.totals.add(found[len(leaves) :])
        return torch.zeros_like(lam) if found[0] is None else plain(found[0])
