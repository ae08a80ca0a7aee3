"""odeint: solve an initial value problem, with gradients through the steps taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import backend_for
from ._ops.contract import RightHandSide
from .compiled.dynamics import CompiledDynamics, compiled_by
from .compiling import not_compiled
from .control import (
    Times,
    check_dict,
    number_from,
)
from .errors import InvalidValue, SolveError, Status, warn
from .gradients.checkpoint import checkpointed
from .gradients.reversal import Recipe
from .idle import idle_loops, keep, kind_of
from .methods import ImplicitTableau, Tableau
from .parameters import named_parameters, reachable
from .problem import Problem, pose
from .solution import Stats
from .state import Dynamics, Form, Func, State
from .stepping.event import EventSearch
from .stepping.fixed_grid import grid_of
from .stepping.hooks import NO_HOOKS, Hooks, raise_it
from .stepping.loops import Loop, loop_for
from .stepping.segment import RungeKuttaSegment, Segment
from .stepping.tape import Passed, Step, Tape
from .vmapped import check_transforms, odeint_vmapped, under_vmap

GRADIENTS = ("direct", "adjoint", "checkpoint")
PER_SAMPLE = {"control": "per_sample"}
GRADIENT_OPTIONS = ("gradient", "checkpoints", "graph_bytes")
GRAPH_BYTES = 1 << 24  # by default
STEPS_TRIED = 4  # of a solve that chooses its steps, to find out whether compiling pays


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
            compile, True to make the solve one native call (see `pyode.compile`), "auto" to do so where that is faster.
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
    if under_vmap(method):
        found = odeint_vmapped(
            odeint, take_steps, func, y0, t, options, args, event_fn, rtol=rtol, atol=atol, method=method
        )
        if found is not None:
            return found
    if type(options) is dict and len(options) == 1 and "compile" in options:
        func, options = compiled_by(options["compile"], func) or func, None
    if type(func) is CompiledDynamics and not options and event_fn is None and not args:
        from .compiled.solve import solve_again  # only those who compile wait for its import

        again = solve_again(func, y0, t, rtol, atol, method, lambda y: odeint(func.func, y, t, rtol, atol, method))
        if again is not None:
            return again
    key = None  # of a per-sample solve that may be done again
    if type(func) is CompiledDynamics and options == PER_SAMPLE and event_fn is None and not args:
        from .compiled.samples import key_of, samples_again

        key = key_of(y0, rtol, atol, "odeint", method)
        loop = samples_again(func, key, y0, t, raise_it)
        if loop is not None:
            return loop.solve(y0)
    by_loop = not (options or event_fn is not None or args or isinstance(func, CompiledDynamics))
    kind = kind_of(func, y0, t, rtol, atol, method) if by_loop else None
    idle = None if kind is None else idle_loops.take(kind)
    if idle is not None and callable(func):
        ys = idle.solve(func, y0)
        idle_loops.put(kind, idle)
        return ys
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
    params = options.get("params")
    if gradient == "direct" or not torch.is_grad_enabled() or undone_natively(problem, choice, params):
        solved = solve(problem, key=key)
        if kind is not None:
            keep(kind, problem.form, solved.loop)
    else:
        listed = parameters_of(func, args, params)
        done: list[Solved] = []

        def carry_out(quiet: Problem, tape: Tape) -> Tensor:
            done.append(solve(quiet, tape=tape))
            return done[0].ys

        ys = solve_checkpointed(problem, listed, choice, carry_out, params != ())
        solved = replace(done[0], ys=ys)
    ys = problem.form.unpack(solved.ys, (len(problem.times.values),))
    return ys if event_fn is None else (problem.event_time(solved.end), ys)


def take_steps(func: Func, y0: State, t: Tensor, rtol: Any, atol: Any, method: Any, options: dict[str, Any]) -> Tape:
    """Solves as `odeint` does, for the steps' sake."""
    problem = pose(func, y0, t, rtol, atol, method, options)
    tape = Tape(problem.y0, most=1)
    solve(problem, tape=tape)
    return tape


def parameters_of(func: Func, args: Any, params: Iterable[Tensor] | None) -> list[Tensor]:
    """What func depends on beside its arguments, as far as it can be found or is told."""
    if params is not None:
        return named_parameters(params, "params", args)
    written = func.func if isinstance(func, CompiledDynamics) else func
    return [x for _, x in reachable((written, args))]


def undone_natively(problem: Problem, choice: dict[str, Any], params: Iterable[Tensor] | None) -> bool:
    """Whether a compiled solve's own gradient is what "checkpoint" asks for: it undoes the steps, from every state.

    Not where it is to keep fewer states, or to have gradients to some tensors only.
    """
    watched = problem.event is not None or bool(problem.callbacks) or len(problem.times.values) == 1
    if problem.compiled is None or watched or params is not None or not choice.keys() <= {"gradient"}:
        return False
    return compiled_loop(problem, lambda _: None) is not None


