"""solve_ivp: solve an initial value problem, sample by sample, and tell how it went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import methods
from ._ops.contract import Policy, wide_dtype
from .compiled.dynamics import CompiledDynamics
from .compiling import not_compiled
from .control import check_dict, check_options, check_tolerance, filter_from, policy_from
from .errors import InvalidValue, SolveError, Status
from .gradients.backsolve_samples import SampleBacksolveConfig
from .gradients.samples import SampleAdjoint, SolvedSamples
from .methods import Tableau
from .methods.external import ScipySolver
from .odeint import (
    GRADIENTS,
    compiled_loop,
    loop_of,
    odeint,
    on_device_of,
    parameters_of,
    solve_checkpointed,
    undone_natively,
)
from .problem import Problem, pose
from .progress import Progress
from .samples import SampleDenseOutput, Samples
from .solution import SampleStats, Solution, Stats
from .state import Func, State
from .stepping.adaptive import AdaptiveLoop
from .stepping.event import SampleEvents
from .stepping.hooks import Hooks
from .stepping.loops import Loop, SampleLoop
from .stepping.rows import RunningRows
from .stepping.segment import BatchSegment
from .stepping.tape import Tape
from .vmapped import check_transforms, solve_ivp_vmapped, under_vmap

if TYPE_CHECKING:
    from .compiled.samples import CompiledSamples

# Options that are arguments here, or have no meaning, and what is instead.
ARGUMENTS = {
    **{name: name for name in ("compile", "control", "first_step", "gradient", "max_num_steps", "params")},
    "on_failure": "throw",
    "event_t_max": "t[-1]",
}
LEAST_ULPS = 10.0  # by which a step has to move t, as in SciPy


@not_compiled
def solve_ivp(
    func: Func,
    y0: State,
    t: Tensor,
    *,
    args: Sequence[Any] = (),
    method: str = "dopri5",
    rtol: float | Tensor = 1e-3,
    atol: float | Tensor = 1e-6,
    control: str = "per_sample",
    controller: str | Sequence[float] = "I",
    gradient: str = "direct",
    event_fn: Callable[..., Tensor] | None = None,
    dense_output: bool = False,
    first_step: float | None = None,
    max_num_steps: int = 100_000,
    throw: bool = True,
    progress: bool = False,
    compact: bool = False,
    compile: bool | str = False,
    params: Iterable[Tensor] | None = None,
    adjoint_options: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Solution:
    """Solves dy/dt = func(t, y, *args), every sample of a batch with steps of its own.

    A sample's answer does not depend on who else is in the batch, as long as func computes a row from that row alone.
    func is never evaluated outside of a sample's times.

    Args:
        func: called as func(t, y, *args); returns dy/dt, of y's structure and shape. With per-sample control t is [B].
        y0: a tensor, or any structure of tensors of one dtype.
        t: [T] floating, strictly increasing or decreasing; with per-sample control also [T, B], with times of its own
            for each sample, in which repetitions of the last time pad the shorter ones.
        args: passed on to func and event_fn; gradients reach the tensors in it.
        method: as `odeint`'s; for per-sample control one of those that choose their steps.
        rtol, atol: as `odeint`'s, for one sample.
        control: "per_sample": the first axis of y0, of every part of it, counts the samples, and each has a step size
            of its own. "joint": the whole state has one, as in `odeint`.
        controller: how step sizes follow from errors: "I" (elementary), "PI", "PID", "H211b", or up to five exponents
            (beta1, beta2, beta3, alpha2, alpha3) of a digital filter.
        gradient: "direct": by backpropagation through the steps taken. "adjoint": by a second solve, backwards in time,
            in memory that does not grow with the number of steps; its norm covers each sample's state and adjoint.
            "checkpoint": direct's, once, by undoing the steps of a Runge-Kutta method one by one, in the memory of
            their states, or of options["checkpoints"] of them; see `odeint`. The interpolant has direct's alone.
        event_fn: called as event_fn(t, y, *args); returns [B] or [B, E] with per-sample control, else one or several
            numbers. A sample ends where the first of its functions changes its sign. Gradients reach the event's time.
        dense_output: whether the Solution is to have an interpolant; it keeps all steps.
        first_step: the size of the first step; chosen if None.
        max_num_steps: of a sample, accepted and rejected, in the whole solve.
        throw: whether a failure raises SolveError when all samples are done; else it is told by the Solution's status.
        progress: whether to show a progress bar: the fraction of time that the slowest sample has covered.
        compact: whether func is called with the rows that still run only, once many are done. args are not cut.
        compile: True to make the solve one native call (see `pyode.compile`), or "auto" to do so where it is faster;
            events, dense_output, callbacks, progress and norms of the user's take the eager path.
        params: for gradient="adjoint" and "checkpoint": the tensors to which gradients are wanted beside y0, t and
            those in args; by default all that require gradient and can be found in func. One that func turns out to
            depend on and that is not among them is told in a warning, but for params=().
        adjoint_options: of the backward solve: rtol, atol, method, and other options; rtol, atol and method are the
            forward solve's by default.
        options: further ones, as `odeint`'s: min_step, max_step, safety, ifactor, dfactor, norm, step_t, jump_t, ...

    Returns:
        A `Solution`.

    Raises:
        InvalidValue, InvalidType: an argument is wrong, an option unknown; nothing has been computed.
        DynamicsError: func returned something that is not dy/dt, or wrote into its input.
        SolveError: a sample failed, and throw is True.

    Source:
        Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section II.4; Soderlind, Digital filters in
        adaptive time-stepping, 2003; Lienen, Gunnemann, torchode, 2022, for one controller a sample.
    """
    if under_vmap(method):
        found_by_elements = solve_ivp_vmapped(
            solve_ivp, func, y0, t, control=control, args=args, event_fn=event_fn, gradient=gradient, compact=compact,
            dense_output=dense_output, options=options, method=method, rtol=rtol, atol=atol, controller=controller,
            first_step=first_step, max_num_steps=max_num_steps, throw=throw, progress=progress,
        )  # fmt: skip
        if found_by_elements is not None:
            return found_by_elements
    key = None
    if (
        type(func) is CompiledDynamics
        and control == "per_sample"
        and gradient == "direct"
        and not (args or options or event_fn is not None or dense_output or progress)
    ):
        from .compiled.samples import key_of, samples_again  # only those who compile wait for its import

        key = key_of(y0, rtol, atol, "solve_ivp", method, controller, first_step, max_num_steps)
        errors: list[SolveError] = []
        again = samples_again(func, key, y0, t, errors.append)
        if again is not None:
            ys = again.solve(y0)
            if errors and throw:
                raise errors[0]
            return _plain_solution(again, y0, t, ys)
    found = methods.find(method)
    if gradient not in GRADIENTS:
        raise InvalidValue(f"gradient must be one of {', '.join(map(repr, GRADIENTS))}, not {gradient!r}")
    check_transforms(gradient)
    options = {} if options is None else dict(check_dict(options, "options"))
    for name in ARGUMENTS.keys() & options.keys():
        raise InvalidValue(f"options has {name}, which for solve_ivp is the argument {ARGUMENTS[name]}")
    choice: dict[str, Any] = {name: options.pop(name) for name in ("checkpoints", "graph_bytes") if name in options}
    options |= {"control": control, "compile": compile}
    if found.adaptive or first_step is not None:
        options["first_step"] = first_step
    if found.adaptive and not isinstance(found, ScipySolver):
        options["max_num_steps"] = max_num_steps
    problem = pose(func, y0, t, rtol, atol, method, options, None, args, strict=True)
    problem = replace(problem, policy=_policy_of(problem.policy, controller))
    adjoint = gradient == "adjoint" and torch.is_grad_enabled()
    backward = backward_config(problem, controller, adjoint_options, params != ()) if adjoint else None
    steered = isinstance(found, Tableau) and found.adaptive
    if (event_fn is not None or dense_output) and not steered:
        raise InvalidValue(
            f"solve_ivp has no events and no dense output for {found.name!r}; odeint_event has, odeint_dense"
        )
    if controller != "I" and not steered:
        raise InvalidValue(f"controller is for explicit Runge-Kutta methods that choose their steps; not {found.name}")
    if compact and not problem.form.per_sample:
        raise InvalidValue("compact is for control='per_sample'")
    samples = Samples(problem.form, problem.y0, t)
    watchers: list[Callable[[BatchSegment], None]] = []
    judges: list[Callable[[Any], None]] = []
    failures: list[SolveError] = []
    events, dense = None, SampleDenseOutput(samples) if dense_output else None
    if dense is not None:
        watchers.append(dense.watch)
    if event_fn is not None:
        tolerance = problem.atol if isinstance(problem.atol, float) else float(problem.atol.min())
        skip = bool(options.get("skip_initial_event", False))
        events = SampleEvents(samples.event(event_fn, args), samples.t0, samples.y0, tolerance, skip)
        watchers.append(events)
    carried_out = problem
    if compact:
        running = RunningRows(problem.func, problem.form)
        carried_out = replace(problem, func=running)
        judges.append(running.look)
    bar = Progress(samples.t0, samples.t1) if progress else None
    hooks = Hooks(fail=failures.append, **problem.callbacks)  # type: ignore[arg-type]
    if bar is not None and steered:
        judges.append(bar)
    elif bar is not None:
        hooks = replace(hooks, step=_all_of([bar.step, *([hooks.step] if hooks.step else [])]))
    hooks = replace(hooks, watch_batch=_all_of(watchers), judged=_all_of(judges))
    watched = bool(watchers or bar or problem.callbacks)
    loops: list[Loop] = []

    def carry_out(problem: Problem, tape: Tape | None = None) -> Tensor:
        loop = None if watched or tape is not None else compiled_loop(problem, failures.append, key)
        if loop is None:
            func = carried_out.func
            loop = loop_of(carried_out if tape is None else replace(problem, func=func), replace(hooks, tape=tape))
        loops.append(loop)
        try:
            ys = loop.solve(problem.y0, problem.first_step)
            if bar is not None:
                bar.finish(loop.controller if isinstance(loop, AdaptiveLoop) else None)
        finally:
            loop.add_to(options.get("stats"))
            if bar is not None:
                bar.close()
        if tape is None or events is None:
            return ys
        events.note_on(tape, len(ys))  # their states are further outputs
        return torch.cat([ys, events.state.reshape(1, *ys.shape[1:])])

    with on_device_of(problem.y0), torch.no_grad() if adjoint else nullcontext():
        taped = gradient == "checkpoint" and torch.is_grad_enabled()
        if taped and (watched or not undone_natively(problem, choice, params)):
            ys = solve_checkpointed(
                problem, parameters_of(func, args, params), choice, carry_out, params != (), compact
            )
        else:
            ys = carry_out(replace(problem, y0=problem.y0.detach()) if adjoint else problem)
    (loop,) = loops
    if failures and throw:
        raise failures[0]
    status, stats, reached = _outcome(loop, failures, problem, samples)
    flat = ys.reshape(len(ys), *samples.y0.shape)
    if events is not None:
        if len(flat) > len(t):
            flat, events.state = flat[:-1], flat[-1]
        met, sign = events.index >= 0, torch.sign(samples.t1 - samples.t0)
        reached = torch.where(met, sign * (samples.times_of(t) - events.time) <= 0, reached.to(met.device))
        status = torch.where(met.cpu(), int(Status.EVENT), status)
    if backward is not None:
        nan = torch.full_like(samples.y0, math.nan)
        end_t, end_y = (samples.t0 * math.nan, nan) if events is None else (events.time, events.state)
        solved = SolvedSamples(
            problem.func, samples.func(problem), backward, problem.form.segments, samples.times_of(t),
            reached.to(samples.clock), flat, end_t, end_y, stats.last_dt.to(samples.clock), odeint,
        )  # fmt: skip
        wanted = [x for x in parameters_of(func, args, params) if x.requires_grad]
        flat, end_y = SampleAdjoint.apply(solved, t, samples.y0, *wanted)  # type: ignore[no-untyped-call]
        if events is not None:
            events.state = end_y
    moved = t[0] - t[0].detach() if t.requires_grad and backward is None else None
    return _solution(problem, samples, t, flat, status, stats, reached, events, dense, moved)


def backward_config(
    problem: Problem, controller: Any, options: dict[str, Any] | None, warns: bool
) -> SampleBacksolveConfig:
    """How the backward solve is done, from a solve's adjoint_options; whether it warns of gradients that are lost."""
    options = {} if options is None else dict(check_dict(options, "adjoint_options"))
    method = methods.find(options.pop("method", problem.method.name), "adjoint_options['method']")
    if not isinstance(method, Tableau) or not method.adaptive:
        raise InvalidValue(f"adjoint_options['method'] must be explicit and choose its steps; {method.name!r} does not")
    y0 = problem.y0[0] if problem.form.per_sample else problem.y0
    rtol, atol = (
        check_tolerance(options.pop(name, getattr(problem, name)), f"adjoint_options[{name!r}]", problem.form, y0)
        for name in ("rtol", "atol")
    )
    check_options(options, method, strict=True)
    policy = replace(_policy_of(policy_from(options, method), controller), resume=True)
    return SampleBacksolveConfig(method, rtol, atol, policy, problem.grid, options.get("stats"), warns)


