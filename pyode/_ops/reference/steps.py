"""Steps: the evaluations of func with the sums and the controller between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import Flag, Layout, Phase, RightHandSide
from .controller import Controller
from .interpolant import Interpolant, interpolate
from .norms import scaled_error
from .sums import stage_combine


@dataclass(frozen=True, eq=False)
class Table:
    """See native.Table."""

    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error_weights: tuple[float, ...]


def stages(
    layout: Layout,
    table: Table,
    y: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    times: tuple[Tensor, ...],
    dynamics: RightHandSide,
    combine: Callable[..., Tensor] = stage_combine,
) -> Tensor:
    """See native.stages; `combine` makes the stages' states."""
    state = y
    for j, t in enumerate(times):
        state = combine(layout, table.rows[j], y, ks, dt)
        ks[j + 1] = dynamics(t, state)
    return state


@dataclass(frozen=True, eq=False)
class Steps:
    """See native.Steps."""

    layout: Layout
    table: Table
    interpolant: Interpolant
    controller: Controller
    rtol: float | Tensor
    atol: float | Tensor

    def take(
        self, y: Tensor, ks: list[Tensor], dynamics: RightHandSide, out: Any, t0: Tensor | None
    ) -> tuple[Tensor, Tensor, int, Tensor]:
        """See native.Steps."""
        flags, y1 = int(Flag.RUNNING), y
        if t0 is not None:
            ks[0] = dynamics(t0, y)
            out = out(y)
            out[0] = y
            flags = self._choose_first(y, ks[0], dynamics)
        while flags in (Flag.RUNNING, Flag.RUNNING | Flag.ACCEPTED, Flag.RUNNING | Flag.STAYED):
            if flags & Flag.ACCEPTED:
                y, ks[0] = y1, ks[-1]
            y1, flags = self._step(y, ks, dynamics, out)
        return y, y1, flags, out

    def _choose_first(self, y: Tensor, k: Tensor, dynamics: RightHandSide) -> int:
        layout, controller, tolerances = self.layout, self.controller, (self.rtol, self.atol)
        slopes = sum(part.n_segments for part in controller.layouts)  # where the norms of slopes begin
        controller.error_norm((1.0,), y, y, [y], controller.one, *tolerances, 0)
        controller.error_norm((1.0,), y, y, [k], controller.one, *tolerances, slopes)
        controller.run(Phase.TRY_FIRST)
        change = dynamics(controller.stage_times, stage_combine(layout, (1.0,), y, [k], controller.dt))
        controller.error_norm((1.0, -1.0), y, y, [change, k], controller.dt, *tolerances, 0)
        return controller.run(Phase.CHOOSE_FIRST)

    def _step(self, y: Tensor, ks: list[Tensor], dynamics: RightHandSide, out: Tensor) -> tuple[Tensor, int]:
        """The state at its end, and the flags."""
        controller, dt, times = self.controller, self.controller.dt, self.controller.stage_times
        y1 = stages(self.layout, self.table, y, ks, dt, times.unbind(), dynamics)
        controller.error_norm(self.table.error_weights, y, y1, ks, dt, self.rtol, self.atol)
        flags = controller.run(Phase.JUDGE)
        if flags & Flag.OUTPUT:
            interpolate(self.layout, self.interpolant, controller, y, ks, out)
        return y1, flags & ~Flag.OUTPUT


@dataclass(frozen=True, eq=False)
class AdamsTable:
    """See native.AdamsTable."""

    predictors: tuple[tuple[float, ...], ...]
    correctors: tuple[tuple[float, ...], ...]
    max_iters: int


class GridSteps:
    """See native.GridSteps; `combine` makes the states."""

    CHUNK = 64  # steps whose times and sizes are taken apart together: a view for each on its own takes twice as long

    def __init__(
        self, layout: Layout, times: Tensor, sizes: Tensor, combine: Callable[..., Tensor] = stage_combine
    ) -> None:
        self.layout, self.combine = layout, combine
        self._all_times, self._all_sizes = times, sizes
        self._chunk = self.under_way = -1
        self._times: list[tuple[Tensor, ...]] = []
        self._sizes: tuple[Tensor, ...] = ()

    def _step(self, n: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The times of step n's stages, each 0-dim, and its size, [1]."""
        self.under_way = n
        chunk, i = divmod(n, self.CHUNK)
        if chunk != self._chunk:
            some = slice(n - i, n - i + self.CHUNK)
            times, sizes = self._all_times[some], self._all_sizes[some]
            views, stages = times.reshape(-1).unbind(), times.shape[1]
            self._times = [views[j : j + stages] for j in range(0, len(views), stages)]
            self._sizes, self._chunk = sizes.unsqueeze(1).unbind(), chunk
        return self._times[i], self._sizes[i]

    def take(
        self,
        table: Table,
        y: Tensor,
        ks: list[Tensor],
        dynamics: RightHandSide,
        begin: int,
        end: int,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See native.GridSteps.take."""
        y1 = y
        for n in range(begin, end):
            if n > begin:
                y = y1
                if out is not None:
                    out[n] = y
            times, dt = self._step(n)
            ks[0] = dynamics(times[0], y)
            stages(self.layout, table, y, ks, dt, times[1:], dynamics, self.combine)
            y1 = self.combine(self.layout, table.weights, y, ks, dt)
        return y, y1

    def take_adams(
        self,
        table: AdamsTable,
        y: Tensor,
        ks: list[Tensor],
        m: int,
        dynamics: RightHandSide,
        begin: int,
        end: int,
        rtol: float | Tensor,
        atol: float | Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, int, int, bool]:
        """See native.GridSteps.take_adams; takes one."""
        layout, ((first, last), dt) = self.layout, self._step(begin)
        m = min(m + 1, len(table.predictors))
        ks[1 : m + 1] = [dynamics(first, y), *ks[1:m]]
        weights, solved, zero = table.predictors[m - 1], True, torch.zeros_like(y)
        if table.correctors:
            before, solved = stage_combine(layout, weights, zero, ks, dt).detach(), False
            for _ in range(table.max_iters):
                ks[0] = dynamics(last, self.combine(layout, weights, y, ks, dt))
                weights = table.correctors[m - 1]
                after = stage_combine(layout, weights, zero, ks, dt).detach()
                change = scaled_error(after - before, before, after, rtol, atol)
                solved, before = bool(change.numel() == 0 or change.abs().max() < 1), after
                if solved:
                    break
        return y, self.combine(layout, weights, y, ks, dt), m, begin, solved
