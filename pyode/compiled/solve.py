"""A solve with compiled dynamics, where it is one that a native call can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import backend_for, native
from .._ops.contract import Grid, Policy
from ..control import Times
from ..errors import SolveError, Status
from ..methods import Method, Tableau
from ..solution import Stats
from ..state import Form
from ..stepping.course import stage_times
from ..stepping.fixed_grid import grid_of
from .dynamics import CompiledDynamics
from .native import Outcome

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
) -> tuple[Tensor, float | None] | None:
    """The states at the output times, [T, *y0.shape], and the size of the last step; None if a loop has to do it.

    That is where a norm is the user's, a method is not an explicit Runge-Kutta method, gradients are wanted, the state is
    not on the CPU or empty, or func can't be compiled.
    """
    cubic = options.get("interp", "linear") == "cubic"
    if (
        not isinstance(method, Tableau)
        or options.get("norm") is not None
        or (cubic and not method.adaptive)
        or y0.device.type != "cpu"
        or y0.numel() == 0
        or backend_for(y0) is not native
    ):
        return None
    entry = compiled.entry(form.shapes, form.is_tuple, y0.dtype, method)
    if entry is None:
        return None
    wanted = torch.is_grad_enabled()
    if wanted and (y0.requires_grad or times.tensor.requires_grad or any(x.requires_grad for x in entry.inputs)):
        return None
    steps = None
    if not method.adaptive:
        ends = grid_of(options, times, compiled.func, form.unpack(y0)).detach().to("cpu", torch.float64)
        abscissae = (0.0, *method.abscissae)
        steps = ends, stage_times(ends, abscissae, y0.dtype, times.sign, bool(options.get("perturb", False)))
    rows = entry.rows_of(form.shapes[0])
    ys, outcome = entry.library.solve(y0, rows, entry.inputs, grid, policy, rtol, atol, first_step, steps)
    stats: Stats | None = options.get("stats")
    if stats is not None:
        stats.n_f_evals += outcome.n_evals
        stats.n_accepted += outcome.n_accepted
        stats.n_rejected += outcome.n_rejected
    if outcome.status != Status.SUCCESS:
        fail(_error(outcome))
    return ys, abs(outcome.dt) if method.adaptive else None


def _error(outcome: Outcome) -> SolveError:
    status, n = Status(outcome.status), outcome.n_accepted + outcome.n_rejected
    if status is Status.NON_FINITE and n == 0 and outcome.finite_start:
        status = Status.STEP_TOO_SMALL  # all is finite, but a tolerance is 0 where y0 is 0
    return SolveError(status, outcome.t, outcome.dt, n)
