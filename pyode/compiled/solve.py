"""A solve with compiled dynamics, where it is one that a native call can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ops import backend_for, native
from .._ops.autograd import plain
from .._ops.contract import Grid, Policy
from ..control import Times
from ..errors import SolveError, Status
from ..methods import DEFAULT, Method, Tableau
from ..solution import Stats
from ..state import Form
from ..stepping.course import stage_times
from ..stepping.fixed_grid import grid_of
from .arguments import WithArgs
from .dynamics import CompiledDynamics
from .native import Plan, Solve, Tape

if TYPE_CHECKING:
    from .entry import Entry


@dataclass
class Prepared:
    """A solve that has been checked and compiled, to be done again: the same times, tolerances and method.

    Attributes:
        key: y0's shape and dtype, rtol, atol, method.
        t, version: the times, and how often they had been written to.
        rows: of the state.
        entry, plan: what was compiled.
        eagerly: does the same by a loop.
    """

    key: tuple[Any, ...]
    t: Tensor
    version: int
    rows: int
    entry: Entry
    plan: Plan
    eagerly: Callable[[Tensor], Tensor]


def solve_again(
    compiled: CompiledDynamics,
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str | None,
) -> Tensor | None:
    """The states at the output times where the last solve was the same but for y0's numbers; None if not.

    It saves what checking the arguments costs, which is more than a small solve.
    """
    last = compiled.last
    if (
        not isinstance(last, Prepared)
        or t is not last.t
        or not (type(y0) is Tensor and type(rtol) is float and type(atol) is float)
        or (y0.shape, y0.dtype, rtol, atol, method) != last.key
        or t._version != last.version
        or not y0.is_contiguous()
        or backend_for(y0) is not native
        or not compiled.unchanged()
    ):
        return None
    entry, plan = last.entry, last.plan
    if _is_recorded(y0, t, entry):
        if t.requires_grad or plan.library is not compiled.library(entry, True):
            return None
        ys, solve = _recorded(plan, last.rows, entry, last.eagerly, y0)
    elif plan.library is entry.library:
        ys, solve = plan.run(y0, entry.inputs)
    else:
        return None
    return ys if solve.sample.status == _SUCCESS else None  # what is wrong is said by the long way


_SUCCESS = int(Status.SUCCESS)


def _is_recorded(y0: Tensor, t: Tensor, entry: Entry) -> bool:
    """Whether gradients are wanted."""
    return torch.is_grad_enabled() and (
        y0.requires_grad or t.requires_grad or any(x.requires_grad for x in entry.inputs)
    )


def compiled_loop(
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
) -> CompiledLoop | None:
    """The solve, about to be done; None if a loop has to do it.

    That is where a norm is the user's, a method is not an explicit Runge-Kutta method, gradients of times are wanted,
    the state is not on the CPU or empty, or func can't be compiled. Where gradients are wanted, the states are one node
    of autograd's graph; `eagerly` does the same solve by a loop, for gradients of gradients.
    """
    if (
        not isinstance(method, Tableau)
        or not (form.is_tensor or form.is_tuple)
        or options.get("norm") is not None
        or y0.device.type != "cpu"
        or y0.numel() == 0
        or backend_for(y0) is not native
    ):
        return None
    entry = compiled.entry(form.shapes, form.is_tuple, y0.dtype, method)
    if entry is None or (torch.is_grad_enabled() and times.tensor.requires_grad):
        return None
    recorded = _is_recorded(y0, times.tensor, entry)
    library = compiled.library(entry, recorded)
    if library is None:
        return None
    steps = None
    if not method.adaptive:
        ends = grid_of(options, times, compiled.func, form.unpack(y0)).detach().to("cpu", torch.float64).contiguous()
        abscissae = (0.0, *method.abscissae)
        times_of_stages = stage_times(ends, abscissae, y0.dtype, times.sign, bool(options.get("perturb", False)))
        steps = ends, torch.cat([times_of_stages, ends[1:, None].to(y0.dtype)], 1)
    rows = entry.rows_of(form.shapes[0])
    cubic = options.get("interp") == "cubic"

    def plan(first_step: float | None) -> Plan:
        return library.plan(y0.shape, y0.dtype, rows, grid, policy, rtol, atol, first_step, steps, cubic)

    key = None
    if not (form.is_tuple or options or steps) and type(rtol) is float and type(atol) is float:
        key = (y0.shape, y0.dtype, rtol, atol, None if method.name == DEFAULT else method.name)
    return CompiledLoop(compiled, plan, entry, rows, times.tensor, method, key, recorded, fail, eagerly)


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
        rows: int,
        t: Tensor,
        method: Tableau,
        key: tuple[Any, ...] | None,
        recorded: bool,
        fail: Callable[[SolveError], None],
        eagerly: Callable[[Tensor], Tensor],
    ) -> None:
        self._compiled, self._plan, self._entry, self._rows, self._t = compiled, plan, entry, rows, t
        self._method, self._key, self._recorded, self._fail, self._eagerly = method, key, recorded, fail, eagerly

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]."""
        plan, entry = self._plan(first_step), self._entry
        if self._recorded:
            ys, self._solve = _recorded(plan, self._rows, entry, self._eagerly, y0)
        else:
            ys, self._solve = plan.run(y0, entry.inputs)
        if self._key is not None:
            parts = self._rows, entry, plan, self._eagerly
            self._compiled.last = Prepared(self._key, self._t, self._t._version, *parts)
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


