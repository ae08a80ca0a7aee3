"""The accepted steps of a solve that a GPU drives by itself, noted there, where they will be undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops.contract import INTEGER_FIELDS, REAL_FIELDS
from .._ops.words import Readings
from ..control import Times
from .tape import Step, passed_by_one, passed_by_samples

DT = REAL_FIELDS.index("dt_prev")


class Rows(NamedTuple):
    """What is known of steps beside the states at their starts, each in the row of its number: the first in row 1.

    Attributes:
        times: [..., stages] or [..., stages, B], those of the evaluations after the first; the last in row 0 is that of
            the start. Samples that have not moved have the first one's.
        words: [..., N_FIELDS, B], the step state when the step was judged, with a size of 0 where it was not accepted;
            in row 0 of a step that passes nothing.
        anew: [...] bool, which steps begin with an evaluation of their own, behind a discontinuity.
        openings: [...] or [..., B], the times of those.
    """

    times: Tensor
    words: Tensor
    anew: Tensor
    openings: Tensor


class Ring:
    """Room for the steps that some sample has accepted.

    A step is written before it is judged, over one that was rejected. What finds no room goes to the last row: then
    more steps have been accepted than there is room for, and all else is right.

    Args:
        room: for how many steps.
        y0: what states are like.
        times: [stages] or [stages, B], what the times of a step are like.
        controller: of the solve.

    Attributes:
        states: [room + 2, *y0.shape], those at the steps' starts.
        rows: [room + 2], see there.
        n: [1] int64, how many steps there are.
    """

    def __init__(self, room: int, y0: Tensor, times: Tensor, controller: Any) -> None:
        self.room, self._controller = room, controller
        self.states, self.rows = rows_for(room, y0, times, controller.words)
        n = controller.field("n_accepted")
        self.n = n if len(n) == 1 else n.new_zeros(1)

    def restart(self, start: Tensor) -> None:
        """Begins at a time, as func sees it."""
        self.n.zero_()
        self.rows.anew.zero_()
        self.rows.times[0, -1] = start

    def begin(self, y: Tensor) -> None:
        """Notes a step's start and times."""
        self._row = (self.n + 1).clamp(max=self.room + 1)
        self.states.index_copy_(0, self._row, y[None])
        self.rows.times.index_copy_(0, self._row, self._controller.stage_times[None])

    def end(self) -> None:
        """Notes what has come of it."""
        row, rows, words = self._row, self.rows, self._controller.words
        accepted = self._controller.field("accepted") != 0
        if len(accepted) != 1:
            words = words.clone()
            words[DT] = torch.where(accepted, words[DT], 0.0)
            times, anew, openings = (x.index_select(0, row) for x in (rows.times, rows.anew, rows.openings))
            first = torch.where(anew, openings, rows.times.index_select(0, row - 1)[:, -1])
            rows.times.index_copy_(0, row, torch.where(accepted, times, first[:, None]))
            self.n += accepted.any()
        rows.words.index_copy_(0, row, words[None])

    def pass_jump(self, anew: Tensor, jumped: Tensor, behind: Tensor) -> None:
        """Notes whether the next step begins anew, behind the discontinuity at which some samples are."""
        row = (self.n + 1).clamp(max=self.room + 1)
        opening = torch.where(jumped, behind, self.rows.times.index_select(0, row - 1)[:, -1])
        for place, x in ((self.rows.openings, opening), (self.rows.anew, anew)):
            place.index_copy_(0, row, torch.where(anew, x, place.index_select(0, row)))


def rows_for(room: int, y0: Tensor, times: Tensor, words: Tensor) -> tuple[Tensor, Rows]:
    """Memory for the states and rows of so many steps; see Ring."""
    like = times, words, words.new_empty((), dtype=torch.bool), times[0]
    return y0.new_empty((room + 2, *y0.shape)), Rows(*(x.new_zeros((room + 2, *x.shape)) for x in like))


def steps_from(rows: Rows, output_times: Times, polynomial: Any) -> Iterator[Step]:
    """The steps on a ring, as a tape has them, but for where they end on discontinuities.

    Args:
        rows: of a ring with N steps, [N + 1].
        output_times: of the solve.
        polynomial: the dense output.
    """
    times, words, anew, openings = rows
    samples = words.shape[2]
    for n, row in enumerate(words[1:].cpu() if samples == 1 else words[1:], 1):
        told = Readings(row.reshape(-1), samples, samples)
        if samples == 1:
            passed = passed_by_one(told, output_times.values, polynomial)
        else:
            passed = passed_by_samples(told, output_times.tensor.to(words), polynomial)
        opening = openings[n] if anew[n] else (times[0, -1] if n == 1 else None)
        yield Step(words[n, DT], times[n], opening, False, tuple(passed))


def n_passed(words: Tensor) -> Tensor:
    """[B] how many outputs each sample has passed in all steps, of words as on a ring."""
    begin, end = (
        words[:, len(REAL_FIELDS) + INTEGER_FIELDS.index(name)].view(torch.int64)
        for name in ("output_begin", "output_end")
    )
    return (end - begin).sum(0)