def _policy_of(policy: Policy, controller: Any) -> Policy:
    beta, alpha = filter_from(controller)
    return replace(
        policy, clip=True, count_per_output=False, least_ulps=LEAST_ULPS, cautious=True, beta=beta, alpha=alpha
    )


def _all_of(functions: list[Callable[..., None]]) -> Callable[..., None] | None:
    """One function that calls all."""
    if len(functions) < 2:
        return functions[0] if functions else None

    def call(*arguments: Any) -> None:
        for function in functions:
            function(*arguments)

    return call


def _outcome(
    loop: Any, failures: list[SolveError], problem: Problem, samples: Samples
) -> tuple[Tensor, SampleStats, Tensor]:
    """Each sample's status and counts, and which outputs were reached: [T, B]."""
    if isinstance(loop, SampleLoop):
        left = loop.left()
        return loop.status_of_samples(), loop.stats_of_samples(), ~(left if left.dim() == 2 else left[:, None])
    status = torch.full((samples.count,), int(failures[0].status if failures else Status.SUCCESS))
    counts = Stats()
    loop.add_to(counts)
    n_f_evals, n_accepted, n_rejected = (
        torch.tensor([n]) for n in (counts.n_f_evals, counts.n_accepted, counts.n_rejected)
    )
    stats = SampleStats(n_f_evals, n_accepted, n_rejected, torch.tensor([loop.last_step or 0.0], dtype=torch.float64))
    sign, last = problem.times.sign, failures[0].t if failures else problem.times.values[-1]
    reached = torch.tensor([[sign * (value - last) <= 0] for value in problem.times.values])
    return status, stats, reached