def _recorded(
    plan: Plan, rows: int, entry: Entry, eagerly: Callable[[Tensor], Tensor], y0: Tensor
) -> tuple[Tensor, Solve]:
    """A solve as one node of autograd's graph, and how it ended."""
    notes: list[Solve] = []
    wanted = [x for x in entry.inputs if x.requires_grad]
    ys: Tensor = _Recorded.apply(plan, rows, entry.inputs, eagerly, notes, y0, *wanted)  # type: ignore[no-untyped-call]
    return ys, notes[0]


class _Recorded(torch.autograd.Function):
    """A solve as one node: the forward pass notes its steps, the backward pass undoes them."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        rows: int,
        inputs: list[Tensor],
        eagerly: Callable[[Tensor], Tensor],
        notes: list[Solve],
        y0: Tensor,
        *wanted: Tensor,
    ) -> Tensor:
        library = plan.library
        numbers = -(-rows // library.lanes) * library.lanes * (y0.numel() // rows)
        while True:
            tape = Tape(library.capacity, numbers, y0.dtype)
            ys, solve = plan.run(y0, inputs, tape)
            n = solve.sample.n_accepted
            fits = n <= tape.capacity
            library.capacity = n + n // 4 + 4
            if fits:
                break
        notes.append(solve)
        ctx.plan, ctx.inputs, ctx.eagerly, ctx.solve, ctx.tape = plan, inputs, eagerly, solve, tape
        ctx.save_for_backward(y0, *wanted)
        return ys

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        y0, *wanted = ctx.saved_tensors
        (gradient,) = gradients
        needed = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():  # this gradient is to have one itself
            asked = [x for x, need in zip([y0, *wanted], needed) if need]
            found = iter(torch.autograd.grad(ctx.eagerly(y0), asked, gradient, create_graph=True, allow_unused=True))
            return None, None, None, None, None, *(next(found) if need else None for need in needed)
        start, of_wanted = ctx.plan.undo(ctx.solve, plain(gradient), y0, ctx.inputs, wanted)
        return None, None, None, None, None, start, *of_wanted


def error_of(solve: Solve) -> SolveError:
    """Why a solve could not go on."""
    sample = solve.sample
    status, n = Status(sample.status), sample.n_accepted + sample.n_rejected
    if status is Status.NON_FINITE and n == 0 and solve.finite_start:
        status = Status.STEP_TOO_SMALL  # all is finite, but a tolerance is 0 where y0 is 0
    return SolveError(status, sample.t, sample.dt_prev, n)
