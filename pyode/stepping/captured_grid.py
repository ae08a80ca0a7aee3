"""A solve with given steps as work for a GPU to do by itself: all steps, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..solution import Stats
from .course import Course, Steps
from .fixed_grid import FixedGridLoop


class CapturedGrid(FixedGridLoop):
    """A solve whose times are all on the device before it is captured.

    Args:
        y0: what states are like.
        further: as FixedGridLoop's; the grid is on the host.

    Attributes:
        y: the start.
        out: [T, *y0.shape] the states at the output times.
        taken: what a solve takes.
    """

    out: Tensor

    def __init__(self, *further: Any, y0: Tensor) -> None:
        super().__init__(*further)
        self.y, self.taken = torch.empty_like(y0), Stats()
        self._course = super().course(self.grid, False)
        self._steps = super().steps(self._course)

    def course(self, grid: Tensor, moving: bool) -> Course:
        """See FixedGridLoop: there is one part."""
        return self._course

    def steps(self, course: Course) -> Steps:
        """See FixedGridLoop."""
        return self._steps

    @torch.no_grad()
    def run(self) -> None:
        """Solves from y."""
        self.out = self.solve(self.ops.copy(self.layout, self.y))  # one that nobody has written before

    def trial(self) -> Iterator[None]:
        """Solves, driven by the host."""
        self.run()
        self.add_to(self.taken)
        yield

    def capture(self, graph: Any) -> None:
        """Has a Graph capture the solve, after a trial; RuntimeError if something can't be."""
        graph.capture(self.run)
