"""Gradients of where events lie."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._ops.contract import wide_dtype
from ..state import Func
from ..stepping.event import SampleEvents
from .batch import Samples

Function = Callable[[Tensor, Tensor], Tensor]


def moved_events(
    events: SampleEvents, func: Func, samples: Samples, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Times, indices and states of the events, with the gradients of where they lie by the implicit function theorem.

    Where an event function is shifted by e, the event moves by -e / (its derivative along the solution); where that is
    0, its time has no gradient.

    Args:
        func: of times [B] and states [B, D].
        start: [] or [B], how far the starts have moved: 0, with a gradient. At a fixed time the state of a sample that
            starts on its event moves with it; others carry that already. None where there is no gradient, or all do.
    """
    time, index, state = events.time, events.index, events.state
    met = index >= 0
    if not torch.is_grad_enabled() or not bool(met.any()):
        return time, index, state
    which = index.clamp(min=0)[:, None].to(state.device)
    here = torch.where(met, time, samples.t0)
    met, here = met.to(state.device), here.to(state.device, wide_dtype(state.device))
    flat = torch.where(met[:, None], state, samples.y0)
    with torch.no_grad():
        slope = func(here, flat)
    if start is not None and bool(events.begun.any()):
        began = events.begun[:, None].to(flat.device)
        start = start.to(flat.device, slope.real.dtype).expand(len(flat))
        flat = torch.where(began, flat - torch.where(began, slope, 0.0) * start[:, None], flat)

    def crossed(t: Tensor, y: Tensor) -> Tensor:
        """[B], of each sample the function that it met."""
        return events.event(t, y).gather(1, which)[:, 0]

    shift = torch.where(met, shift_of(crossed, here, flat, slope), 0.0)
    moved = flat + slope * shift[:, None].to(slope.real.dtype)
    return time + shift.to(time), index, torch.where(met[:, None], moved, math.nan)


def shift_of(function: Function, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """[B] how far the zeros of a function have moved in time: 0, with its gradient; without where it is not crossed."""
    value, rate = function(t, y), rate_along(function, t, y.detach(), slope)
    crosses = rate.isfinite() & (rate != 0) & value.detach().isfinite()
    return torch.where(crosses, (value.detach() - value) / torch.where(crosses, rate, math.inf), 0.0)


def rate_along(function: Function, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """[B] the derivative of a function of times [B] and states [B, D] along the solution, whose derivative is given."""
    t, y = t.clone().requires_grad_(), y.clone().requires_grad_()
    value = function(t, y)
    if not value.requires_grad:
        return torch.zeros_like(value)
    by_t, by_y = torch.autograd.grad(value.sum(), (t, y), materialize_grads=True)
    return by_t + (by_y.conj() * slope).real.sum(1)
