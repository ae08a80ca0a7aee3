"""The continuous adjoint's backward solve as one native call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..control import Times, grid_from
from ..errors import Status
from ..gradients.backsolve import BacksolveConfig, backwards
from ..methods import Tableau
from ..solution import Stats
from ..state import Form
from .arguments import WithArgs
from .dynamics import CompiledDynamics
from .native import TIME
from .plan import Plan
from .prepared import solved_natively
from .solve import error_of


def backsolve_compiled(
    compiled: CompiledDynamics | WithArgs,
    form: Form,
    times: Times,
    config: BacksolveConfig,
    ys: Tensor,
    gradients: Tensor,
    params: tuple[Tensor, ...],
    time: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]] | None:
    """The gradients with respect to y0 (packed), t if wanted, and the parameters; None if a loop has to do it.

    That is where a norm or callbacks are the user's, every interval is to be a solve of its own, a method is not an
    adaptive Runge-Kutta method, or func uses tensors through which parameters are reached in another way than directly.

    Args:
        compiled: the dynamics.
        form, times, config, ys, gradients, params, time: as `Backsolve`'s.

    Raises:
        SolveError: the backward solve failed.
    """
    method = config.method
    if (
        not (isinstance(method, Tableau) and method.adaptive)
        or not (form.is_tensor or form.is_tuple)
        or form.per_sample
        or config.restart
        or config.callbacks
        or not config.fused
        or len(times.values) < 2
        or not solved_natively(ys)
    ):
        return None
    entry = compiled.entry(form.shapes, form.is_tuple, ys.dtype, method)
    if entry is None:
        return None
    places = {id(x): i for i, x in enumerate(entry.inputs)}
    wanted = tuple(places[id(p)] for p in params if id(p) in places)
    # What was computed from parameters outside of func leads to them by its graph only.
    direct = all(x.is_leaf or i in wanted for i, x in enumerate(entry.inputs) if x.requires_grad)
    if not direct or len(places) < len(entry.inputs) or any(entry.inputs[i].dtype != ys.dtype for i in wanted):
        return None
    library = compiled.backsolving(entry, (*wanted, TIME) if time else wanted)
    if library is None:
        return None
    ends, options = backwards(times, config.options)
    rtol, atol = (x if isinstance(x, float) else torch.stack([x, x]) for x in (config.rtol, config.atol))
    least_rtol, least_atol = (x if isinstance(x, float) else float(x.min()) for x in (config.rtol, config.atol))
    ys, gradients = ys.detach().contiguous(), gradients.detach().contiguous()
    z = torch.stack([ys[-1], gradients[-1]])
    grid = grid_from(options, ends, ys.device)
    rows = entry.rows_of(form.shapes[0])
    plan = Plan(library, z.shape, z.dtype, rows, grid, config.policy, rtol, atol, config.first_step)
    values = torch.tensor(times.values, dtype=torch.float64, device="cpu")
    inputs = [entry.inputs[i] for i in wanted]
    tolerances = least_rtol, least_atol
    start, of_times, found, solve = plan.run_back(
        z, entry.inputs, values, ys, gradients, tolerances, config.seminorm, inputs
    )
    stats: Stats | None = options.get("stats")
    if stats is not None:
        stats.n_f_evals += solve.evaluations
        stats.n_accepted += solve.sample.n_accepted
        stats.n_rejected += solve.sample.n_rejected
    if solve.sample.status != Status.SUCCESS:
        raise error_of(solve)
    by_id = {id(x): g for x, g in zip(inputs, found)}
    of_t = of_times.to(times.tensor) if time else None
    return start[1] + gradients[0], of_t, [by_id.get(id(p), torch.zeros_like(p)) for p in params]
