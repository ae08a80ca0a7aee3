"""What an adaptive solve has come to, told by the step states of its samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .._ops.contract import Layout
from ..control import Times
from ..errors import SolveError, Status
from ..methods import Tableau
from ..solution import SampleStats, Stats


class Outcome(ABC):
    """A solve that is done.

    Attributes:
        controller: has the fields of the step states.
        layout, tableau, times: of the solve.
        evals_before_steps: evaluations of func for all samples together, before the first step.
        n_jumps: [B] discontinuities crossed, each with an evaluation behind it; 0 if there are none.
        unread: whether nobody has waited for its end yet, on a device: `look` does.
    """

    controller: Any
    layout: Layout
    tableau: Tableau
    times: Times
    evals_before_steps: int
    n_jumps: Any
    unread = False

    def look(self) -> None:
        """Waits for the end of an unread solve, and finds out how it went."""
        self.unread = False

    @property
    @abstractmethod
    def n_evals(self) -> int:
        """How often func was called."""

    def status_of_samples(self) -> Tensor:
        """[B] how each sample stands."""
        status: Tensor = self.controller.field("status").cpu().clone()
        return status

    def stats_of_samples(self) -> SampleStats:
        """What each sample has taken."""
        field = self.controller.field
        accepted, rejected = field("n_accepted").cpu().clone(), field("n_rejected").cpu().clone()
        if self.layout.samples == 1:
            evals = torch.tensor([self.n_evals], device="cpu")
        else:
            evals = self.evals_before_steps + (accepted + rejected) * len(self.tableau.rows) + self.n_jumps
        return SampleStats(evals, accepted, rejected, field("size1").cpu().clone())

    def ends_of_samples(self) -> Tensor:
        """[B] float64, to which time each has come, where the controller is."""
        ends: Tensor = self.controller.field("t")
        return ends

    def left(self) -> Tensor:
        """Which outputs have not been reached: [T, B], or [T] of the only sample."""
        ends = self.controller.field("output_end")
        left: Tensor = torch.arange(len(self.times), device=ends.device)[:, None] >= ends
        return (left[:, 0] if self.layout.samples == 1 else left).to(self.layout.device)

    @property
    def last_step(self) -> float | None:
        """The size of the step taken last, where there is one controller."""
        return abs(float(self.controller.field("dt_prev"))) if self.layout.samples == 1 else None

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            stats.n_f_evals += self.n_evals - evals_before
            stats.n_accepted += int(self.controller.field("n_accepted").sum())
            stats.n_rejected += int(self.controller.field("n_rejected").sum())

    def tell_apart(self, y: Tensor, k: Tensor) -> None:
        """Puts statuses right that look alike to the controller, by the last state and its derivative."""
        field = self.controller.field
        statuses, tried = field("status"), field("n_accepted") + field("n_rejected")
        no_start = (statuses == int(Status.NON_FINITE)) & (tried == 0)
        if bool(no_start.any()):
            finite = (y.isfinite() & k.isfinite()).reshape(self.layout.samples, -1).all(1).to(statuses.device)
            statuses.masked_fill_(no_start & finite, int(Status.STEP_TOO_SMALL))  # a tolerance is 0 where y0 is 0

    def error(self, y: Tensor, k: Tensor) -> SolveError:
        """Why it could not go on, from the last state and its derivative."""
        self.tell_apart(y, k)
        field = self.controller.field
        statuses, tried = field("status"), field("n_accepted") + field("n_rejected")
        b = int((statuses > int(Status.RUNNING)).nonzero()[0])
        status, n, t, dt = (x[b].item() for x in (statuses, tried, field("t"), field("dt_prev")))
        return SolveError(Status(status), t, dt, n, None if len(statuses) == 1 else b)
