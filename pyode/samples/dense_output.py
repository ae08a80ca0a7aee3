"""The solution of every sample as a function of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from ..compiling import not_compiled
from ..errors import InvalidValue
from ..state import State
from ..stepping.segment import BatchSegment
from .batch import Samples


class SampleDenseOutput:
    """What the interpolant of a Solution is.

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
        t = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64, device="cpu")
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
