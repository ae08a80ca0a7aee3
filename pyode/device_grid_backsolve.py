"""The continuous adjoint's backward solve with given steps as one launch on a GPU: all of them are one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import graph_loop
from ._ops.contract import RightHandSide
from .captures import BoundFunc, Captured, Key, captured_for, standing_for, surroundings
from .device_grid import check_steps, within
from .device_solve import launch
from .gradients.augmented import AugmentedDynamics, AugmentedState
from .gradients.backsolve import Arriving, Backsolve, BacksolveConfig, Found, interval
from .problem import Problem
from .solution import Stats
from .state import Func
from .stepping.captured_grid import CapturedGrid, PreparedGrid
from .stepping.fixed_grid import grid_of
from .stepping.quadrature import Quadrature


def places_for(arriving: Arriving, stand_ins: dict[int, Tensor]) -> Arriving:
    """The like for a captured solve, with places of its own; see Make."""
    ys, times = arriving.ys, arriving.times
    return Arriving(
        times.in_tensor(times.tensor.to(ys.device)),
        ys.new_empty(ys.shape),
        ys.new_empty(ys.shape),
        standing_for(arriving.params, stand_ins),
        arriving.with_time,
    )


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
        self.augmented: AugmentedDynamics | None = None
        dynamics: RightHandSide = self.dynamics
        layout, beside = self.layout, integrals if integrals.values else None
        if not config.method.one_step:
            state = AugmentedState(torch.stack(self.ys[:1] * 2), integrals.values)
            dynamics = self.augmented = AugmentedDynamics(self.dynamics, state)
            layout, beside = state.layout(self.ops, layout), None
        self.loops = [
            PreparedGrid(
                dynamics, config.method, layout, interval(self.times, i), grid, config.options, self.rtol, self.atol,
                beside,
            )
            for i, grid in enumerate(reversed(grids), 1)
        ]  # fmt: skip

    def _quadrature(self) -> Quadrature:
        self.integrals.values = [torch.zeros_like(value) for value in self.integrals.values]
        return self.integrals

    def _over_interval(self, i: int, z: Tensor, quadrature: Quadrature) -> Tensor:
        loop, augmented = self.loops[i - 1], self.augmented
        if augmented is None:
            return self._carry_out(loop, z, self.config.options)
        augmented.dynamics.quadrature = augmented
        end = self._carry_out(loop, augmented.state.pack([z, *quadrature.values]), self.config.options)
        z, *quadrature.values = augmented.state.unpack(end)
        return z


class DeviceGridBacksolve:
    """The backward solve for one forward solve, by a method with given steps; see `Backsolve`."""

    def __init__(self, problem: Problem, config: BacksolveConfig, arriving: Arriving) -> None:
        self.problem, self.config, self.arriving = problem, config, arriving
        self.bound, form, options = BoundFunc(problem.written, problem.args), problem.form, config.options
        outputs, ys = arriving.times, arriving.ys
        found = [
            grid_of(options, interval(outputs, i), problem.func, form.unpack(ys[i])).detach()
            for i in range(len(outputs) - 1, 0, -1)
        ]
        steps, lengths = torch.cat(found).cpu(), tuple(map(len, found))
        check_steps(len(steps) - len(found))
        self.grids = torch.split(steps, list(lengths))
        self.key: Key = (
            self.bound.key, "backwards", ys.shape, ys.dtype, ys.device, tuple(form.shapes), config.method.name,
            *within(options).items(), self.bound.which(arriving.params), arriving.with_time, outputs.tensor.dtype,
            lengths, tuple(steps.tolist()), surroundings(),
        )  # fmt: skip

    def solve(self) -> Found:
        """Returns the gradients of y0 (packed), of the times (None if not wanted), and of the parameters."""
        captured = captured_for(self.key, self.bound, self.arriving.ys.device, self._make, self._fill, graph_loop.Graph)

        def collect(loop: CapturedGrid) -> Found:
            a, times, integrals = loop.out
            return a.clone(), None if times is None else times.clone(), [x.clone() for x in integrals]

        found = launch(captured, self.key, partial(self._fill, captured), collect)
        stats: Stats | None = self.config.options.get("stats")
        if stats is not None:
            stats.add(captured.loop.taken)
        return found

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedGrid, list[Tensor]]:
        counts, inner = Stats(), places_for(self.arriving, stand_ins)
        config = replace(self.config, options={**within(self.config.options), "stats": counts})
        backsolve = PreparedBacksolve(self.grids, func, self.problem.form, config, inner)
        return CapturedGrid(backsolve.solve, counts), [inner.ys, inner.gradients]

    def _fill(self, captured: Captured) -> None:
        for place, given in zip(captured.inputs, (self.arriving.ys, self.arriving.gradients)):
            place.copy_(given)
        captured.fill_slots(self.bound)
