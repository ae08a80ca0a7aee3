"""The continuous adjoint's backward solve as one launch on a GPU."""

from __future__ import annotations

from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor

from ._ops import backend_for, native
from ._ops.autograd import plain
from ._ops.contract import Flag, Grid, Layout
from .captures import (
    BoundFunc,
    Captured,
    CaptureError,
    captured_for,
    captured_solves,
    fill_tolerances,
    places_for_tolerances,
    surroundings,
)
from .control import Times, grid_from
from .device_loop import evals_of
from .errors import warn
from .gradients.backsolve import AdjointDynamics, BacksolveConfig, backwards
from .methods import Tableau
from .problem import Problem
from .state import Dynamics, Func
from .stepping.captured import CapturedLoop
from .stepping.hooks import raise_it
from .stepping.outcome import Outcome
from .stepping.quadrature import Quadrature


def obstacle(config: BacksolveConfig, ys: Tensor, with_time: bool) -> str | None:
    """Why a backward solve can't be one launch, as far as it can be told before trying; None if it may."""
    if not native.on_gpu(ys.device) or backend_for(ys) is not native:
        return f"the state is on the {ys.device.type.upper()}"
    if not isinstance(config.method, Tableau) or not config.method.adaptive:
        return f"{config.method.name!r} is not an explicit method that chooses its steps"
    if config.restart:
        return "adjoint_options['restart'] has a solve for every output time"
    if not config.fused:
        return "the norm is a function of the user's"
    if config.callbacks:
        return "callbacks look at every step"
    if with_time:
        return "the gradient of t is wanted"
    return None


def backsolve_on_device(
    problem: Problem,
    times: Times,
    config: BacksolveConfig,
    ys: Tensor,
    gradients: Tensor,
    params: tuple[Tensor, ...],
    with_time: bool,
) -> tuple[Tensor, None, list[Tensor]] | None:
    """The gradients of y0, of no times, and of the parameters; None, with a warning of why, if that can't be.

    Args:
        problem: of the forward solve.
        times, config, ys, gradients, params, with_time: as those of Backsolve.
    """
    why = obstacle(config, ys, with_time)
    if why is None:
        try:
            return DeviceBacksolve(problem, times, config, ys, plain(gradients), params).solve()
        except CaptureError as error:
            why = str(error)
    if config.options["device_loop"] != "auto":
        warn(f"adjoint_options['device_loop']: the host drives the backward solve, because {why}")
    return None


