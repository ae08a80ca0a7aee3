"""Solves with given steps as work for a GPU to do by itself: all steps, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..solution import Stats
from .course import Course, Steps
from .fixed_grid import FixedGridLoop


class PreparedGrid(FixedGridLoop):
    """A solve whose times are all on the device before it begins, where none can be copied while it is captured.

    Args:
        further: as FixedGridLoop's; the grid is on the host.
    """

    def __init__(self, *further: Any) -> None:
        super().__init__(*further)
        self._course = super().course(self.grid, False)
        self._steps = super().steps(self._course)

    def course(self, grid: Tensor, moving: bool) -> Course:
        """See FixedGridLoop: there is one part."""
        return self._course

    def steps(self, course: Course) -> Steps:
        """See FixedGridLoop."""
        return copy(self._steps)  # a multistep method's remember derivatives, these have none yet


class CapturedGrid:
    """One such solve, or several, captured as they are.

    Args:
        work: carries them out and returns what has come of it.
        counts: to which it adds what it takes.

    Attributes:
        out: what has come of it.
        taken: what it takes, once.
    """

    out: Any

    def __init__(self, work: Callable[[], Any], counts: Stats) -> None:
        self.work, self.counts, self.taken = work, counts, Stats()

    @torch.no_grad()
    def run(self) -> None:
        """Solves."""
        self.out = self.work()

    def trial(self) -> Iterator[None]:
        """Solves, driven by the host."""
        self.run()
        self.taken = replace(self.counts)
        yield

    def capture(self, graph: Any) -> None:
        """Has a Graph capture the work, after a trial; RuntimeError if something can't be."""
        graph.capture(self.run)
