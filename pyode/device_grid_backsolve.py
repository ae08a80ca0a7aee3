"""The continuous adjoint's backward solve with given steps as one launch on a GPU: all of them are one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import graph_loop
from .captures import BoundFunc, Captured, Key, captured_for, standing_for, surroundings
from .control import Times
from .device_grid import check_steps, within
from .device_solve import launch
from .gradients.backsolve import Backsolve, BacksolveConfig, Found, interval
from .problem import Problem
from .solution import Stats
from .state import Func
from .stepping.captured_grid import CapturedGrid, PreparedGrid
from .stepping.fixed_grid import grid_of
from .stepping.quadrature import Quadrature


class PreparedBacksolve(Backsolve):
    """A backward solve whose times are all on the device before it begins; see PreparedGrid.

    Args:
        grids: the times of the steps between the outputs, backwards, the last ones first; on the host.
        further: as Backsolve's.
    """

    def __init__(self, grids: Sequence[Tensor], *further: Any) -> None:
        super().__init__(*further)
        config, integrals = self.config, super()._quadrature()
        self.integrals = integrals
        self.dynamics.quadrature = integrals if integrals.values else None
        self.loops = [
            PreparedGrid(
                self.dynamics, config.method, self.layout, interval(self.times, i), grid, config.options, self.rtol,
                self.atol, self.dynamics.quadrature,
            )
            for i, grid in enumerate(reversed(grids), 1)
        ]  # fmt: skip

    def _quadrature(self) -> Quadrature:
        self.integrals.values = [torch.zeros_like(value) for value in self.integrals.values]
        return self.integrals

    def _over_interval(self, i: int, z: Tensor, quadrature: Quadrature) -> Tensor:
        return self._carry_out(self.loops[i - 1], z, self.config.options)


class DeviceGridBacksolve:
    """The backward solve for one forward solve, by a method with given steps; see `Backsolve`."""

    def __init__(
        self,
        problem: Problem,
        outputs: Times,
        config: BacksolveConfig,
        ys: Tensor,
        gradients: Tensor,
        params: tuple[Tensor, ...],
        with_time: bool,
    ) -> None:
        self.problem, self.outputs, self.config = problem, outputs, config
        self.ys, self.gradients, self.params, self.with_time = ys, gradients, params, with_time
        self.bound, form, options = BoundFunc(problem.written, problem.args), problem.form, config.options
        found = [
            grid_of(options, interval(outputs, i), problem.func, form.unpack(ys[i])).detach()
            for i in range(len(outputs) - 1, 0, -1)
        ]
        steps, lengths = torch.cat(found).cpu(), tuple(map(len, found))
        check_steps(len(steps) - len(found))
        self.grids = torch.split(steps, list(lengths))
        self.key: Key = (
            self.bound.key, "backwards", ys.shape, ys.dtype, ys.device, tuple(form.shapes), config.method.name,
            *within(options).values(), self.bound.which(params), with_time, outputs.tensor.dtype, lengths,
            tuple(steps.tolist()), surroundings(),
        )  # fmt: skip

    def solve(self) -> Found:
        """Returns the gradients of y0 (packed), of the times (None if not wanted), and of the parameters."""
        captured = captured_for(self.key, self.bound, self.ys.device, self._make, self._fill, graph_loop.Graph)

        def collect(loop: CapturedGrid) -> Found:
            a, times, integrals = loop.out
            return a.clone(), None if times is None else times.clone(), [x.clone() for x in integrals]

        found = launch(captured, self.key, partial(self._fill, captured), collect)
        stats: Stats | None = self.config.options.get("stats")
        if stats is not None:
            stats.add(captured.loop.taken)
        return found

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedGrid, list[Tensor]]:
        counts, ys = Stats(), self.ys
        outputs, gradients = ys.new_empty(ys.shape), ys.new_empty(ys.shape)
        times = Times(self.outputs.tensor.to(ys.device), self.outputs.values)
        config = replace(self.config, options={**within(self.config.options), "stats": counts})
        params = standing_for(self.params, stand_ins)
        backsolve = PreparedBacksolve(
            self.grids, func, self.problem.form, times, config, outputs, gradients, params, self.with_time
        )
        return CapturedGrid(backsolve.solve, counts), [outputs, gradients]

    def _fill(self, captured: Captured) -> None:
        for place, given in zip(captured.inputs, (self.ys, self.gradients)):
            place.copy_(given)
        captured.fill_slots(self.bound)
