"""The adaptive loop as work for a GPU to do by itself: an opening and a step, in memory of their own, without a look.

What the host-driven loop decides by flags is decided on the device: a step's end takes the place of its start where it
was accepted, outputs that it passed are written, and the controller says whether there is another step. The numbers are
the same ops', in the same order, so the bits are the host-driven loop's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._ops.contract import Phase, neighbour
from ..control import in_order
from ..errors import Status
from .adaptive import AdaptiveLoop
from .outputs import column
from .ring import Ring

# How many steps a turn of the device's loop takes, in solves of up to so many steps; in longer ones, MOST_A_TURN. A
# turn itself takes as long as a few small kernels, but what of the last one lies behind the end is in vain.
STEPS_A_TURN = ((8, 1), (24, 2), (96, 4))
MOST_A_TURN = 8


class CapturedLoop(AdaptiveLoop):
    """An adaptive explicit Runge-Kutta solve whose steps nobody looks at.

    Args:
        y0: what states are like.
        first_step: whether the first step is given.
        checks: whether the output times have to be checked; wrong ones end the solve at its start.
        room: for how many steps there is to be room on a ring; None for no ring.
        further: as AdaptiveLoop's. at_jump is called after every step, with the samples that are at a discontinuity; of
            the hooks watch_batch alone, with every step, accepted or not.

    Attributes:
        y: the state; the start, before `open`.
        k: its derivative.
        stage: the state of the step's first stage after that; None if that is the step's end.
        out: [T, *y0.shape] the states at the output times.
        first_step: [B] float64, the given one; None if it is to be chosen.
        crossings: [2, B] int64: how many discontinuities each sample has crossed, and in how many steps any of them
            has.
        ring: the steps accepted.
    """

    def __init__(
        self, *further: Any, y0: Tensor, first_step: bool, checks: bool = False, room: int | None = None
    ) -> None:
        super().__init__(*further)
        self.checks = checks
        B, clock = self.layout.samples, self.grid.times.device
        self.y, self.k = torch.empty_like(y0), torch.empty_like(y0)
        self.stage = torch.empty_like(y0) if len(self.table.rows) > 1 else None
        self.out = y0.new_empty((len(self.times), *y0.shape))
        self.first_step = torch.zeros(B, dtype=torch.float64, device=clock) if first_step else None
        self.crossings = torch.zeros(2, B, dtype=torch.int64, device=clock)
        self.controller.stay_on_device()
        shape = (len(self.tableau.abscissae), B)[: 1 if B == 1 else 2]
        stage_times = y0.new_empty(shape, dtype=self.layout.real_dtype)
        self.ring = None if room is None else Ring(room, y0, stage_times, self.controller)
        if self.quadrature is not None:
            self.quadrature.stay_on_device()

    def trial(self) -> Iterator[None]:
        """Solves, driven by the host, and stops after each step; of a long solve it takes the first."""
        self.open()
        for self.n_tried in range(1, STEPS_A_TURN[-1][0] + 2):
            self.step()
            yield
            if not bool((self.controller.field("status") == int(Status.RUNNING)).any()):
                return

    def capture(self, graph: Any) -> None:
        """Has a GraphLoop capture the solve, after a trial; RuntimeError if something can't be."""
        a_turn = next((steps for most, steps in STEPS_A_TURN if self.n_tried <= most), MOST_A_TURN)
        self.controller.stay_on_device(graph.condition)
        graph.capture(self.open, partial(self._take, a_turn))

    def _take(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    @torch.no_grad()
    def open(self) -> None:
        """Begins the solve from y: evaluates func there, and plans the first step."""
        self.controller.restart()
        self.crossings.zero_()
        self.out[: 1 if self.grid.times.dim() == 1 else None] = self.y  # a sample may have no way to go
        if self.quadrature is not None:
            self.quadrature.start(trial=self.first_step is None)
        self.ops.copy(self.layout, self.dynamics(self.start(), self.y), self.k)
        self.measure.start(self.dynamics, self.y, self.k, self.first_step)
        if self.quadrature is not None:
            self.quadrature.keep_integrands()
        if self.ring is not None:
            self.ring.restart(self.start())
        if self.checks:
            wrong = ~in_order(self.grid.times)
            self.controller.finish(wrong.expand(self.layout.samples), int(Status.NON_FINITE))
        self._begin_step()

    def _begin_step(self) -> None:
        """The first stage's state, where the end of the step before has not left it."""
        row = self.table.rows[0]
        if self.stage is not None:
            self.ops.stage_combine(self.layout, row, self.y, [self.k], self.controller.dt, self.stage)

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step, in vain where all samples are done."""
        controller, layout, y = self.controller, self.layout, self.y
        ks: list[Any] = [self.k, *[None] * len(self.table.rows)]
        if self.ring is not None:
            self.ring.begin(y)
        times = controller.stage_times.unbind()
        y1 = self.ops.stages(layout, self.table, y, ks, controller.dt, times, self.dynamics, self.stage)
        tail = y, ks, y1, self.out, self.stage, self.table.rows[0][0]
        watch = self.hooks.watch_batch
        if self.quadrature is None and watch is None:
            self.ops.end_step(layout, self.table, self.interpolant, controller, (self.rtol, self.atol), *tail)
        else:
            self.measure.step(y, y1, ks)
            controller.run(Phase.JUDGE)
            if watch is not None:
                watch(self.batch_segment(self.dense_output, y, ks, controller.dt, None))
            self.ops.finish_step(layout, self.interpolant, controller, *tail)
            if self.quadrature is not None:
                self.quadrature.finish_on_device(controller, self.interpolant)
        if self.ring is not None:
            self.ring.end()
        if self.grid.jump_t is not None:
            self._cross(self.grid.jump_t)

    def _cross(self, stops: Tensor) -> None:
        """Where the step has ended on a discontinuity: the state and its derivative just behind it."""
        field, quadrature = self.controller.field, self.quadrature
        now = field("t")
        there = (now == (stops if stops.dim() == 2 else stops[:, None])).any(0)
        arrived, running = there & (field("accepted") != 0), field("status") == int(Status.RUNNING)
        jumped = arrived & running
        anew = arrived.any() & running.any()
        self.crossings += torch.stack([jumped, anew.expand_as(jumped)])
        mask = jumped if self.layout.samples == 1 else column(jumped, self.y)
        if self.at_jump is not None:
            self.y.copy_(torch.where(mask, self.at_jump(now, jumped, self.y), self.y))
        t = now.to(self.layout.real_dtype)
        behind = torch.where(jumped, neighbour(t, field("dt_prev").sign().to(t)), t)
        if self.ring is not None:
            self.ring.pass_jump(anew, jumped, behind)
        if quadrature is not None:
            quadrature.restart()
        k = self.dynamics(behind[0] if self.layout.samples == 1 else behind, self.y)
        self.k.copy_(torch.where(mask, k, self.k))
        if quadrature is not None:
            quadrature.keep_integrands(jumped)
        self._begin_step()
