"""Who looks on while `solve_ivp` solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SolveError
from ..methods import Tableau
from ..problem import Problem, event_of
from ..progress import Progress
from ..state import Func
from ..stepping.event import SampleEvents
from ..stepping.hooks import Hooks
from ..stepping.running_rows import RunningRows
from .batch import Samples
from .dense_output import SampleDenseOutput


@dataclass(eq=False)
class Observers:
    """Those of one solve; None are those that it does not ask for."""

    problem: Problem
    events: SampleEvents | None
    dense: SampleDenseOutput | None
    rows: RunningRows | None
    bar: Progress | None

    @property
    def func(self) -> Func:
        """What the loop is to call."""
        return self.problem.func if self.rows is None else self.rows

    @property
    def see_steps(self) -> bool:
        """Whether somebody has to be shown single steps, which a native solve does not do."""
        return any((self.events, self.dense, self.bar, self.problem.callbacks))

    def hooks(self, fail: Callable[[SolveError], None]) -> Hooks:
        """What a loop calls; `fail` for a failure."""
        callbacks: dict[str, Any] = dict(self.problem.callbacks)
        method, bar = self.problem.method, self.bar
        has_controller = isinstance(method, Tableau) and method.adaptive
        if bar is not None and not has_controller:
            callbacks["step"] = _all_of(bar.step, callbacks.get("step"))
        return Hooks(
            fail=_all_of(fail, None if bar is None else bar.fail) or fail,
            watch_batch=_all_of(None if self.dense is None else self.dense.watch, self.events),
            judged=_all_of(None if self.rows is None else self.rows.look, bar if has_controller else None),
            **callbacks,
        )


def observers_of(
    problem: Problem,
    samples: Samples,
    event_fn: Callable[..., Any] | None,
    args: Sequence[Any],
    dense_output: bool,
    compact: bool,
    progress: bool,
) -> Observers:
    """Those that `solve_ivp`'s arguments ask for."""
    events = None
    if event_fn is not None:
        event = event_of(event_fn, args, problem.form, samples.shape)
        events = SampleEvents(event, samples.t0, samples.y0, *problem.search_options)
    return Observers(
        problem,
        events,
        SampleDenseOutput(samples) if dense_output else None,
        RunningRows(problem.func, problem.form) if compact else None,
        Progress(samples.t0, samples.t1) if progress else None,
    )


def _all_of(*functions: Callable[..., None] | None) -> Callable[..., None] | None:
    """One function that calls those that are not None."""
    given = [function for function in functions if function is not None]
    if len(given) < 2:
        return given[0] if given else None

    def call(*arguments: Any) -> None:
        for function in given:
            function(*arguments)

    return call
