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
from .._ops.contract import Grid, Policy, neighbour
from ..control import Times
from ..methods import Tableau
from ..state import Func
from ..stepping.adaptive import AdaptiveLoop
from ..stepping.hooks import Hooks
from ..stepping.running_rows import RunningRows
from ..stepping.segment import BatchSegment
from .partials import partial_derivatives
from .survey import Survey
from .vjp import Vjp

Found = tuple[Tensor, Tensor, list[Tensor]]  # the gradients of y0, [B, D], of the times, [T, B], and the parameters
Compacted = Callable[[], tuple[RunningRows, Func]]


def effects_of(f: Tensor, gradients: Tensor) -> Tensor:
    """What moving a sample's time does to it, by gradients [T, B, D] that arrive there, [T, B]: it moves along f."""
    if f.is_complex():  # each real product is rounded alike wherever it stands, which complex ones are not
        f, gradients = (torch.view_as_real(x).flatten(-2) for x in (f, gradients))
    return (f * gradients).sum(-1)


@dataclass(eq=False)
class SampleBacksolveConfig:
    """How the backward solve is done, all checked."""

    tableau: Tableau
    rtol: float | Tensor
    atol: float | Tensor
    policy: Policy
    grid: Grid  # of the forward solve, whose step_t and jump_t are met again
    options: dict[str, Any]
    warns: bool  # of tensors that func depends on and that get no gradient
    compact: bool = False  # whether func is called with some of its rows only

    @property
    def tolerances(self) -> tuple[float | Tensor, float | Tensor]:
        """rtol and atol; if there is one for each number of the state, it is the adjoint's too."""
        rtol, atol = (x if isinstance(x, float) else torch.cat([x.reshape(-1)] * 2) for x in (self.rtol, self.atol))
        return rtol, atol

    def grid_of(self, times: Tensor) -> Grid:
        """From the last time to the first; where gradients arrive in between, there is a discontinuity."""
        jumps, given = times[1:-1], self.grid.jump_t
        if given is not None:
            jumps = torch.cat([jumps, given.to(jumps)[:, None].expand(-1, jumps.shape[1])]).sort(0).values
        ends = torch.stack([times[-1], times[0]])
        return Grid(ends.contiguous(), self.grid.step_t, jumps.contiguous() if len(jumps) else None)


@dataclass(eq=False)
class SampleArriving:
    """The outputs of a forward solve of B samples, what arrives at them, and what is wanted of the backward solve.

    Attributes:
        times: [T, B] float64, on the `clock_device`: where the gradients arrive, in the forward solve's direction; the
            first is the start. A sample may be given its last time several times.
        ys: [T, B, D] the states there.
        gradients: [T, B, D] the gradients that arrive.
        first_step: [B], the backward solve's, signed.
        segments: of the norm of a state.
        params: the tensors whose gradients are wanted, beside y0's.
        with_time: whether those of the times are.
    """

    times: Tensor
    ys: Tensor
    gradients: Tensor
    first_step: Tensor
    segments: tuple[int, ...]
    params: tuple[Tensor, ...]
    with_time: bool

    @property
    def both(self) -> tuple[int, ...]:
        """The segments of the norm of a state and its adjoint."""
        size = self.ys.shape[-1]
        return (*self.segments, *(size + s for s in self.segments[1:]))


