"""The continuous adjoint's backward solve as one launch on a GPU."""

from __future__ import annotations

from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor

from ._ops import graph_loop, native
from ._ops.autograd import plain
from ._ops.contract import Layout
from .captures import BoundFunc, Captured, CaptureError, Key, captured_for, surroundings
from .control import Times, grid_from
from .device_solve import DeviceSolve, Given, launch, obstacle, unless
from .gradients.backsolve import AdjointDynamics, BacksolveConfig, backwards, stack_for
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
) -> tuple[Tensor, None, list[Tensor]] | None:
    """The gradients of y0, of no times, and of the parameters; None, with a warning of why, if that can't be.

    Args:
        problem: of the forward solve.
        outputs, config, ys, gradients, params, with_time: as those of Backsolve.
    """

    def solve() -> tuple[Tensor, None, list[Tensor]]:
        return DeviceBacksolve(problem, outputs, config, ys, plain(gradients), params).solve()

    why = obstacle(ys, config.method) or _what_looks_on(config, with_time)
    return unless(why, solve, config.options, "adjoint_options")


def _what_looks_on(config: BacksolveConfig, with_time: bool) -> str | None:
    """What the host has to see of the solve, if anything."""
    if not config.method.adaptive:
        return f"{config.method.name!r} does not choose its steps"
    if config.restart:
        return "adjoint_options['restart'] has a solve for every output time"
    if not config.fused:
        return "the norm is a function of the user's"
    if config.callbacks:
        return "callbacks look at every step"
    if with_time:
        return "the gradient of t is wanted"
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
    ) -> None:
        assert isinstance(config.method, Tableau)
        times, options = backwards(outputs, config.options)
        rtol, atol = (x if isinstance(x, float) else torch.stack([x, x]) for x in (config.rtol, config.atol))
        n, segments = ys[0].numel(), problem.form.segments
        layout = Layout(1, 2 * n, (*segments, *(n + s for s in segments[1:])), ys.dtype, ys.device)
        given = Given(times, grid_from(options, times, ys.device), rtol, atol, config.first_step)
        super().__init__(config.method, layout, given)
        self.problem, self.outputs, self.config = problem, outputs, config
        self.ys, self.gradients, self.params = ys, gradients, params
        self.bound = BoundFunc(problem.written, problem.args)
        in_args = {id(x): i for i, x in enumerate(self.bound.tensors)}
        wanted = tuple(in_args.get(id(p), (id(p), p.data_ptr())) for p in params)
        self.key: Key = (
            self.bound.key, "backwards", ys.shape, ys.dtype, ys.device, tuple(problem.form.shapes), config.method.name,
            astuple(config.policy), config.seminorm, wanted, given.kind, surroundings(),
        )  # fmt: skip

    def solve(self) -> tuple[Tensor, None, list[Tensor]]:
        """Returns the gradients of y0 (packed), None, and those of the parameters."""
        if len(self.outputs.values) == 1:
            return self.gradients[0], None, [torch.zeros_like(p) for p in self.params]
        captured = captured_for(self.key, self.bound, self.ys.device, self._make, self._fill, graph_loop.GraphLoop)

        def collect(loop: CapturedLoop) -> tuple[Tensor, list[Tensor]]:
            assert loop.quadrature is not None
            found = self.gradients[0] - loop.out[-1, 1], loop.quadrature.copies()
            self.read(loop)
            return found

        a, integrals = launch(captured, self.key, partial(self._fill, captured), collect)
        self.add_to(self.config.options.get("stats"))
        if self.end is not None:
            raise_it(self.error(*self.end))
        return a, None, integrals

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedLoop, list[Tensor]]:
        config, ys, form, here = self.config, self.ys, self.problem.form, self.layout
        layout = native.Layout(here.samples, here.size, here.segments, here.dtype, here.device)
        if any(id(p) not in stand_ins for p in self.params):
            raise CaptureError("a tensor that wants a gradient is a global variable of func's, or in a tuple")
        params = tuple(stand_ins[id(p)] for p in self.params)
        forward = Dynamics(func, form, ys[0], partial(native.copy, layout))
        dynamics = AdjointDynamics(forward, stack_for(native, form, ys[0]), params, False, config.warns)
        outputs, gradients = torch.empty_like(ys), torch.empty_like(ys)
        output_times = torch.empty(len(ys), dtype=torch.float64, device=ys.device)
        rtol, atol = output_times.new_empty(()), output_times.new_empty(())
        in_norm = [not config.seminorm] * len(params)
        quadrature = Quadrature([x.clone() for x in dynamics.zeros], self.tableau, native, rtol, atol, in_norm)
        dynamics.quadrature = quadrature

        def arrive(now: Tensor, _: Tensor, z: Tensor) -> Tensor:
            """At an output time y is the forward solve's, and a jumps by the gradient that arrives there."""
            here = output_times == now
            i = here.to(torch.uint8).argmax(0, keepdim=True)
            arrived = torch.stack([outputs.index_select(0, i)[0], z[1] - gradients.index_select(0, i)[0]])
            return torch.where(here.any(), arrived, z)

        rtols, atols, grid, times = self.given.places(ys.device)
        loop = CapturedLoop(
            dynamics, self.tableau, layout, rtols, atols, config.policy, grid, times, None, quadrature, arrive,
            y0=torch.stack([ys[-1], ys[-1]]), first_step=config.first_step is not None,
        )  # fmt: skip
        return loop, [outputs, gradients, output_times, rtol, atol]

    def _fill(self, captured: Captured) -> None:
        outputs, gradients, times, *tolerances = captured.inputs
        outputs.copy_(self.ys)
        gradients.copy_(self.gradients)
        times.copy_(self.outputs.tensor)
        for place, given in zip(tolerances, (self.config.rtol, self.config.atol)):
            place.copy_(given.min()) if isinstance(given, Tensor) else place.fill_(given)
        captured.loop.y[0] = self.ys[-1]
        captured.loop.y[1] = -self.gradients[-1]
        self.given.fill(captured)
        captured.fill_slots(self.bound)