def _plain_solution(loop: CompiledSamples, y0: Tensor, t: Tensor, ys: Tensor) -> Solution:
    """The same as `_solution`'s, of a compiled solve of a tensor, without events."""
    if loop.failed:
        left = loop.left()
        ys = torch.where(left.reshape(*left.shape, *[1] * (ys.dim() - 2)), math.nan, ys)
    B = len(y0)
    return Solution(
        ts=t,
        ys=ys,
        status=loop.status_of_samples(),
        stats=loop.stats_of_samples(),
        interpolant=None,
        event_t=torch.full((B,), math.nan, dtype=torch.float64),
        event_index=torch.full((B,), -1),
        event_y=torch.full(y0.shape, math.nan, dtype=y0.dtype),
    )


def _solution(
    problem: Problem,
    samples: Samples,
    t: Tensor,
    flat: Tensor,
    status: Tensor,
    stats: SampleStats,
    reached: Tensor,
    events: SampleEvents | None,
    dense: SampleDenseOutput | None,
    moved: Tensor | None,
) -> Solution:
    """All together; states behind a sample's failure or event are nan. For `moved` see `_moved`."""
    nan = torch.full_like(samples.y0[:, :1], math.nan)
    event_t, event_index = samples.t0 * math.nan, torch.full_like(samples.t0, -1, dtype=torch.int64)
    event_y = nan.expand_as(samples.y0)
    if events is not None:
        event_t, event_index, event_y = _moved(problem, samples, events, moved)
    if not bool(reached.all()):
        flat = torch.where(reached.to(flat.device).unsqueeze(-1), flat, nan)
    return Solution(
        ts=t,
        ys=samples.of_user(flat),
        status=status,
        stats=stats,
        interpolant=None if dense is None else dense.stacked(event_t),
        event_t=event_t,
        event_index=event_index,
        event_y=samples.of_user(event_y, joint_axis=True),
    )


