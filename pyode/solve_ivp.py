"""solve_ivp: solve an initial value problem, sample by sample, and tell how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import methods
from ._ops.contract import Policy
from .again import kinds
from .callbacks import callbacks_of
from .compiled.dynamics import CompiledDynamics
from .compiled.samples import samples_again
from .compiling import not_compiled
from .control import check_dict, check_options, check_tolerance, filter_from, policy_from
from .errors import InvalidValue, SolveError
from .gradients.backsolve_samples import SampleBacksolveConfig
from .methods import Tableau
from .methods.external import ScipySolver
from .odeint import GRADIENTS, odeint
from .problem import Problem, one_of, pose
from .samples.adjoint import with_adjoint
from .samples.batch import Samples
from .samples.observers import Observers, observers_of
from .samples.results import results_of, solution_of, solution_of_native
from .solution import Solution
from .solving import compiled_loop, loop_of, on_device_of
from .state import Func, State
from .stepping.adaptive import AdaptiveLoop
from .stepping.loops import Loop
from .stepping.tape import Tape
from .taped import parameters_of, solve_checkpointed, undone_natively
from .vmapped import check_transforms, solve_ivp_vmapped, under_vmap

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
        adjoint_options: of the backward solve: rtol, atol and method, which are the forward solve's by default, and
            other options, which are not. The controller, step_t and jump_t are the forward solve's.
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
    kind = None
    if (
        type(func) is CompiledDynamics
        and control == "per_sample"
        and gradient == "direct"
        and type(args) is tuple
        and not (options or event_fn is not None or dense_output or progress)
    ):
        kind = kinds.of(y0, t, rtol, atol, ("solve_ivp", method, controller, first_step, max_num_steps))
    if isinstance(func, CompiledDynamics) and kind is not None:
        compiled = func.with_args(args)

        def eagerly(y: Tensor) -> Tensor:
            found: Tensor = solve_ivp(
                compiled.func, y, t, method=method, rtol=rtol, atol=atol, controller=controller,
                first_step=first_step, max_num_steps=max_num_steps, throw=False,
            ).ys  # fmt: skip
            return found

        errors: list[SolveError] = []
        again = samples_again(compiled, kind, y0, t, eagerly, errors.append)
        if again is not None:
            ys = again.solve(y0)
            if errors and throw:
                raise errors.pop(0)  # kept nowhere: see raise_it
            return solution_of_native(again, y0, t, ys)
    if gradient not in GRADIENTS:
        raise InvalidValue(f"gradient must be one of {', '.join(map(repr, GRADIENTS))}, not {gradient!r}")
    check_transforms(gradient)
    options = {} if options is None else dict(check_dict(options, "options"))
    memory: dict[str, Any] = {name: options.pop(name) for name in ("checkpoints", "graph_bytes") if name in options}
    options = _with_arguments(options, method, control, compile, first_step, max_num_steps)
    problem = pose(func, y0, t, rtol, atol, method, options, None, args, strict=True)
    problem = replace(problem, policy=_policy_of(problem.policy, controller), kind=kind)
    _check_method(problem, controller, event_fn is not None or dense_output, compact)
    graph = torch.is_grad_enabled()
    adjoint = None
    if graph and gradient == "adjoint":
        adjoint = _adjoint_of(problem, controller, adjoint_options, params != (), compact)
        callbacks_of(func, adjoint.tableau, t, lambda z: z, "_adjoint", "in solve_ivp's backward solve")  # warns
    samples = Samples(problem.form, problem.y0, problem.grid.times)
    observers = observers_of(problem, samples, event_fn, args, dense_output, compact, progress)
    failures: list[SolveError] = []
    run = _Run(observers, failures.append, waits=throw or adjoint is not None)
    with on_device_of(problem.y0), torch.no_grad() if adjoint else nullcontext():
        if adjoint is not None:
            ys = run(replace(problem, y0=problem.y0.detach()))
        elif graph and gradient == "checkpoint":

            def solve_by_tape() -> Tensor:
                listed = parameters_of(func, args, params)
                return solve_checkpointed(problem, listed, memory, run, params != (), compact)

            ys = run(problem, otherwise=solve_by_tape) if undone_natively(memory, params) else solve_by_tape()
        else:
            ys = run(problem)
    if failures and throw:
        raise failures.pop(0)
    results, events = results_of(run.loop, failures, problem), observers.events
    flat = ys.reshape(len(ys), *samples.y0.shape)
    if events is not None:
        if len(flat) > len(t):
            flat, events.state = flat[:-1], flat[-1]
        results = results.until(events, samples, t)
    if adjoint is not None:
        wanted = [x for x in parameters_of(func, args, params) if x.requires_grad]
        end = None if events is None else (events.time, events.state)
        flat, state = with_adjoint(
            odeint, adjoint, problem, samples, t, flat, results.reached, results.stats.last_dt, end, wanted
        )
        if events is not None:
            events.state = state
    moved = t[0] - t[0].detach() if t.requires_grad and adjoint is None else None
    return solution_of(problem, samples, t, flat, results, events, observers.dense, moved)


def _with_arguments(
    options: dict[str, Any], method: str, control: str, compile: bool | str, first_step: float | None, most: int
) -> dict[str, Any]:
    """The options of `odeint` that the user's and those which are arguments here come to."""
    for name in ARGUMENTS.keys() & options.keys():
        raise InvalidValue(f"options has {name}, which for solve_ivp is the argument {ARGUMENTS[name]}")
    found = methods.find(method)
    options |= {"control": control, "compile": compile}
    if found.adaptive or first_step is not None:
        options["first_step"] = first_step
    if found.adaptive and not isinstance(found, ScipySolver):
        options["max_num_steps"] = most
    return options


