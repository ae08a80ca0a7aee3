"""The continuous adjoint's backward solve as one launch on a GPU."""

from __future__ import annotations

from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor

from ._ops import graph_loop, native
from ._ops.autograd import plain
from ._ops.contract import Layout
from .captures import BoundFunc, Captured, Key, captured_for, captured_solves, standing_for, surroundings
from .control import Times, grid_from
from .device_grid_backsolve import DeviceGridBacksolve
from .device_solve import DeviceSolve, Given, launch, obstacle, unless
from .gradients.backsolve import AdjointDynamics, BacksolveConfig, Found, backwards, effect_of_time, stack_for
from .methods import Tableau
from .problem import Problem
from .state import Dynamics, Func
from .stepping.captured import CapturedLoop
from .stepping.hooks import raise_it
from .stepping.quadrature import Quadrature


def backsolve_on_device(
    problem: Problem,
    outputs: Times,
    config: BacksolveConfig,
    ys: Tensor,
    gradients: Tensor,
    params: tuple[Tensor, ...],
    with_time: bool,
) -> Found | None:
    """The gradients of y0, of the times (None if not wanted), and of the parameters; None, with a warning of why, if
    that can't be.

    Args:
        problem: of the forward solve.
        outputs, config, ys, gradients, params, with_time: as those of Backsolve.
    """

    def solve() -> Found:
        kind = DeviceBacksolve if config.method.adaptive else DeviceGridBacksolve
        return kind(problem, outputs, config, ys, plain(gradients), params, with_time).solve()

    if len(outputs) == 1:  # there is nothing to solve
        return None
    why = obstacle(ys, config.method) or _what_looks_on(config)
    return unless(why, solve, config.options, "adjoint_options")


def _what_looks_on(config: BacksolveConfig) -> str | None:
    """What the host has to see of the solve, if anything."""
    if config.callbacks:
        return "callbacks look at every step"
    if config.restart and config.method.adaptive:
        return "adjoint_options['restart'] has a solve for every output time"
    if not config.fused and config.method.adaptive:
        return "the norm is a function of the user's"
    return None


