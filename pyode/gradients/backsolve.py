"""The continuous adjoint: gradients from a second solve, backwards in time, in memory that does not grow with steps.

With a(t) = dL/dy(t), the solve carries y, a, and integrals of a df/dp for each parameter p and for time::

    a' = -a df/dy,    dL/dp = int a df/dp dt        (Chen, Rubanova, Bettencourt, Duvenaud 2018)

It carries b = -a in a's place: what one product b df/d(y, p) returns for p is then an integrand as it is, backwards in
time. At each output time a jumps by the gradient that arrives there, and y is set to the forward solve's value. The
solve runs through all of them: they are its discontinuities, and the step size is carried on. The integrals are read by
nothing but their own share of the error norm, so they need no stage sums (stepping/quadrature.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._ops import backend_for
from .._ops.autograd import plain
from .._ops.contract import Policy
from ..control import Times, grid_from, numbers_of
from ..methods import Method
from ..solution import Stats
from ..state import Dynamics, Form, Func
from ..stepping.adaptive import AtJump
from ..stepping.fixed_grid import grid_of
from ..stepping.hooks import NO_HOOKS, Callback, Hooks
from ..stepping.loops import Loop, loop_for
from ..stepping.quadrature import Quadrature
from ..stepping.recorder import with_graph
from .augmented import AugmentedDynamics, AugmentedState
from .partials import partial_derivatives
from .survey import Survey
from .vjp import Vjp

AdjointNorm = Callable[[tuple[Tensor, ...]], Any]
Found = tuple[Tensor, Tensor | None, list[Tensor]]  # the gradients of y0, the times if wanted, and the parameters
Stack = Callable[[Tensor, Tensor], Tensor]  # of x and y to [x, -y]


@dataclass(eq=False)
class BacksolveConfig:
    """How the backward solve is done, all checked.

    Attributes:
        restart: whether every output interval is a solve of its own, with its own first step, as in torchdiffeq.
        norm: of (t, y, adj_y, *params), packed.
        fused: whether it is the largest RMS, over the parts of a tuple.
        seminorm: whether the parameters have no share in it.
        callbacks: of the backward solve; called with (t, y, adj_y, *params), packed.
        warns: whether of tensors that func depends on and that get no gradient.
    """

    method: Method
    rtol: float | Tensor
    atol: float | Tensor
    options: dict[str, Any]
    policy: Policy
    first_step: float | None
    restart: bool
    norm: AdjointNorm
    fused: bool
    seminorm: bool
    callbacks: dict[str, Callback]
    warns: bool


@dataclass(eq=False)
class Arriving:
    """The outputs of a forward solve, what arrives at them, and what is wanted of the backward solve.

    Attributes:
        times: of the outputs.
        ys: [T, ...] the outputs, packed.
        gradients: [T, ...] the gradients that arrive at them.
        params: the tensors whose gradients are wanted, beside y0's.
        with_time: whether those of the times are.
    """

    times: Times
    ys: Tensor
    gradients: Tensor
    params: tuple[Tensor, ...]
    with_time: bool


def backwards(times: Times, options: dict[str, Any]) -> tuple[Times, dict[str, Any]]:
    """The ends of the backward solve, and its options: the output times between are its discontinuities."""
    values = times.values
    ends = Times(times.tensor.detach()[[-1, 0]], [values[-1], values[0]])
    options = dict(options)
    jumps = options.get("jump_t")
    jumps = [] if jumps is None else numbers_of(jumps)
    options["jump_t"] = [*jumps, *(v for v in values[1:-1] if v not in jumps)]
    stops = options.get("step_t")
    if stops is not None:
        options["step_t"] = [v for v in numbers_of(stops) if v not in values]
    return ends, options


def interval(times: Times, i: int) -> Times:
    """That which ends at output time i, backwards."""
    return Times(times.tensor.detach()[i - 1 : i + 1].flip(0), [times.values[i], times.values[i - 1]])


def stack_for(ops: ModuleType, form: Form, y: Tensor) -> Stack:
    """What makes a state of the backward solve of two like y, a state of the forward one."""
    half = ops.Layout(1, form.segments[-1], form.segments, y.dtype, y.device)
    stack: Stack = ops.opposites(half, y.new_empty((2, *y.shape)))
    return stack


def effect_of_time(forward: Dynamics, t: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of an output's time: moving it moves the output along f."""
    real = y.real.dtype if y.is_complex() else y.dtype
    f = forward(t.detach().to(device=y.device, dtype=real), y)
    return torch.sum((f.conj() * gradient).real if f.is_complex() else f * gradient)


