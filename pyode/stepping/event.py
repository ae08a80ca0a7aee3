"""The search for an event: the first zero of a function along a solve."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .segment import Segment

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
            self.signs = torch.sign(event(t0, y0)).reshape(-1)
        self._staying = bool((self.signs == 0).any())
        self.time: float | None = t0 if self._staying and not skip_initial else None

    def __call__(self, segment: Segment) -> Tensor | None:
        """Returns the state at the event if the step has one, else None."""
        sign = math.copysign(1.0, segment.t1 - segment.t0)
        end = sign * min(sign * segment.t1, sign * self.last)
        begin = segment.t0
        with torch.no_grad():
            for x in LEAVING if self._staying else (1.0,):
                t = end if x == 1 else segment.t0 + x * (end - segment.t0)
                value = self._values(segment, t)
                if self._crossed(value):
                    self.time = self._locate(segment, begin, t)
                    break
                if self._staying:
                    self.signs = torch.where(self.signs == 0, torch.sign(value), self.signs)
                    self._staying = bool((self.signs == 0).any())
                begin = t
        return None if self.time is None else segment.at(self.time)

    def _values(self, segment: Segment, t: float) -> Tensor:
        return self.event(t, segment.at(t)).reshape(-1)

    def _crossed(self, value: Tensor) -> bool:
        """Whether one of the functions, of those that have left their start, has changed its sign."""
        return not bool(((value * self.signs > 0) | (self.signs == 0)).all())

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
