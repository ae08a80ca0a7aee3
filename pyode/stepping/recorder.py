"""func in the forward pass of a solve whose steps will be undone: its first evaluations keep their graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._ops.contract import RightHandSide
from .._ops.native import Calls

Survey = Callable[[Tensor, tuple[Tensor, ...]], int | None]


class Evaluation(NamedTuple):
    """f(t, y) with a graph of its own.

    Attributes:
        t, y: leaves of the graph, t if its gradient is wanted.
        k: the value; None if it is not needed any more.
        root: where the graph begins; None if there is none.
    """

    t: Tensor
    y: Tensor
    k: Tensor | None
    root: Tensor | GradientEdge | None


def evaluate(dynamics: RightHandSide, t: Tensor, y: Tensor, time: bool) -> Evaluation:
    """An evaluation, with a graph back to y, and to t if its `time` is wanted."""
    y = y.detach().requires_grad_()
    if time:
        t = t.detach().requires_grad_()
    k = with_graph(dynamics, t, y)
    return Evaluation(t, y, k, k if k.requires_grad else None)


def with_graph(dynamics: RightHandSide, t: Tensor, y: Tensor) -> Tensor:
    """The derivative with a graph to all that it was made of. torch.enable_grad() takes 2 us more."""
    enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)
    try:
        return dynamics(t, y)
    finally:
        torch._C._set_grad_enabled(enabled)


class Recorder:
    """A right-hand side whose evaluations have graphs as long as there is room for them.

    Args:
        dynamics: func on packed states.
        time: whether gradients of the times are wanted.
        room: how many bytes the graphs may take that are kept.
        survey: looks at an evaluation's k and at what it was made of, (t, y); returns how many bytes its graph takes,
            or None to look at the next one, too.

    Attributes:
        recent: the evaluations of the step under way, from its first one on; None for one without a graph. The loop
            drops those that do not count.
    """

    def __init__(self, dynamics: RightHandSide, time: bool, room: int, survey: Survey) -> None:
        self.dynamics, self.time, self.room, self.survey = dynamics, time, room, survey
        self.recent: list[Evaluation | None] = []
        self._bytes: int | None = None  # of an evaluation
        self._recording = True

    @property
    def n_evals(self) -> int:
        """See RightHandSide."""
        return self.dynamics.n_evals

    @property
    def calls(self) -> Calls | None:
        """See RightHandSide."""
        return None if self._recording else self.dynamics.calls

    @property
    def func(self) -> Any:
        """See RightHandSide."""
        return self.dynamics.func

    def accept(self, k: Any, y: Tensor) -> Tensor:
        """See RightHandSide."""
        return self.dynamics.accept(k, y)

    def trial(self, t: Tensor, y: Tensor, /) -> Tensor:
        """See RightHandSide."""
        return self.dynamics.trial(t, y)

    def __call__(self, t: Tensor, y: Tensor, /) -> Tensor:
        """See RightHandSide."""
        if not self._recording:
            return self.dynamics(t, y)
        evaluation = evaluate(self.dynamics, t, y, self.time)
        _, y, k, root = evaluation
        assert k is not None
        if self._bytes is None:
            self._bytes = self.survey(k, evaluation[:2])
            self._recording = self._bytes is None or self.room > 0
        if not self.time:  # the value serves the solve, and then times alone
            if k.grad_fn is not None:
                root = GradientEdge(k.grad_fn, k.output_nr)
            evaluation = Evaluation(evaluation.t, y, None, root)
        self.recent.append(evaluation)
        return k.detach()

    def take(self, n: int) -> list[Evaluation | None]:
        """The first n evaluations of a step that was accepted; none if not all were recorded, or there is no room.

        The last one that was made remains: it is the next step's first.
        """
        evaluations, self.recent = self.recent[:n], self.recent[-1:]
        if self._recording and len(evaluations) == n:
            self.room -= n * (self._bytes or 0)
            if self.room >= 0:
                return evaluations
        self._recording, self.recent = self._recording and self.room > 0, []
        return []