def _moved(
    problem: Problem, samples: Samples, events: SampleEvents, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Times, indices and states of the events, with the gradients of where they lie by the implicit function theorem.

    Where an event function is shifted by e, the event moves by -e / (its derivative along the solution); where that is
    0, its time has no gradient.

    Args:
        start: [] or [B], how far the starts have moved: 0, with a gradient. At a fixed time the state of a sample that
            starts on its event moves with it; others carry that already. None where there is no gradient, or all do.
    """
    time, index, state = events.time, events.index, events.state
    met = index >= 0
    if not torch.is_grad_enabled() or not bool(met.any()):
        return time, index, state
    which = index.clamp(min=0)[:, None].to(state.device)
    here = torch.where(met, time, samples.t0)
    met, here = met.to(state.device), here.to(state.device, wide_dtype(state.device))
    flat = torch.where(met[:, None], state, samples.y0)
    with torch.no_grad():
        slope = samples.func(problem)(here, flat)
    if start is not None and bool(events.begun.any()):
        began = events.begun[:, None]
        start = start.to(flat.device, slope.real.dtype).expand(len(flat))
        flat = torch.where(began, flat - torch.where(began, slope, 0.0) * start[:, None], flat)
    leaves = here.clone().requires_grad_(), flat.detach().requires_grad_()
    value = events.event(*leaves).gather(1, which).sum()
    rates = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else (None, None)
    along = torch.zeros_like(here) if rates[0] is None else rates[0]
    if rates[1] is not None:
        along = along + (rates[1].conj() * slope).real.sum(1)
    value = events.event(here, flat).gather(1, which)[:, 0]
    along = torch.where(met & along.isfinite() & (along != 0), along, torch.full_like(along, math.inf))
    shift = (value.detach() - value) / along
    nan = torch.full_like(state, math.nan)
    moved = flat + slope * shift[:, None].to(slope.real.dtype)
    return time + shift.to(time), index, torch.where(met[:, None], moved, nan)
