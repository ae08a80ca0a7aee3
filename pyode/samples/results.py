"""From what a solve has come to, the Solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SolveError, Status
from ..problem import Problem
from ..solution import SampleStats, Solution, Stats
from ..stepping.event import SampleEvents
from ..stepping.loops import SampleLoop
from ..stepping.outcome import Outcome
from .batch import Samples
from .dense_output import SampleDenseOutput
from .event_gradients import moved_events

if TYPE_CHECKING:
    from ..compiled.samples import CompiledSamples


@dataclass(eq=False)
class Results:
    """How each of B samples has fared.

    Args:
        tell: returns `status` and `stats`.
        reached: [T, B] bool, which outputs it came to.
        unread: whether `tell` waits for a device.

    Attributes:
        status: [B] a `Status` each.
        stats: what it has taken.
    """

    tell: Callable[[], tuple[Tensor, SampleStats]]
    reached: Tensor
    unread: bool = False

    @cached_property
    def _told(self) -> tuple[Tensor, SampleStats]:
        return self.tell()

    @property
    def status(self) -> Tensor:
        """[B] a `Status` each."""
        return self._told[0]

    @property
    def stats(self) -> SampleStats:
        """What each has taken."""
        return self._told[1]

    def until(self, events: SampleEvents, samples: Samples, t: Tensor) -> Results:
        """The same for samples of which some ended at an event."""
        met, sign = events.index >= 0, torch.sign(samples.t1 - samples.t0)
        before = sign * (samples.times_of(t) - events.time) <= 0
        status = torch.where(met.cpu(), int(Status.EVENT), self.status)
        return Results(lambda: (status, self.stats), torch.where(met, before, self.reached.to(met.device)))


def results_of(loop: Any, failures: list[SolveError], problem: Problem) -> Results:
    """That of a loop which has done its solve, and told of its failures."""
    if isinstance(loop, (Outcome, SampleLoop)):  # in this order: a protocol's check looks at properties
        left = loop.left()
        reached = ~(left if left.dim() == 2 else left[:, None])
        if isinstance(loop, Outcome) and loop.unread:

            def look() -> tuple[Tensor, SampleStats]:
                loop.look()
                return loop.status_of_samples(), loop.stats_of_samples()

            return Results(look, reached, unread=True)
        found = loop.status_of_samples(), loop.stats_of_samples()
        return Results(lambda: found, reached)
    counts = Stats()
    loop.add_to(counts)
    n_f_evals, n_accepted, n_rejected = (
        torch.tensor([n], device="cpu") for n in (counts.n_f_evals, counts.n_accepted, counts.n_rejected)
    )
    last_dt = torch.tensor([loop.last_step or 0.0], dtype=torch.float64, device="cpu")
    sign, values = problem.times.sign, problem.times.values
    end = failures[0].t if failures else values[-1]
    status = torch.tensor([int(failures[0].status if failures else Status.SUCCESS)], device="cpu")
    stats = SampleStats(n_f_evals, n_accepted, n_rejected, last_dt)
    return Results(
        lambda: (status, stats), torch.tensor([[sign * (value - end) <= 0] for value in values], device="cpu")
    )


def solution_of(
    problem: Problem,
    samples: Samples,
    t: Tensor,
    ys: Tensor,
    results: Results,
    events: SampleEvents | None,
    dense: SampleDenseOutput | None,
    start: Tensor | None,
) -> Solution:
    """All together.

    Args:
        ys: [T, B, D], which become nan behind a sample's failure or event.
        start: see `moved_events`.
    """
    nan = torch.full_like(samples.y0[:, :1], math.nan)
    event_t, event_index = samples.t0 * math.nan, torch.full_like(samples.t0, -1, dtype=torch.int64)
    event_y = nan.expand_as(samples.y0)
    if events is not None:
        event_t, event_index, event_y = moved_events(events, samples.func(problem), samples, start)
    if results.unread or not bool(results.reached.all()):
        ys = torch.where(results.reached.to(ys.device).unsqueeze(-1), ys, nan)
    solution = Solution(
        ts=t,
        ys=samples.of_user(ys),
        status=None if results.unread else results.status,  # type: ignore[arg-type]
        stats=None if results.unread else results.stats,  # type: ignore[arg-type]
        interpolant=None if dense is None else dense.stacked(event_t),
        event_t=event_t,
        event_index=event_index,
        event_y=samples.of_user(event_y, joint_axis=True),
    )
    return solution.read_later(results.tell) if results.unread else solution


def solution_of_native(loop: CompiledSamples, y0: Tensor, t: Tensor, ys: Tensor) -> Solution:
    """The same of a compiled solve of a tensor, without events, in less time."""
    if loop.failed:
        left = loop.left()
        ys = torch.where(left.reshape(*left.shape, *[1] * (ys.dim() - 2)), math.nan, ys)
    B, (status, stats) = len(y0), loop.outcome()
    return Solution(
        ts=t,
        ys=ys,
        status=status,
        stats=stats,
        interpolant=None,
        event_t=torch.full((B,), math.nan, dtype=torch.float64, device="cpu"),
        event_index=torch.full((B,), -1, device="cpu"),
        event_y=torch.full(y0.shape, math.nan, dtype=y0.dtype, device="cpu"),
    )
