"""A solve in which every sample has steps of its own, as one native call."""

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
from ..methods import Method, Tableau
from ..solution import SampleStats, Stats
from ..state import Form
from .arguments import WithArgs
from .dynamics import CompiledDynamics
from .native import Plan, RowStates, Solve, Tape

if TYPE_CHECKING:
    from .entry import Entry


@dataclass
class PreparedSamples:
    """A per-sample solve that has been checked and compiled, to be done again from other states.

    Attributes:
        key: all that it depends on beside the times and the state's numbers.
        t, version: the times, and how often they had been written to.
        parts: what `CompiledSamples` is made of.
    """

    key: tuple[Any, ...]
    t: Tensor
    version: int
    parts: tuple[Plan, Entry, Tableau, bool, Callable[[Tensor], Tensor]]


def key_of(y0: Any, rtol: Any, atol: Any, *others: Any) -> tuple[Any, ...] | None:
    """All that a solve depends on beside the times, if it is a plain one; others are compared by ==."""
    if type(y0) is not Tensor or type(rtol) is not float or type(atol) is not float:
        return None
    return (y0.shape, y0.dtype, y0.device, rtol, atol, *others)


def samples_again(
    compiled: CompiledDynamics, key: tuple[Any, ...] | None, y0: Any, t: Any, fail: Callable[[SolveError], None]
) -> CompiledSamples | None:
    """The last solve's loop, if that was the same but for y0's numbers; it saves what checking the arguments costs."""
    last = compiled.last_samples
    if (
        key is None
        or not isinstance(last, PreparedSamples)
        or t is not last.t
        or t._version != last.version
        or key != last.key
        or not y0.is_contiguous()
        or backend_for(y0) is not native
        or not compiled.unchanged()
    ):
        return None
    _, entry, _, recorded, _ = last.parts
    if recorded != _is_recorded(y0, entry) or (torch.is_grad_enabled() and t.requires_grad):
        return None
    if recorded and compiled.library(entry, True) is not last.parts[0].library:
        return None
    return CompiledSamples(*last.parts, fail)


def _is_recorded(y0: Tensor, entry: Entry) -> bool:
    """Whether gradients are wanted."""
    return torch.is_grad_enabled() and (y0.requires_grad or any(x.requires_grad for x in entry.inputs))


