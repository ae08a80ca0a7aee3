"""A solve as one of B samples, whatever the user's state: 1 under joint control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import reference
from ._ops.contract import clock_device, wide_dtype
from .compiling import not_compiled
from .errors import DynamicsError, InvalidType, InvalidValue
from .state import Dynamics, Form, Func, State, with_args
from .stepping.segment import BatchSegment


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
        ends = times.detach()[[0, -1]].to(self.clock, torch.float64)
        self.t0, self.t1 = (end.expand(self.count) if end.dim() == 0 else end for end in ends)

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
        dynamics = Dynamics(problem.func, self.form, problem.y0)
        real = problem.y0.real.dtype if problem.y0.is_complex() else problem.y0.dtype

        def func(t: Tensor, flat: Tensor) -> Tensor:
            time = t.to(flat.device, real)
            if self.count == 1:  # a view of more than one, as the stages' times are: torch.compile would compile anew
                time = time.repeat(2)[0]
            return self.flat(dynamics(time, flat.reshape(self.shape)))

        return func

    def event(self, event_fn: Any, args: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """A user's event function as one of times [B] and states [B, D] that returns [B, E]."""
        if not callable(event_fn):
            raise InvalidType(f"event_fn must be callable as event_fn(t, y), not a {type(event_fn).__name__}")
        event_fn, per_sample = with_args(event_fn, args), self.form.per_sample

        def event(t: Tensor, flat: Tensor) -> Tensor:
            t = t.to(flat.device, wide_dtype(flat.device))
            value = event_fn(t if per_sample else t[0], self.of_user(flat))
            if not isinstance(value, Tensor) or (value.numel() == 0 and self.count):
                raise DynamicsError(f"event_fn must return a tensor of numbers, not {value!r}")
            if per_sample and (value.dim() not in (1, 2) or len(value) != self.count):
                shape = tuple(value.shape)
                raise DynamicsError(f"event_fn must return [B] or [B, E], here with B = {self.count}, not {shape}")
            several = per_sample and value.dim() == 2
            return value if several else value[:, None] if per_sample else value.reshape(1, -1)

        return event


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

    def stacked(self, event_t: Tensor) -> SampleDenseOutput:
        """Makes it ready: the steps as tensors of their own; [B] event_t, nan where there is none."""
        steps, start, y0 = self.steps, self.samples.t0[None][:0], self.samples.y0[None][:0]
        self.polynomial = steps[0].polynomial if steps else reference.Interpolant((), ())
        self.t0, self.t1, self.size, self.y = start, start, start, y0
        self.last, self.ks = self.samples.t0, []
        if steps:
            # A step that moves with the solve's start has moved by 0, which has a gradient.
            self.t0 = torch.stack([step.t0 if step.shift is None else step.t0 + step.shift for step in steps])
            self.t1, self.size, self.y = (torch.stack([getattr(s, name) for s in steps]) for name in ("t1", "dt", "y"))
            self.ks = [torch.stack(column) for column in zip(*(step.ks for step in steps))]
            self.last = torch.where(event_t.isnan(), self.t1[-1], event_t.detach())
        self.steps = []
        return self

    def __repr__(self) -> str:
        """How much it holds."""
        return f"SampleDenseOutput({self.samples.count} samples, {len(self.t0)} steps)"

    @not_compiled
    def __call__(self, t: Tensor | float) -> State:
        """Returns the states at times [m], or [m, B] with times of its own for each sample, or at a single time.

        The result is [m, *y0.shape], or y0's structure of such; for a single time without m. Gradients reach what the
        solve's own do, and t. Behind a sample's failure or event, states are nan.

        Raises:
            InvalidValue: a time lies outside of a sample's.
        """
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        samples, B = self.samples, self.samples.count
        times = t.to(samples.clock, torch.float64)
        times = times.reshape(-1, 1).expand(-1, B) if times.dim() < 2 else times
        low, high = torch.minimum(samples.t0, samples.t1), torch.maximum(samples.t0, samples.t1)
        if times.shape[1:] != (B,) or not bool(((times >= low) & (times <= high)).all()):
            span = f"; they reach from {float(low.min()):g} to {float(high.max()):g}" if B else ""
            raise InvalidValue(f"t must be [m] or [m, {B}], within each sample's times{span}")
        states = self._at(times) if len(self.t0) else samples.y0.expand(len(times), *samples.y0.shape)
        return samples.of_user(states if t.dim() else states[0])

    def _at(self, times: Tensor) -> Tensor:
        """[m, B, D] from [m, B]."""
        samples, when = self.samples, times.detach()
        sign = torch.sign(samples.t1 - samples.t0)
        # Where a sample has stood still so far it has no step that ends at its start.
        ends = torch.where(self.t1 == samples.t0, -torch.inf, self.t1 * sign)
        steps = torch.searchsorted(ends.T.contiguous(), (when * sign).T.contiguous()).T  # the first that ends there
        steps, b = steps.clamp(max=len(ends) - 1), torch.arange(samples.count, device=steps.device)
        size = self.size[steps, b]
        x = (times - self.t0[steps, b]) / torch.where(size == 0, torch.ones_like(size), size)
        real = self.y.real.dtype if self.y.is_complex() else self.y.dtype
        x, size = (v.unsqueeze(-1).to(self.y.device, real) for v in (x, size))
        steps, b = steps.to(self.y.device), b.to(self.y.device)
        states = reference.interpolate_at(self.polynomial, x, self.y[steps, b], [k[steps, b] for k in self.ks], size)
        beyond = ((when - self.last) * sign > 0).unsqueeze(-1).to(self.y.device)
        states = torch.where(beyond, torch.full_like(states, torch.nan), states)
        never = (self.t1[-1] == samples.t0).unsqueeze(-1).to(self.y.device)  # their derivatives may be nan
        return torch.where(never & ~beyond, samples.y0, states)

    def _map(self, change: Callable[[Tensor], Tensor]) -> SampleDenseOutput:
        """The same with every tensor changed; times keep their dtype."""

        def of(owner: Any) -> dict[str, Any]:
            return {k: changed(k, v) if isinstance(v, Tensor) else v for k, v in vars(owner).items()}

        def changed(name: str, value: Tensor) -> Tensor:
            new = change(value)
            return new if new.dtype == value.dtype or name.startswith("y") else value.to(new.device)

        new, samples = object.__new__(SampleDenseOutput), object.__new__(Samples)
        samples.__dict__ |= of(self.samples)
        new.__dict__ |= {**of(self), "samples": samples, "ks": [change(k) for k in self.ks]}
        return new
