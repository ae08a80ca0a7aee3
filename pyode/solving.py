"""A posed problem, carried out: which loop does it, what watches it, and what it has come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import backend_for
from ._ops.contract import RightHandSide
from .again import keep
from .compiled.samples import sample_loop
from .compiled.solve import joint_loop
from .control import Times
from .errors import InvalidType, InvalidValue, SolveError, Status, warn
from .methods import Tableau
from .problem import Problem
from .solution import Stats
from .state import Dynamics, Form, State
from .stepping.event import JointEvent
from .stepping.fixed_grid import grid_of
from .stepping.hooks import Hooks
from .stepping.loops import Loop, loop_for
from .stepping.segment import Segment
from .stepping.tape import Tape

STEPS_TRIED = 4  # of a solve that chooses its steps, to find out whether compiling pays


@dataclass(eq=False)
class Solved:
    """What a solve has come to.

    Attributes:
        ys: the packed states at the output times, [T, *y0.shape], with a graph behind them where gradients are enabled.
        times: those of the outputs.
        n_reached: how many output times it reached; the states behind them, if any, are all that at the end.
        loop: what has done it, if there was something to do.
        early: where the solve ended, at the event or where it failed; None at the last output time.
    """

    ys: Tensor
    times: Times
    n_reached: int
    loop: Loop | None = None
    early: float | None = None

    @property
    def end(self) -> float:
        """Where the solve ended."""
        return self.times.values[-1] if self.early is None else self.early

    @property
    def last_step(self) -> float | None:
        """The size of the last step, if the method chose it."""
        return None if self.loop is None else self.loop.last_step


def on_device_of(y: Tensor) -> AbstractContextManager[Any]:
    """Makes a state's CUDA device the current one."""
    return torch.cuda.device(y.device) if y.device.type == "cuda" else nullcontext()


def loop_of(problem: Problem, hooks: Hooks, ends: Tensor | None = None) -> Loop:
    """The loop that carries out a solve; of a method that does not choose its steps with the given ends, if any."""
    if problem.options.get("device_loop") and ends is None:
        from .device_loop import device_loop  # only those who ask for it wait for its import

        on_device = device_loop(problem, hooks)
        if on_device is not None:
            return on_device
    problem.times.check()
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


def compiled_loop(problem: Problem, fail: Callable[[SolveError], None]) -> Loop | None:
    """The same as one native call, for a solve that nothing watches; None if that can't be, or is not to be."""
    if problem.compiled is None or (problem.compiled.auto and not compiling_pays(problem)):
        return None
    return _native_loop(problem, fail)


def _native_loop(problem: Problem, fail: Callable[[SolveError], None]) -> Loop | None:
    assert problem.compiled is not None
    stateless = replace(problem, y0=problem.y0.new_empty(0))  # what is kept for other solves keeps no state alive

    def eagerly(y0: Tensor) -> Tensor:
        return loop_of(replace(stateless, y0=y0), Hooks(fail=lambda _: None)).solve(y0, stateless.first_step)

    if problem.form.per_sample:
        return sample_loop(
            problem.compiled, problem.form, problem.y0, problem.times, problem.method, problem.rtol, problem.atol,
            problem.policy, problem.grid, problem.first_step, problem.options, eagerly, fail, problem.kind,
        )  # fmt: skip
    return joint_loop(
        problem.compiled, problem.form, problem.y0, problem.times, problem.method, problem.rtol, problem.atol,
        problem.policy, problem.grid, problem.options, fail, eagerly, problem.kind,
    )  # fmt: skip


def norm_by(norm: Callable[[State], Any], form: Form, scaled_error: Tensor) -> Any:
    """The user's norm of a scaled error, packed: a number, for each sample that has a step size of its own."""
    value = norm(form.unpack(scaled_error))
    try:
        shape = value.shape if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu").shape
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(f"options['norm'] must return a number, not {value!r}") from error
    if form.per_sample and shape != (form.samples,):
        raise InvalidValue(
            f"options['norm'] must return a number for each sample, [{form.samples}], where control is 'per_sample'; "
            f"it returned {tuple(shape)}"
        )
    if shape.numel() != 1 and not form.per_sample:
        raise InvalidValue(f"options['norm'] must return one number, not {tuple(shape)}")
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


def search_of(problem: Problem) -> JointEvent | None:
    """The search for a problem's event, begun at the start; None if it has none."""
    if problem.event is None:
        return None
    values = problem.times.values
    return JointEvent(problem.event, values[0], problem.y0, values[-1], *problem.search_options)


def solve(
    problem: Problem,
    watch: Callable[[Segment], Tensor | None] | None = None,
    tape: Tape | None = None,
    otherwise: Callable[[], Solved] | None = None,
) -> Solved:
    """Carries out a solve.

    Args:
        problem: the solve.
        watch: is told every accepted step, if there is no event.
        tape: notes it.
        otherwise: what is done where it can't be one native call; a loop if None.
    """
    y0, times, options = problem.y0, problem.times, problem.options
    watched = problem.event is not None or watch is not None or tape is not None or bool(problem.callbacks)
    if otherwise is not None and (watched or problem.compiled is None or len(times) == 1):
        return otherwise()
    stats = options.get("stats")
    if len(times) == 1:
        times.check()
        return Solved(y0.unsqueeze(0).clone(), times, 1)
    solved = Solved(y0, times, len(times))
    search = search_of(problem)
    if search is not None and search.found:
        if stats is not None:
            stats.n_events += 1
        return Solved(torch.stack([y0, y0]), times, 1, early=times.values[0])
    failures: list[float] = []  # not put into `solved` by `fail`, which the loop knows: all would live on in a cycle

    def fail(error: SolveError) -> None:
        if search is not None and error.status is Status.TOO_MANY_STEPS:
            error = SolveError(Status.NO_EVENT, error.t, error.dt, error.n_steps)
        if options.get("on_failure", "raise") == "raise":
            try:
                raise error
            finally:
                del error  # see raise_it
        warn(f"the solve failed, and its last state stands for the rest: {error}")
        failures.append(error.t)

    watch = search or watch
    with on_device_of(y0):
        loop = None if watched else compiled_loop(problem, fail)
        if loop is None and otherwise is not None:
            return otherwise()
        if loop is None:
            loop = loop_of(problem, Hooks(watch=watch, tape=tape, fail=fail, **problem.callbacks))  # type: ignore[arg-type]
        try:
            solved.ys, solved.loop = loop.solve(y0, problem.first_step), loop
        finally:
            loop.add_to(stats)
    if problem.kind is not None and problem.compiled is None:
        keep(problem.kind, loop)
    if search is not None and search.found:
        solved.early, solved.n_reached = float(search.time), 1
        if stats is not None:
            stats.n_events += 1
        if tape is not None:
            search.note_on(tape, 1, last=True)
    elif search is not None and not failures:
        counts = Stats()
        loop.add_to(counts)
        fail(SolveError(Status.NO_EVENT, solved.end, loop.last_step or math.nan, counts.n_steps))
    if failures:
        solved.early = failures[-1]
        solved.n_reached = sum(times.sign * (t - solved.end) <= 0 for t in times.values)
    return solved