def sample_loop(
    compiled: CompiledDynamics | WithArgs,
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
    eagerly: Callable[[Tensor], Tensor],
    fail: Callable[[SolveError], None],
    key: tuple[Any, ...] | None = None,
) -> CompiledSamples | None:
    """The solve, about to be done; None if the eager loop has to do it. With a key it is remembered.

    That is where a norm is the user's, the state is a structure other than a tuple, not on the CPU, or empty, gradients
    of times are wanted, or func can't be compiled.
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
    entry = compiled.entry(form.shapes, form.is_tuple, y0.dtype, method, per_sample=True)
    if entry is None or (torch.is_grad_enabled() and times.tensor.requires_grad):
        return None
    recorded = _is_recorded(y0, entry)
    library = compiled.library(entry, recorded)
    if library is None:
        return None

    plan = library.plan(y0.shape, y0.dtype, len(y0), grid, policy, rtol, atol, first_step)
    parts = plan, entry, method, recorded, eagerly
    if key is not None and not isinstance(compiled, WithArgs):
        compiled.last_samples = PreparedSamples(key, times.tensor, times.tensor._version, parts)
    return CompiledSamples(*parts, fail)


class CompiledSamples:
    """A loop for samples with steps of their own.

    Attributes:
        failed: whether some have failed.
    """

    last_step = None
    failed = False
    _solve: Solve | None = None  # as it has ended
    _states: RowStates

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that func uses."""
        return self._entry.inputs

    def __init__(
        self,
        plan: Plan,
        entry: Entry,
        method: Tableau,
        recorded: bool,
        eagerly: Callable[[Tensor], Tensor],
        fail: Callable[[SolveError], None],
    ) -> None:
        self._plan, self._entry, self._method, self._recorded = plan, entry, method, recorded
        self._fail, self._eagerly = fail, eagerly

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]. The plan has the first step."""
        plan, inputs = self._plan, self._entry.inputs
        if self._recorded:
            notes: list[Any] = []
            wanted = [x for x in inputs if x.requires_grad]
            ys: Tensor = _RecordedSamples.apply(plan, inputs, self._eagerly, notes, y0, *wanted)  # type: ignore[no-untyped-call]
            self._solve, self._states = notes
        else:
            self._states = RowStates(len(y0))
            ys, self._solve = plan.run(y0, inputs, states=self._states)
        self._n_times = len(ys)
        status = self._states["status"]
        self.failed = bool(status.any())  # success is 0
        if self.failed:
            tried, finite = self._states["n_accepted"] + self._states["n_rejected"], self._states["finite_start"] != 0
            no_start = (status == int(Status.NON_FINITE)) & (tried == 0)
            status[no_start & finite] = int(Status.STEP_TOO_SMALL)  # a tolerance is 0 where y0 is 0
            self._fail(self._error(int(status.nonzero()[0])))
        return ys

    def status_of_samples(self) -> Tensor:
        """[B] how each has ended."""
        return self._states["status"].clone()

    def stats_of_samples(self) -> SampleStats:
        """What each sample has taken."""
        assert self._solve is not None
        accepted, rejected = self._states["n_accepted"].clone(), self._states["n_rejected"].clone()
        evals = self._solve.evaluations + (accepted + rejected) * len(self._method.rows) + self._states["n_jumps"]
        return SampleStats(evals, accepted, rejected, self._states["size1"].clone())

    def left(self) -> Tensor:
        """Which outputs have not been reached: [T, B]."""
        return torch.arange(self._n_times)[:, None] >= self._states["output_end"]

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts; evaluations of all samples together count as one, as where func is called."""
        if stats is not None and self._solve is not None:
            found = self.stats_of_samples()
            stats.n_f_evals += int(found.n_f_evals.max())
            stats.n_accepted += int(found.n_accepted.sum())
            stats.n_rejected += int(found.n_rejected.sum())

    def _error(self, b: int) -> SolveError:
        """Why sample b could not go on."""
        status, accepted, rejected = (int(self._states[name][b]) for name in ("status", "n_accepted", "n_rejected"))
        t, dt = (float(self._states[name][b]) for name in ("t", "dt_prev"))
        several = len(self._states["status"]) > 1
        return SolveError(Status(status), t, dt, accepted + rejected, b if several else None)


class _RecordedSamples(torch.autograd.Function):
    """A solve as one node: the forward pass notes the steps of every row, the backward pass undoes them."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        inputs: list[Tensor],
        eagerly: Callable[[Tensor], Tensor],
        notes: list[Any],
        y0: Tensor,
        *wanted: Tensor,
    ) -> Tensor:
        library, states = plan.library, RowStates(len(y0))
        while True:
            tape = Tape(max(library.capacity, 32 * len(y0)), y0[0].numel(), y0.dtype)
            ys, solve = plan.run(y0, inputs, tape, states)
            library.capacity = solve.n_steps + solve.n_steps // 4 + 4
            if solve.n_steps <= tape.capacity:
                break
        notes += solve, states
        ctx.plan, ctx.inputs, ctx.eagerly, ctx.solve, ctx.kept = plan, inputs, eagerly, solve, (tape, states)
        ctx.save_for_backward(y0, *wanted)
        return ys

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        y0, *wanted = ctx.saved_tensors
        solve: Solve = ctx.solve
        (gradient,) = gradients
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():  # this gradient is to have one itself
            asked = [x for x, need in zip([y0, *wanted], needed) if need]
            found = iter(torch.autograd.grad(ctx.eagerly(y0), asked, gradient, create_graph=True, allow_unused=True))
            return None, None, None, None, *(next(found) if need else None for need in needed)
        start, of_wanted = ctx.plan.undo(solve, plain(gradient), y0, ctx.inputs, wanted)
        return None, None, None, None, start, *of_wanted
