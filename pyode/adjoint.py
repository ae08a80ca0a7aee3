"""odeint_adjoint: solve an initial value problem, with gradients by the continuous adjoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from .control import Times, check_dict, check_options, check_tolerance, first_step_from, policy_from
from .errors import InvalidType, InvalidValue
from .gradients.backsolve import Backsolve, BacksolveConfig
from .odeint import Problem, pose, solve_and_tell
from .state import Func, State
from .stepping.fixed_grid import check_interp

NOT_INHERITED = frozenset({"norm", "stats"})


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
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """Solves dy/dt = func(t, y) as `odeint` does; gradients come from a second solve, backwards in time.

    The memory of a backward pass does not grow with the number of steps; its gradients are as accurate as the backward
    solve's tolerances. They can't be differentiated again.

    Args:
        func: an nn.Module, or any callable if adjoint_params is given.
        y0, t, rtol, atol, method, options: as `odeint`'s.
        event_fn: not available yet.
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; the forward solve's by default.
        adjoint_options: of the backward solve; the forward solve's by default, but for norm and stats. Further:
            norm, a function of (t, y, adj_y, *params) or "seminorm", which leaves the parameters out; restart, True
            to solve every output interval on its own with a first step of its own, as torchdiffeq does. By default the
            step size is carried on from the forward solve's end and across output times, which saves evaluations.
        adjoint_params: the tensors to which gradients are wanted beside y0 and t; by default func.parameters().

    Returns:
        [T, *y0.shape], or a tuple of such tensors.

    Raises:
        What `odeint` raises; a backward solve that fails raises SolveError from backward().

    Source:
        Chen, Rubanova, Bettencourt, Duvenaud, Neural ordinary differential equations, 2018; seminorm: Kidger, Chen,
        Lyons, "Hey, that's not an ODE", 2021.
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise InvalidValue(
            "func must be an instance of nn.Module to specify the adjoint parameters; alternatively they can be "
            "specified explicitly via the `adjoint_params` argument. If there are no parameters then it is allowable "
            "to set `adjoint_params=()`."
        )
    if adjoint_options is not None:
        check_dict(adjoint_options, "adjoint_options")
    if adjoint_method is not None and adjoint_method != method and options and adjoint_options is None:
        raise InvalidValue(
            "adjoint_options must be given too where adjoint_method is not method and options are given: the options "
            "of one method need not suit another"
        )
    problem = pose(func, y0, t, rtol, atol, method, options, event_fn)
    found = find_parameters(func) if adjoint_params is None else list(adjoint_params)
    for i, param in enumerate(found):
        if not isinstance(param, Tensor):
            raise InvalidType(f"adjoint_params[{i}] must be a tensor, not a {type(param).__name__}")
    params = [param for param in found if param.requires_grad]
    inherited = {name: value for name, value in problem.options.items() if name not in NOT_INHERITED}
    config = _configure(
        problem,
        methods.find(method) if adjoint_method is None else methods.find(adjoint_method, "adjoint_method"),
        problem.rtol if adjoint_rtol is None else adjoint_rtol,
        problem.atol if adjoint_atol is None else adjoint_atol,
        inherited if adjoint_options is None else dict(adjoint_options),
    )
    if config.norm is not None and len(params) < len(found):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from "
            "the adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=2,
        )
    y0_packed, problem = problem.y0, replace(problem, y0=problem.y0.detach())
    ys = _OdeintAdjoint.apply(problem, config, t, y0_packed, *params)  # type: ignore[no-untyped-call]
    return problem.form.unpack(ys, (len(problem.times.values),))


def find_parameters(module: Any) -> list[Tensor]:
    """The parameters of a module; of a DataParallel replica, whose parameters are plain attributes, those."""
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    return [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and value.requires_grad
    ]


def _configure(
    problem: Problem, method: methods.Method, rtol: Any, atol: Any, options: dict[str, Any]
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
        norm=norm if callable(norm) else None,
        state_norm=problem.options.get("norm"),
        seminorm=norm == "seminorm",
    )


class _OdeintAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, config: BacksolveConfig, t: Tensor, y0: Tensor, *params: Tensor) -> Tensor:
        ctx.problem, ctx.config = problem, config
        ys, last_step = solve_and_tell(problem)
        if config.first_step is None and not config.restart and config.method is problem.method:
            # The backward solve starts where the forward one ended, and with its step size.
            ctx.config = replace(config, first_step=last_step)
        ctx.save_for_backward(t, ys, *params)
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        t, ys, *params = ctx.saved_tensors
        times = Times(t if ctx.needs_input_grad[2] else t.detach(), ctx.problem.times.values)
        backsolve = Backsolve(ctx.problem.func, ctx.problem.form, times, ctx.config, ys, gradients[0], tuple(params))
        y0_gradient, t_gradient, param_gradients = backsolve.solve()
        return (None, None, t_gradient, y0_gradient, *param_gradients)