class DeviceBacksolve(Outcome):
    """The backward solve for one forward solve; see `Backsolve`."""

    n_jumps = 0

    def __init__(
        self,
        problem: Problem,
        times: Times,
        config: BacksolveConfig,
        ys: Tensor,
        gradients: Tensor,
        params: tuple[Tensor, ...],
    ) -> None:
        assert isinstance(config.method, Tableau)
        self.problem, self.outputs, self.config, self.tableau = problem, times, config, config.method
        self.ys, self.gradients, self.params = ys, gradients, params
        self.times, options = backwards(times, config.options)
        self.grid = grid_from(options, self.times, ys.device)
        n, segments = ys[0].numel(), problem.form.segments
        self.layout = Layout(1, 2 * n, (*segments, *(n + s for s in segments[1:])), ys.dtype, ys.device)
        self.evals_before_steps = 1 if config.first_step is not None else 2
        self.bound = BoundFunc(problem.written, problem.args)
        stops = (None if x is None else len(x) for x in (self.grid.step_t, self.grid.jump_t))
        self.key = (
            self.bound.key, "backwards", ys.shape, ys.dtype, ys.device, segments, tuple(problem.form.shapes), *stops,
            config.method.name, astuple(config.policy), config.first_step is None, config.seminorm,
            tuple((id(p), p.data_ptr()) for p in self._read_in_place()), len(params),
            *(isinstance(tolerance, Tensor) for tolerance in (config.rtol, config.atol)), surroundings(),
        )  # fmt: skip

    def _read_in_place(self) -> list[Tensor]:
        given = set(map(id, self.bound.tensors))
        return [p for p in self.params if id(p) not in given]

    def solve(self) -> tuple[Tensor, None, list[Tensor]]:
        """Returns the gradients of y0 (packed), None, and those of the parameters."""
        if len(self.outputs.values) == 1:
            return self.gradients[0], None, [torch.zeros_like(p) for p in self.params]
        captured = captured_for(self.key, self.bound, self.ys.device, self._make, self._fill)
        loop, failed = captured.loop, False
        assert loop.quadrature is not None
        with captured.graph.in_use():
            self._fill(captured)
            captured.graph.launch()
            a, integrals = loop.out[-1, 1] + self.gradients[0], loop.quadrature.copies()
            self.controller, self._crossings = loop.controller.readings(), loop.crossings.clone()
            _, flags = self.controller.flags()
            failed = bool(flags & Flag.FAILED)
            y, k = (loop.y.clone(), loop.k.clone()) if failed else (a, a)
        captured_solves.put(self.key, captured)
        self.add_to(self.config.options.get("stats"))
        if failed:
            raise_it(self.error(y, k))
        return a, None, integrals

    @property
    def n_evals(self) -> int:
        """See Outcome."""
        return self.evals_before_steps + evals_of(self.controller, self._crossings, self.tableau)

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedLoop, list[Tensor]]:
        config, ys, form = self.config, self.ys, self.problem.form
        n, segments = ys[0].numel(), form.segments
        layout = native.Layout(1, 2 * n, (*segments, *(n + s for s in segments[1:])), ys.dtype, ys.device)
        if any(id(p) not in stand_ins for p in self.params):
            raise CaptureError("a tensor that wants a gradient is a global variable of func's, or in a tuple")
        params = tuple(stand_ins[id(p)] for p in self.params)
        forward = Dynamics(func, form, ys[0], partial(native.copy, layout))
        dynamics = AdjointDynamics(forward, params, False, config.warns)
        rtol, atol = (x if isinstance(x, float) else float(x.min()) for x in (config.rtol, config.atol))
        in_norm = [not config.seminorm] * len(params)
        quadrature = Quadrature([x.clone() for x in dynamics.zeros], self.tableau, native, rtol, atol, in_norm)
        dynamics.quadrature = quadrature
        inputs = [
            torch.empty_like(ys),
            torch.empty_like(ys),
            torch.empty(len(ys), dtype=torch.float64, device=ys.device),
        ]
        outputs, gradients, output_times = inputs

        def arrive(now: Tensor, _: Tensor, z: Tensor) -> Tensor:
            """At an output time y is the forward solve's, and a jumps by the gradient that arrives there."""
            here = output_times == now
            i = here.to(torch.uint8).argmax(0, keepdim=True)
            arrived = torch.stack([outputs.index_select(0, i)[0], z[1] + gradients.index_select(0, i)[0]])
            return torch.where(here.any(), arrived, z)

        rtol_each, atol_each = self._tolerances()
        stops = (None if x is None else torch.empty_like(x) for x in (self.grid.step_t, self.grid.jump_t))
        grid = Grid(torch.empty_like(self.grid.times), *stops)
        loop = CapturedLoop(
            dynamics, self.tableau, layout, *places_for_tolerances(rtol_each, atol_each, ys.device),
            config.policy, grid, Times(grid.times, self.times.values), None, quadrature, arrive,
            y0=torch.stack([ys[-1], ys[-1]]), first_step=config.first_step is not None,
        )  # fmt: skip
        return loop, inputs

    def _tolerances(self) -> list[float | Tensor]:
        return [x if isinstance(x, float) else torch.stack([x, x]) for x in (self.config.rtol, self.config.atol)]

    def _fill(self, captured: Captured) -> None:
        loop, (outputs, gradients, times) = captured.loop, captured.inputs
        outputs.copy_(self.ys)
        gradients.copy_(self.gradients)
        times.copy_(self.outputs.tensor)
        loop.y[0] = self.ys[-1]
        loop.y[1] = self.gradients[-1]
        loop.grid.times.copy_(self.grid.times)
        for name in ("step_t", "jump_t"):
            if (stops := getattr(self.grid, name)) is not None:
                getattr(loop.grid, name).copy_(stops)
        rtol, atol = self._tolerances()
        fill_tolerances(loop, rtol, atol)
        if loop.first_step is not None and self.config.first_step is not None:
            loop.first_step.fill_(self.config.first_step)
        for slot, given in zip(captured.slots, self.bound.tensors):
            slot.detach().copy_(given)
