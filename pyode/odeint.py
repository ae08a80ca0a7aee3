"""odeint: solve an initial value problem, with gradients through the steps taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .again import solve_again
from .compiled.dynamics import compiled_by
from .compiling import not_compiled
from .control import check_dict
from .errors import InvalidValue
from .problem import pose
from .solving import Solved, solve
from .state import Func, State
from .taped import parameters_of, solve_taped, take_steps, undone_natively
from .vmapped import check_transforms, odeint_vmapped, under_vmap

GRADIENTS = ("direct", "adjoint", "checkpoint")
GRADIENT_OPTIONS = ("gradient", "checkpoints", "graph_bytes")
ON_DEVICE = {"device_loop": True}


@not_compiled
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
    args: tuple[Any, ...] = (),
) -> Any:
    """Solves dy/dt = func(t, y) with y(t[0]) = y0, and returns y at every time of t.

    Gradients reach y0, t, and whatever func uses, by backpropagation through the steps taken, any number of times; of
    implicit methods, whose steps are differentiated by the implicit function theorem, once. With
    options={"gradient": "checkpoint"} there is no graph through the solve: see there. Step sizes count as constants;
    output times act through the interpolant, t[0] by shifting all steps.

    Args:
        func: called as func(t, y) with t a 0-dim tensor of y's real dtype and device; returns dy/dt, of y's shape.
            It may keep what it gets, and must not write into y.
        y0: a tensor of any shape, or a tuple, list, dict, named tuple, dataclass ... of tensors, nested or not (torch's
            pytrees), which func then gets and returns too; float32, float64, complex64, complex128, or bfloat16 and
            float16, which are computed with in float32.
        t: [T] floating, strictly increasing or decreasing.
        rtol, atol: the error estimate of a step is kept below atol + rtol |y|, in the root-mean-square sense; for a
            structure, in each part. Numbers, tensors that broadcast to y0, or for a structure one for each part, in a
            like structure or in a row.
        method: "dopri5" (default), "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun" choose their steps,
            "adams" its orders too. "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"
            ("fixed_adams"), and for stiff problems the implicit "implicit_euler", "implicit_midpoint", "trapezoid",
            "radauIIA3", "gl4", "radauIIA5", "gl6", "sdirk2", "trbdf2" take those that t or the options prescribe.
            "scipy_solver" is the method of SciPy's solve_ivp that the option solver names, without gradients.
        options: for methods that choose their steps: first_step, min_step, max_step, safety (0.9), ifactor (10),
            dfactor (0.2), max_num_steps (between two output times), norm (of the scaled error, a function of the
            state), step_t and jump_t (times at which steps end, and at which func is discontinuous), check_every (1;
            after how many steps of samples is asked whether they are done: on CUDA only these wait), dtype (accepted;
            time is always float64). For the others: step_size or grid_constructor(func, y0, t), interp ("linear" or
            "cubic"), perturb; for Adams methods max_order (12) and max_iters (4), for implicit ones max_iters (100) and
            newton_tol. For all: stats, a `pyode.Stats` that counts are added to; on_failure, "raise" (default)
            or "return", which warns and repeats the last good state; gradient, "direct" (default), "checkpoint", the
            same gradient, once, by undoing the steps of a Runge-Kutta method one by one, in the memory of their
            states, or "adjoint", `odeint_adjoint`'s; checkpoints, how many states "checkpoint" keeps at most, taking
            steps again (None: all); graph_bytes, how much memory it may spend on graphs that it then need not make
            again (2**24; 0 with checkpoints); params, the tensors that func uses, if it is not to be searched;
            compile, True to make the solve one native call (see `pyode.compile`), "auto" to do so where that is faster;
            device_loop, True to make it one launch on a GPU, "auto" to do so where that can be (docs/gpu.md).
        event_fn: a function of (t, y) that returns a tensor of one or several numbers: the solve ends where the first
            of them changes its sign. t then has two entries: where the solve starts, and on which side it goes on. A
            solve that starts on an event ends there, unless options has skip_initial_event=True, which waits until it
            has been left. options' event_t_max bounds the search; without it, max_num_steps does (100 000 by default),
            or 20 000 steps of a method that does not choose them and needs step_size here. The event's time carries no
            gradient: that of `odeint_event` does.
        args: passed on, as func(t, y, *args) and event_fn(t, y, *args).

    Returns:
        [T, *y0.shape], or for a structure one of such tensors. With event_fn, the time of the event, a 0-dim tensor,
        and the states at the start and at the event, [2, *y0.shape].

    Raises:
        InvalidValue, InvalidType: an argument is wrong; nothing has been computed.
        DynamicsError: func returned something that is not dy/dt, or wrote into its input.
        SolveError: the step size became too small, max_num_steps was reached, func is not finite, the equations of an
            implicit step were not solved, or there was no event.

    Source:
        Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, sections II.1 to II.6; the interface is
        torchdiffeq's.
    """
    if type(options) is dict and len(options) == 1 and "compile" in options:
        func, options = compiled_by(options["compile"], func) or func, None
    kind: Any = None
    if event_fn is None:
        again, kind = solve_again(func, y0, t, rtol, atol, method, options, args, odeint)
        if again is not None:
            return again
    if under_vmap(method):
        found = odeint_vmapped(
            odeint, take_steps, func, y0, t, options, args, event_fn, rtol=rtol, atol=atol, method=method
        )
        if found is not None:
            return found
    if options == ON_DEVICE and event_fn is None and not args:
        from .device_loop import solve_again as again_on_device  # only those who ask for it wait for its import

        again = again_on_device(func, y0, t, rtol, atol, method)
        if again is not None:
            return again
    options = {} if options is None else check_dict(options, "options")
    choice = {name: options[name] for name in GRADIENT_OPTIONS if name in options}
    options = {name: value for name, value in options.items() if name not in choice}
    gradient = choice.get("gradient", "direct")
    if gradient not in GRADIENTS:
        raise InvalidValue(f"options['gradient'] must be one of {', '.join(GRADIENTS)}, not {gradient!r}")
    check_transforms(gradient)
    if gradient == "adjoint":
        from .adjoint import odeint_adjoint  # which is made of this module's parts

        return odeint_adjoint(
            func, y0, t, rtol, atol, method, options,
            event_fn=event_fn, args=args, adjoint_params=options.get("params"),
        )  # fmt: skip
    problem = pose(func, y0, t, rtol, atol, method, options, event_fn, args)
    problem.kind = kind
    params = options.get("params")

    def solve_by_tape() -> Solved:
        return solve_taped(problem, parameters_of(func, args, params), choice, params != ())

    if gradient == "direct" or not torch.is_grad_enabled():
        solved = solve(problem)
    elif undone_natively(choice, params):
        solved = solve(problem, otherwise=solve_by_tape)
    else:
        solved = solve_by_tape()
    ys = problem.form.unpack(solved.ys, (len(problem.times),))
    return ys if event_fn is None else (problem.event_time(solved.end), ys)
