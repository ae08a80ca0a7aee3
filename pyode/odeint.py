"""odeint: solve an initial value problem, with gradients through the steps taken."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import methods
from ._ops import backend_for
from ._ops.contract import Grid, Policy
from .control import (
    Times,
    check_dict,
    check_options,
    check_times,
    check_tolerance,
    first_step_from,
    grid_from,
    policy_from,
)
from .errors import InvalidType
from .methods import Method
from .state import Dynamics, Form, Func, State, check_y0
from .stepping.fixed_grid import check_interp, grid_of
from .stepping.loops import loop_for


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

    Gradients reach y0, t, and whatever func uses, by backpropagation through the steps taken, any number of times; of
    implicit methods, whose steps are differentiated by the implicit function theorem, once.
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
            "euler", "midpoint", "heun2", "heun3", "rk4", and for stiff problems the implicit "implicit_euler",
            "implicit_midpoint", "trapezoid", "radauIIA3", "gl4", "radauIIA5", "gl6", "sdirk2", "trbdf2", take those
            that t or the options prescribe.
        options: for methods that choose their steps: first_step, min_step, max_step, safety (0.9), ifactor (10),
            dfactor (0.2), max_num_steps (between two output times), norm (of the scaled error, a function of the
            state), step_t and jump_t (times at which steps end, and at which func is discontinuous), dtype (accepted;
            time is always float64). For the others: step_size or grid_constructor(func, y0, t), interp ("linear" or
            "cubic"), perturb; for implicit ones max_iters (100) and newton_tol. For all: stats, a `pyode.Stats` that
            counts are added to.
        event_fn: not available yet.

    Returns:
        [T, *y0.shape], or a tuple of such tensors.

    Raises:
        InvalidValue, InvalidType: an argument is wrong; nothing has been computed.
        DynamicsError: func returned something that is not dy/dt, or wrote into its input.
        SolveError: the step size became too small, max_num_steps was reached, func is not finite, or the equations of
            an implicit step were not solved.

    Source:
        Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, sections II.1 to II.6; the interface is
        torchdiffeq's.
    """
    problem = pose(func, y0, t, rtol, atol, method, options, event_fn)
    return problem.form.unpack(solve(problem), (len(problem.times.values),))


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
    refuse_unfinished(func, event_fn)
    check_y0(y0)
    times = check_times(t)
    found = methods.find(method)
    options = {} if options is None else check_dict(options, "options")
    check_options(options, found)
    check_interp(options)
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
    )


def refuse_unfinished(func: Any, event_fn: Any) -> None:
    """Raises NotImplementedError for what torchdiffeq has and pyode does not have yet."""
    if event_fn is not None:
        raise NotImplementedError("event_fn is not available yet; solve to a later time and look for the event in it")
    for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
        # Not hasattr: a module's search for an attribute that it lacks takes as long as a stage.
        if name in getattr(func, "__dict__", ()) or hasattr(type(func), name):
            raise NotImplementedError(f"func.{name}: callbacks are not available yet; remove the attribute")


def solve(problem: Problem) -> Tensor:
    """The packed states at the output times, [T, *y0.shape], with a graph behind them where gradients are enabled."""
    return solve_and_tell(problem)[0]


def solve_and_tell(problem: Problem) -> tuple[Tensor, float | None]:
    """The same, and the size of the last step if the method chose it."""
    y0, times, form, options = problem.y0, problem.times, problem.form, problem.options
    if len(times.values) == 1:
        return y0.unsqueeze(0).clone(), None
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
        )
        try:
            return loop.solve(y0, problem.first_step), loop.last_step
        finally:
            loop.add_to(options.get("stats"))
