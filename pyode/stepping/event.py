"""The search for an event: the first zero of a function along a solve."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._ops.reference import Interpolant
from ..errors import Status
from .segment import BatchSegment, Segment
from .tape import Passed, Tape

LEAVING = tuple(2.0**-k for k in range(20, -1, -1))  # where in a step functions are looked at that start at zero


class EventSearch:
    """Watches a solve for the earliest change of sign of an event function.

    Signs are compared with those at the start; where there are several functions, one of them is enough.

    Args:
        event: of a time and a packed state; returns a tensor of any shape: one or several functions.
        t0, y0: the solve's start.
        last: the time up to which is searched, in the direction of integration; may be infinite.
        tolerance: to which the time is located.
        skip_initial: whether functions that are zero at the start count only once they have been left.

    Attributes:
        time: of the event; None as long as there is none. It is t0 where a function is zero at the start.
        segment: the step in which it is.
    """

    def __init__(
        self,
        event: Callable[[float, Tensor], Tensor],
        t0: float,
        y0: Tensor,
        last: float,
        tolerance: float,
        skip_initial: bool = False,
    ) -> None:
        self.event, self.last, self.tolerance = event, last, tolerance
        with torch.no_grad():
            self.signs: list[float] = torch.sign(event(t0, y0)).reshape(-1).tolist()
        self._staying = 0 in self.signs
        self.time: float | None = t0 if self._staying and not skip_initial else None
        self.segment: Segment | None = None

    def __call__(self, segment: Segment) -> Tensor | None:
        """Returns the state at the event if the step has one, else None."""
        sign = math.copysign(1.0, segment.t1 - segment.t0)
        end = sign * min(sign * segment.t1, sign * self.last)
        begin = segment.t0
        with torch.no_grad():
            for x in LEAVING if self._staying else (1.0,):
                t = end if x == 1 else segment.t0 + x * (end - segment.t0)
                values = self._values(segment, t)
                if self._crossed(values):
                    self.time, self.segment = self._locate(segment, begin, t), segment
                    break
                if self._staying:
                    self.signs = [(v > 0) - (v < 0) if sign == 0 else sign for v, sign in zip(values, self.signs)]
                    self._staying = 0 in self.signs
                begin = t
        return None if self.time is None else segment.at(self.time)

    def _values(self, segment: Segment, t: float) -> list[float]:
        values: list[float] = self.event(t, segment.at(t).detach()).reshape(-1).tolist()
        return values

    def _crossed(self, values: list[float]) -> bool:
        """Whether one of the functions, of those that have left their start, has changed its sign, or become nan."""
        return not all(value * sign > 0 for value, sign in zip(values, self.signs) if sign != 0)

    def _locate(self, segment: Segment, begin: float, end: float) -> float:
        """Halves the time between one before the event and one behind it."""
        tolerance = max(self.tolerance, math.ulp(end))
        for _ in range(math.ceil(math.log2(max(abs(end - begin) / tolerance, 1.0)))):
            middle = (begin + end) / 2
            if self._crossed(self._values(segment, middle)):
                end = middle
            else:
                begin = middle
        return (begin + end) / 2


class SampleEvents:
    """The same for every sample on its own: each stops at its own event.

    Args:
        event: of times [B] and states [B, D]; returns [B, E].
        t0, y0: [B] and [B, D], the solve's start; times are on the `clock_device`.
        tolerance, skip_initial: as EventSearch's.

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
    ) -> None:
        self.event, self.tolerance = event, tolerance
        with torch.no_grad():
            self.signs = torch.sign(event(t0, y0)).to(t0.device)
        self.begun = begun = (self.signs == 0).any(1) & (not skip_initial)
        self._at_start = bool(begun.any())
        self.time = torch.where(begun, t0, torch.full_like(t0, math.nan))
        self.index = torch.where(begun, (self.signs == 0).long().argmax(1), -1)
        self.state = torch.where(begun[:, None].to(y0.device), y0, torch.full_like(y0, math.nan))
        self._n_steps = 0
        self._found: list[tuple[int, Tensor, Tensor, Interpolant]] = []

    def __call__(self, segment: BatchSegment) -> None:
        """Finishes the samples that have met their event in a step."""
        self._n_steps += 1
        if self._at_start:
            segment.controller.finish(self.index >= 0, int(Status.SUCCESS))
            self._at_start = False
        with torch.no_grad():
            candidates = segment.accepted.to(self.index.device) & (self.index < 0)
            begin, end = segment.t0.clone(), segment.t1.clone()
            staying = bool((self.signs[candidates] == 0).any())
            met = torch.zeros_like(candidates)
            for x in LEAVING if staying else (1.0,):
                t = segment.t1 if x == 1 else segment.t0 + x * (segment.t1 - segment.t0)
                value = self._values(segment, t)
                crossed = candidates & ~met & self._crossed(value)
                met |= crossed
                end = torch.where(crossed, t, end)
                begin = torch.where(met, begin, t)
                if staying:
                    self.signs = torch.where(candidates[:, None] & (self.signs == 0), torch.sign(value), self.signs)
            if not bool(met.any()):
                return
            begin = torch.where(met, begin, segment.t0)
            width = float((end - begin)[met].abs().max())
            for _ in range(math.ceil(math.log2(max(width / max(self.tolerance, 1e-300), 1.0)))):
                middle = (begin + end) / 2
                if bool(((middle == begin) | (middle == end))[met].all()):
                    break  # as near as numbers come
                crossed = self._crossed(self._values(segment, middle))
                begin, end = torch.where(crossed, begin, middle), torch.where(crossed, middle, end)
            time = (begin + end) / 2
            value = (self._values(segment, end) * self.signs).to(torch.float64)
            index = torch.where((value <= 0) & (self.signs != 0), value, math.inf).argmin(1)
        self.time = torch.where(met, time, self.time)
        self.index = torch.where(met, index, self.index)
        self.state = torch.where(met[:, None].to(self.state.device), segment.at(time), self.state)
        self._found.append((self._n_steps - 1, met.nonzero()[:, 0], segment.position(time), segment.polynomial))
        segment.controller.finish(met, int(Status.SUCCESS))

    def note_on(self, tape: Tape, index: int) -> None:
        """Notes the states at events as one more output, on the tape of the solve."""
        for n, samples, position, polynomial in self._found:
            if len(self.time) == 1:
                tape.add_event(n, Passed(index, 0, float(position), polynomial, timed=False))
            else:
                there = torch.full_like(samples, index)
                tape.add_event(n, Passed(there, samples, position[samples], polynomial, timed=False))

    def _values(self, segment: BatchSegment, t: Tensor) -> Tensor:
        """[B, E], where times are."""
        return self.event(t, segment.at(t)).to(self.time.device)

    def _crossed(self, value: Tensor) -> Tensor:
        """[B], whether one of the functions, of those that have left their start, has changed its sign."""
        crossed: Tensor = ((value * self.signs <= 0) & (self.signs != 0)).any(1)
        return crossed
