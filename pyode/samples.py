"""A solve as one of B samples, whatever the user's state: 1 under joint control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import reference
from .errors import DynamicsError, InvalidType, InvalidValue
from .state import Dynamics, Form, Func, State, with_args
from .stepping.segment import BatchSegment


class Samples:
    """Between the user's states and [B, D], B samples of D numbers.

    Args:
        form: of the user's state.
        y0: packed.
        times: [T] or [T, B].
    """

    def __init__(self, form: Form, y0: Tensor, times: Tensor) -> None:
        self.form, self.shape, self.count = form, y0.shape, form.samples
        ends = times.detach()[[0, -1]].to(y0.device, torch.float64)
        self.t0, self.t1 = (end.expand(self.count) if end.dim() == 0 else end for end in ends)
        self.y0 = self.flat(y0)

    def flat(self, y: Tensor) -> Tensor:
        """[B, D] from a packed state."""
        return y.reshape(self.count, -1)

    def of_user(self, flat: Tensor, joint_axis: bool = False) -> State:
        """The user's states from [..., B, D]; with B in front also under joint control if `joint_axis`."""
        leading: tuple[int, ...] = tuple(flat.shape[:-2])
        if joint_axis and not self.form.per_sample:
            leading = (*leading, 1)
        return self.form.unpack(flat.reshape(*leading, *self.shape), leading)

    def times_of(self, t: Tensor) -> Tensor:
        """[T, B] float64 from times [T] or [T, B]."""
        times = t.detach().to(self.y0.device, torch.float64)
        return times if times.dim() == 2 else times[:, None].expand(-1, self.count)

    def func(self, problem: Any) -> Func:
        """A problem's func as one of times [B] and states [B, D]."""
        dynamics = Dynamics(problem.func, self.form, problem.y0)
        real = problem.y0.real.dtype if problem.y0.is_complex() else problem.y0.dtype

        def func(t: Tensor, flat: Tensor) -> Tensor:
            time = t.to(real)
            return self.flat(dynamics(time if self.count != 1 else time[0], flat.reshape(self.shape)))

        return func

    def event(self, event_fn: Any, args: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """A user's event function as one of times [B] and states [B, D] that returns [B, E]."""
        if not callable(event_fn):
            raise InvalidType(f"event_fn must be callable as event_fn(t, y), not a {type(event_fn).__name__}")
        event_fn, per_sample = with_args(event_fn, args), self.form.per_sample

        def event(t: Tensor, flat: Tensor) -> Tensor:
            value = event_fn(t if per_sample else t[0], self.of_user(flat))
            if not isinstance(value, Tensor) or value.numel() == 0:
                raise DynamicsError(f"event_fn must return a tensor of numbers, not {value!r}")
            if per_sample and (value.dim() not in (1, 2) or len(value) != self.count):
                shape = tuple(value.shape)
                raise DynamicsError(f"event_fn must return [B] or [B, E], here with B = {self.count}, not {shape}")
            return value.reshape(self.count, -1)

        return event


class RunningRows:
    """A func that is called with the rows that still run only.

    Args:
        func: of times [B] and the user's state, for any B.
        form: of the state.
    """

    WORTHWHILE = 0.75  # of the rows called last: fewer running ones are gathered anew

    def __init__(self, func: Func, form: Form) -> None:
        self.func, self.form = func, form
        self.rows: Tensor | None = None
        self.count = form.samples

    def look(self, controller: Any) -> None:
        """Takes note of which samples still run."""
        running = controller.field("status") == 1
        count = int(running.sum())
        if 0 < count <= self.WORTHWHILE * self.count:
            self.rows, self.count = running.nonzero()[:, 0], count

    def __call__(self, t: Tensor, y: State) -> State:
        """The derivatives, 0 in the other rows."""
        if self.rows is None:
            return self.func(t, y)
        rows = self.rows.to(t.device)
        parts = self.form.parts(y)
        some = self.form.parts(self.func(t[rows], self.form.build(part[rows] for part in parts)))
        return self.form.build(
            torch.zeros_like(part).index_copy(0, rows, k.to(part.dtype)) for part, k in zip(parts, some)
        )


class SampleDenseOutput:
    """The solution of every sample as a function of time: what the interpolant of a Solution is.

    Args:
        samples: the solve's.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.steps: list[BatchSegment] = []

    def watch(self, segment: BatchSegment) -> None:
        """Keeps a step."""
        self.steps.append(segment)

    def stacked(self) -> SampleDenseOutput:
        """Makes it ready: the steps as tensors of their own."""
        steps, samples = self.steps, self.samples
        self.polynomial = steps[0].polynomial if steps else reference.Interpolant((), ())
        empty = samples.y0[None][:0]
        self.t0, self.t1, self.size = (
            torch.stack([getattr(step, name) for step in steps]) if steps else samples.t0[None][:0]
            for name in ("t0", "t1", "size")
        )
        self.y = torch.stack([step.y for step in steps]) if steps else empty
        self.ks = [torch.stack(column) for column in zip(*(step.ks for step in steps))]
        self.steps = []
        return self

    def __repr__(self) -> str:
        """How much it holds."""
        return f"SampleDenseOutput({self.samples.count} samples, {len(self.t0)} steps)"

    def __call__(self, t: Tensor | float) -> State:
        """Returns the states at times [m], or [m, B] with times of its own for each sample, or at a single time.

        The result is [m, *y0.shape], or y0's structure of such; for a single time without m. Gradients reach what the
        solve's own do, and t. Behind a sample's failure, states are nan; behind its event they are the solution's.

        Raises:
            InvalidValue: a time lies outside of a sample's.
        """
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        device, B = self.samples.y0.device, self.samples.count
        times = t.to(device, torch.float64).reshape(-1, *t.shape[1:]) if t.dim() else t.to(device, torch.float64)[None]
        times = times[:, None].expand(-1, B) if times.dim() == 1 else times
        low, high = torch.minimum(self.samples.t0, self.samples.t1), torch.maximum(self.samples.t0, self.samples.t1)
        if times.shape[1] != B or not bool(((times >= low) & (times <= high)).all()):
            raise InvalidValue(
                f"t must be [m] or [m, {B}], within each sample's times; they reach from {float(low.min()):g} to "
                f"{float(high.max()):g}"
            )
        if not len(self.t0):
            states = self.samples.y0.expand(len(times), *self.samples.y0.shape)
        else:
            states = self._at(times)
        states = self.samples.of_user(states if t.dim() else states[0])
        return states

    def _at(self, times: Tensor) -> Tensor:
        """[m, B, D] from [m, B]."""
        sign = torch.sign(self.samples.t1 - self.samples.t0)
        ends = (self.t1 * sign).T.contiguous()
        steps = torch.searchsorted(ends, (times.detach() * sign).T.contiguous()).T  # the first that ends there or later
        beyond = steps >= len(self.t1)
        steps, b = steps.clamp(max=len(self.t1) - 1), torch.arange(self.samples.count, device=steps.device)
        size = self.size[steps, b]
        x = (times - self.t0[steps, b]) / torch.where(size == 0, torch.ones_like(size), size)
        real = self.y.real.dtype if self.y.is_complex() else self.y.dtype
        x, size = (v.unsqueeze(-1).to(real) for v in (x, size))
        states = reference.interpolate_at(self.polynomial, x, self.y[steps, b], [k[steps, b] for k in self.ks], size)
        return torch.where(beyond.unsqueeze(-1), torch.full_like(states, torch.nan), states)

    def _map(self, change: Callable[[Tensor], Tensor]) -> SampleDenseOutput:
        """The same with every tensor changed."""
        new = object.__new__(SampleDenseOutput)
        new.samples = object.__new__(Samples)
        new.samples.__dict__ |= {k: change(v) if isinstance(v, Tensor) else v for k, v in vars(self.samples).items()}
        new.__dict__ |= {
            name: change(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
            if name != "samples"
        }
        new.ks = [change(k) for k in self.ks]
        return new