def solve_checkpointed(
    problem: Problem,
    params: list[Tensor],
    choice: dict[str, Any],
    carry_out: Callable[[Problem, Tape], Tensor],
    warns: bool = True,
    compact: bool = False,
) -> Tensor:
    """A solve whose gradient is found by undoing its steps: its outputs, packed.

    Args:
        problem: with a graph behind y0 and the times, if there is one.
        params: what func depends on beside its arguments.
        choice: the user's options checkpoints and graph_bytes.
        carry_out: solves the problem, which has no graph, notes its steps on the tape, and returns the outputs; first
            those at the output times.
        warns: whether of tensors that func depends on and that get no gradient.
        compact: whether the backward pass calls func with the rows alone that move.
    """
    method, y0, t = problem.method, problem.y0, problem.times.tensor
    if not isinstance(method, (Tableau, ImplicitTableau)):
        raise InvalidValue(
            f"gradient 'checkpoint' needs a method whose steps depend on the state at their start alone, a Runge-Kutta "
            f"method; {method.name!r} is none. It has 'direct' and 'adjoint'"
        )
    most = choice.get("checkpoints")
    quiet = replace(problem, y0=y0.detach(), times=replace(problem.times, tensor=t.detach()))

    def grid(t: Tensor) -> Tensor:
        times = replace(problem.times, tensor=t)
        return grid_of(problem.options, times, problem.func, problem.form.unpack(quiet.y0))

    def retake(step: Step, y: Tensor, ends: Tensor, inside: Tensor) -> Tensor:
        moments = torch.cat([ends[:1], inside, ends[1:]])
        times = Times(moments, moments.tolist())
        loop = loop_of(replace(quiet, y0=y, times=times, callbacks={}), NO_HOOKS, ends)
        return loop.solve(y)[1:]

    most = None if most is None else int(number_from(choice, "checkpoints", 1, 1))
    graph_bytes = int(number_from(choice, "graph_bytes", GRAPH_BYTES if most is None else 0, 0))
    recipe = Recipe(
        problem.func, problem.form, method, None if method.adaptive else grid, most, graph_bytes, warns, compact, retake
    )
    return checkpointed(partial(carry_out, quiet), recipe, t, y0, [p for p in params if p.requires_grad])


@dataclass
class Solved:
    """What a solve has come to.

    Attributes:
        ys: the packed states at the output times, [T, *y0.shape], with a graph behind them where gradients are enabled.
        end: where the solve ended: at the last output time, at the event, or where it failed.
        n_reached: how many output times it reached; the states behind them, if any, are all that at the end.
        loop: what has done it, if there was something to do.
    """

    ys: Tensor
    end: float
    n_reached: int
    loop: Loop | None = None

    @property
    def last_step(self) -> float | None:
        """The size of the last step, if the method chose it."""
        return None if self.loop is None else self.loop.last_step


def on_device_of(y: Tensor) -> AbstractContextManager[Any]:
    """Makes a state's CUDA device the current one."""
    return torch.cuda.device(y.device) if y.device.type == "cuda" else nullcontext()


def loop_of(problem: Problem, hooks: Hooks, ends: Tensor | None = None) -> Loop:
    """The loop that carries out a solve; of a method that does not choose its steps with the given ends, if any."""
    y0, form, options = problem.y0, problem.form, problem.options
    ops = backend_for(y0)
    layout = ops.Layout(form.samples, form.segments[-1], form.segments, y0.dtype, y0.device)
    norm = options.get("norm")
    dynamics: RightHandSide = Dynamics(problem.func, form, y0, partial(ops.copy, layout))
    return loop_for(
        problem.method,
        dynamics if hooks.tape is None else hooks.tape.listening(dynamics),
        layout,
        problem.times,
        problem.rtol,
        problem.atol,
        problem.policy,
        problem.grid,
        options,
        lambda: grid_of(options, problem.times, problem.func, form.unpack(y0)) if ends is None else ends,
        None if norm is None else lambda error, _: norm_by(norm, form, error),
        hooks=hooks,
    )


def compiled_loop(
    problem: Problem, fail: Callable[[SolveError], None], key: tuple[Any, ...] | None = None
) -> Loop | None:
    """The same as one native call, for a solve that nothing watches; None if that can't be, or is not to be.

    With a key a per-sample solve is remembered, for `samples_again`.
    """
    if problem.compiled is None or (problem.compiled.auto and not compiling_pays(problem)):
        return None
    return _native_loop(problem, fail, key)


