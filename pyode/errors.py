"""How a solve can end, every error pyode raises, and the sentences for both.

Each error derives from the builtin classes that torchdiffeq raises in the same places, so code that catches those
keeps working.
"""

from __future__ import annotations

import sys
import warnings
from enum import IntEnum


class Status(IntEnum):
    """How a solve, or one sample of it, stands. The first five are those of csrc/core/step_state.h."""

    SUCCESS = 0
    RUNNING = 1
    STEP_TOO_SMALL = 2
    TOO_MANY_STEPS = 3
    NON_FINITE = 4
    NOT_CONVERGED = 5
    NO_EVENT = 6
    EVENT = 7

    @property
    def sentence(self) -> str:
        """What happened, and what usually helps."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.SUCCESS: "The solve reached the last time.",
    Status.RUNNING: "The solve is not finished.",
    Status.STEP_TOO_SMALL: (
        "The step size underflowed: no step that still moves t is accurate enough. The problem may be stiff or have a "
        "singularity here; loosen rtol and atol, check func for a discontinuity (and name it in options['jump_t']), or "
        "solve in float64."
    ),
    Status.TOO_MANY_STEPS: (
        "max_num_steps was reached. Raise it or loosen rtol and atol; a problem that needs very "
        "many steps is often stiff."
    ),
    Status.NON_FINITE: (
        "func or the state became inf or nan, in smaller steps too where the method takes them. The solution may blow "
        "up here; check func at this time and state, shorten the time span, or scale the problem."
    ),
    Status.EVENT: "The solve ended at its event.",
    Status.NO_EVENT: (
        "There was no event: event_fn did not change its sign. Check its sign at the start and to which side time "
        "runs, or search further: options['event_t_max'], options['max_num_steps']."
    ),
    Status.NOT_CONVERGED: (
        "The equations of an implicit step were not solved: Newton's iteration, or GMRES within it or in the backward "
        "pass, did not converge. Take smaller steps, check that func is smooth, solve in float64, or loosen "
        "options['newton_tol'] or raise options['max_iters']."
    ),
}


class PyodeError(Exception):
    """The base of all errors that pyode raises itself."""


class InvalidValue(PyodeError, ValueError, AssertionError, RuntimeError):
    """An argument has the right type and a wrong value."""


class InvalidType(PyodeError, TypeError, AssertionError, RuntimeError):
    """An argument is of the wrong type."""


class DynamicsError(PyodeError, RuntimeError):
    """`func` returned something that can't be a derivative of the state, or wrote into its input."""


class CompileError(PyodeError, RuntimeError):
    """`func` can't be compiled; says which operator or line is in the way."""


class SolveError(PyodeError, AssertionError, RuntimeError):
    """A solve could not go on.

    Attributes:
        status: why (a `Status`).
        t: where it stopped.
        dt: the last step that was tried.
        n_steps: how many steps had been tried.
        sample: which one of several, None where there is one controller for all.
    """

    def __init__(self, status: Status, t: float, dt: float, n_steps: int, sample: int | None = None) -> None:
        super().__init__(status, t, dt, n_steps, sample)
        self.status, self.t, self.dt, self.n_steps, self.sample = Status(status), t, dt, n_steps, sample

    def __str__(self) -> str:
        who = "" if self.sample is None else f"sample {self.sample} "
        return f"{who}at t = {self.t:.9g}, with dt = {self.dt:.3g}, after {self.n_steps} steps: {self.status.sentence}"


def warn(message: str) -> None:
    """Warns, and points at the frame that called into pyode, or had torch do so."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("pyode", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
