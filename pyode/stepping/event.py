"""The search for an event: the first zero of a function along a solve."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .segment import Segment

LEAVING = tuple(2.0**-k for k in range(20, -1, -1))  # where in its first step a solve is taken to have left its start


class EventSearch:
    """Watches a solve for the earliest change of sign of an event function.

    Signs are compared with those at the start. Where there are several, each is multiplied with its own, so that the
    earliest change is that of the least.

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
            self.signs = torch.sign(event(t0, y0)).reshape(-1)
        self._staying = bool((self.signs == 0).any())
        self.time: float | None = t0 if self._staying and not skip_initial else None
        self.segment: Segment | None = None

    def __call__(self, segment: Segment) -> Tensor | None:
        """Returns the state at the event if the step has one, else None."""
        with torch.no_grad():
            begin = self._leave(segment) if self._staying else segment.t0
            if begin is None:
                return None
            sign = math.copysign(1.0, segment.t1 - segment.t0)
            end = sign * min(sign * segment.t1, sign * self.last)
            if self._least(segment, end) > 0:
                return None
            halvings = math.ceil(math.log2(max(abs(end - begin) / max(self.tolerance, math.ulp(end)), 1.0)))
            for _ in range(halvings):
                middle = (begin + end) / 2
                begin, end = (middle, end) if self._least(segment, middle) > 0 else (begin, middle)
            self.time, self.segment = (begin + end) / 2, segment
        return segment.at(self.time)

    def _least(self, segment: Segment, t: float) -> float:
        """Positive as long as no function has changed its sign."""
        return float((self.event(t, segment.at(t)).reshape(-1) * self.signs).min())

    def _leave(self, segment: Segment) -> float | None:
        """Takes the signs of functions that were zero at the start just behind it; returns from where to search."""
        for x in LEAVING:
            t = segment.t0 + x * (segment.t1 - segment.t0) if x < 1 else segment.t1
            now = torch.sign(self.event(t, segment.at(t))).reshape(-1)
            self.signs = torch.where(self.signs == 0, now, self.signs)
            self._staying = bool((self.signs == 0).any())
            if not self._staying:
                return t
        return None
