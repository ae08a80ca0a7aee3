"""A solve with compiled dynamics, where it is one that a native call can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ops.contract import Grid, Policy
from .._ops.native import Kind
from ..control import Times
from ..errors import SolveError, Status
from ..methods import Method, Tableau
from ..solution import Stats
from ..state import Form
from ..stepping.course import stage_times
from ..stepping.fixed_grid import grid_of
from .arguments import WithArgs
from .dynamics import CompiledDynamics
from .native import Solve
from .node import solve_recorded
from .plan import Plan
from .prepared import Prepared, solved_natively, wanted_of

if TYPE_CHECKING:
    from .entry import Entry


def joint_again(
    compiled: CompiledDynamics | WithArgs,
    kind: Kind,
    y0: Tensor,
    t: Tensor,
    eagerly: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """The states at the output times where the last solve was of the same kind; None if not."""
    last = compiled.last
    if not isinstance(last, Prepared):
        return None
    found = last.serves(compiled, kind, y0, t)
    if found is None:
        return None
    inputs, recorded = found
    ys, solve = solve_recorded(last.plan, inputs, eagerly, y0, t) if recorded else last.plan.run(y0, inputs)
    return ys if solve.sample.status == _SUCCESS else None  # what is wrong is said by the long way


_SUCCESS = int(Status.SUCCESS)


def joint_loop(
    compiled: CompiledDynamics | WithArgs,
    form: Form,
    y0: Tensor,
    times: Times,
    method: Method,
    rtol: float | Tensor,
    atol: float | Tensor,
    policy: Policy,
    grid: Grid,
    options: dict[str, Any],
    fail: Callable[[SolveError], None],
    eagerly: Callable[[Tensor], Tensor],
    kind: Kind | None = None,
) -> CompiledLoop | None:
    """The solve, about to be done; None if a loop has to do it. With a kind it is remembered.

    That is where a norm is the user's, a method is not an explicit Runge-Kutta method, the state is not on the CPU or
    empty, autocast is at work, or func can't be compiled. Where gradients are wanted, the states are one node of
    autograd's graph; `eagerly` does the same solve by a loop, for gradients of gradients.
    """
    if (
        not isinstance(method, Tableau)
        or not (form.is_tensor or form.is_tuple)
        or options.get("norm") is not None
        or not solved_natively(y0)
    ):
        return None
    entry = compiled.entry(form.shapes, form.is_tuple, y0.dtype, method)
    if entry is None:
        return None
    wanted = wanted_of(entry.inputs, y0, times.tensor)
    library = compiled.library(entry, wanted)
    if library is None:
        return None
    steps = ends_of = None
    if not method.adaptive:
        state = form.unpack(y0)

        def ends_of(t: Tensor) -> Tensor:
            return grid_of(options, replace(times, tensor=t), compiled.func, state)

        ends = ends_of(times.tensor).detach().to("cpu", torch.float64).contiguous()
        abscissae = (0.0, *method.abscissae)
        times_of_stages = stage_times(ends, abscissae, y0.dtype, times.sign, bool(options.get("perturb", False)))
        steps = ends, torch.cat([times_of_stages, ends[1:, None].to(y0.dtype)], 1)
    rows = entry.rows_of(form.shapes[0])
    cubic = options.get("interp") == "cubic"

    def plan(first_step: float | None) -> Plan:
        plan = Plan(library, y0.shape, y0.dtype, rows, grid, policy, rtol, atol, first_step, steps, cubic)
        plan.ends_of = ends_of
        return plan

    kind = None if options or steps else kind
    return CompiledLoop(compiled, plan, entry, times.tensor, method, kind, wanted, fail, eagerly)


class CompiledLoop:
    """A loop for a whole state that takes one step at a time: one native call."""

    last_step: float | None = None
    _solve: Solve | None = None  # as it has ended

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that func uses."""
        return self._entry.inputs

    def __init__(
        self,
        compiled: CompiledDynamics | WithArgs,
        plan: Callable[[float | None], Plan],
        entry: Entry,
        t: Tensor,
        method: Tableau,
        kind: Kind | None,
        wanted: tuple[int, ...] | None,
        fail: Callable[[SolveError], None],
        eagerly: Callable[[Tensor], Tensor],
    ) -> None:
        self._compiled, self._plan, self._entry, self._t = compiled, plan, entry, t
        self._method, self._kind, self._wanted, self._fail, self._eagerly = method, kind, wanted, fail, eagerly

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]."""
        plan, entry = self._plan(first_step), self._entry
        if self._wanted is not None:
            ys, self._solve = solve_recorded(plan, entry.inputs, self._eagerly, y0, self._t)
        else:
            ys, self._solve = plan.run(y0, entry.inputs)
        if self._kind is not None:
            self._compiled.last = Prepared(self._kind, entry.origin, plan, self._wanted)
        sample = self._solve.sample
        self.last_step = abs(sample.dt_prev) if self._method.adaptive else None
        if sample.status != _SUCCESS:
            self._fail(error_of(self._solve))
        return ys

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None and self._solve is not None:
            stats.n_f_evals += self._solve.evaluations
            stats.n_accepted += self._solve.sample.n_accepted
            stats.n_rejected += self._solve.sample.n_rejected


def error_of(solve: Solve) -> SolveError:
    """Why a solve could not go on."""
    sample = solve.sample
    status, n = Status(sample.status), sample.n_accepted + sample.n_rejected
    if status is Status.NON_FINITE and n == 0 and solve.finite_start:
        status = Status.STEP_TOO_SMALL  # all is finite, but a tolerance is 0 where y0 is 0
    return SolveError(status, sample.t, sample.dt_prev, n)
