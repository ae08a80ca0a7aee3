"""What a solve notes of its steps, so that they can be undone one by one: the exact gradient in little memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from .._ops.reference import Interpolant
from .segment import RungeKuttaSegment


@dataclass(frozen=True)
class Step:
    """An accepted explicit Runge-Kutta step, without its states.

    Attributes:
        dt: [1] float64, signed.
        times: [stages] those of the evaluations after the first, as func saw them; that at the step's end is the last.
        opening: the time of the first evaluation; None where that is the last one of the step before.
        on_jump: whether the step ends where a discontinuity has it end.
        outputs: the indices of the output times that it passed.
        positions: where in the step they lie, from 0 to 1.
        polynomial: the dense output over the evaluations, if there are outputs.
    """

    dt: Tensor
    times: Tensor
    opening: Tensor | None
    on_jump: bool = False
    outputs: range = range(0)
    positions: tuple[float, ...] = ()
    polynomial: Interpolant | None = None


class Tape:
    """The accepted steps of a solve, and the states at the starts of all of them, or of some at equal distances.

    Args:
        y0: the state at the start.
        most: how many states to keep at most, 1 or more; None for all. How many steps a solve will take is not known
            before its end: when there are too many states, every other one is dropped.

    Attributes:
        steps: all of them.
        states: by the step that they are the start of; the first step's is always there.
        end: the state behind the last step.
    """

    def __init__(self, y0: Tensor, most: int | None = None) -> None:
        self.most = math.inf if most is None else most
        self.steps: list[Step] = []
        self.states: dict[int, Tensor] = {}
        self.end = y0
        self._stride = 1

    def add(self, step: Step, y: Tensor, y1: Tensor) -> None:
        """Notes a step from y to y1."""
        n = len(self.steps)
        while n % self._stride == 0 and len(self.states) >= self.most:
            self._stride *= 2
            self.states = {i: state for i, state in self.states.items() if i % self._stride == 0}
        if n % self._stride == 0:
            self.states[n] = y
        self.steps.append(step)
        self.end = y1

    def end_within(self, segment: RungeKuttaSegment, t: float) -> None:
        """Notes that the solve ended at t, within the last step, and put out the state there."""
        x, polynomial = segment.position(t), segment.polynomial
        self.steps[-1] = replace(self.steps[-1], outputs=range(1, 2), positions=(x,), polynomial=polynomial)
