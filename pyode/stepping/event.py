"""The search for events: the first zero of a function along a solve, of each sample its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import Status
from .segment import BatchSegment, Segment
from .tape import Passed, Tape

LEAVING = tuple(2.0**-k for k in range(20, -1, -1))  # where in a step functions are looked at that start at zero


class EventSearch:
    """Watches a solve for each sample's earliest change of sign of an event function.

    Signs are compared with those at the start; where there are several functions, one of them is enough.

    Args:
        event: of times [B] and states [B, D]; returns [B, E].
        t0, y0: [B] float64 and [B, D], the solve's start.
        tolerance: to which times are located.
        skip_initial: whether functions that are zero at the start count only once they have been left.
        nan_counts: whether to become nan is a change of sign.

    Attributes:
        begun: [B] which samples start on theirs.
        time: [B] of each sample's event; nan as long as there is none.
        index: [B] which of the E functions it is; -1.
        state: [B, D] at the event, with a graph behind it where gradients are enabled; nan.
    """

    def __init__(
        self,
        event: Callable[[Tensor, Tensor], Tensor],
        t0: Tensor,
        y0: Tensor,
        tolerance: float,
        skip_initial: bool = False,
        nan_counts: bool = False,
    ) -> None:
        self.event, self.tolerance, self.nan_counts = event, tolerance, nan_counts
        with torch.no_grad():
            self.signs = torch.sign(event(t0, y0)).to(t0.device)
        at_zero = self.signs == 0
        self.begun = begun = at_zero.any(1) & (not skip_initial)
        self.time = torch.where(begun, t0, torch.full_like(t0, math.nan))
        self.index = torch.where(begun, at_zero.long().argmax(1), -1)
        self.state = torch.where(begun[:, None].to(y0.device), y0, torch.full_like(y0, math.nan))
        self._staying = bool((at_zero.any(1) & ~begun).any())  # whether some function has still to leave its zero
        self._n_steps = 0
        self._found: list[tuple[int, Tensor, Tensor, Any]] = []

    def find(self, step: Any) -> Tensor | None:
        """Looks for events in a step, a BatchSegment or a `_Alone`; returns which samples have met theirs, if any."""
        self._n_steps += 1
        with torch.no_grad():
            staying, value = self._staying, self._values(step, step.t1)
            if not staying and float((value * self.signs).min()) > 0:
                return None
            waiting = step.accepted.to(self.index.device) & (self.index < 0)
            met, begin, end = torch.zeros_like(waiting), step.t0, step.t1
            for x in LEAVING if staying else (1.0,):
                t = step.t1 if x == 1 else step.t0 + x * (step.t1 - step.t0)
                value = self._values(step, t) if x < 1 else value
                crossed = waiting & ~met & self._crossed(value).any(1)
                met |= crossed
                begin, end = torch.where(met, begin, t), torch.where(crossed, t, end)
                if staying:
                    self.signs = torch.where(waiting[:, None] & (self.signs == 0), torch.sign(value), self.signs)
            self._staying = staying and bool(((self.signs == 0).any(1) & (self.index < 0) & ~met).any())
            if not bool(met.any()):
                return None
            time, end = self._locate(step, met, begin, end)
            value = self._values(step, end)
            # The one that is furthest behind its zero; nan is furthest of all.
            behind = torch.where(self._crossed(value), (value * self.signs).to(torch.float64), math.inf)
        self.time = torch.where(met, time, self.time)
        self.index = torch.where(met, behind.argmin(1), self.index)
        self.state = torch.where(met[:, None].to(self.state.device), step.at(time), self.state)
        self._found.append((self._n_steps - 1, met.nonzero()[:, 0], step.position(time), step.polynomial))
        return met

    def _locate(self, step: Any, met: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Halves the times between one before the event and one behind it; returns the events', and the latter."""
        width = float((end - begin)[met].abs().max())
        for _ in range(math.ceil(math.log2(max(width / max(self.tolerance, 1e-300), 1.0)))):
            middle = (begin + end) / 2
            if bool(((middle == begin) | (middle == end))[met].all()):
                break  # as near as numbers come
            crossed = self._crossed(self._values(step, middle)).any(1)
            begin, end = torch.where(crossed, begin, middle), torch.where(crossed, middle, end)
        return (begin + end) / 2, end

    def note_on(self, tape: Tape, index: int, last: bool = False) -> None:
        """Notes the states at events as one more output, on the tape of the solve; see Tape.add_event."""
        for n, samples, position, polynomial in self._found:
            if len(self.time) == 1:
                tape.add_event(n, Passed(index, 0, float(position), polynomial, timed=False), last)
            else:
                there = torch.full_like(samples, index)
                tape.add_event(n, Passed(there, samples, position[samples], polynomial, timed=False), last)

    def _values(self, step: Any, t: Tensor) -> Tensor:
        """[B, E], where times are."""
        return self.event(t, step.at(t)).to(self.time.device)

    def _crossed(self, value: Tensor) -> Tensor:
        """[B, E], which functions, of those that have left their start, have changed their sign."""
        moved = value * self.signs
        return (~(moved > 0) if self.nan_counts else moved <= 0) & (self.signs != 0)


class SampleEvents(EventSearch):
    """The search of a solve of samples, each of which stops at its own event."""

    def __call__(self, segment: BatchSegment) -> None:
        """Finishes the samples that have met their event in a step."""
        if self._n_steps == 0 and bool(self.begun.any()):
            segment.controller.finish(self.begun, int(Status.SUCCESS))
        met = self.find(segment)
        if met is not None:
            segment.controller.finish(met, int(Status.SUCCESS))


class JointEvent(EventSearch):
    """The search of a solve that ends at its event.

    Args:
        event, tolerance, skip_initial: as EventSearch's, with B = 1.
        t0, y0: the solve's start, a number and a packed state.
        last: the time up to which is searched, in the direction of integration.
    """

    def __init__(
        self,
        event: Callable[[Tensor, Tensor], Tensor],
        t0: float,
        y0: Tensor,
        last: float,
        tolerance: float,
        skip_initial: bool = False,
    ) -> None:
        start = torch.tensor([t0], dtype=torch.float64, device="cpu")
        super().__init__(event, start, y0.reshape(1, -1), tolerance, skip_initial, nan_counts=True)  # as in torchdiffeq
        self.shape, self.last = y0.shape, last

    @property
    def found(self) -> bool:
        """Whether there was one."""
        return int(self.index) >= 0

    def __call__(self, segment: Segment) -> Tensor | None:
        """Returns the state at the event if the step has one, else None."""
        return None if self.find(_Alone(segment, self.last)) is None else self.state.reshape(self.shape)


class _Alone:
    """The step of the only sample, up to a last time, as a BatchSegment is that of several."""

    accepted = torch.ones(1, dtype=torch.bool, device="cpu")

    def __init__(self, segment: Segment, last: float) -> None:
        self.segment, self.polynomial = segment, segment.polynomial
        sign = math.copysign(1.0, segment.t1 - segment.t0)
        self.end = sign * min(sign * segment.t1, sign * last)
        self.t1 = torch.tensor([self.end], dtype=torch.float64, device="cpu")

    @cached_property
    def t0(self) -> Tensor:
        """See BatchSegment."""
        return torch.tensor([self.segment.t0], dtype=torch.float64, device="cpu")

    def position(self, t: Tensor) -> Tensor:
        """See BatchSegment."""
        return torch.tensor([self.segment.position(float(t))], device="cpu")

    def at(self, t: Tensor) -> Tensor:
        """See BatchSegment."""
        return self.segment.at(self.end if t is self.t1 else float(t)).reshape(1, -1)