def _native_loop(
    problem: Problem, fail: Callable[[SolveError], None], key: tuple[Any, ...] | None = None
) -> Loop | None:
    # Only those who compile wait for the import.
    from .compiled.samples import sample_loop
    from .compiled.solve import compiled_loop

    assert problem.compiled is not None

    def eagerly(y0: Tensor) -> Tensor:
        return loop_of(replace(problem, y0=y0), Hooks(fail=lambda _: None)).solve(y0, problem.first_step)

    if problem.form.per_sample:
        return sample_loop(
            problem.compiled, problem.form, problem.y0, problem.times, problem.method, problem.rtol, problem.atol,
            problem.policy, problem.grid, problem.first_step, problem.options, eagerly, fail, key,
        )  # fmt: skip
    return compiled_loop(
        problem.compiled, problem.form, problem.y0, problem.times, problem.method, problem.rtol, problem.atol,
        problem.policy, problem.grid, problem.options, fail, eagerly,
    )  # fmt: skip


def norm_by(norm: Callable[[State], Any], form: Form, error: Tensor) -> Any:
    """The user's norm of a scaled error, packed: a number, for each sample that has a step size of its own."""
    value = norm(form.unpack(error))
    if form.per_sample and torch.as_tensor(value).shape != (form.samples,):
        raise InvalidValue(
            f"options['norm'] must return a number for each sample, [{form.samples}], where control is 'per_sample'; "
            f"it returned {tuple(torch.as_tensor(value).shape)}"
        )
    return value


def compiling_pays(problem: Problem) -> bool:
    """Whether a native call is faster than the eager loop: tried with the first steps of a solve, and remembered.

    As much is tried as is wanted: with gradients, the backward pass too.
    """
    compiled, y0 = problem.compiled, problem.y0
    assert compiled is not None
    few = replace(problem, options={**problem.options, "compile": "auto"})  # what has options is not solved again
    if isinstance(problem.method, Tableau) and problem.method.adaptive:
        few = replace(few, policy=replace(problem.policy, max_num_steps=STEPS_TRIED, count_per_output=False))

    def eager_loop(y: Tensor) -> Loop:
        return loop_of(replace(few, y0=y), Hooks(fail=lambda _: None))

    def native_loop(y: Tensor) -> Loop | None:
        return _native_loop(replace(few, y0=y), lambda _: None)

    return compiled.pays(native_loop, eager_loop, y0, (problem.method.name, problem.form.per_sample))


def solve(
    problem: Problem,
    watch: Callable[[Segment], Tensor | None] | None = None,
    tape: Tape | None = None,
    key: tuple[Any, ...] | None = None,
) -> Solved:
    """Carries out a solve; `watch` is told every accepted step, and the tape notes it; for a key see samples_again."""
    y0, times, options = problem.y0, problem.times, problem.options
    if len(times.values) == 1:
        return Solved(y0.unsqueeze(0).clone(), times.values[0], 1)
    solved = Solved(y0, times.values[-1], len(times.values))
    search = None
    if problem.event is not None:
        tolerance = problem.atol if isinstance(problem.atol, float) else float(problem.atol.min())
        skip = bool(options.get("skip_initial_event", False))
        watch = search = EventSearch(problem.event, times.values[0], y0, times.values[-1], tolerance, skip)
        if search.time is not None:
            return Solved(torch.stack([y0, y0]), search.time, 1)

    failures: list[float] = []  # not put into `solved` by `fail`, which the loop knows: all would live on in a cycle

    def fail(error: SolveError) -> None:
        if problem.event is not None and error.status is Status.TOO_MANY_STEPS:
            error = SolveError(Status.NO_EVENT, error.t, error.dt, error.n_steps)
        if options.get("on_failure", "raise") == "raise":
            raise error
        warn(f"the solve failed, and its last state stands for the rest: {error}")
        failures.append(error.t)

    watched = problem.event is not None or watch is not None or tape is not None or bool(problem.callbacks)
    with on_device_of(y0):
        loop = None if watched else compiled_loop(problem, fail, key)
        if loop is None:
            loop = loop_of(problem, Hooks(watch=watch, tape=tape, fail=fail, **problem.callbacks))  # type: ignore[arg-type]
        try:
            solved.ys, solved.loop = loop.solve(y0, problem.first_step), loop
        finally:
            loop.add_to(options.get("stats"))
    if search is not None:
        if search.time is not None:
            solved.end, solved.n_reached = search.time, 1
            if tape is not None:
                assert isinstance(search.segment, RungeKuttaSegment)
                x = search.segment.position(search.time)
                tape.add_event(len(tape.steps) - 1, Passed(1, 0, x, search.segment.polynomial, timed=False), last=True)
        elif not failures:
            stats = Stats()
            loop.add_to(stats)
            fail(SolveError(Status.NO_EVENT, solved.end, loop.last_step or math.nan, stats.n_steps))
    if failures:
        solved.end = failures[-1]
        solved.n_reached = sum(times.sign * (t - solved.end) <= 0 for t in times.values)
    return solved
