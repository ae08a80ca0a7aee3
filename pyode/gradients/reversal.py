"""What undoing the steps of a solve has in common, whatever its method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .._ops import backend_for
from .._ops.autograd import plain
from ..methods import ImplicitTableau, Tableau
from ..state import Form, Func
from ..stepping.recorder import Evaluation
from ..stepping.tape import Step
from .arrivals import arrivals_at
from .revolve import backwards
from .vjp import Totals, Vjp

Retake = Callable[[Step, Tensor, Tensor, Tensor], Tensor]

# What undoing the steps of a solve gives: the gradients at the start, of the params, and of the output times if wanted.
Undone = tuple[Tensor, list[Tensor], "Tensor | None"]


@dataclass(eq=False)
class Recipe:
    """How a solve is done, as far as its steps depend on it.

    Attributes:
        func, form, method: the solve's.
        grid: the steps' ends as a function of the output times, if the method does not choose them.
        checkpoints: how many states are kept at most; None for one a step.
        graph_bytes: how much memory the graphs of evaluations may take that are kept and need not be made again.
        warns: whether of tensors that func depends on and that get no gradient.
        compact: whether func is called with the rows alone that move, where it is evaluated again.
        retake: takes a step of an implicit method again, from a state, between two ends [2], and returns the states at
            some times within it and at its end, [..., *state], with a graph to the times, too, if they carry one. None
            of an explicit method.
    """

    func: Func
    form: Form
    method: Tableau | ImplicitTableau
    grid: Callable[[Tensor], Tensor] | None
    checkpoints: int | None
    graph_bytes: int
    warns: bool
    compact: bool
    retake: Retake | None


@dataclass(eq=False)
class Forward:
    """What a solve has left, and what is wanted of its way back.

    Attributes:
        steps: those of the solve.
        end: the state behind the last one.
        left: [T] or [T, B], which outputs are that state because they were not reached; None if all were.
        gradient: [T, ...] what arrives at the outputs.
        params: the tensors whose gradients are wanted.
        start, time: whether those of the start and of the times are.
    """

    steps: list[Step]
    end: Tensor
    left: Tensor | None
    gradient: Tensor
    params: tuple[Tensor, ...]
    start: bool
    time: bool


class Reversal(ABC):
    """Undoes the steps of a solve; with gradients enabled.

    Args:
        recipe, forward: see there.
        last: the evaluation at the end, if its graph was kept; taken out when it is used.

    Attributes:
        totals: the gradients of the params, of the steps undone so far.
    """

    def __init__(self, recipe: Recipe, forward: Forward, last: list[Evaluation | None]) -> None:
        self.recipe, self.params, self.steps, self.left = recipe, forward.params, forward.steps, forward.left
        self.start, self.time, self.last = forward.start, forward.time, last
        self.totals, self.vjp = Totals(self.params), Vjp()
        self.end, self.gradient = forward.end, plain(forward.gradient.detach())
        end, self.ops = self.end, backend_for(self.end)
        samples, size = recipe.form.samples, recipe.form.segments[-1]
        self.layout = self.ops.Layout(samples, size, (0, size), end.dtype, end.device)
        self.arrivals = arrivals_at(self.gradient, self.layout, self.ops)

    def run(self, states: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Undoes all steps, from the states that were kept; returns the gradients at the start and of the params."""
        self.totals.restart()
        start = self._run(states)
        return start, self.totals.settled()

    @abstractmethod
    def _run(self, states: dict[int, Tensor]) -> Tensor:
        """Undoes all steps, from the states that were kept; returns the gradient at the start."""

    @abstractmethod
    def advance(self, y: Tensor, begin: int, end: int) -> Tensor:
        """Takes some steps again, from y, and returns the state behind them."""

    @abstractmethod
    def of_times(self, t: Tensor) -> Tensor:
        """The gradient of the output times t, if it is wanted, when all steps have been undone."""

    def backwards(self, states: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The steps from the last to the first, each with the state at its start."""
        kept, end, most = list(states), len(self.steps), self.recipe.checkpoints
        for i in reversed(range(len(kept))):
            snapshots = 1 if most is None else most - i
            yield from backwards(kept[i], end, states.pop(kept[i]), snapshots, self.advance)
            end = kept[i]
