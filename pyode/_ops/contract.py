"""What both backends of the seam take: the shape of a solve, its prescribed times, its step-size policy.

The compiled counterparts are the structs of csrc/ops.h and csrc/core (step_state.h, times.h, controller.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .native import Calls

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# Of the numbers that states of a dtype are made of: `Scalar` of csrc/core/common.h.
SCALARS = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.complex64: 0,
    torch.complex128: 1,
}


class RightHandSide(Protocol):
    """What a loop evaluates: a packed state's derivative."""

    @property
    def n_evals(self) -> int:
        """How often it has been evaluated."""

    @property
    def calls(self) -> Calls | None:
        """By which `func` itself may be called, and is counted; None: all evaluations are made here.

        What it returns is used as it is if it is contiguous and like its input, and nobody else holds it; otherwise
        `accept` has to look at it.
        """

    @property
    def func(self) -> Any:
        """The user's; None where it is not called for itself."""

    def accept(self, k: Any, y: Tensor) -> Tensor:
        """Checks and packs what func returned directly for y, in memory that it does not hold."""

    def __call__(self, t: Tensor, y: Tensor, /) -> Tensor:
        """Returns dy/dt, contiguous, of y's shape, dtype and device."""

    def trial(self, t: Tensor, y: Tensor, /) -> Tensor:
        """The same where y need not become a stage's state: nothing is noted of it, and dy/dt has a graph back to y."""


@dataclass(eq=False)
class Layout:
    """How the states of one solve lie in memory: [samples, size] numbers, contiguous.

    Args:
        samples: how many step on their own (B).
        size: numbers a sample, complex ones counted once.
        segments: offsets into `size`, from 0 to `size`; the error norm is the largest RMS over the segments.
        dtype, device: of the state.
    """

    samples: int
    size: int
    segments: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype of the times that func sees."""
        return REAL.get(self.dtype, self.dtype)

    @property
    def n_segments(self) -> int:
        """How many means error_norm writes."""
        return len(self.segments) - 1


@dataclass(eq=False)
class Policy:
    """The step-size controller's constants, by torchdiffeq's names.

    Args:
        order: the error is taken to shrink as dt**order.
        clip: whether the last step ends at the last time, instead of passing it.
        count_per_output: whether max_num_steps bounds the steps to each output time, or all steps.
        resume: whether to go on with at least the whole size of a step that a prescribed time cut short.
        beta, alpha: exponents of the last three errors, in units of 1 / order, and of the last two ratios of step
            sizes: the controller as a digital filter (Soderlind 2003).
        least_ulps: a step has to move t by so many units in the last place.
        cautious: whether a step does not grow right after a rejection.
    """

    order: float
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = float("inf")
    max_num_steps: int = 2**31 - 1
    clip: bool = False
    count_per_output: bool = True
    resume: bool = False
    beta: tuple[float, float, float] = (1.0, 0.0, 0.0)
    alpha: tuple[float, float] = (0.0, 0.0)
    least_ulps: float = 0.0
    cautious: bool = False


def clock_device(device: torch.device) -> torch.device:
    """Where times and step sizes live, which are float64: with CUDA states on their device, with others on the host."""
    return device if device.type == "cuda" else torch.device("cpu")


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums and tolerances are in: float64 where the compiled ops work; not every other device has it."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def neighbour(t: Tensor, sign: Tensor) -> Tensor:
    """The number next to t in its dtype, on the side of the sign; t where that is 0. They broadcast."""
    return torch.nextafter(t, torch.where(sign == 0, t, sign * math.inf))


@dataclass(eq=False)
class Grid:
    """The times that a solve has to meet, float64, on the `clock_device`: outputs in the direction of integration, the
    others sorted in either.

    Args:
        times: [T] or [T, B]; the first is where the solve starts.
        step_t: [n] where steps end.
        jump_t: [n] or [n, B] where steps end because func is discontinuous.
    """

    times: Tensor
    step_t: Tensor | None = None
    jump_t: Tensor | None = None


def largest(means: list[float]) -> float:
    """The largest of the mean squares over the segments; nan if one of them is."""
    return math.nan if any(map(math.isnan, means)) else max(means)


class Phase(IntEnum):
    """What a controller is asked to do; see csrc/ops.h."""

    TRY_FIRST = 0
    CHOOSE_FIRST = 1
    GIVEN_FIRST = 2
    JUDGE = 3


class Flag(IntFlag):
    """What a controller's call tells of all samples together; see csrc/core/step_state.h."""

    RUNNING = 1
    ACCEPTED = 2
    STAYED = 4
    OUTPUT = 8
    JUMP = 16
    FAILED = 32


# The words of one sample's step state, in the order of `struct Samples` in csrc/core/step_state.h.
REAL_FIELDS = (
    "t", "dt", "t1", "t_prev", "dt_prev", "dt_whole", "slope", "size1", "size2", "error1", "error2", "next_output",
    "end",
)  # fmt: skip
INTEGER_FIELDS = (
    "status", "accepted", "output_begin", "output_end", "on_jump", "non_finite",
    "n_accepted", "n_rejected", "n_steps", "next_step_t", "next_jump_t",
)  # fmt: skip
N_FIELDS = len(REAL_FIELDS) + len(INTEGER_FIELDS)