def _check_method(problem: Problem, controller: Any, looks_inside: bool, compact: bool) -> None:
    """Raises InvalidValue where a method can't do what is asked of it; events and dense output look inside steps."""
    method = problem.method
    if not (isinstance(method, Tableau) and method.adaptive):
        if looks_inside:
            raise InvalidValue(
                f"solve_ivp has no events and no dense output for {method.name!r}; odeint_event has, odeint_dense"
            )
        if controller != "I":
            raise InvalidValue(
                f"controller is for explicit Runge-Kutta methods that choose their steps; not {method.name}"
            )
    if compact and not problem.form.per_sample:
        raise InvalidValue("compact is for control='per_sample'")


class _Run:
    """Carries out one solve, natively if that can be.

    Args:
        observers: who is to look on.
        fail: called with a failure.
        waits: see Hooks.

    Attributes:
        loop: what has carried it out.
    """

    loop: Loop

    def __init__(self, observers: Observers, fail: Callable[[SolveError], None], waits: bool) -> None:
        self.observers, self.fail, self.waits = observers, fail, waits

    def __call__(
        self, problem: Problem, tape: Tape | None = None, otherwise: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Returns the packed states at the output times; with a tape, behind them those at the events, if there are.

        Where it can't be one native call it is done `otherwise`, if that is given.
        """
        observers, loop = self.observers, None
        if tape is None and not observers.see_steps:
            loop = compiled_loop(problem, self.fail)
        if loop is None and otherwise is not None:
            return otherwise()
        if loop is None:
            hooks = observers.hooks(self.fail)
            loop = loop_of(replace(problem, func=observers.func), replace(hooks, tape=tape, waits=self.waits))
        self.loop, bar, events = loop, observers.bar, observers.events
        try:
            ys = loop.solve(problem.y0, problem.first_step)
            if bar is not None:
                bar.finish(loop.controller if isinstance(loop, AdaptiveLoop) else None)
        finally:
            loop.add_to(problem.options.get("stats"))
            if bar is not None:
                bar.close()
        if tape is None or events is None:
            return ys
        events.note_on(tape, len(ys))
        return torch.cat([ys, events.state.reshape(1, *ys.shape[1:])])


def _adjoint_of(
    problem: Problem, controller: Any, options: dict[str, Any] | None, warns: bool, compact: bool
) -> SampleBacksolveConfig:
    """How the backward solve is done, from a solve's adjoint_options and what else SampleBacksolveConfig has."""
    options = {} if options is None else dict(check_dict(options, "adjoint_options"))
    method = methods.find(options.pop("method", problem.method.name), "adjoint_options['method']")
    if not isinstance(method, Tableau) or not method.adaptive:
        raise InvalidValue(f"adjoint_options['method'] must be explicit and choose its steps; {method.name!r} does not")
    y0 = one_of(problem.y0, problem.form)
    rtol, atol = (
        check_tolerance(options.pop(name, getattr(problem, name)), f"adjoint_options[{name!r}]", problem.form, y0)
        for name in ("rtol", "atol")
    )
    check_options(options, method, strict=True)
    policy = replace(_policy_of(policy_from(options, method), controller), resume=True)
    return SampleBacksolveConfig(method, rtol, atol, policy, problem.grid, options, warns, compact)


def _policy_of(policy: Policy, controller: Any) -> Policy:
    beta, alpha = filter_from(controller)
    return replace(
        policy, clip=True, count_per_output=False, least_ulps=LEAST_ULPS, cautious=True, beta=beta, alpha=alpha
    )
