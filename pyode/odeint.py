"""odeint: solve an initial value problem, with gradients through the steps taken."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import methods
from ._ops import backend_for
from ._ops.contract import Grid, Policy
from .callbacks import callbacks_of
from .compiled.dynamics import CompiledDynamics, compiled_once
from .control import (
    STEPS_TO_EVENT,
    Times,
    check_dict,
    check_options,
    check_times,
    check_tolerance,
    first_step_from,
    grid_from,
    policy_from,
    times_until_event,
)
from .errors import DynamicsError, InvalidType, SolveError, Status
from .methods import Method
from .solution import Stats
from .state import Dynamics, Form, Func, State, check_y0
from .stepping.event import EventSearch
from .stepping.fixed_grid import check_interp, grid_of
from .stepping.hooks import Callback, Hooks
from .stepping.loops import loop_for
from .stepping.segment import Segment


def odeint(
    func: Func,
    y0: State,
    t: Tensor,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    *,
    event_fn: Any = None,
) -> Any:
    """Solves dy/dt = func(t, y) with y(t[0]) = y0, and returns y at every time of t.

    Gradients reach y0, t, and whatever func uses, by backpropagation through the steps taken, any number of times.
    Step sizes count as constants; output times act through the interpolant, t[0] by shifting all steps.

    Args:
        func: called as func(t, y) with t a 0-dim tensor of y's real dtype and device; returns dy/dt, of y's shape.
            It may keep what it gets, and must not write into y.
        y0: a tensor of any shape, or a tuple of tensors; float32, float64, complex64, complex128, or bfloat16 and
            float16, which are computed with in float32.
        t: [T] floating, strictly increasing or decreasing.
        rtol, atol: the error estimate of a step is kept below atol + rtol |y|, in the root-mean-square sense; for a
            tuple, in each part. Numbers, tensors that broadcast to y0, or for a tuple one for each part.
        method: "dopri5" (default), "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun" choose their steps;
            "euler", "midpoint", "heun2", "heun3", "rk4" take those that t or the options prescribe.
        options: for methods that choose their steps: first_step, min_step, max_step, safety (0.9), ifactor (10),
            dfactor (0.2), max_num_steps (between two output times), norm (of the scaled error, a function of the
            state), step_t and jump_t (times at which steps end, and at which func is discontinuous), dtype (accepted;
            time is always float64). For the others: step_size or grid_constructor(func, y0, t), interp ("linear" or
            "cubic"), perturb. For all: stats, a `pyode.Stats` that counts are added to; on_failure, "raise" (default)
            or "return", which warns and repeats the last good state; compile, True to make the solve one native call
            (see `pyode.compile`).
        event_fn: a function of (t, y) that returns a tensor of one or several numbers: the solve ends where the first
            of them changes its sign. t then has two entries: where the solve starts, and on which side it goes on. A
            solve that starts on an event ends there, unless options has skip_initial_event=True, which waits until it
            has been left. options' event_t_max bounds the search; without it, max_num_steps does (100 000 by default),
            or 20 000 steps of a method that does not choose them and needs step_size here. The event's time carries no
            gradient: that of `odeint_event` does.

    Returns:
        [T, *y0.shape], or a tuple of such tensors. With event_fn, the time of the event, a 0-dim tensor, and the states
        at the start and at the event, [2, *y0.shape].

    Raises:
        InvalidValue, InvalidType: an argument is wrong; nothing has been computed.
        DynamicsError: func returned something that is not dy/dt, or wrote into its input.
        SolveError: the step size became too small, max_num_steps was reached, func is not finite, there was no event.

    Source:
        Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, sections II.1 to II.6; the interface is
        torchdiffeq's.
    """
    if type(func) is CompiledDynamics and not options and event_fn is None:
        from .compiled.solve import solve_again  # only those who compile wait for its import

        again = solve_again(func, y0, t, rtol, atol, method, lambda y: odeint(func.func, y, t, rtol, atol, method))
        if again is not None:
            return again
    problem = pose(func, y0, t, rtol, atol, method, options, event_fn)
    solved = solve(problem)
    ys = problem.form.unpack(solved.ys, (len(problem.times.values),))
    return ys if event_fn is None else (problem.event_time(solved), ys)


@dataclass
class Problem:
    """A solve with all its arguments checked."""

    func: Func
    form: Form
    y0: Tensor  # packed
    times: Times
    method: Method
    rtol: float | Tensor
    atol: float | Tensor
    options: dict[str, Any]
    policy: Policy
    grid: Grid
    first_step: float | None
    callbacks: dict[str, Callback]
    event: Callable[[float, Tensor], Tensor] | None
    compiled: CompiledDynamics | None = None

    def event_time(self, solved: Solved) -> Tensor:
        """The time at which a solve with an event has ended, as t has times."""
        return self.times.tensor.new_tensor(solved.end)


@dataclass
class Solved:
    """What a solve has come to.

    Attributes:
        ys: the packed states at the output times, [T, *y0.shape], with a graph behind them where gradients are enabled.
        last_step: the size of the last step, if the method chose it.
        end: where the solve ended: at the last output time, at the event, or where it failed.
        n_reached: how many output times it reached; the states behind them, if any, are all that at the end.
    """

    ys: Tensor
    last_step: float | None
    end: float
    n_reached: int


def pose(
    func: Func,
    y0: State,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Any = None,
) -> Problem:
    """Checks everything that can be checked before func is called."""
    if not callable(func):
        raise InvalidType(f"func must be callable as func(t, y), not a {type(func).__name__}")
    check_y0(y0)
    times = check_times(t)
    found = methods.find(method)
    options = {} if options is None else check_dict(options, "options")
    check_options(options, found)
    check_interp(options)
    if event_fn is not None:
        times = times_until_event(times, options)
        options = {"max_num_steps": STEPS_TO_EVENT, **options} if found.adaptive else options
    compiled = func if isinstance(func, CompiledDynamics) else compiled_once(func) if options.get("compile") else None
    if compiled is not None:
        func = compiled.func
    form = Form(y0)
    packed = form.pack(y0)
    if t.device != packed.device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=3)
    return Problem(
        func=func,
        form=form,
        y0=packed,
        times=times,
        method=found,
        rtol=check_tolerance(rtol, "rtol", form, packed),
        atol=check_tolerance(atol, "atol", form, packed),
        options=options,
        policy=policy_from(options, found),
        grid=grid_from(options, times, packed.device),
        first_step=first_step_from(options),
        callbacks=callbacks_of(func, found, times.tensor, form.unpack),
        event=None if event_fn is None else event_of(event_fn, form, packed.device),
        compiled=compiled,
    )


def event_of(event_fn: Any, form: Form, device: torch.device) -> Callable[[float, Tensor], Tensor]:
    """A user's event function, on a time and a packed state."""
    if not callable(event_fn):
        raise InvalidType(f"event_fn must be callable as event_fn(t, y), not a {type(event_fn).__name__}")

    def event(t: float, y: Tensor) -> Tensor:
        value = event_fn(torch.tensor(t, dtype=torch.float64, device=device), form.unpack(y))
        if not isinstance(value, Tensor) or value.numel() == 0:
            raise DynamicsError(f"event_fn must return a tensor of one or several numbers, not {value!r}")
        return value

    return event


