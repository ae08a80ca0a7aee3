"""The continuous adjoint's backward solve as one launch on a GPU."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import graph_loop
from ._ops.autograd import plain
from .captures import BoundFunc, Captured, Key, captured_for, surroundings
from .control import Times, grid_from
from .device_grid_backsolve import DeviceGridBacksolve, places_for
from .device_solve import DeviceSolve, Given, launch, obstacle, unless
from .gradients.backsolve import Arriving, Backsolve, BacksolveConfig, Found, backwards, interval
from .methods import Tableau
from .problem import Problem
from .state import Func
from .stepping.adaptive import AtJump
from .stepping.captured import CapturedLoop
from .stepping.hooks import raise_it
from .stepping.quadrature import Quadrature


def backsolve_on_device(problem: Problem, config: BacksolveConfig, arriving: Arriving) -> Found | None:
    """The gradients of y0, of the times (None if not wanted), and of the parameters; None, with a warning of why, if
    that can't be.

    Args:
        problem: of the forward solve.
        config, arriving: as those of Backsolve.
    """

    def solve() -> Found:
        kind = DeviceBacksolve if config.method.adaptive else DeviceGridBacksolve
        return kind(problem, config, replace(arriving, gradients=plain(arriving.gradients))).solve()

    if len(arriving.times) == 1:  # there is nothing to solve
        return None
    why = obstacle(arriving.ys, config.method) or _what_looks_on(config)
    return unless(why, solve, config.options, "adjoint_options")


def _what_looks_on(config: BacksolveConfig) -> str | None:
    """What the host has to see of the solve, if anything."""
    if config.callbacks:
        return "callbacks look at every step"
    if not config.fused and config.method.adaptive:
        return "the norm is a function of the user's"
    return None


class DeviceBacksolve(Backsolve):
    """The backward solve for one forward solve, one launch, or one for each output interval."""

    def __init__(self, problem: Problem, config: BacksolveConfig, arriving: Arriving) -> None:
        # While it is captured, func finds tensors of their own: what it gives to them are partial derivatives.
        params = tuple(p.detach() for p in arriving.params)
        super().__init__(problem.func, problem.form, config, replace(arriving, params=params))
        if config.restart:  # a solve over one interval meets no output between
            first = interval(arriving.times, 1)
            arriving = replace(arriving, times=first, ys=arriving.ys[:2], gradients=arriving.gradients[:2])
        self.problem, self.given = problem, arriving

    def _through(self, z: Tensor, quadrature: Quadrature) -> Tensor:
        ends, options = backwards(self.times, self.config.options)
        loop = DeviceInterval(self, z, ends, options, quadrature)
        if self.time:
            loop.effects = [self._effect(i) for i in range(1, len(self.ys) - 1)]
        return self._carry_out(loop, z, options)

    def _run(
        self, z: Tensor, times: Times, options: dict[str, Any], quadrature: Quadrature, at_jump: AtJump | None = None
    ) -> Tensor:
        return self._carry_out(DeviceInterval(self, z, times, options, quadrature), z, options)


class CapturedBacksolve(Backsolve):
    """A backward solve at which nobody looks.

    Attributes:
        output_times: [T] float64, a place for the output times.
        effects: [T] another for what moving them does to the adjoint's integral over time.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.output_times = torch.zeros(len(self.ys), dtype=torch.float64, device=self.layout.device)
        self.effects = torch.zeros_like(self.output_times, dtype=self.layout.real_dtype)
        quadrature = self._quadrature()
        self.dynamics.quadrature = quadrature if quadrature.values else None

    def arrive(self, now: Tensor, jumped: Tensor, z: Tensor) -> Tensor:
        """At an output time y is the forward solve's, and a jumps by the gradient that arrives there."""
        ys, gradients = self.arriving.ys, self.arriving.gradients
        here = self.output_times == now
        i = here.to(torch.uint8).argmax(0, keepdim=True)
        if self.time:
            assert self.dynamics.quadrature is not None
            effect = torch.where(here.any() & jumped, self.effects.index_select(0, i), 0)
            self.dynamics.quadrature.values[0].add_(effect[0])
        arrived = torch.stack([ys.index_select(0, i)[0], z[1] - gradients.index_select(0, i)[0]])
        return torch.where(here.any(), arrived, z)


class DeviceInterval(DeviceSolve):
    """A solve from one time to another, as one launch; see `Loop`.

    Args:
        backsolve: whose it is.
        z, times, options, quadrature: of the solve.

    Attributes:
        effects: what moving the output times between does.

    Raises:
        CaptureError: func can't be captured.
    """

    def __init__(
        self, backsolve: DeviceBacksolve, z: Tensor, times: Times, options: dict[str, Any], quadrature: Quadrature
    ) -> None:
        problem, config, arriving = backsolve.problem, backsolve.config, backsolve.given
        assert isinstance(config.method, Tableau)
        grid = grid_from(options, times, z.device)
        given = Given(times, grid, backsolve.rtol, backsolve.atol, config.first_step)
        super().__init__(config.method, backsolve.layout, given)
        self.backsolve, self.z, self.quadrature = backsolve, z, quadrature
        self.effects: list[Tensor] = []
        self.bound = BoundFunc(problem.written, problem.args)
        self.key: Key = (
            self.bound.key, "backwards", len(arriving.ys), z.shape, z.dtype, z.device,
            tuple(problem.form.shapes), config.method.name, astuple(config.policy), config.seminorm,
            self.bound.which(arriving.params), backsolve.time_carried, given.kind, surroundings(),
        )  # fmt: skip
        self._captured = captured_for(self.key, self.bound, z.device, self._make, self._fill, graph_loop.GraphLoop)

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedLoop, list[Tensor]]:
        config, form = self.backsolve.config, self.backsolve.form
        inner = CapturedBacksolve(func, form, config, places_for(self.backsolve.given, stand_ins))
        rtol, atol, grid, times = self.given.places(self.z.device)
        loop = CapturedLoop(
            inner.dynamics, self.tableau, inner.layout, rtol, atol, config.policy, grid, times, None,
            inner.dynamics.quadrature, inner.arrive,
            y0=self.z, first_step=config.first_step is not None,
        )  # fmt: skip
        arriving = inner.arriving
        return loop, [arriving.ys, arriving.gradients, inner.output_times, inner.effects]

    def _fill(self, captured: Captured) -> None:
        arriving = self.backsolve.given
        for place, given in zip(captured.inputs, (arriving.ys, arriving.gradients, arriving.times.tensor)):
            place.copy_(given)
        if self.effects:
            captured.inputs[-1][1:-1] = -torch.stack(self.effects)  # moving an output moves the integral back
        captured.loop.y.copy_(self.z)
        if captured.loop.quadrature is not None:
            captured.loop.quadrature.begin_as(self.quadrature)
        self.given.fill(captured)
        captured.fill_slots(self.bound)

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at both times; the integrals move to the second."""
        captured = self._captured

        def collect(loop: CapturedLoop) -> Tensor:
            if loop.quadrature is not None:
                self.quadrature.values = loop.quadrature.copies()
            out = loop.out.clone()
            self.read(loop)
            return out

        out = launch(captured, self.key, partial(self._fill, captured), collect)
        if self.end is not None:
            raise_it(self.error(*self.end))
        return out

    @property
    def n_evals(self) -> int:
        """See Outcome; and those that the host has made."""
        return super().n_evals + self.backsolve.dynamics.n_evals
