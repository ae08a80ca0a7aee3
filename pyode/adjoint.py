"""odeint_adjoint: solve an initial value problem, with gradients by the continuous adjoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from ._ops.batched import one_by_one
from .callbacks import callbacks_of
from .circumstances import Circumstances
from .compiled.dynamics import CompiledDynamics
from .compiling import not_compiled
from .control import Times, check_dict, check_options, check_tolerance, first_step_from, policy_from
from .errors import InvalidValue, warn
from .gradients.backsolve import AdjointNorm, Arriving, Backsolve, BacksolveConfig, Found
from .gradients.backsolve_samples import SampleBacksolveConfig
from .gradients.twice import backsolve_with_graph
from .odeint import odeint
from .parameters import find_parameters, lost_gradient, named_parameters
from .problem import PER_SAMPLE, Problem, one_of, pose
from .samples.adjoint import with_adjoint
from .samples.batch import Samples
from .solving import solve
from .state import Dynamics, Form, Func, State
from .stepping.fixed_grid import check_interp
from .stepping.loops import SampleLoop
from .stepping.outcome import Outcome
from .vmapped import check_transforms

NOT_INHERITED = frozenset({"norm", "stats"})


@not_compiled
def odeint_adjoint(
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
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """Solves dy/dt = func(t, y) as `odeint` does; gradients come from a second solve, backwards in time.

    With options={"control": "per_sample"} every sample has steps of its own in both solves.
    The memory of a backward pass does not grow with the number of steps; its gradients are as accurate as the backward
    solve's tolerances. With create_graph=True they can be differentiated once more; that backward solve is recorded,
    and its samples take their steps together.

    Args:
        func: an nn.Module, or any callable in which parameters can be found, or for which adjoint_params are given.
        y0, t, rtol, atol, method, options: as `odeint`'s.
        args: as `odeint`'s; gradients reach every tensor in them.
        event_fn: as `odeint`'s; the gradients of what is returned are those at a fixed time of the event.
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; the forward solve's by default.
        adjoint_options: of the backward solve; the forward solve's by default, but for norm and stats. Further:
            norm, a function of (t, y, adj_y, *params) or "seminorm", which leaves the parameters out; restart, True
            to solve every output interval on its own with a first step of its own, as torchdiffeq does. By default the
            step size is carried on from the forward solve's end and across output times, which saves evaluations.
        adjoint_params: the tensors to which gradients are wanted beside y0, t and those in args; by default
            func.parameters(). Of another callable, those are found in what it holds: the module of a bound method,
            the arguments of functools.partial, the variables of a closure, globals, attributes. A tensor that requires
            gradient, that func can reach and that is not listed is named in a warning, but for adjoint_params=().

    Returns:
        [T, *y0.shape], or a tuple of such tensors.

    Raises:
        What `odeint` raises; a backward solve that fails raises SolveError from backward().

    Source:
        Chen, Rubanova, Bettencourt, Duvenaud, Neural ordinary differential equations, 2018; seminorm: Kidger, Chen,
        Lyons, "Hey, that's not an ODE", 2021.
    """
    check_transforms("adjoint")
    found, warned = listed_parameters(func, adjoint_params, args)
    if adjoint_options is not None:
        check_dict(adjoint_options, "adjoint_options")
    if adjoint_method is not None and adjoint_method != method and options and adjoint_options is None:
        raise InvalidValue(
            "adjoint_options must be given too where adjoint_method is not method and options are given: the options "
            "of one method need not suit another"
        )
    problem = pose(func, y0, t, rtol, atol, method, options, event_fn, args)
    params = [param for param in found if param.requires_grad]
    inherited = {name: value for name, value in problem.options.items() if name not in NOT_INHERITED}
    backward = (
        methods.find(method) if adjoint_method is None else methods.find(adjoint_method, "adjoint_method"),
        rtol if adjoint_rtol is None else adjoint_rtol,
        atol if adjoint_atol is None else adjoint_atol,
        inherited if adjoint_options is None else dict(adjoint_options),
    )
    warns = not warned and adjoint_params != ()
    if problem.form.per_sample:
        callbacks_of(func, problem.method, t, lambda z: z, "_adjoint", PER_SAMPLE)  # warns
        return _solve_samples(problem, params, t, _configure_samples(problem, *backward, warns=warns))
    config = _configure(func, problem, *backward, warns=warns)
    if len(params) < len(found) and callable((adjoint_options or {}).get("norm")):
        warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from "
            "the adjoint pass, and will not appear as a tensor in the adjoint norm."
        )
    y0_packed, problem = problem.y0, replace(problem, y0=problem.y0.detach())
    end, ys = _OdeintAdjoint.apply(problem, config, t, y0_packed, *params)  # type: ignore[no-untyped-call]
    states = problem.form.unpack(ys, (len(problem.times.values),))
    return states if event_fn is None else (end, states)


def listed_parameters(func: Func, adjoint_params: Iterable[Tensor] | None, args: Any) -> tuple[list[Tensor], bool]:
    """Those given, or else found in func, and those in args; and whether it was told that a gradient will be lost."""
    if isinstance(func, CompiledDynamics):
        func = func.func
    given = None if adjoint_params is None else list(adjoint_params)
    params = named_parameters(find_parameters(func) if given is None else given, "adjoint_params", args)
    is_module = isinstance(func, nn.Module)
    if given is None and not params and not is_module:
        raise InvalidValue(
            "func must be an instance of nn.Module to specify the adjoint parameters; alternatively they can be "
            "specified explicitly via the `adjoint_params` argument. If there are no parameters then it is allowable "
            "to set `adjoint_params=()`. (This func is not one, and no tensor that requires gradient was found in it.)"
        )
    # What was found in a func that is no module is all there is, and () says that no gradient is wanted.
    lost = None
    if torch.is_grad_enabled() and (given or (given is None and is_module)):
        lost = lost_gradient(func, params)
        if lost is not None:
            warn(
                f"{lost} requires gradient, and odeint_adjoint returns none to it: name it in adjoint_params, make it "
                "a parameter of func, or pass it in args. If its gradient is not wanted, detach it."
            )
    return params, lost is not None


def _configure(
    func: Func, problem: Problem, method: methods.Method, rtol: Any, atol: Any, options: dict[str, Any], warns: bool
) -> BacksolveConfig:
    restart = bool(options.pop("restart", False))
    norm = options.pop("norm", None)
    if not (norm is None or norm == "seminorm" or callable(norm)):
        raise InvalidValue(f"adjoint_options['norm'] must be a function of a tuple or 'seminorm', not {norm!r}")
    check_options(options, method)
    check_interp(options)
    return BacksolveConfig(
        method=method,
        rtol=check_tolerance(rtol, "adjoint_rtol", problem.form, problem.y0),
        atol=check_tolerance(atol, "adjoint_atol", problem.form, problem.y0),
        options=options,
        policy=policy_from(options, method, clip=not restart, resume=not restart),
        first_step=first_step_from(options),
        restart=restart,
        norm=_norm_of(problem.form, problem.options.get("norm"), norm),
        fused=not callable(norm) and problem.options.get("norm") is None,
        seminorm=norm == "seminorm",
        callbacks=callbacks_of(func, method, problem.times.tensor, lambda z: z, "_adjoint"),
        warns=warns,
    )


def _configure_samples(
    problem: Problem, method: methods.Method, rtol: Any, atol: Any, options: dict[str, Any], warns: bool
) -> SampleBacksolveConfig:
    if not isinstance(method, methods.Tableau) or not method.adaptive:
        raise InvalidValue(
            f"adjoint_method must be explicit and choose its steps where control='per_sample'; {method.name!r} does not"
        )
    norm = options.pop("norm", None)
    if options.pop("restart", False) or norm not in (None, "seminorm"):  # parameters have no share in a sample's norm
        raise InvalidValue(
            "adjoint_options cannot have restart, or norm as a function, where control='per_sample': each sample's "
            "norm is that of its state and adjoint"
        )
    check_options(options, method)
    rtol, atol = (
        check_tolerance(tolerance, name, problem.form, one_of(problem.y0, problem.form))
        for tolerance, name in ((rtol, "adjoint_rtol"), (atol, "adjoint_atol"))
    )
    policy = policy_from(options, method, clip=True, resume=True)
    return SampleBacksolveConfig(method, rtol, atol, policy, problem.grid, options, warns)


def _solve_samples(problem: Problem, params: list[Tensor], t: Tensor, config: SampleBacksolveConfig) -> State:
    """The same for samples with steps of their own."""
    samples = Samples(problem.form, problem.y0, t)
    quiet = replace(problem, y0=problem.y0.detach(), times=problem.times.in_tensor(t.detach()))
    with torch.no_grad():
        solved = solve(quiet)
    loop, flat = solved.loop, solved.ys.reshape(len(solved.ys), *samples.y0.shape)
    if loop is None:  # there is only one time
        return samples.of_user(samples.y0[None])
    assert isinstance(loop, (Outcome, SampleLoop))
    left = loop.left()
    reached = ~(left if left.dim() == 2 else left[:, None])
    failed = ~reached[-1]  # from there on the last state stands for the rest
    end_t = torch.where(failed.to(samples.clock), loop.ends_of_samples().to(samples.clock), torch.nan)
    end = end_t, torch.where(failed[:, None], flat[-1], torch.nan)
    flat, end_y = with_adjoint(
        odeint, config, problem, samples, t, flat, reached, loop.stats_of_samples().last_dt, end, params
    )
    return samples.of_user(torch.where(reached.unsqueeze(-1), flat, end_y) if bool(failed.any()) else flat)


def _norm_of(form: Form, state_norm: Any, norm: Any) -> AdjointNorm:
    """The norm of the adjoint state (t, y, adj_y, *params), where y and adj_y are packed."""
    if callable(norm):
        if form.is_tensor:
            return norm  # type: ignore[no-any-return]
        if form.is_tuple:
            return lambda whole: norm((whole[0], *form.unpack(whole[1]), *form.unpack(whole[2]), *whole[3:]))
        return lambda whole: norm((whole[0], form.unpack(whole[1]), form.unpack(whole[2]), *whole[3:]))

    def rms(x: Tensor) -> Tensor:
        return x.abs().square().mean().sqrt()

    def of_state(y: Tensor) -> Any:
        state = form.unpack(y)
        return max(map(rms, form.parts(state))) if state_norm is None else state_norm(state)

    def largest(whole: tuple[Tensor, ...]) -> Any:
        time, y, adj_y, *params = whole
        return max([time.abs(), of_state(y), of_state(adj_y), *([] if norm == "seminorm" else map(rms, params))])

    return largest


class _OdeintAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, config: BacksolveConfig, t: Tensor, y0: Tensor, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        solved = solve(problem)
        if config.first_step is None and not config.restart and config.method is problem.method:
            # The backward solve starts where the forward one ended, and with its step size.
            config = replace(config, first_step=solved.last_step)
        ctx.circumstances = Circumstances(problem.func, y0.device, params)
        ctx.problem, ctx.config, ctx.end, ctx.n_reached = problem, config, solved.end, solved.n_reached
        ctx.adjoint_options = {**config.options, "norm": config.norm}  # where torchdiffeq's users find and replace it
        ctx.save_for_backward(t, solved.ys, *params)
        return problem.event_time(solved.end), solved.ys  # the time's gradient is 0, as in torchdiffeq

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        t, ys, *params = ctx.saved_tensors
        problem, config, n, end = ctx.problem, ctx.config, ctx.n_reached, ctx.end
        values, gradient = problem.times.values, gradients[1]
        standing = None  # the gradient of a state at the last output time that does not move with it
        if n < len(values):  # an event or a failure ended the solve; all states behind are that at its end
            behind = gradient[n:].sum(0, keepdim=True)
            if end == values[n - 1]:
                ys, gradient = ys[:n], torch.cat([gradient[: n - 1], gradient[n - 1 : n] + behind])
                values, standing = values[:n], behind[0]
            else:
                ys, gradient, values = ys[: n + 1], torch.cat([gradient[:n], behind]), [*values[:n], end]
        norm = ctx.adjoint_options["norm"]
        if norm is not config.norm:
            config = replace(config, norm=norm, fused=False)
        found: Found | None = None
        with ctx.circumstances.again():
            if torch.is_grad_enabled():
                reached = t[:n] if len(values) == n else torch.cat([t[:n], t.new_tensor(values[n:])])
                forward = Dynamics(problem.func, problem.form, ys[0])
                found = backsolve_with_graph(
                    odeint, ctx.circumstances, forward, reached, config, ys, gradient, tuple(params)
                )
            else:
                times = Times(t.new_tensor(values), values)
                arriving = Arriving(times, ys, gradient, tuple(params), ctx.needs_input_grad[2])
                if problem.compiled is not None:
                    from .compiled.backsolve import backsolve_compiled  # only those who compile wait for its import

                    found = backsolve_compiled(problem.compiled, problem.form, config, arriving)
                if found is None and config.options.get("device_loop"):
                    from .device_backsolve import backsolve_on_device  # likewise

                    found = backsolve_on_device(problem, config, arriving)
                if found is None:
                    found = Backsolve(problem.func, problem.form, config, arriving).solve()
            y0_gradient, t_gradient, param_gradients = found
            if t_gradient is not None and standing is not None and n > 1:
                f = Dynamics(problem.func, problem.form, ys[0])(t[n - 1].to(ys.device, ys.real.dtype), ys[n - 1])
                t_gradient[n - 1] -= torch.sum((f.conj() * standing).real).to(t_gradient)
        if t_gradient is not None:
            t_gradient = torch.cat([t_gradient[:n], torch.zeros_like(t[n:])])
        return (None, None, t_gradient, y0_gradient, *param_gradients)