def solve(problem: Problem, watch: Callable[[Segment], Tensor | None] | None = None) -> Solved:
    """Carries out a solve; `watch` is told every accepted step."""
    y0, times, form, options = problem.y0, problem.times, problem.form, problem.options
    solved = Solved(y0.unsqueeze(0), None, times.values[-1], len(times.values))
    if len(times.values) == 1:
        solved.ys = solved.ys.clone()
        return solved
    search = None
    if problem.event is not None:
        tolerance = problem.atol if isinstance(problem.atol, float) else float(problem.atol.min())
        skip = bool(options.get("skip_initial_event", False))
        watch = search = EventSearch(problem.event, times.values[0], y0, times.values[-1], tolerance, skip)
        if search.time is not None:
            return Solved(torch.stack([y0, y0]), None, search.time, 1)

    def fail(error: SolveError) -> None:
        if problem.event is not None and (error.status is Status.TOO_MANY_STEPS or not math.isfinite(error.t)):
            error = SolveError(Status.NO_EVENT, error.t, error.dt, error.n_steps)
        if options.get("on_failure", "raise") == "raise":
            raise error
        warnings.warn(f"the solve failed, and its last state stands for the rest: {error}", stacklevel=4)
        solved.end = error.t
        solved.n_reached = sum(times.sign * (t - error.t) <= 0 for t in times.values)

    if problem.compiled is not None and problem.event is None and watch is None and not problem.callbacks:
        from .compiled.solve import solve_compiled

        outcome = solve_compiled(
            problem.compiled, form, y0, times, problem.method, problem.rtol, problem.atol, problem.policy, problem.grid,
            problem.first_step, options, fail, lambda y: solve(replace(problem, compiled=None, y0=y)).ys,
        )  # fmt: skip
        if outcome is not None:
            solved.ys, solved.last_step = outcome
            return solved

    with torch.cuda.device(y0.device) if y0.device.type == "cuda" else nullcontext():
        ops = backend_for(y0)
        segments = form.segments if form.is_tuple else (0, y0.numel())
        layout = ops.Layout(1, y0.numel(), segments, y0.dtype, y0.device)
        dynamics = Dynamics(problem.func, form, y0, partial(ops.copy, layout))
        norm = options.get("norm")
        loop = loop_for(
            problem.method,
            dynamics,
            layout,
            times,
            problem.rtol,
            problem.atol,
            problem.policy,
            problem.grid,
            options,
            lambda: grid_of(options, times, problem.func, form.unpack(y0)),
            None if norm is None else lambda error, _: norm(form.unpack(error)),
            hooks=Hooks(watch=watch, fail=fail, **problem.callbacks),
        )
        try:
            solved.ys, solved.last_step = loop.solve(y0, problem.first_step), loop.last_step
        finally:
            loop.add_to(options.get("stats"))
    if search is not None:
        if search.time is not None:
            solved.end, solved.n_reached = search.time, 1
        elif solved.end == times.values[-1]:
            stats = Stats()
            loop.add_to(stats)
            fail(SolveError(Status.NO_EVENT, solved.end, loop.last_step or math.nan, stats.n_steps))
    return solved
