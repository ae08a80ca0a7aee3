"""The exact gradient of the steps taken, in the memory of one state a step, or of a given number of states.

The forward pass makes no graph, only a tape of the accepted steps. The backward pass undoes them from the last to the
first. With lam the gradient at a step's end and G_m those that arrive at outputs inside it, at positions x_m, a step is
undone by what autograd would do with it, stage by stage::

    g_i = dt (b_i lam + sum_j>i a_ji h_j + sum_m w_i(x_m) G_m),    h_i = g_i df/dy(t_i, y_i),
    lam at its start = lam + sum_i h_i + sum_m G_m

where g_i df/dp is what stage i adds to a parameter's gradient. f(t1, y1), which dense output needs, is the next step's
first evaluation and is undone with it. Step sizes are constants, as in backpropagation through a recorded solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import backend_for
from .._ops.autograd import plain
from ..errors import InvalidValue
from ..methods import Tableau
from ..state import Dynamics, Form, Func
from ..stepping.course import table_of
from ..stepping.tape import Step, Tape
from .revolve import backwards
from .time import TimeGradients
from .vjp import Circumstances, accumulate, vjp


@dataclass
class Recipe:
    """How a solve is done, as far as its steps depend on it.

    Attributes:
        func, form, method: the solve's.
        grid: the steps' ends as a function of the output times, if the method does not choose them.
        checkpoints: how many states are kept at most; None for one a step.
    """

    func: Func
    form: Form
    method: Tableau
    grid: Callable[[Tensor], Tensor] | None
    checkpoints: int | None


def checkpointed(
    solve: Callable[[Tape], Tensor], recipe: Recipe, t: Tensor, y0: Tensor, params: list[Tensor]
) -> Tensor:
    """Carries out a solve and returns its outputs, [T, *y0.shape], as one node of autograd's graph.

    Args:
        solve: does so without a graph, and notes its steps on the tape.
        recipe: see there.
        t: the output times.
        y0: the packed state at the start.
        params: what func depends on beside its arguments.
    """
    return _Checkpointed.apply(solve, recipe, t, y0, *params)  # type: ignore[no-any-return, no-untyped-call]


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, solve: Callable[[Tape], Tensor], recipe: Recipe, t: Tensor, y0: Tensor, *params: Tensor
    ) -> Tensor:
        tape = Tape(y0.detach(), recipe.checkpoints)
        ys = solve(tape)
        ctx.recipe, ctx.steps, ctx.n_params = recipe, tape.steps, len(params)
        ctx.circumstances = Circumstances(recipe.func, y0.device)
        # Where they are few, a backward pass uses them up and makes others in their places; one after it makes all.
        first = 1 if recipe.checkpoints else len(tape.states)
        indices, states = list(tape.states), list(tape.states.values())
        ctx.kept, ctx.consumed = indices[:first], dict(zip(indices[first:], states[first:]))
        ctx.save_for_backward(t, *params, *states[:first], tape.end)
        return ys

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # Not once_differentiable, which is silent where only what was saved requires a gradient.
        if torch.is_grad_enabled():
            raise InvalidValue(
                "the gradient of a checkpointed solve can't be differentiated, for which create_graph=True prepares; "
                "leave it out, or take options={'gradient': 'direct'}"
            )
        t, *saved, end = ctx.saved_tensors
        states, ctx.consumed = {**dict(zip(ctx.kept, saved[ctx.n_params :])), **ctx.consumed}, {}
        _, _, time_wanted, y0_wanted, *wanted = ctx.needs_input_grad
        params = tuple(p for p, want in zip(saved, wanted) if want)
        (gradient,) = gradients
        reversal = Reversal(ctx.recipe, ctx.steps, end, gradient, params, time_wanted)
        on_device = torch.cuda.device(gradient.device) if gradient.is_cuda else nullcontext()
        with on_device, ctx.circumstances.again(params), torch.enable_grad():
            start = reversal.run(states)
        found = iter(reversal.param_gradients)
        times = None if reversal.clock is None else reversal.clock.of(t)
        return None, None, times, start if y0_wanted else None, *(next(found) if want else None for want in wanted)


class _Evaluation(NamedTuple):
    """f(t, y) with a graph of its own."""

    t: Tensor
    y: Tensor
    k: Tensor


class Reversal:
    """Undoes the steps of a solve; with gradients enabled.

    Args:
        recipe: see there.
        steps: those of the solve.
        end: the state behind the last one.
        gradient: [T, ...] what arrives at the outputs.
        params: the tensors whose gradients are wanted.
        time: whether those of the times are.

    Attributes:
        param_gradients: of the steps undone.
        clock: the gradients of the times, if they are wanted.
    """

    def __init__(
        self,
        recipe: Recipe,
        steps: list[Step],
        end: Tensor,
        gradient: Tensor,
        params: tuple[Tensor, ...],
        time: bool,
    ) -> None:
        self.recipe, self.steps, self.end, self.params = recipe, steps, end, params
        self.gradient = gradient = plain(gradient.detach())
        self.param_gradients = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in params]
        self.zero = y = torch.zeros_like(end)
        self.ops = ops = backend_for(y)
        self.layout = ops.Layout(1, y.numel(), (0, y.numel()), y.dtype, y.device)
        self.dynamics = Dynamics(recipe.func, recipe.form, y)
        self.one = torch.ones(1, dtype=torch.float64, device=y.device)
        self.weights, self.transposed = recipe.method.weights, transposed_of(recipe.method)
        self.n_stages = len(self.weights)
        self.rows, self.table = recipe.method.rows, table_of(ops, recipe.method)
        self.clock = TimeGradients(recipe.method, steps, self.layout, len(gradient), recipe.grid) if time else None

    def run(self, states: dict[int, Tensor]) -> Tensor:
        """Undoes all steps, from the states that were kept, and returns the gradient at the start."""
        steps, gradient = self.steps, self.gradient
        behind = max((1, *(step.outputs.stop for step in steps)))
        lam = gradient[behind:].sum(0)  # a solve that ended early has put out its last state for all the rest
        if self.clock is not None and steps and behind < len(gradient):
            # That state has moved with the start, and is wanted at the time where it stands.
            slope = self._evaluate(steps[-1].times[-1], self.end).k.detach()
            self.clock.add_start(len(steps) - 1, -lam, torch.where(slope.isfinite(), slope, 0.0))
        y1, last = self.end, None  # the state at the end of the next step to be undone, and the derivative if known
        shares = self._shares_of_outputs(len(steps) - 1)
        for n, y in self._backwards(states):
            step = steps[n]
            if step.outputs and step.positions[-1] == 1.0:
                lam = lam + gradient[step.outputs[-1]]
            if last is None and (shares[-1] is not None or self._needs_slope_at_end(step)):
                lam, last = self._undo_end(n, y1, lam, shares[-1])
            if self.clock is not None and last is not None and shares[-1] is not None:
                self.clock.add_sums(n, shares[-1], last)
            shares_before = self._shares_of_outputs(n - 1)
            carried = shares_before[-1] if step.opening is None else None
            lam, ks = self._undo(n, y, lam, shares, carried)
            if self.clock is not None:
                self.clock.add_outputs(n, ks if last is None else [*ks, last], gradient)
            y1, shares, last = y, shares_before, None if step.opening is not None else ks[0]
        return lam + gradient[0]

    def _backwards(self, states: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The steps from the last to the first, each with the state at its start."""
        kept, end, most = list(states), len(self.steps), self.recipe.checkpoints
        for i in reversed(range(len(kept))):
            snapshots = 1 if most is None else most - i
            yield from backwards(kept[i], end, states.pop(kept[i]), snapshots, self._advance)
            end = kept[i]

    def _advance(self, y: Tensor, begin: int, end: int) -> Tensor:
        """Takes some steps again."""
        with torch.no_grad():
            for n in range(begin, end):
                first, *times = self._times(n)
                ks, dt = [self.dynamics(first, y)] * self.n_stages, self.steps[n].dt
                self.ops.stages(self.layout, self.table, y, ks, dt, tuple(times), self.dynamics)
                y = self.ops.stage_combine(self.layout, self.weights, y, ks, dt)
        return y

    def _times(self, n: int) -> tuple[Tensor, ...]:
        """Those of the evaluations of step n but for that at its end."""
        step = self.steps[n]
        first = self.steps[n - 1].times[-1] if step.opening is None else step.opening
        return first, *step.times.unbind()[: self.n_stages - 1]

    def _shares_of_outputs(self, n: int) -> list[Tensor | None]:
        """What outputs inside step n give to its derivatives, the last of them that at its end."""
        total: list[Tensor | None] = [None] * (self.n_stages + 1)
        if n < 0:
            return total
        step = self.steps[n]
        for m, x in zip(step.outputs, step.positions):
            if x != 1.0:
                assert step.polynomial is not None
                shares = self.ops.stage_vjp(self.layout, step.polynomial.weights_at(x), self.gradient[m], step.dt)
                for j, share in enumerate(shares):
                    before = total[j]
                    total[j] = share if before is None else before if share is None else before + share
        return total

    def _needs_slope_at_end(self, step: Step) -> bool:
        """Whether the derivative at a step's end is needed though it got no gradient: moving outputs move along it."""
        polynomial = step.polynomial
        wanted = self.clock is not None and bool(step.outputs)
        return wanted and polynomial is not None and len(polynomial.coefficients) > self.n_stages

    def _undo_end(self, n: int, y1: Tensor, lam: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """Undoes the evaluation at the end of step n, which no step after it uses; returns the derivative too."""
        evaluation = self._evaluate(self.steps[n].times[-1], y1)
        if share is not None:
            lam = lam + self._pull_back(n, -1, evaluation, share)
        return lam, evaluation.k.detach()

    def _undo(
        self, n: int, y: Tensor, lam: Tensor, shares: list[Tensor | None], carried: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Undoes step n, from y; returns the gradient at its start and its derivatives.

        Args:
            lam: the gradient at its end.
            shares: see _shares_of_outputs; `carried` is that of the step before at its end, this one's start.
        """
        step, combine, layout = self.steps[n], self.ops.stage_combine, self.layout
        evaluations: list[_Evaluation] = []
        ks: list[Tensor] = []
        for i, t in enumerate(self._times(n)):
            evaluations.append(self._evaluate(t, combine(layout, self.rows[i - 1], y, ks, step.dt) if i else y))
            ks.append(evaluations[-1].k.detach())
        hs = [lam]
        for i in reversed(range(self.n_stages)):
            share = shares[i]
            g = combine(layout, self.transposed[i], self.zero if share is None else share, hs, step.dt)
            if self.clock is not None:
                self.clock.add_sums(n, g, ks[i])
            hs.append(self._pull_back(n, i, evaluations.pop(), g if i or carried is None else g + carried))
        lam = combine(layout, (1.0,) * self.n_stages, lam, hs[1:], self.one)
        for m, x in zip(step.outputs, step.positions):
            if x != 1.0:
                lam = lam + self.gradient[m]
        return lam, ks

    def _evaluate(self, t: Tensor, y: Tensor) -> _Evaluation:
        y = y.detach().requires_grad_()
        if self.clock is not None:
            t = t.detach().requires_grad_()
        return _Evaluation(t, y, self.dynamics(t, y))

    def _pull_back(self, n: int, i: int, evaluation: _Evaluation, g: Tensor) -> Tensor:
        """Returns g df/dy for evaluation i of step n, and adds what it does to the parameters and times."""
        t, y, k = evaluation
        own = (y,) if self.clock is None else (y, t)
        gradients = vjp(k, own + self.params, g)
        if self.clock is not None:
            self.clock.add_evaluation(n, i, gradients[1])
        if self.params:
            accumulate(self.param_gradients, gradients[len(own) :])
        h = gradients[0]
        return self.zero if h is None else plain(h)


@lru_cache(maxsize=64)
def transposed_of(method: Tableau) -> tuple[tuple[float, ...], ...]:
    """For each stage i the weights in g_i of lam and of h_j, from the last stage to that after i."""
    rows, s = method.rows, len(method.weights)
    return tuple((method.weights[i], *(rows[j - 1][i] for j in reversed(range(i + 1, s)))) for i in range(s))
