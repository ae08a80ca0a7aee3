"""odeint_event: solve until an event, with gradients to its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compiling import not_compiled
from .odeint import odeint
from .state import Form, Func, State


@not_compiled
def odeint_event(
    func: Func,
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solves dy/dt = func(t, y) from y(t0) = y0 until event_fn(t, y) changes its sign.

    The event's time and state carry gradients to y0, t0, and all that func and event_fn use, by the implicit function
    theorem: where event_fn = 0 is shifted by e, the event moves by -e / (d event_fn / dt along the solution).

    Args:
        func, y0: as `odeint`'s.
        t0: where the solve starts, a tensor of one number.
        event_fn: returns a tensor of one or several numbers; the earliest change of sign counts.
        reverse_time: whether time runs backwards.
        odeint_interface: `odeint` or `odeint_adjoint`, or what has their arguments.
        kwargs: passed on to it, args among them; options may have event_t_max and skip_initial_event, see `odeint`.

    Returns:
        The event's time, a 0-dim tensor, and the states at t0 and at the event, [2, *y0.shape].

    Raises:
        What `odeint` raises; SolveError also if there is no event.

    Source:
        Chen, Amos, Nickel, Learning neural event functions for ordinary differential equations, 2021.
    """
    t0 = t0.reshape(-1)
    t = torch.cat([t0, t0.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, ys = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    form, args = Form(y0), kwargs.get("args", ())
    event_t = event_t.detach()
    flat = form.pack(form.at(ys, -1))
    if not torch.is_grad_enabled():
        return event_t, ys

    def event(t: Tensor, y: Tensor) -> Tensor:
        return event_fn(t, form.unpack(y), *args).reshape(-1)

    with torch.no_grad():
        slope = form.pack(func(event_t, form.unpack(flat), *args)).to(flat.dtype)
        crossed = int(_crossed(event(t0[0], form.pack(y0)), event(event_t, flat)))
    time, state = event_t.clone().requires_grad_(), flat.detach().requires_grad_()
    rate = torch.autograd.grad(event(time, state)[crossed], (time, state), allow_unused=True)
    along = sum(torch.sum((d.conj() * v).real) for d, v in zip(rate, (torch.ones_like(time), slope)) if d is not None)
    here = event(event_t, flat)[crossed]
    moved = (here.detach() - here) / along
    event_t = event_t + moved.to(event_t)
    start = form.pack(form.at(ys, 0))
    return event_t, form.unpack(torch.stack([start, flat + slope * moved.to(slope.real)]), (2,))


def _crossed(before: Tensor, now: Tensor) -> Tensor:
    """Which of several functions has changed its sign: the one furthest on its other side."""
    return torch.argmin(now * torch.where(before == 0, torch.sign(now), torch.sign(before)))
