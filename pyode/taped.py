"""Solves whose steps are noted: for the gradient that undoes them, or for their own sake."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .compiled.dynamics import CompiledDynamics
from .control import Times, number_from
from .errors import InvalidValue
from .gradients.checkpoint import checkpointed
from .gradients.reversal import Recipe
from .methods import ImplicitTableau, Tableau
from .parameters import named_parameters, reachable
from .problem import Problem, pose
from .solving import Solved, loop_of, solve
from .state import Func, State
from .stepping.fixed_grid import grid_of
from .stepping.hooks import NO_HOOKS
from .stepping.tape import Step, Tape

GRAPH_BYTES = 1 << 24  # by default


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


def undone_natively(choice: dict[str, Any], params: Iterable[Tensor] | None) -> bool:
    """Whether a compiled solve's own gradient is what "checkpoint" asks for: it undoes the steps, from every state.

    Not where it is to keep fewer states, or to have gradients to some tensors only.
    """
    return params is None and choice.keys() <= {"gradient"}


def solve_taped(problem: Problem, params: list[Tensor], choice: dict[str, Any], warns: bool = True) -> Solved:
    """Carries out a solve whose gradient is found by undoing its steps; arguments as `solve_checkpointed`'s."""
    done: list[Solved] = []

    def carry_out(quiet: Problem, tape: Tape) -> Tensor:
        done.append(solve(quiet, tape=tape))
        return done[0].ys

    ys = solve_checkpointed(problem, params, choice, carry_out, warns)
    return replace(done[0], ys=ys)


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
    quiet = replace(problem, y0=y0.detach(), times=problem.times.in_tensor(t.detach()))

    def grid(t: Tensor) -> Tensor:
        times = problem.times.in_tensor(t)
        return grid_of(problem.options, times, problem.func, problem.form.unpack(quiet.y0))

    def retake(step: Step, y: Tensor, ends: Tensor, inside: Tensor) -> Tensor:
        moments = torch.cat([ends[:1], inside, ends[1:]])
        times = Times(moments, moments.tolist())
        loop = loop_of(replace(quiet, y0=y, times=times, callbacks={}), NO_HOOKS, ends)
        return loop.solve(y)[1:]

    most = None if most is None else int(number_from(choice, "checkpoints", 1, 1))
    graph_bytes = int(number_from(choice, "graph_bytes", GRAPH_BYTES if most is None else 0, 0))
    recipe = Recipe(
        problem.func, problem.form, method, None if method.adaptive else grid, most, graph_bytes, warns, compact,
        retake if isinstance(method, ImplicitTableau) else None,
    )  # fmt: skip
    return checkpointed(partial(carry_out, quiet), recipe, t, y0, [p for p in params if p.requires_grad])
