"""What is done beside a solve: the user's callbacks, a look at every accepted step, what happens after a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..errors import SolveError
from .segment import BatchSegment, Segment
from .tape import Tape

Callback = Callable[[float, Any, float], None]


def raise_it(error: SolveError) -> None:
    """Raises the error."""
    try:
        raise error
    finally:
        del error  # a frame that knows the exception which knows it is a cycle, and all frames above it live on in it


@dataclass(frozen=True, eq=False)
class Hooks:
    """What a loop calls beside func.

    Attributes:
        step, accept, reject: called with the time and the packed state at a step's start and its size, not signed:
            before the step, after it was accepted, after it was rejected.
        judged: called with the controller after every step, accepted or not.
        watch: called with every accepted step. What it returns, if not None, is the state at which the solve ends.
        watch_batch: called with every step that some sample has accepted, as a BatchSegment; may finish samples.
        tape: notes every accepted step of an explicit Runge-Kutta method.
        fail: called with the error of a solve that can't go on; where it returns, the last state stands for the rest.
        waits: whether a solve on a device is to wait for its end, so that a failure can be told. Else it is for whoever
            looks at the loop's states then.
    """

    step: Callback | None = None
    accept: Callback | None = None
    reject: Callback | None = None
    judged: Callable[[Any], None] | None = None
    watch: Callable[[Segment], Tensor | None] | None = None
    watch_batch: Callable[[BatchSegment], None] | None = None
    tape: Tape | None = None
    fail: Callable[[SolveError], None] = raise_it
    waits: bool = True

    @cached_property
    def after_step(self) -> bool:
        """Whether there is something to be called after a step."""
        return any(hook is not None for hook in (self.accept, self.reject, self.judged, self.watch, self.watch_batch))

    @cached_property
    def watching(self) -> bool:
        """Whether single steps are to be looked at."""
        return self.step is not None or self.tape is not None or self.after_step


NO_HOOKS = Hooks()