class AdjointDynamics:
    """d/dt of (y, b), stacked; notes the integrands of time and the parameters."""

    def __init__(self, forward: Dynamics, stack: Stack, params: tuple[Tensor, ...], time: bool, warns: bool) -> None:
        self.forward, self.stack, self.params, self.time = forward, stack, params, time
        self.quadrature: Quadrature | None = None
        self.survey = Survey(params) if warns else None
        self.vjp = Vjp()
        self.zeros = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in params]

    calls = func = None

    @property
    def n_evals(self) -> int:
        """See RightHandSide."""
        return self.forward.n_evals

    def accept(self, k: Any, y: Tensor) -> Tensor:
        """See RightHandSide."""
        return self.forward.accept(k, y)

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        """See RightHandSide."""
        quadrature = self.quadrature
        wanted = quadrature is not None and quadrature.wanted
        y, b = z[0], z[1]  # quicker than unbind()
        inputs: tuple[Tensor, ...] = (y.requires_grad_(),)
        if wanted and self.time:
            t = t.detach().requires_grad_()
            inputs += (t,)
        if wanted:
            inputs += self.params
        f = with_graph(self.forward, t, y)
        if wanted and self.survey is not None and self.survey.look(f, (t, y)) is not None:
            self.survey = None
        product, *integrands = self.vjp(f, inputs, b)
        if quadrature is not None:
            quadrature.note(self._plain(t, integrands) if wanted else None)
        return self.stack(f, torch.zeros_like(b) if product is None else plain(product))

    def trial(self, t: Tensor, z: Tensor, /) -> Tensor:
        """See RightHandSide."""
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            y, b = z.unbind()
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            f, product = self.forward(t, y), None
            if f.requires_grad:
                (product,) = torch.autograd.grad(f, y, b, allow_unused=True, create_graph=recording)
        return torch.stack([f, torch.zeros_like(f) if product is None else -product])

    def _plain(self, t: Tensor, integrands: list[Tensor | None]) -> list[Tensor]:
        zeros = [torch.zeros_like(t), *self.zeros] if self.time else self.zeros
        return [zero if g is None else plain(g) for g, zero in zip(integrands, zeros)]


