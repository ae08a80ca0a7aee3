"""The continuous adjoint's backward solve as one native call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..control import Times, grid_from
from ..errors import Status
from ..gradients.backsolve import Arriving, BacksolveConfig, backwards
from ..gradients.backsolve_samples import Found, SampleArriving, SampleBacksolveConfig
from ..gradients.survey import warn_of_loss
from ..methods import Tableau
from ..solution import Stats
from ..state import Form
from .arguments import WithArgs
from .dynamics import CompiledDynamics
from .native import TIME
from .plan import Plan, RowStates
from .prepared import solved_natively
from .solve import error_of

if TYPE_CHECKING:
    from .entry import Entry
    from .native import Library


def backsolve_compiled(
    compiled: CompiledDynamics | WithArgs,
    form: Form,
    config: BacksolveConfig,
    arriving: Arriving,
    measured: bool = True,
) -> tuple[Tensor, Tensor | None, list[Tensor]] | None:
    """The gradients with respect to y0 (packed), t if wanted, and the parameters; None if a loop has to do it.

    That is where a norm or callbacks are the user's, every interval is to be a solve of its own, a method is not an
    adaptive Runge-Kutta method, or func uses tensors through which parameters are reached in another way than directly.

    Args:
        compiled: the dynamics.
        form, config, arriving: as `Backsolve`'s.
        measured: whether integrals have a share in the norm: time's, and those of parameters if config has it so.

    Raises:
        SolveError: the backward solve failed.
    """
    method, times, ys, params = config.method, arriving.times, arriving.ys, arriving.params
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
    found = _library_for(compiled, form, ys.dtype, method, params, arriving.with_time, config.warns)
    if found is None:
        return None
    entry, library, wanted = found
    ends, options = backwards(times, config.options)
    rtol, atol = (x if isinstance(x, float) else torch.stack([x, x]) for x in (config.rtol, config.atol))
    least_rtol, least_atol = (x if isinstance(x, float) else float(x.min()) for x in (config.rtol, config.atol))
    ys, gradients = ys.detach().contiguous(), arriving.gradients.detach().contiguous()
    z = torch.stack([ys[-1], gradients[-1]])
    grid = grid_from(options, ends, ys.device)
    rows = entry.rows_of(form.shapes[0])
    plan = Plan(library, z.shape, z.dtype, rows, grid, config.policy, rtol, atol, config.first_step)
    values = torch.tensor(times.values, dtype=torch.float64, device="cpu")
    first_measured = (len(wanted) if config.seminorm else 0) if measured else len(wanted) + 1
    start, of_times, of_wanted, solve = plan.run_back(
        z, entry.inputs, values, ys, gradients, wanted, (least_rtol, least_atol), first_measured
    )
    stats: Stats | None = options.get("stats")
    if stats is not None:
        stats.n_f_evals += solve.evaluations
        stats.n_accepted += solve.sample.n_accepted
        stats.n_rejected += solve.sample.n_rejected
    if solve.sample.status != Status.SUCCESS:
        raise error_of(solve)
    of_t = of_times.to(times.tensor) if arriving.with_time else None
    return start[1] + gradients[0], of_t, _by_params(params, wanted, of_wanted)


def backsolve_samples_compiled(
    compiled: CompiledDynamics | WithArgs,
    form: Form,
    config: SampleBacksolveConfig,
    arriving: SampleArriving,
) -> Found | None:
    """The same of samples with steps of their own: what `SampleBacksolve.solve` returns, or None.

    Args:
        compiled, form: the dynamics, and the form of the user's state.
        config, arriving: as `SampleBacksolve`'s.

    Raises:
        SolveError: the backward solve of a sample failed.
    """
    if not form.per_sample:
        return _backsolve_one(compiled, form, config, arriving)
    params, with_time = arriving.params, arriving.with_time
    if not (form.is_tensor or form.is_tuple) or not solved_natively(arriving.ys):
        return None
    found = _library_for(
        compiled, form, arriving.ys.dtype, config.tableau, params, with_time, config.warns, per_sample=True
    )
    if found is None:
        return None
    entry, library, wanted = found
    times, ys, gradients = (x.detach().contiguous() for x in (arriving.times, arriving.ys, arriving.gradients))
    z = torch.stack([ys[-1], torch.zeros_like(ys[-1])], 1)
    rtol, atol = config.tolerances
    grid, states = config.grid_of(times), RowStates(len(z))
    plan = Plan(library, z.shape, z.dtype, len(z), grid, config.policy, rtol, atol, None, per_sample=True)
    end, of_times, of_wanted, solve = plan.run_back(
        z, entry.inputs, times, ys, gradients, wanted, states=states, first_steps=arriving.first_step.contiguous()
    )
    stats = config.options.get("stats")
    if stats is not None:
        states.add_to(stats)
    if solve.n_failed > 0:
        raise states.error()
    return end[:, 1] + gradients[0], of_times, _by_params(params, wanted, of_wanted)


def _backsolve_one(
    compiled: CompiledDynamics | WithArgs, form: Form, config: SampleBacksolveConfig, given: SampleArriving
) -> Found | None:
    """The same where the whole state is the only sample: [T] times, the last of them once or several times."""
    times, ys, gradients = given.times[:, 0], given.ys, given.gradients
    n = int((times != times[-1]).sum()) + 1
    if given.with_time and bool(gradients[-1].any()):  # it does not move with t, but arrives where others do that move
        return None
    ends = Times(times[:n], times[:n].tolist())
    arriving = torch.cat([gradients[: n - 1], gradients[n - 1 :].sum(0, keepdim=True)])
    options = {**config.options, "step_t": config.grid.step_t, "jump_t": config.grid.jump_t}
    joint = BacksolveConfig(
        config.tableau, config.rtol, config.atol, options, config.policy, float(given.first_step), restart=False,
        norm=lambda _: None, fused=True, seminorm=True, callbacks={}, warns=config.warns,
    )  # fmt: skip
    shape = (n, *form.shapes[0]) if form.is_tensor else (n, ys.shape[-1])
    one = Arriving(ends, ys[:n].reshape(shape), arriving.reshape(shape), given.params, given.with_time)
    found = backsolve_compiled(compiled, form, joint, one, measured=False)
    if found is None:
        return None
    y0, moved, of_params = found
    of_times = torch.zeros_like(times)
    if moved is not None:
        of_times[:n] = moved
    return y0.reshape(1, -1), of_times[:, None], of_params


def _library_for(
    compiled: CompiledDynamics | WithArgs,
    form: Form,
    dtype: torch.dtype,
    method: Tableau,
    params: tuple[Tensor, ...],
    time: bool,
    warns: bool,
    per_sample: bool = False,
) -> tuple[Entry, Library, list[Tensor]] | None:
    """What was compiled, the library of its backward solve, and those of func's tensors that are among params.

    If it is to warn, it does so of one that is not.
    """
    entry = compiled.entry(form.shapes, form.is_tuple, dtype, method, per_sample)
    if entry is None:
        return None
    inputs = entry.inputs
    places = {id(x): i for i, x in enumerate(inputs)}
    wanted = tuple(places[id(p)] for p in params if id(p) in places)
    # What was computed from parameters outside of func leads to them by its graph only.
    direct = all(x.is_leaf or i in wanted for i, x in enumerate(inputs) if x.requires_grad)
    if not direct or len(places) < len(inputs) or any(inputs[i].dtype != dtype for i in wanted):
        return None
    library = compiled.backsolving(entry, (*wanted, TIME) if time else wanted)
    if library is None:
        return None
    lost = next((x for i, x in enumerate(inputs) if x.requires_grad and i not in wanted), None)
    if warns and lost is not None:
        warn_of_loss(lost)
    return entry, library, [inputs[i] for i in wanted]


def _by_params(params: tuple[Tensor, ...], wanted: list[Tensor], found: list[Tensor]) -> list[Tensor]:
    """The gradients of params, from those of some tensors; 0 for the others."""
    by_id = {id(x): g for x, g in zip(wanted, found)}
    return [by_id.get(id(p), torch.zeros_like(p)) for p in params]
