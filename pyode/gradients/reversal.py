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
            some times within it and at its end, [..., *state], with a graph to the times, too, if they carry one.
    """

    func: Func
    form: Form
    method: Tableau | ImplicitTableau
    grid: Callable[[Tensor], Tensor] | None
    checkpoints: int | None
    graph_bytes: int
    warns: bool
    compact: bool
    retake: Retake


class Reversal(ABC):
    """Undoes the steps of a solve; with gradients enabled.

    Args:
        recipe: see there.
        steps: those of the solve.
        end: the state behind the last one.
        left: [T] or [T, B], which outputs are that state because they were not reached; None if all were.
        gradient: [T, ...] what arrives at the outputs.
        params: the tensors whose gradients are wanted.
        start, time: whether those of the start and of the times are.
        last: the evaluation at the end, if its graph was kept; taken out when it is used.

    Attributes:
        totals: the gradients of the params, of the steps undone.
    """

    def __init__(
        self,
        recipe: Recipe,
        steps: list[Step],
        end: Tensor,
        left: Tensor | None,
        gradient: Tensor,
        params: tuple[Tensor, ...],
        start: bool,
        time: bool,
        last: list[Evaluation | None],
    ) -> None:
        self.recipe, self.steps, self.end, self.left, self.params = recipe, steps, end, left, params
        self.totals, self.vjp = Totals(params), Vjp()
        self.gradient = plain(gradient.detach())
        self.ops = ops = backend_for(end)
        samples, size = recipe.form.samples, recipe.form.segments[-1]
        self.layout = ops.Layout(samples, size, (0, size), end.dtype, end.device)
        self.arrivals = arrivals_at(self.gradient, self.layout, ops)
        self.start, self.time, self.last = start, time, last

    @abstractmethod
    def run(self, states: dict[int, Tensor]) -> Tensor:
        """Undoes all steps, from the states that were kept, and returns the gradient at the start."""

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
