"""Undoing the steps of explicit Runge-Kutta methods, evaluation by evaluation.

With lam the gradient at a step's end and G_m those that arrive at outputs inside it, at positions x_m, a step is
undone by what autograd would do with it, stage by stage::

    g_i = dt (b_i lam + sum_j>i a_ji h_j + sum_m w_i(x_m) G_m),    h_i = g_i df/dy(t_i, y_i),
    lam at its start = lam + sum_i h_i + sum_m G_m

where g_i df/dp is what stage i adds to a parameter's gradient. f(t1, y1), which dense output needs, is the next step's
first evaluation and is undone with it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._ops.autograd import plain
from .._ops.contract import clock_device
from ..methods import Tableau
from ..state import Dynamics
from ..stepping.course import table_of
from ..stepping.recorder import Evaluation, evaluate
from ..stepping.running_rows import RunningRows
from ..stepping.tape import Step
from .arrivals import Shares
from .reversal import Reversal
from .survey import Survey
from .time import TimeGradients, through_grid


class ExplicitReversal(Reversal):
    """See Reversal; of an explicit Runge-Kutta method."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        recipe, method, y = self.recipe, self.recipe.method, self.end
        assert isinstance(method, Tableau)
        self.method = method
        self.zero = torch.zeros_like(y)
        self.survey: Survey | None = None  # looks at the first evaluations, if nobody has in the forward pass
        self.running = RunningRows(recipe.func, recipe.form) if recipe.compact else None
        self.dynamics = Dynamics(recipe.func if self.running is None else self.running, recipe.form, y)
        self.one = torch.ones(recipe.form.samples, dtype=torch.float64, device=clock_device(y.device))
        self.weights, self.transposed = method.weights, transposed_of(method)
        self.n_stages = len(self.weights)
        self.clock: TimeGradients | None = None
        self.rows, self.table = method.rows, table_of(self.ops, method)

    def of_times(self, t: Tensor) -> Tensor:  # noqa: D102
        assert self.clock is not None
        if self.recipe.grid is None:
            return self.clock.of(t)
        return through_grid(self.recipe.grid, t, self.clock.of_ends(), self.clock.outputs[: len(t), 0])

    def _run(self, states: dict[int, Tensor]) -> Tensor:
        steps, arrivals, n_derivatives = self.steps, self.arrivals, self.n_stages + 1
        if self.time:
            self.clock = TimeGradients(self.method, steps, self.layout, len(self.gradient))
        lam = arrivals.at_last_state(self.left)
        if self.clock is not None and steps and self.left is not None and self.recipe.grid is None:
            # That state has moved with the last step's end, and is wanted at the time where it stands.
            slope = self._value(self._evaluate(steps[-1].times[-1], self.end))
            self.clock.add_end(len(steps) - 1, -lam, torch.where(slope.isfinite(), slope, 0.0))
        y1, last = self.end, None  # the state at the end of the next step to be undone, and the derivative if known
        shares = arrivals.shares(steps[-1], n_derivatives) if steps else []
        for n, y in self.backwards(states):
            step = steps[n]
            self._compact(n)
            arriving = arrivals.at_end(step)
            if arriving is not None:
                lam = lam + arriving
            if last is None and (shares[-1] is not None or self._needs_slope_at_end(step)):
                lam, last = self.undo_end(n, y1, lam, shares[-1])
            if self.clock is not None and last is not None and shares[-1] is not None:
                self.clock.add_sums(n, shares[-1], last)
            shares_before: Shares = arrivals.shares(steps[n - 1], n_derivatives) if n else [None]
            carried = shares_before[-1] if step.opening is None else None
            lam, ks = self.undo(n, y, lam, shares, carried)
            inside = arrivals.inside(step)
            lam = lam if inside is None else lam + inside
            if self.clock is not None and step.outputs:
                self.clock.add_outputs(n, arrivals.effects(step, ks if last is None else [*ks, last]))
            y1, shares, last = y, shares_before, None if step.opening is not None else ks[0]
        return lam + arrivals.at_start(steps, self.left)

    def advance(self, y: Tensor, begin: int, end: int) -> Tensor:  # noqa: D102
        with torch.no_grad():
            for n in range(begin, end):
                self._compact(n)
                first, *times = self._times(n)
                ks, dt = [self.dynamics(first, y)] * self.n_stages, self.steps[n].dt
                self.ops.stages(self.layout, self.table, y, ks, dt, tuple(times), self.dynamics)
                y = self.ops.stage_combine(self.layout, self.weights, y, ks, dt)
        return y

    def _compact(self, n: int) -> None:
        """Has func called with the rows alone that step n moves, or the one before, whose last evaluation is its first.

        That is where it pays, and wanted.
        """
        if self.running is not None:
            self.running.only(torch.stack([step.dt != 0 for step in self.steps[max(n - 1, 0) : n + 1]]).any(0))

    def _times(self, n: int) -> tuple[Tensor, ...]:
        """Those of the evaluations of step n but for that at its end."""
        step = self.steps[n]
        first = self.steps[n - 1].times[-1] if step.opening is None else step.opening
        return first, *step.times.unbind()[: self.n_stages - 1]

    def _needs_slope_at_end(self, step: Step) -> bool:
        """Whether the derivative at a step's end is needed though it got no gradient: moving outputs move along it."""
        several = (len(passed.polynomial.coefficients) > self.n_stages for passed in step.outputs)
        return self.clock is not None and any(several)

    def undo_end(self, n: int, y1: Tensor, lam: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """Undoes the evaluation at the end of step n, which no step after it uses; returns the derivative too."""
        kept = self.last.pop() if self.last and n == len(self.steps) - 1 else None
        evaluation = self._evaluate(self.steps[n].times[-1], y1) if kept is None else kept
        if share is not None:
            lam = lam + self._pull_back(n, -1, evaluation, share)
            self.totals.settled()
        return lam, self._value(evaluation)

    def undo(
        self, n: int, y: Tensor, lam: Tensor, shares: Shares, carried: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Undoes step n, from y; returns its derivatives and the gradient at its start, without that of outputs there.

        Args:
            lam: the gradient at its end.
            shares: what outputs inside it give to its derivatives.
            carried: what those of the step before give to that at its end, which is this one's first.
        """
        step, combine, layout = self.steps[n], self.ops.stage_combine, self.layout
        kept = step.evaluations.copy() or [None] * self.n_stages
        step.evaluations.clear()  # their graphs can be gone through once
        evaluations: list[Evaluation] = []
        ks: list[Tensor] = []
        for i, t in enumerate(self._times(n)):
            known = kept[i]
            if known is None:
                known = self._evaluate(t, combine(layout, self.rows[i - 1], y, ks, step.dt) if i else y)
            evaluations.append(known)
            ks.append(self._value(known))
        del kept, known  # an evaluation's graph goes when it has been gone through
        hs = [lam]
        for i in reversed(range(self.n_stages)):
            share = shares[i]
            g = combine(layout, self.transposed[i], self.zero if share is None else share, hs, step.dt)
            if self.clock is not None:
                self.clock.add_sums(n, g, ks[i])
            hs.append(self._pull_back(n, i, evaluations.pop(), g if i or carried is None else g + carried))
        lam = combine(layout, (1.0,) * self.n_stages, lam, hs[1:], self.one)
        self.totals.settled()
        return lam, ks

    def _evaluate(self, t: Tensor, y: Tensor) -> Evaluation:
        evaluation = evaluate(self.dynamics, t, y, self.time)
        if self.survey is not None and evaluation.k is not None:
            self.survey = None if self.survey.look(evaluation.k, evaluation[:2]) is not None else self.survey
        return evaluation

    def _value(self, evaluation: Evaluation) -> Tensor:
        """That of func, or in its place zeros if it is not needed any more."""
        return self.zero if evaluation.k is None else evaluation.k.detach()

    def _pull_back(self, n: int, i: int, evaluation: Evaluation, g: Tensor) -> Tensor:
        """Returns g df/dy for evaluation i of step n, and adds what it does to the parameters and times."""
        t, y, _, root = evaluation
        unwanted = not (n or i or self.start)  # the gradient of the start
        own = (() if unwanted else (y,)) + ((t,) if self.time else ())
        gradients = self.vjp(root, own + self.params, g)
        if self.clock is not None:
            self.clock.add_evaluation(n, i, gradients[len(own) - 1])
        if self.params:
            self.totals.add(gradients[len(own) :])
        h = None if unwanted else gradients[0]
        return self.zero if h is None else plain(h)


@lru_cache(maxsize=64)
def transposed_of(method: Tableau) -> tuple[tuple[float, ...], ...]:
    """For each stage i the weights in g_i of lam and of h_j, from the last stage to that after i."""
    rows, s = method.rows, len(method.weights)
    return tuple((method.weights[i], *(rows[j - 1][i] for j in reversed(range(i + 1, s)))) for i in range(s))
