"""The accepted steps of a solve that a GPU drives by itself, noted there, where they will be undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._ops.contract import N_FIELDS, REAL_FIELDS
from .._ops.words import Readings
from .tape import Step, passed_by_one

DT = REAL_FIELDS.index("dt_prev")


class Ring:
    """Room for the steps of one sample, each in the row of its number: the first in row 1.

    A step is written before it is judged, over one that was rejected. What finds no room goes to the last row: then
    more steps have been accepted than there is room for, and all else is right.

    Args:
        room: for how many steps.
        y0: what states are like.
        times: [stages], what the times of a step are like.
        controller: of the solve.

    Attributes:
        states: [room + 2, *y0.shape], those at the steps' starts.
        times: [room + 2, stages], those of the evaluations after the first; the last in row 0 is that of the start.
        words: [room + 2, N_FIELDS], the step state when the step was judged; in row 0 of a step that passes nothing.
    """

    def __init__(self, room: int, y0: Tensor, times: Tensor, controller: Any) -> None:
        self.room, self._controller = room, controller
        self.states = y0.new_empty((room + 2, *y0.shape))
        self.times = times.new_zeros(room + 2, len(times))
        self.words = torch.zeros(room + 2, N_FIELDS, dtype=torch.float64, device=y0.device)

    def begin(self, y: Tensor) -> None:
        """Notes a step's start and times."""
        self._row = (self._controller.field("n_accepted") + 1).clamp(max=self.room + 1)
        self.states.index_copy_(0, self._row, y[None])
        self.times.index_copy_(0, self._row, self._controller.stage_times[None])

    def end(self) -> None:
        """Notes what has come of it."""
        self.words.index_copy_(0, self._row, self._controller.words[None])


def steps_from(times: Tensor, words: Tensor, values: list[float], polynomial: Any) -> Iterator[Step]:
    """The steps on a ring, as a tape has them.

    Args:
        times, words: [N + 1, ...], those of a ring with N steps.
        values: the output times.
        polynomial: the dense output.
    """
    for n, row in enumerate(words[1:].cpu(), 1):
        passed = passed_by_one(Readings(row, 1, 1), values, polynomial)
        yield Step(words[n, DT : DT + 1], times[n], times[0, -1] if n == 1 else None, False, tuple(passed))