class DeviceBacksolve(DeviceSolve):
    """The backward solve for one forward solve; see `Backsolve`."""

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
        assert isinstance(config.method, Tableau)
        times, options = backwards(outputs, config.options)
        rtol, atol = (x if isinstance(x, float) else torch.stack([x, x]) for x in (config.rtol, config.atol))
        n, segments = ys[0].numel(), problem.form.segments
        layout = Layout(1, 2 * n, (*segments, *(n + s for s in segments[1:])), ys.dtype, ys.device)
        given = Given(times, grid_from(options, times, ys.device), rtol, atol, config.first_step)
        super().__init__(config.method, layout, given)
        self.problem, self.outputs, self.config = problem, outputs, config
        self.ys, self.gradients, self.params, self.with_time = ys, gradients, params, with_time
        self.bound = BoundFunc(problem.written, problem.args)
        self.key: Key = (
            self.bound.key, "backwards", ys.shape, ys.dtype, ys.device, tuple(problem.form.shapes), config.method.name,
            astuple(config.policy), config.seminorm, self.bound.which(params), with_time, given.kind, surroundings(),
        )  # fmt: skip

    def solve(self) -> Found:
        """Returns the gradients of y0 (packed), of the times (None if not wanted), and of the parameters."""
        wanted = self.with_time and captured_solves.refused(self.key) is None
        self.effects = self._effects_of_times() if wanted else []
        captured = captured_for(self.key, self.bound, self.ys.device, self._make, self._fill, graph_loop.GraphLoop)

        def collect(loop: CapturedLoop) -> tuple[Tensor, list[Tensor]]:
            assert loop.quadrature is not None
            found = self.gradients[0] - loop.out[-1, 1], loop.quadrature.copies()
            self.read(loop)
            return found

        a, integrals = launch(captured, self.key, partial(self._fill, captured), collect)
        stats = self.config.options.get("stats")
        self.add_to(stats)
        if self.end is not None:
            raise_it(self.error(*self.end))
        if not self.with_time:
            return a, None, integrals
        if stats is not None:
            stats.n_f_evals += len(self.effects)
        t = self.outputs.tensor
        return a, torch.stack([integrals.pop(0), *self.effects]).to(t.dtype), integrals

    def _effects_of_times(self) -> list[Tensor]:
        """The gradients of the output times behind the first, that of the last as exact as a time can be."""
        ys, t = plain(self.ys), self.outputs.tensor
        forward = Dynamics(self.problem.func, self.problem.form, ys[0])
        times = t.to(ys.device, self.layout.real_dtype)
        effects = [effect_of_time(forward, *one) for one in zip(times[1:], ys[1:], self.gradients[1:])]
        return [*effects[:-1], effects[-1].to(t.dtype).to(effects[-1])]

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedLoop, list[Tensor]]:
        config, ys, form, here = self.config, self.ys, self.problem.form, self.layout
        layout = native.Layout(here.samples, here.size, here.segments, here.dtype, here.device)
        params = standing_for(self.params, stand_ins)
        forward = Dynamics(func, form, ys[0], partial(native.copy, layout))
        dynamics = AdjointDynamics(forward, stack_for(native, form, ys[0]), params, self.with_time, config.warns)
        outputs, gradients = torch.empty_like(ys), torch.empty_like(ys)
        output_times = torch.empty(len(ys), dtype=torch.float64, device=ys.device)
        rtol, atol = output_times.new_empty(()), output_times.new_empty(())
        values, in_norm = [x.clone() for x in dynamics.zeros], [not config.seminorm] * len(params)
        effects = torch.empty(len(ys), dtype=layout.real_dtype, device=ys.device)
        if self.with_time:
            values, in_norm = [torch.empty_like(effects[0]), *values], [True, *in_norm]
        with_time = self.with_time  # what the loop keeps must not lead to func, as self does
        quadrature = Quadrature(values, self.tableau, native, rtol, atol, in_norm)
        quadrature.first = effects[-1] if self.with_time else None
        dynamics.quadrature = quadrature

        def arrive(now: Tensor, jumped: Tensor, z: Tensor) -> Tensor:
            """At an output time y is the forward solve's, and a jumps by the gradient that arrives there."""
            here = output_times == now
            i = here.to(torch.uint8).argmax(0, keepdim=True)
            if with_time:
                effect = torch.where(here.any() & jumped, effects.index_select(0, i), 0)
                quadrature.values[0].add_(effect[0])
            arrived = torch.stack([outputs.index_select(0, i)[0], z[1] - gradients.index_select(0, i)[0]])
            return torch.where(here.any(), arrived, z)

        rtols, atols, grid, times = self.given.places(ys.device)
        loop = CapturedLoop(
            dynamics, self.tableau, layout, rtols, atols, config.policy, grid, times, None, quadrature, arrive,
            y0=torch.stack([ys[-1], ys[-1]]), first_step=config.first_step is not None,
        )  # fmt: skip
        return loop, [outputs, gradients, output_times, effects, rtol, atol]

    def _fill(self, captured: Captured) -> None:
        outputs, gradients, times, effects, *tolerances = captured.inputs
        if self.with_time:
            effects[1:] = -torch.stack(self.effects)  # moving an output's time moves the adjoint's integral back
        outputs.copy_(self.ys)
        gradients.copy_(self.gradients)
        times.copy_(self.outputs.tensor)
        for place, given in zip(tolerances, (self.config.rtol, self.config.atol)):
            place.copy_(given.min()) if isinstance(given, Tensor) else place.fill_(given)
        captured.loop.y[0] = self.ys[-1]
        captured.loop.y[1] = -self.gradients[-1]
        self.given.fill(captured)
        captured.fill_slots(self.bound)