class SampleBacksolve:
    """The backward solve for one forward solve of samples.

    Args:
        func: of times [B] and packed states [B, D].
        config, arriving: see there.
        compacted: returns func with the choice of its rows, if it is to be called with some only: those that still run,
            or that a step has moved.
    """

    calls = None

    def __init__(
        self,
        func: Func,
        config: SampleBacksolveConfig,
        arriving: SampleArriving,
        compacted: Compacted | None = None,
    ) -> None:
        self.func, self.config, self.params, self.with_time = func, config, arriving.params, arriving.with_time
        self.running: RunningRows | None
        self.moved: RunningRows | None
        self.running, self.running_func = (None, func) if compacted is None else compacted()
        self.moved, self.moved_func = (None, func) if compacted is None else compacted()
        self.times, self.ys, self.gradients = arriving.times, arriving.ys, arriving.gradients
        self.first_step = arriving.first_step
        self.n_evals = 0
        self.survey = Survey(self.params) if config.warns else None
        self.vjp = Vjp()
        self.param_gradients: list[Tensor] = [torch.zeros_like(p) for p in self.params]
        self.time_gradients = torch.zeros_like(self.times)
        self.behind = torch.zeros_like(self.times[0], dtype=torch.bool)  # which samples are just behind a discontinuity
        ys = self.ys
        self.ops = backend_for(ys)
        self.layout = self.ops.Layout(ys.shape[1], 2 * ys.shape[2], arriving.both, ys.dtype, ys.device)

    def accept(self, k: Any, y: Tensor) -> Tensor:
        """See RightHandSide."""
        raise NotImplementedError("calls is None")

    trial = accept

    def solve(self) -> Found:
        """Returns the gradients with respect to y0, [B, D], the times, [T, B], and the parameters."""
        z = self.begin()
        if bool((self.times[-1] != self.times[0]).any()):
            config, grid = self.config, self.config.grid_of(self.times)
            loop = AdaptiveLoop(
                self, config.tableau, self.layout, *config.tolerances, config.policy, grid,
                Times(grid.times, grid.times[:, 0].tolist()), at_jump=self.arrive, hooks=Hooks(watch_batch=self.watch),
            )  # fmt: skip
            try:
                z = loop.solve(z, self.first_step)[1]
            finally:
                loop.add_to(config.options.get("stats"))
        return self.found(z)

    def begin(self) -> Tensor:
        """(y, a) at the last times, [B, 2, D]."""
        y = self.ys[-1]
        z = self.arrive(self.times[-1], torch.ones_like(self.behind), torch.stack([y, torch.zeros_like(y)], 1))
        self.behind.zero_()  # the start is where the forward solve's end is
        return z

    def found(self, z: Tensor) -> Found:
        """What has come of it, from (y, a) at the first times."""
        of_params = partial_derivatives(self.params, self.param_gradients)
        return z[:, 1] + self.gradients[0], self.time_gradients, of_params

    def arrive(self, now: Tensor, there: Tensor, z: Tensor) -> Tensor:
        """The state behind outputs: y from the forward solve, a with the gradients that arrive.

        Args:
            now: [B] the samples' times.
            there: [B] bool, which of them have just come to an output.
            z: [B, 2, D] (y, a) before it.
        """
        now, there = now.to(self.times.device), there.to(self.times.device)
        self.behind |= there
        here = (self.times == now) & there
        here[0].zero_()  # the start: its gradient is added at the end
        arriving = here.to(z.device)
        gradient = torch.where(arriving.unsqueeze(-1), self.gradients, 0.0)
        y = self.ys[arriving.int().argmax(0), torch.arange(len(z), device=z.device)]
        if self.with_time:
            effect = torch.where(here, self.effects(now, y, gradient), 0.0)
            self.time_gradients += effect
            self.time_gradients[0] -= effect.sum(0)
        met = arriving.any(0)[:, None]
        return torch.stack([torch.where(met, y, z[:, 0]), z[:, 1] + gradient.sum(0)], 1)

    def effects(self, now: Tensor, y: Tensor, gradients: Tensor) -> Tensor:
        """[T, B], what moving the samples' times, now, does to them, by gradients [T, B, D] that arrive there."""
        f = self.func(now.to(y.device, self.layout.real_dtype), y)
        return effects_of(f, gradients).to(self.time_gradients)

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

    def watch(self, segment: BatchSegment) -> None:
        """Looks at a step that some sample has accepted."""
        if self.params or self.with_time:
            if self.moved is not None:
                self.moved.only(segment.accepted)
            self._add_integrals(segment)
            self.behind &= ~segment.accepted
        if self.running is not None:
            self.running.look(segment.controller)

    def _add_integrals(self, segment: BatchSegment) -> None:
        """Adds an accepted step's share of the parameters' and the times' integrals."""
        tableau, dt = self.config.tableau, torch.where(segment.accepted, segment.size, 0.0)
        z, ks = segment.y.contiguous(), [k.contiguous() for k in segment.ks]
        # Like the step itself its integrals see f as it is between discontinuities.
        inwards = {0.0: segment.size.sign() * self.behind, 1.0: -segment.size.sign()}
        for j, weight in enumerate(tableau.weights):
            if weight == 0:
                continue
            c = (0.0, *tableau.abscissae)[j]
            stage = self.ops.stage_combine(self.layout, tableau.rows[j - 1], z, ks, dt) if j else z
            y, a = stage.reshape(len(z), 2, self.ys.shape[-1]).unbind(1)
            t = segment.t1 if c == 1 else segment.t0 + c * segment.size
            t = t.to(y.device, self.layout.real_dtype)
            if c in inwards:
                t = neighbour(t, inwards[c].to(t))
            if self.with_time:
                t = t.requires_grad_()
            v = a * (-weight * dt).to(y.device, self.layout.real_dtype)[:, None]
            _, found = self._products(
                self.moved_func, t, y.contiguous(), v, (*([t] if self.with_time else []), *self.params)
            )
            totals = [*([self.time_gradients[0]] if self.with_time else []), *self.param_gradients]
            for total, gradient in zip(totals, found):
                if gradient is not None:
                    self.add(total, gradient.to(total.device))

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Adds a share of an integral."""
        total += gradient