class Backsolve:
    """The backward solve for one forward solve.

    Args:
        func, form: the user's func, and the form of the user's state.
        config, arriving: see there.
    """

    def __init__(self, func: Func, form: Form, config: BacksolveConfig, arriving: Arriving) -> None:
        self.form, self.config, self.arriving, self.times = form, config, arriving, arriving.times
        ys = arriving.ys
        self.ys, self.gradients = plain(ys).unbind(), plain(arriving.gradients).unbind()
        self.time = arriving.with_time
        # torchdiffeq carries the time integral, and its share of the norm, whether it is wanted or not.
        self.time_carried = self.time or (config.restart and config.method.adaptive)
        self.func = func
        self.forward = Dynamics(func, form, self.ys[0])
        self.evals_counted = 0
        new_times = self.times.tensor.new_zeros(len(self.times.values))
        self.time_gradients = list(new_times.to(ys.device)) if self.time else []
        n, segments = form.segments[-1], form.segments
        self.ops = backend_for(ys)
        self.stack = stack_for(self.ops, form, self.ys[0])
        self.layout = self.ops.Layout(1, 2 * n, (*segments, *(n + s for s in segments[1:])), ys.dtype, ys.device)
        self.dynamics = AdjointDynamics(self.forward, self.stack, arriving.params, self.time_carried, config.warns)
        self.rtol, self.atol = (x if isinstance(x, float) else torch.stack([x, x]) for x in (config.rtol, config.atol))

    def solve(self) -> Found:
        """Returns the gradients with respect to y0 (packed), t (None if not wanted) and the parameters."""
        last = len(self.times.values) - 1
        if last == 0:
            t = torch.zeros_like(self.times.tensor) if self.time else None
            return self.gradients[0], t, list(self.dynamics.zeros)
        z = self._arrive(last, self.gradients[last], None)
        quadrature = self._quadrature()
        if self.time:
            quadrature.values[0] = quadrature.values[0] - self.time_gradients[last].to(quadrature.values[0])
        self.dynamics.quadrature = quadrature if quadrature.values else None
        with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
            stepwise = self.config.restart or not (self.config.method.adaptive and self.config.method.one_step)
            z = self._interval_by_interval(z, quadrature) if stepwise else self._through(z, quadrature)
        results = list(quadrature.values)
        of_start = results.pop(0) if self.time_carried else None
        if self.time and of_start is not None:
            self.time_gradients[0] = of_start.to(self.time_gradients[0])
        return (
            self.gradients[0] - z[1],
            torch.stack(self.time_gradients) if self.time else None,
            partial_derivatives(self.dynamics.params, results),
        )

    def _quadrature(self) -> Quadrature:
        config, like = self.config, self.ys[0]
        values = list(self.dynamics.zeros)
        shares = [config.fused and not config.seminorm] * len(values)
        if self.time_carried:
            real = like.real.dtype if like.is_complex() else like.dtype
            values.insert(0, torch.zeros((), dtype=real, device=like.device))
            shares.insert(0, config.fused)
        rtol, atol = (x if isinstance(x, float) else float(x.min()) for x in (config.rtol, config.atol))
        return Quadrature(values, config.method, self.ops, rtol, atol, shares)

    def _jump(self, i: int, z: Tensor, quadrature: Quadrature) -> Tensor:
        """The state behind output i, where the gradient that arrives there adds to a."""
        return self._arrive(i, self.gradients[i] - z[1], quadrature)

    def _arrive(self, i: int, a: Tensor, quadrature: Quadrature | None) -> Tensor:
        """The state behind output i, of the forward solve's y and a."""
        if self.time and i > 0:
            effect = self._effect(i)
            if quadrature is not None:
                quadrature.values[0] = quadrature.values[0] - effect
        return self.stack(self.ys[i], a)

    def _effect(self, i: int) -> Tensor:
        """The gradient of output time i, which is noted."""
        effect = effect_of_time(self.forward, self.times.tensor[i], self.ys[i], self.gradients[i])
        self.time_gradients[i] = effect.to(self.time_gradients[i])
        return effect

    def _through(self, z: Tensor, quadrature: Quadrature) -> Tensor:
        """One solve from the last output time to the first, with a jump at each between."""
        values = self.times.values
        pending = list(range(1, len(values) - 1))

        def at_jump(t: Tensor, _: Tensor, z: Tensor) -> Tensor:
            if not pending or float(t) != values[pending[-1]]:
                return z  # a discontinuity of the user's
            return self._jump(pending.pop(), z, quadrature)

        return self._run(z, *backwards(self.times, self.config.options), quadrature, at_jump)

    def _interval_by_interval(self, z: Tensor, quadrature: Quadrature) -> Tensor:
        """A solve for every output interval, from the last to the first."""
        for i in range(len(self.times.values) - 1, 0, -1):
            z = self._over_interval(i, z, quadrature)
            if i > 1:
                z = self._jump(i - 1, z, quadrature)
        return z

    def _over_interval(self, i: int, z: Tensor, quadrature: Quadrature) -> Tensor:
        """Solves from output i to the one before it."""
        return self._run(z, interval(self.times, i), self.config.options, quadrature)

    def _norm(self, error: Tensor, integral_errors: list[Tensor]) -> Any:
        """The norm of the scaled errors of the whole adjoint state."""
        return self.config.norm(self._whole(error, integral_errors))

    def _whole(self, z: Tensor, integrals: list[Tensor]) -> tuple[Tensor, ...]:
        """(t, y, adj_y, *params), as torchdiffeq has the adjoint state."""
        if not self.time_carried:
            integrals = [z.new_zeros((), dtype=self.layout.real_dtype), *integrals]
        y, b = z.unbind()
        return (integrals[0], y, -b, *integrals[1:])

    def _hooks(self, whole: Callable[[Tensor], tuple[Tensor, ...]]) -> Hooks:
        """The user's callbacks, which are given (t, y, adj_y, *params)."""
        if not self.config.callbacks:
            return NO_HOOKS

        def on_whole(callback: Callback) -> Callback:
            return lambda t, z, dt: callback(t, whole(z), dt)

        return Hooks(**{name: on_whole(callback) for name, callback in self.config.callbacks.items()})  # type: ignore[arg-type]

    def _run(
        self,
        z: Tensor,
        times: Times,
        options: dict[str, Any],
        quadrature: Quadrature,
        at_jump: AtJump | None = None,
    ) -> Tensor:
        """Solves from the first of two times to the second."""
        config = self.config
        if not config.method.one_step:
            return self._run_augmented(z, times, options, quadrature)
        loop = loop_for(
            config.method,
            self.dynamics,
            self.layout,
            times,
            self.rtol,
            self.atol,
            config.policy,
            grid_from(options, times, z.device),
            options,
            lambda: grid_of(options, times, self.func, self.form.unpack(z[0])),
            None if config.fused else self._norm,
            quadrature if quadrature.values else None,
            at_jump,
            self._hooks(lambda z: self._whole(z, quadrature.values)),
        )
        return self._carry_out(loop, z, options)

    def _run_augmented(self, z: Tensor, times: Times, options: dict[str, Any], quadrature: Quadrature) -> Tensor:
        """The same with the integrals as a part of the state."""
        config, state = self.config, AugmentedState(z, quadrature.values)

        def whole(flat: Tensor) -> tuple[Tensor, ...]:
            z, *integrals = state.unpack(flat)
            return self._whole(z, integrals)

        def extended(tolerance: float | Tensor) -> float | Tensor:
            if isinstance(tolerance, float):
                return tolerance
            integrals = tolerance.min().expand(sum(state.sizes[1:]), *tolerance.shape[z.dim() :])
            return torch.cat([tolerance.reshape(z.numel(), *tolerance.shape[z.dim() :]), integrals]).contiguous()

        loop = loop_for(
            config.method,
            AugmentedDynamics(self.dynamics, state),
            state.layout(self.ops, self.layout),
            times,
            extended(self.rtol),
            extended(self.atol),
            config.policy,
            grid_from(options, times, z.device),
            options,
            lambda: grid_of(options, times, self.func, self.form.unpack(z[0])),
            None if config.fused and not config.seminorm else lambda error, _: config.norm(whole(error)),
            hooks=self._hooks(whole),
        )
        z, *quadrature.values = state.unpack(self._carry_out(loop, state.pack(state.parts), options))
        return z

    def _carry_out(self, loop: Loop, z: Tensor, options: dict[str, Any]) -> Tensor:
        stats: Stats | None = options.get("stats")
        try:
            out = loop.solve(z, self.config.first_step)
        finally:
            loop.add_to(stats, self.evals_counted)
            self.evals_counted = self.dynamics.n_evals
        return out[-1]
