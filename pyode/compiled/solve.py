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
    """

    key: tuple[Any, ...]
    t: Tensor
    version: int
    rows: int
    entry: Entry
    plan: Plan


def solve_again(
    compiled: CompiledDynamics,
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str | None,
    eagerly: Callable[[Tensor], Tensor],
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
        if t.requires_grad or plan.library is not compiled.trained(entry):
            return None
        ys, solve = _recorded(plan, last.rows, entry, eagerly, y0)
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


def solve_compiled(
    compiled: CompiledDynamics,
    form: Form,
    y0: Tensor,
    times: Times,
    method: Method,
    rtol: float | Tensor,
    atol: float | Tensor,
    policy: Policy,
    grid: Grid,
    first_step: float | None,
    options: dict[str, Any],
    fail: Callable[[SolveError], None],
    eagerly: Callable[[Tensor], Tensor],
) -> tuple[Tensor, float | None] | None:
    """The states at the output times, [T, *y0.shape], and the size of the last step; None if a loop has to do it.

    That is where a norm is the user's, a method is not an explicit Runge-Kutta method, gradients of times are wanted,
    the state is not on the CPU or empty, or func can't be compiled. Where gradients are wanted, the states are one node
    of autograd's graph; `eagerly` does the same solve by a loop, for gradients of gradients.
    """
    if (
        not isinstance(method, Tableau)
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
    library = compiled.trained(entry) if recorded else entry.library
    if library is None:
        return None
    steps = None
    if not method.adaptive:
        ends = grid_of(options, times, compiled.func, form.unpack(y0)).detach().to("cpu", torch.float64).contiguous()
        abscissae = (0.0, *method.abscissae)
        times_of_stages = stage_times(ends, abscissae, y0.dtype, times.sign, bool(options.get("perturb", False)))
        steps = ends, torch.cat([times_of_stages, ends[1:, None].to(y0.dtype)], 1)
    rows = entry.rows_of(form.shapes[0])
    plan = library.plan(
        y0.shape, y0.dtype, rows, grid, policy, rtol, atol, first_step, steps, options.get("interp") == "cubic"
    )
    if recorded:
        ys, solve = _recorded(plan, rows, entry, eagerly, y0)
    else:
        ys, solve = plan.run(y0, entry.inputs)
    if not (form.is_tuple or options or steps) and type(rtol) is float and type(atol) is float:
        key = (y0.shape, y0.dtype, rtol, atol, None if method.name == DEFAULT else method.name)
        compiled.last = Prepared(key, times.tensor, times.tensor._version, rows, entry, plan)
    sample = solve.sample
    stats: Stats | None = options.get("stats")
    if stats is not None:
        stats.n_f_evals += solve.evaluations
        stats.n_accepted += sample.n_accepted
        stats.n_rejected += sample.n_rejected
    if sample.status != _SUCCESS:
        fail(error_of(solve))
    return ys, abs(sample.dt_prev) if method.adaptive else None


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
