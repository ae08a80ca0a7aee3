"""The checkpoint gradient of a solve with given steps: they are undone as one launch on a GPU, as they were taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._ops import graph_loop
from .captures import BoundFunc, Captured, Key, captured_for, standing_for
from .device_solve import launch, unless
from .gradients.explicit import ExplicitReversal
from .gradients.reversal import Forward, Recipe, Undone
from .gradients.survey import Survey
from .gradients.time import through_grid
from .solution import Stats
from .state import Func
from .stepping.captured_grid import CapturedGrid

# At the start, of the params, and if wanted of the steps' ends and the outputs where they lie.
Gradients = tuple[Tensor, list[Tensor], "tuple[Tensor, Tensor] | None"]


def undo_on_device(
    options: dict[str, Any],
    bound: BoundFunc,
    key: Key,
    recipe: Recipe,
    states: dict[int, Tensor],
    t: Tensor,
    forward: Forward,
) -> Undone | None:
    """Undoes all steps of a solve; None, with a warning of why, if that can't be.

    Args:
        options, bound, key: of the forward solve on the device.
        recipe, states, t, forward: as of the host's reversal.
    """
    key = (key[0], "undone", *key[1:], bound.which(forward.params), forward.start, forward.time)
    undoing = GridUndoing(bound, key, recipe, torch.stack([*states.values(), forward.end]), forward)
    return unless(None, partial(undoing.undo, t), options, "options")


@dataclass(eq=False)
class GridUndoing:
    """What undoes the steps of one solve; see Reversal.

    Attributes:
        key: tells what is captured from others.
        states: [N + 1, *state] at the ends of all steps.
    """

    bound: BoundFunc
    key: Key
    recipe: Recipe
    states: Tensor
    forward: Forward

    def undo(self, t: Tensor) -> Undone:
        """Returns the gradients, that of the output times t among them."""
        captured = captured_for(self.key, self.bound, self.states.device, self._make, self._fill, graph_loop.Graph)

        def collect(loop: CapturedGrid) -> Gradients:
            copied: Gradients = tree_map_only(Tensor, torch.clone, loop.out)
            return copied

        start, totals, moving = launch(captured, self.key, partial(self._fill, captured), collect)
        if moving is None:
            return start, totals, None
        assert self.recipe.grid is not None
        ends, outputs = moving
        return start, totals, through_grid(self.recipe.grid, t, ends, outputs[: len(t)])

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedGrid, list[Tensor]]:
        states, gradient = torch.empty_like(self.states), self.states.new_empty(self.forward.gradient.shape)
        params, recipe = standing_for(self.forward.params, stand_ins), replace(self.recipe, func=func, grid=None)
        *starts, end = states.unbind()
        reversal = ExplicitReversal(recipe, replace(self.forward, end=end, gradient=gradient, params=params), [])
        reversal.survey = Survey(params, recipe.warns)

        @torch.enable_grad()
        def work() -> Gradients:
            found = reversal.run(dict(enumerate(starts)))
            return *found, None if reversal.clock is None else (reversal.clock.of_ends(), reversal.clock.outputs[:, 0])

        return CapturedGrid(work, Stats()), [states, gradient]

    def _fill(self, captured: Captured) -> None:
        for place, given in zip(captured.inputs, (self.states, self.forward.gradient)):
            place.copy_(given)
        captured.fill_slots(self.bound)
