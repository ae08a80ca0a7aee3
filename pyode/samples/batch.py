"""A solve as one of B samples, whatever the user's state: 1 under joint control."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops.contract import clock_device
from ..state import Dynamics, Form, Func, State


class Samples:
    """Between the user's states and [B, D], B samples of D numbers.

    Args:
        form: of the user's state.
        y0: packed.
        times: [T] or [T, B].

    Attributes:
        t0, t1: [B] float64, where each starts and ends; on the `clock_device`, as all times here.
        y0: [B, D].
    """

    def __init__(self, form: Form, y0: Tensor, times: Tensor) -> None:
        self.form, self.shape, self.count = form, y0.shape, form.samples
        self.y0 = self.flat(y0)
        times = times.detach().to(self.clock, torch.float64)
        self.t0, self.t1 = (end.expand(self.count) if end.dim() == 0 else end for end in (times[0], times[-1]))

    @property
    def clock(self) -> torch.device:
        """Where times are."""
        return clock_device(self.y0.device)

    def flat(self, y: Tensor) -> Tensor:
        """[B, D] from a packed state."""
        return y.reshape(self.count, self.form.segments[-1])

    def of_user(self, flat: Tensor, joint_axis: bool = False) -> State:
        """The user's states from [..., B, D]; with B in front also under joint control if `joint_axis`."""
        leading: tuple[int, ...] = tuple(flat.shape[:-2])
        if joint_axis and not self.form.per_sample:
            leading = (*leading, 1)
        return self.form.unpack(flat.reshape(*leading, *self.shape), leading)

    def times_of(self, t: Tensor) -> Tensor:
        """[T, B] float64 from times [T] or [T, B]."""
        times = t.detach().to(self.clock, torch.float64)
        return times if times.dim() == 2 else times[:, None].expand(-1, self.count)

    def func(self, problem: Any) -> Func:
        """A problem's func as one of times [B] and states [B, D]."""
        shape, count, size = self.shape, self.count, self.form.segments[-1]  # self has a state
        dynamics = Dynamics(problem.func, self.form, problem.y0)
        real = problem.y0.real.dtype if problem.y0.is_complex() else problem.y0.dtype

        def func(t: Tensor, flat: Tensor) -> Tensor:
            time = t.to(flat.device, real)
            if count == 1:  # a view of more than one, as the stages' times are: torch.compile would compile anew
                time = time.repeat(2)[0]
            return dynamics(time, flat.reshape(shape)).reshape(count, size)

        return func
