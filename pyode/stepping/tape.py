"""What a solve notes of its steps, so that they can be undone one by one: the exact gradient in little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._ops.contract import RightHandSide
from .._ops.reference import Interpolant
from .recorder import Evaluation, Recorder


@dataclass(frozen=True, eq=False)
class Passed:
    """An output within a step; of several samples one each, of some of them, with all numbers in tensors [n].

    Attributes:
        index: which of the solve's outputs it is.
        samples: which samples'; 0 if there is only one.
        position: where in the step it lies, from 0 to 1.
        polynomial: the dense output over the step's evaluations.
        timed: whether its time is one of the output times; that of an event has no gradient.
    """

    index: int | Tensor
    samples: int | Tensor
    position: float | Tensor
    polynomial: Interpolant
    timed: bool = True


@dataclass(frozen=True, eq=False)
class Step:
    """An accepted explicit Runge-Kutta step of one sample or of some out of B, without its states.

    Attributes:
        dt: [B] float64, signed; 0 for samples that have not moved.
        times: [stages] or [stages, B], those of the evaluations after the first, as func saw them; that at the step's
            end is the last. Samples that have not moved have the first one's.
        opening: the times of the first evaluation; None where that is the last one of the step before.
        on_jump: whether the step ends where a discontinuity has it end: for all samples, or [B].
        outputs: those that it passed.
        evaluations: with their graphs, from the first on, if those were kept; taken out when they are used.
    """

    dt: Tensor
    times: Tensor
    opening: Tensor | None
    on_jump: bool | Tensor = False
    outputs: tuple[Passed, ...] = ()
    evaluations: list[Evaluation | None] = field(default_factory=list)


class Tape:
    """The accepted steps of a solve, and the states at the starts of all of them, or of some at equal distances.

    Args:
        y0: the state at the start.
        most: how many states to keep at most, 1 or more; None for all. How many steps a solve will take is not known
            before its end: when there are too many states, every other one is dropped.
        record: makes a recorder of func; None if its evaluations are not to have graphs.
        n_stages: how many evaluations a step is the sum of.

    Attributes:
        steps: all of them.
        states: by the step that they are the start of; the first step's is always there.
        end: the state behind the last step.
        last: the evaluation at the end of the last step, in a list, if its graph was kept.
        left: [T] or [T, B], which outputs were not reached and are the last state; None if all were.
    """

    def __init__(
        self,
        y0: Tensor,
        most: int | None = None,
        record: Callable[[RightHandSide], Recorder] | None = None,
        n_stages: int = 0,
    ) -> None:
        self.record, self.n_stages = record, n_stages
        self.recorder: Recorder | None = None
        self.most = math.inf if most is None else most
        self.steps: list[Step] = []
        self.states: dict[int, Tensor] = {}
        self.end = y0
        self.left: Tensor | None = None
        self.last: list[Evaluation | None] = []
        self._stride = 1

    def listening(self, dynamics: RightHandSide) -> RightHandSide:
        """The same right-hand side, whose evaluations are noted, too."""
        if self.record is None:
            return dynamics
        self.recorder = self.record(dynamics)
        return self.recorder

    def add(self, step: Step, y: Tensor, y1: Tensor) -> None:
        """Notes a step from y to y1."""
        n = len(self.steps)
        while n % self._stride == 0 and len(self.states) >= self.most:
            self._stride *= 2
            self.states = {i: state for i, state in self.states.items() if i % self._stride == 0}
        if n % self._stride == 0:
            self.states[n] = y
        if self.recorder is not None:
            at_end = len(self.recorder.recent) > self.n_stages
            step.evaluations.extend(self.recorder.take(self.n_stages))
            self.last = self.recorder.recent[:] if at_end else []
        self.steps.append(step)
        self.end = y1

    def keep_first(self) -> None:
        """Drops the evaluations of the step under way but its first: it was rejected."""
        if self.recorder is not None:
            del self.recorder.recent[1:]

    def keep_last(self) -> None:
        """Drops the evaluations but the last: it is a step's first."""
        if self.recorder is not None:
            del self.recorder.recent[:-1]

    def keep_none(self) -> None:
        """Drops the evaluations: a step begins."""
        if self.recorder is not None:
            self.recorder.recent.clear()

    def mix(self, spoiled: bool) -> None:
        """Notes that some samples have not moved in the last step: no one evaluation is the first of the next.

        Where their evaluations were `spoiled`, by numbers that are not finite, none is kept.
        """
        if self.recorder is not None and self.recorder.recent:
            self.recorder.recent[:] = [None]
        if spoiled:
            self.steps[-1].evaluations.clear()
            self.last = []

    def add_event(self, n: int, passed: Passed, last: bool = False) -> None:
        """Notes that the state at an event within step n is an output too, and its only one if it is the `last`."""
        step = self.steps[n]
        self.steps[n] = replace(step, outputs=(passed,) if last else (*step.outputs, passed))


def passed_by_samples(controller: Any, times: Tensor, polynomial: Interpolant) -> Iterator[Passed]:
    """The outputs which the step just judged has passed: the first of each sample, the second of each, ...

    Args:
        controller: of B samples.
        times: [T] or [T, B] float64, of the outputs.
        polynomial: the dense output.
    """
    begin, end, t0, t1, size = (
        controller.field(name).to(times.device) for name in ("output_begin", "output_end", "t_prev", "t", "dt_prev")
    )
    samples = torch.arange(len(begin), device=times.device)
    for j in range(int((end - begin).max())):
        some = samples[begin + j < end]
        index = begin[some] + j
        time = times[index] if times.dim() == 1 else times[index, some]
        position = torch.where(time == t1[some], 1.0, (time - t0[some]) / size[some])
        yield Passed(index, some, position, polynomial)
