"""The backward solve of samples with steps of their own as one launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import graph_loop
from ._ops.contract import Layout
from .captures import BoundFunc, Captured, Key, captured_for, captured_solves, standing_for, surroundings
from .control import UnreadTimes, check_sample_times
from .device_solve import DeviceSolve, Given, launch, obstacle, unless
from .gradients.backsolve_samples import Found, SampleArriving, SampleBacksolve, SampleBacksolveConfig, effects_of
from .problem import Problem, for_one_sample
from .state import Func
from .stepping.captured import CapturedLoop
from .stepping.hooks import Hooks, raise_it
from .stepping.segment import BatchSegment


def backsolve_samples_on_device(
    problem: Problem, flat: Callable[[Func], Func], config: SampleBacksolveConfig, arriving: SampleArriving
) -> Found | None:
    """The gradients that SampleBacksolve finds; None, with a warning of why, if that can't be.

    Args:
        problem: of the forward solve.
        flat: makes of its func one of times [B] and packed states [B, D].
        config, arriving: as those of SampleBacksolve.
    """
    why = obstacle(arriving.ys, config.tableau) or ("compact looks at every step" if config.compact else None)

    def solve() -> Found:
        return DeviceSampleBacksolve(problem, flat, config, arriving).solve()

    return unless(why, solve, config.options, "adjoint_options")


FILLED = ("times", "ys", "gradients")  # what is copied in at every solve


class CapturedSampleBacksolve(SampleBacksolve):
    """A backward solve at which nobody looks, with places of its own for times, states and gradients.

    Attributes:
        all_effects: [T, B] what moving each output time does, found before.
        n_integrated: [] int64, how often func was evaluated for the integrals.
    """

    def __init__(self, *further: Any) -> None:
        super().__init__(*further)
        self.all_effects = torch.zeros_like(self.times)
        self.n_integrated = torch.zeros((), dtype=torch.int64, device=self.times.device)

    def fill(self, arriving: SampleArriving, effects: Tensor | None) -> None:
        """Makes it the backward solve of these, from its beginning."""
        for name in FILLED:
            getattr(self, name).copy_(getattr(arriving, name))
        if effects is not None:
            self.all_effects.copy_(effects)
        for total in (self.time_gradients, self.n_integrated, *self.param_gradients):
            total.zero_()

    def effects(self, now: Tensor, y: Tensor, gradients: Tensor) -> Tensor:
        """See SampleBacksolve."""
        return self.all_effects

    def watch(self, segment: BatchSegment) -> None:
        """See SampleBacksolve; here of steps that no sample has accepted, too."""
        self.some, before = segment.accepted.any(), self.n_evals
        super().watch(segment)
        self.n_integrated += self.some * (self.n_evals - before)

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """See SampleBacksolve."""
        super().add(total, torch.where(self.some, gradient, 0))


class DeviceSampleBacksolve(DeviceSolve):
    """The backward solve for one forward solve of samples; see `SampleBacksolve`."""

    def __init__(
        self,
        problem: Problem,
        flat: Callable[[Func], Func],
        config: SampleBacksolveConfig,
        arriving: SampleArriving,
    ) -> None:
        times, ys = arriving.times, arriving.ys
        samples, size = ys.shape[1:]
        layout = Layout(samples, 2 * size, arriving.both, ys.dtype, ys.device)
        grid = config.grid_of(times)
        ends = UnreadTimes(grid.times, partial(check_sample_times, samples=samples))
        given = Given(ends, grid, *config.tolerances, arriving.first_step)
        super().__init__(config.tableau, layout, given)
        self.problem, self.flat, self.config, self.arriving = problem, flat, config, arriving
        self.bound = BoundFunc(problem.written, problem.args)
        form = problem.form
        structure = form.per_sample, tuple(form.shapes), form.tree and str(form.tree.spec)
        self.key: Key = (
            self.bound.key, "backwards", ys.shape, ys.dtype, ys.device, structure, config.tableau.name,
            astuple(config.policy), self.bound.which(arriving.params), arriving.with_time, times.shape, given.kind,
            surroundings(),
        )  # fmt: skip

    def solve(self) -> Found:
        """Returns the gradients with respect to y0, [B, D], the times, [T, B], and the parameters."""
        wanted = self.arriving.with_time and captured_solves.refused(self.key) is None
        self.effects = self._effects() if wanted else None
        captured = captured_for(self.key, self.bound, self.layout.device, self._make, self._fill, graph_loop.GraphLoop)

        def collect(loop: Any) -> Found:
            a, of_times, of_params = loop.dynamics.found(loop.out[1])
            self._n_integrated = loop.dynamics.n_integrated.clone()
            found = a, of_times.clone(), [total.clone() for total in of_params]
            self.read(loop)
            return found

        found = launch(captured, self.key, partial(self._fill, captured), collect)
        stats, times = self.config.options.get("stats"), self.arriving.times
        if stats is not None and bool((times[0] != times[-1]).any()):  # some had a way to go
            self.add_to(stats)
        if self.end is not None:
            raise_it(self.error(*self.end))
        return found

    @property
    def n_evals(self) -> int:
        """See Outcome."""
        return super().n_evals + int(self._n_integrated)

    def _effects(self) -> Tensor:
        """[T, B] what moving each output time but the first does."""
        func, later, ys = self.flat(self.problem.func), self.arriving.times[1:], self.arriving.ys
        samples, slopes = torch.arange(self.layout.samples, device=ys.device), []
        for now in later:
            first = (later == now).to(torch.uint8).argmax(0).to(ys.device)
            slopes.append(func(now.to(ys.device, self.layout.real_dtype), ys[1:][first, samples]))
        return effects_of(torch.stack([slopes[0], *slopes]), self.arriving.gradients)

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedLoop, list[Tensor]]:
        config, arriving, ys = self.config, self.arriving, self.arriving.ys
        places = {name: x.new_empty(x.shape) for name, x in vars(arriving).items() if name in FILLED}
        inner = replace(arriving, **places, params=standing_for(arriving.params, stand_ins))
        backsolve = CapturedSampleBacksolve(self.flat(for_one_sample(func, self.problem.form)), config, inner)
        rtol, atol, grid, times = self.given.places(ys.device)
        loop = CapturedLoop(
            backsolve, self.tableau, backsolve.layout, rtol, atol, config.policy, grid, times, None, None,
            backsolve.arrive, Hooks(watch_batch=backsolve.watch),
            y0=ys.new_empty((ys.shape[1], 2, ys.shape[2])), first_step=True,
        )  # fmt: skip
        return loop, []

    def _fill(self, captured: Captured) -> None:
        backsolve = captured.loop.dynamics
        backsolve.fill(self.arriving, self.effects)
        captured.loop.y.copy_(backsolve.begin())
        self.given.fill(captured)
        captured.fill_slots(self.bound)
