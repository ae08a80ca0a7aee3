"""The adaptive loop: evaluate the stages, judge the step, move or stay.

Python calls func and decides what happens next; all numbers are the ops'. One loop serves one step-size controller
for the whole state (B = 1) and one for each sample. What a solve has under way is in march.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .._ops import backend_of, reference
from .._ops.contract import Grid, Layout, Policy, RightHandSide, neighbour
from ..control import Times
from ..methods import Tableau
from .course import table_of
from .hooks import NO_HOOKS, Hooks
from .march import ACCEPTED, FAILED, RUNNING, March
from .measure import Measure, Norm
from .outcome import Outcome
from .outputs import column, interpolant_of
from .quadrature import Quadrature
from .segment import BatchSegment, RungeKuttaSegment

AtJump = Callable[[Tensor, Tensor, Tensor], Tensor]
_THE_ONLY = torch.ones(1, dtype=torch.bool, device="cpu")  # sample, of those on a discontinuity


class AdaptiveLoop(Outcome):
    """An adaptive explicit Runge-Kutta solve.

    Args:
        dynamics: func, on packed states.
        tableau: the method.
        layout: the state's, from the backend that is to do the work.
        rtol, atol: numbers, or tensors with one for each number of the state.
        policy, grid: of the step-size controller.
        times: the output times; grid.times holds their values on the device.
        norm: of the scaled error of the state and those of the integrals, instead of the largest RMS over the segments.
        quadrature: integrals that are carried along and have a share in the norm.
        at_jump: called at each discontinuity with the samples' times, [B], which of them are there, [B], and the state;
            returns the state behind it.
        hooks: what else is called.
        check_every: after how many steps of several samples is asked whether they are done. Between, none waits for the
            device: they go on as if some samples had moved and others not, which is right whatever they did. Where
            steps have to be looked at one by one, for gradients, hooks or discontinuities, they are.
    """

    def __init__(
        self,
        dynamics: RightHandSide,
        tableau: Tableau,
        layout: Layout,
        rtol: float | Tensor,
        atol: float | Tensor,
        policy: Policy,
        grid: Grid,
        times: Times,
        norm: Norm | None = None,
        quadrature: Quadrature | None = None,
        at_jump: AtJump | None = None,
        hooks: Hooks = NO_HOOKS,
        check_every: int = 1,
    ) -> None:
        self.check_every = check_every
        self.dynamics, self.tableau, self.layout = dynamics, tableau, layout
        self.rtol, self.atol, self.grid, self.times = rtol, atol, grid, times
        self.norm, self.quadrature, self.at_jump, self.hooks = norm, quadrature, at_jump, hooks
        self.single = layout.samples == 1 and grid.times.dim() == 1
        self.ops = ops = backend_of(layout)
        layouts = [layout] if quadrature is None else [layout, *quadrature.layouts]
        self.controller = ops.Controller(layouts, policy, grid, tableau.abscissae)
        self.interpolant, self.table = interpolant_of(ops, tableau), table_of(ops, tableau)
        self.measure = Measure(ops, layout, tableau, rtol, atol, norm, quadrature, self.controller)
        self.steps = ops.Steps(layout, self.table, self.interpolant, self.controller, rtol, atol)
        self._kept_start: Tensor | None = None
        self.evals_before_steps = 0  # of func: those of the start
        self.n_jumps: int | Tensor = 0  # of each sample: discontinuities behind which func was evaluated

    def solve(self, y0: Tensor, first_step: float | Tensor | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]. A first step is for all samples, or [B].

        Raises:
            SolveError: says why and where the solve could not go on.
        """
        if first_step is None and self.single and self.unwatched:
            return self._solve_at_once(y0)
        march = March(self, y0, first_step)
        while march.flags & RUNNING:
            march.step()
            end = None if march.plain else march.look()
            if end is not None:
                return torch.stack([y0, end])
            march.settle()
        return march.finish(y0)

    def _solve_at_once(self, y0: Tensor) -> Tensor:
        """A joint solve at whose steps nobody looks, from discontinuity to discontinuity."""
        self.n_jumps, y = 0, y0
        t0: Tensor | None = self.start()
        out: Any = self.new_outputs  # a tensor when the first step is chosen
        ks: list[Any] = [None] * (len(self.table.rows) + 1)
        while True:
            y, y1, flags, out = self.steps.take(y, ks, self.dynamics, out, t0)
            if flags & ACCEPTED:
                y, ks[0] = y1, ks[-1]
            if not flags & RUNNING:
                break
            behind, y = self.pass_jump(y)
            t0, ks[0] = None, self.dynamics(behind, y)
        if flags & FAILED:
            self.fail(y, ks[0])
            out = torch.where(column(self.left(), out), y, out)
        return out  # type: ignore[no-any-return]

    @property
    def new_outputs(self) -> Callable[[Tensor], Tensor]:
        """What makes a place for all outputs, [T, *y0.shape], for a start y0."""
        return partial(self.ops.new_states, len(self.times.values))

    def fail(self, y: Tensor, k: Tensor) -> None:
        """Tells of a failure at a state, where the derivative is k."""
        self.hooks.fail(self.error(y, k))

    @property
    def unwatched(self) -> bool:
        """Whether nobody looks at single steps: no graph, no tape, no hook, no norm of the user's, no integrals."""
        return not (torch.is_grad_enabled() or self.hooks.watching or self.norm or self.quadrature)

    @property
    def dense_output(self) -> reference.Interpolant:
        """The method's, which is not always what outputs are interpolated by."""
        return _dense_output_of(self.tableau)

    @property
    def n_evals(self) -> int:
        """How often func was called."""
        return self.dynamics.n_evals

    def start(self) -> Tensor:
        """The time of the first evaluations, as func sees it."""
        if self._kept_start is None:
            start = self._seen_times()[0]
        else:
            if self._kept_start._version or self._kept_start.requires_grad:  # func has done something to it
                self._kept_start = self._seen_times().clone()[0]
            start = self._kept_start
        return start if self.layout.samples == 1 else start.expand(self.layout.samples).contiguous()

    def keep_times(self) -> None:
        """Makes the times this loop's own, for another solve with the same ones: the user's may change."""
        self.times = self.times.in_tensor(self.times.tensor.new_tensor(self.times.values))
        self._kept_start = self._seen_times().clone()[0]

    def _seen_times(self) -> Tensor:
        # Two, so that the first is a view, as times of stages are: torch.compile would compile func anew for another.
        return self.times.tensor[:2].to(device=self.layout.device, dtype=self.layout.real_dtype)

    def on_jump(self) -> Tensor:
        """Which samples have just arrived at a discontinuity, where one has: [B]."""
        if self.layout.samples == 1:
            return _THE_ONLY
        now, stops = self.controller.field("t"), self.grid.jump_t
        assert stops is not None
        stops = stops.to(now.device)
        there = torch.isin(now, stops) if stops.dim() == 1 else (now == stops).any(0)
        arrived: Tensor = (self.controller.field("accepted") != 0) & there
        return arrived

    @cached_property
    def behind(self) -> dict[float, Tensor]:
        """For each discontinuity of the only sample the time just behind it, as func sees it."""
        assert self.grid.jump_t is not None
        jumps = self.grid.jump_t.reshape(-1)
        seen = jumps.to(device=self.layout.device, dtype=self.layout.real_dtype)
        # Views of two numbers or more, as times of stages are: torch.compile would compile func anew for others.
        ahead = neighbour(torch.cat([seen, seen[-1:]]), torch.full_like(seen[:1], self.times.sign))
        return dict(zip(jumps.tolist(), ahead.unbind()))

    def pass_jump(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The time just behind the discontinuity that the only sample is at, as func sees it, and the state there."""
        now = self.controller.field("t")
        if self.at_jump is not None:
            y = self.at_jump(now, _THE_ONLY, y)
        return self.behind[float(now)], y

    def field(self, name: str) -> float:
        """A number of the only sample's step state."""
        return float(self.controller.field(name))

    def batch_segment(
        self, polynomial: Any, y: Tensor, ks: list[Tensor], dt: Tensor, shift: Tensor | None
    ) -> BatchSegment:
        """The step just judged, from y, sample by sample."""
        return BatchSegment(self.layout, polynomial, self.controller, y, list(ks), dt, shift)

    def segment(
        self,
        polynomial: Any,
        y: Tensor,
        ks: list[Tensor],
        dt: Tensor,
        shift: Tensor | None,
        y1: Tensor | None = None,
    ) -> RungeKuttaSegment:
        """The step just accepted, from y, and to y1 where the polynomial leads there."""
        t0, t1, size = (self.field(name) for name in ("t_prev", "t", "dt_prev"))
        shift = None if shift is None else shift.reshape(())
        return RungeKuttaSegment(self.layout, polynomial, t0, t1, size, y, list(ks), dt, shift, y1)


@lru_cache(maxsize=64)
def _dense_output_of(tableau: Tableau) -> reference.Interpolant:
    return reference.Interpolant(tableau.dense, tableau.end)
