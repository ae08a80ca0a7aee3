"""The continuous adjoint of a solve in which every sample has steps of its own.

As in `backsolve`, with a(t) = dL/dy(t) for each sample and jumps where a gradient arrives. The parameters' integrals
belong to all samples together and have no share in any sample's norm: when a step has been accepted, one more product
of each stage adds to them, with the cotangents b_j dt_i a_i, zero for samples that rejected it. So nothing is kept for
each sample but (y, a).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops import backend_for
from .._ops.contract import Grid, Policy
from ..control import Times
from ..errors import warn
from ..methods import Tableau
from ..solution import Stats
from ..state import Func
from ..stepping.adaptive import AdaptiveLoop
from ..stepping.hooks import Hooks
from ..stepping.running_rows import RunningRows
from ..stepping.segment import BatchSegment
from .partials import partial_derivatives
from .survey import Survey
from .vjp import Vjp

Compacted = Callable[[], tuple[RunningRows, Func]]


def warn_of_host(options: dict[str, Any]) -> None:
    """Warns where a loop on the device is asked for."""
    if options.get("device_loop") not in (None, False, "auto"):
        warn(
            "adjoint_options['device_loop']: the host drives the backward solve, because every sample has steps of its "
            "own there"
        )


@dataclass
class SampleBacksolveConfig:
    """How the backward solve is done, all checked."""

    tableau: Tableau
    rtol: float | Tensor
    atol: float | Tensor
    policy: Policy
    grid: Grid  # of the forward solve, whose step_t and jump_t are met again
    stats: Stats | None
    warns: bool  # of tensors that func depends on and that get no gradient
    compact: bool = False  # whether func is called with some of its rows only


class SampleBacksolve:
    """The backward solve for one forward solve of B samples.

    Args:
        func: of times [B] and packed states [B, D].
        config: see there.
        times: [T, B] float64, on the `clock_device`: where the gradients arrive, in the forward solve's direction; the
            first is the start. A sample may be given its last time several times.
        ys: [T, B, D] the states there.
        gradients: [T, B, D] the gradients that arrive.
        first_step: [B], the backward solve's, signed.
        segments: of the norm of a state.
        params: the tensors whose gradients are wanted, beside y0's.
        with_time: whether those of the times are.
        compacted: returns func with the choice of its rows, if it is to be called with some only: those that still run,
            or that a step has moved.
    """

    direct = None

    def __init__(
        self,
        func: Func,
        config: SampleBacksolveConfig,
        times: Tensor,
        ys: Tensor,
        gradients: Tensor,
        first_step: Tensor,
        segments: tuple[int, ...],
        params: tuple[Tensor, ...],
        with_time: bool,
        compacted: Compacted | None = None,
    ) -> None:
        self.func, self.config, self.params, self.with_time = func, config, params, with_time
        self.running: RunningRows | None
        self.moved: RunningRows | None
        self.running, self.running_func = (None, func) if compacted is None else compacted()
        self.moved, self.moved_func = (None, func) if compacted is None else compacted()
        self.times, self.ys, self.gradients, self.first_step = times, ys, gradients, first_step
        self.n_evals = 0
        self.survey = Survey(params) if config.warns else None
        self.vjp = Vjp()
        self.param_gradients: list[Tensor] = [torch.zeros_like(p) for p in params]
        self.time_gradients = torch.zeros_like(times)
        samples, size = ys.shape[1:]
        self.ops = backend_for(ys)
        both = (*segments, *(size + s for s in segments[1:]))
        self.layout = self.ops.Layout(samples, 2 * size, both, ys.dtype, ys.device)

    def count(self, n: int) -> None:
        """See RightHandSide."""
        self.n_evals += n

    def accept(self, k: Any, y: Tensor) -> Tensor:
        """See RightHandSide."""
        raise NotImplementedError("direct is None")

    trial = accept

    def solve(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the gradients with respect to y0, [B, D], the times, [T, B], and the parameters."""
        start, everywhere = self.times[-1], torch.ones_like(self.times[-1], dtype=torch.bool)
        z = self._arrive(start, everywhere, torch.stack([self.ys[-1], torch.zeros_like(self.ys[-1])], 1))
        if bool((start != self.times[0]).any()):
            loop = self._loop()
            try:
                z = loop.solve(z, self.first_step)[1]
            finally:
                loop.add_to(self.config.stats)
        of_params = partial_derivatives(self.params, self.param_gradients)
        return z[:, 1] + self.gradients[0], self.time_gradients, of_params

    def _loop(self) -> AdaptiveLoop:
        """From the last time to the first; where gradients arrive in between, there is a discontinuity."""
        config, ends = self.config, torch.stack([self.times[-1], self.times[0]])
        jumps, given = self.times[1:-1], config.grid.jump_t
        if given is not None:
            jumps = torch.cat([jumps, given.to(jumps)[:, None].expand(-1, jumps.shape[1])]).sort(0).values
        grid = Grid(ends.contiguous(), config.grid.step_t, jumps.contiguous() if len(jumps) else None)
        # A tolerance for each number of the state is the adjoint's too.
        rtol, atol = (x if isinstance(x, float) else torch.cat([x.reshape(-1)] * 2) for x in (config.rtol, config.atol))
        return AdaptiveLoop(
            self, config.tableau, self.layout, rtol, atol, config.policy, grid, Times(ends, ends[:, 0].tolist()),
            at_jump=self._arrive, hooks=Hooks(watch_batch=self._watch),
        )  # fmt: skip

    def _arrive(self, now: Tensor, there: Tensor, z: Tensor) -> Tensor:
        """The state behind outputs: y from the forward solve, a with the gradients that arrive.

        Args:
            now: [B] the samples' times.
            there: [B] bool, which of them have just come to an output.
            z: [B, 2, D] (y, a) before it.
        """
        now, there = now.to(self.times.device), there.to(self.times.device)
        here = (self.times == now) & there
        here[0] = False  # the start: its gradient is added at the end
        arriving = here.to(z.device)
        gradient = torch.where(arriving.unsqueeze(-1), self.gradients, 0.0)
        y = self.ys[arriving.int().argmax(0), torch.arange(len(z), device=z.device)]
        if self.with_time and bool(arriving.any()):
            # Moving an output time moves the output along f.
            f = self.func(now.to(z.device, self.layout.real_dtype), y)
            effect = (f.conj() * gradient).real.sum(-1).to(self.time_gradients)
            self.time_gradients = self.time_gradients + torch.where(here, effect, 0.0)
            self.time_gradients[0] -= torch.where(here, effect, 0.0).sum(0)
        met = arriving.any(0)[:, None]
        return torch.stack([torch.where(met, y, z[:, 0]), z[:, 1] + gradient.sum(0)], 1)

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        """d/dt of (y, a)."""
        y, a = z.detach().unbind(1)
        f, (slope,) = self._products(self.running_func, t.reshape(-1), y.contiguous(), a.neg(), ())
        return torch.stack([f, torch.zeros_like(f) if slope is None else slope], 1)

    def _products(self, func: Func, t: Tensor, y: Tensor, v: Tensor, others: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        """F(t, y), and v df/dx for y, or for what is given instead."""
        self.n_evals += 1
        with torch.enable_grad():
            y = y.requires_grad_()
            f = func(t, y)
            if self.survey is not None and self.survey.look(f, (t, y)) is not None:
                self.survey = None
            return f.detach(), self.vjp(f, others or (y,), v)

    def _watch(self, segment: BatchSegment) -> None:
        """Looks at a step that some sample has accepted."""
        if self.params or self.with_time:
            if self.moved is not None:
                self.moved.only(segment.accepted)
            self._add_integrals(segment)
        if self.running is not None:
            self.running.look(segment.controller)

    def _add_integrals(self, segment: BatchSegment) -> None:
        """Adds an accepted step's share of the parameters' and the times' integrals."""
        tableau, dt = self.config.tableau, torch.where(segment.accepted, segment.size, 0.0)
        z, ks = segment.y.contiguous(), [k.contiguous() for k in segment.ks]
        for j, weight in enumerate(tableau.weights):
            if weight == 0:
                continue
            c = (0.0, *tableau.abscissae)[j]
            stage = self.ops.stage_combine(self.layout, tableau.rows[j - 1], z, ks, dt) if j else z
            y, a = stage.reshape(len(z), 2, -1).unbind(1)
            t = (segment.t0 + c * segment.size).to(y.device, self.layout.real_dtype)
            if self.with_time:
                t = t.requires_grad_()
            v = a * (-weight * dt).to(y.device, self.layout.real_dtype)[:, None]
            _, found = self._products(
                self.moved_func, t, y.contiguous(), v, (*([t] if self.with_time else []), *self.params)
            )
            totals = [*([self.time_gradients[0]] if self.with_time else []), *self.param_gradients]
            for total, gradient in zip(totals, found):
                if gradient is not None:
                    total += gradient.to(total.device)
