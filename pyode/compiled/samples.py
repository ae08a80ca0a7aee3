"""A solve in which every sample has steps of its own, as one native call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops.contract import Grid, Policy
from .._ops.native import Kind
from ..control import Times
from ..errors import SolveError
from ..methods import Method, Tableau
from ..solution import SampleStats, Stats
from ..state import Form
from .arguments import WithArgs
from .dynamics import CompiledDynamics
from .native import Solve
from .node import solve_recorded
from .plan import Plan, RowStates
from .prepared import Prepared, solved_natively, wanted_of


def samples_again(
    compiled: CompiledDynamics | WithArgs,
    kind: Kind,
    y0: Tensor,
    t: Tensor,
    eagerly: Callable[[Tensor], Tensor],
    fail: Callable[[SolveError], None],
) -> CompiledSamples | None:
    """The last solve's loop, if that was of the same kind; it saves what checking the arguments costs."""
    last = compiled.last_samples
    if not isinstance(last, Prepared):
        return None
    found = last.serves(compiled, kind, y0, t)
    return None if found is None else CompiledSamples(last.plan, *found, t, eagerly, fail)


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
    kind: Kind | None = None,
) -> CompiledSamples | None:
    """The solve, about to be done; None if the eager loop has to do it. With a kind it is remembered.

    That is where a norm is the user's, the state is a structure other than a tuple, not on the CPU, or empty, or func
    can't be compiled.
    """
    if (
        not isinstance(method, Tableau)
        or not (form.is_tensor or form.is_tuple)
        or options.get("norm") is not None
        or not solved_natively(y0)
    ):
        return None
    entry = compiled.entry(form.shapes, form.is_tuple, y0.dtype, method, per_sample=True)
    if entry is None:
        return None
    rows, t = len(y0), times.tensor
    wanted = wanted_of(entry.inputs, y0, t)
    library = compiled.library(entry, wanted)
    if library is None:
        return None
    plan = Plan(library, y0.shape, y0.dtype, rows, grid, policy, rtol, atol, first_step, per_sample=True)
    if kind is not None:
        compiled.last_samples = Prepared(kind, entry.origin, plan, wanted)
    return CompiledSamples(plan, entry.inputs, wanted is not None, t, eagerly, fail)


class CompiledSamples:
    """A loop for samples with steps of their own.

    Attributes:
        inputs: the tensors that func uses.
        failed: whether some have failed.
    """

    last_step = None
    failed = False
    _solve: Solve | None = None  # as it has ended
    _states: RowStates

    def __init__(
        self,
        plan: Plan,
        inputs: list[Tensor],
        recorded: bool,
        t: Tensor,
        eagerly: Callable[[Tensor], Tensor],
        fail: Callable[[SolveError], None],
    ) -> None:
        self._plan, self.inputs, self._recorded, self._t = plan, inputs, recorded, t
        self._fail, self._eagerly = fail, eagerly

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]. The plan has the first step."""
        inputs, self._states = self.inputs, RowStates(len(y0))
        if self._recorded:
            ys, self._solve = solve_recorded(self._plan, inputs, self._eagerly, y0, self._t, self._states)
        else:
            ys, self._solve = self._plan.run(y0, inputs, self._states)
        self._n_times = len(ys)
        self.failed = self._solve.n_failed > 0
        if self.failed:
            self._fail(self._states.error())
        return ys

    def outcome(self) -> tuple[Tensor, SampleStats]:
        """[B] how each sample has ended, and what it has taken."""
        return self._states.outcome()

    def status_of_samples(self) -> Tensor:
        """[B] how each has ended."""
        return self.outcome()[0]

    def stats_of_samples(self) -> SampleStats:
        """What each sample has taken."""
        return self.outcome()[1]

    def ends_of_samples(self) -> Tensor:
        """[B] float64, to which time each has come."""
        return self._states["t"]

    def left(self) -> Tensor:
        """Which outputs have not been reached: [T, B]."""
        return torch.arange(self._n_times, device="cpu")[:, None] >= self._states["output_end"]

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None and self._solve is not None:
            self._states.add_to(stats)
