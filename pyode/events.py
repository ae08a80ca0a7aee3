"""odeint_event: solve until an event, with gradients to its time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compiling import not_compiled
from .control import single_time
from .odeint import odeint
from .solution import Stats
from .state import Form, Func, State


@not_compiled
def odeint_event(
    func: Func,
    y0: State,
    t0: Tensor | float,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solves dy/dt = func(t, y) from y(t0) = y0 until event_fn(t, y) changes its sign.

    The event's time and state carry gradients to y0, t0, and all that func and event_fn use, by the implicit function
    theorem: where event_fn = 0 is shifted by e, the event moves by -e / (d event_fn / dt along the solution). Where
    that derivative is 0, the time has no gradient.

    Args:
        func, y0: as `odeint`'s.
        t0: where the solve starts, a number or a tensor of one.
        event_fn: returns a tensor of one or several numbers; the earliest change of sign counts.
        reverse_time: whether time runs backwards.
        odeint_interface: `odeint` or `odeint_adjoint`, or what has their arguments.
        kwargs: passed on to it, args among them; options may have event_t_max and skip_initial_event, see `odeint`.

    Returns:
        The event's time, a 0-dim tensor, and the states at t0 and at the event, [2, *y0.shape]. If there was none, and
        options' on_failure is "return", where the search ended, a time without gradient, and the state there.

    Raises:
        What `odeint` raises; SolveError also if there is no event.

    Source:
        Chen, Amos, Nickel, Learning neural event functions for ordinary differential equations, 2021.
    """
    options = kwargs.get("options") or {}
    stats = options.get("stats") or Stats()
    n_events = stats.n_events
    if options.get("on_failure") == "return":
        kwargs["options"] = {**options, "stats": stats}
    t0 = single_time(t0, "t0").reshape(-1)
    t = torch.cat([t0, t0.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, ys = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    form, args = Form(y0), kwargs.get("args", ())
    event_t = event_t.detach()
    flat = form.pack(form.at(ys, -1))
    unmet = options.get("on_failure") == "return" and stats.n_events == n_events  # no event moves where it has ended
    if unmet or not torch.is_grad_enabled():
        return event_t, ys

    def event(t: Tensor, y: Tensor) -> Tensor:
        return event_fn(t, form.unpack(y), *args).reshape(-1)

    with torch.no_grad():
        slope = form.pack(func(event_t, form.unpack(flat), *args)).to(flat.dtype)
    if float(event_t) == float(t0.detach()):  # no step was taken, but the state at a fixed time moves with the start
        flat = flat - slope * (t0 - t0.detach()).to(slope.real)
    values = event(event_t, flat)
    along = torch.stack(_rates(event, event_t, flat.detach(), slope))
    # The event is that of the function which is closest to its zero, in time.
    crossed = int(torch.argmin((values.detach() / along).abs())) if len(values) > 1 else 0
    moved = (values[crossed].detach() - values[crossed]) / along[crossed]
    event_t = event_t + moved.to(event_t)
    start = form.pack(form.at(ys, 0))
    return event_t, form.unpack(torch.stack([start, flat + slope * moved.to(slope.real)]), (2,))


def _rates(event: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor, slope: Tensor) -> list[Tensor]:
    """How fast each of an event's functions changes along the solution; inf, for no gradient, if it does not."""
    t, y = t.clone().requires_grad_(), y.clone().requires_grad_()
    rates = []
    for value in event(t, y):
        of_t, of_y = torch.zeros_like(t), torch.zeros_like(y)
        if value.requires_grad:
            of_t, of_y = torch.autograd.grad(value, (t, y), retain_graph=True, materialize_grads=True)
        rate = of_t + torch.sum((of_y.conj() * slope).real)
        rates.append(torch.where(rate == 0, math.inf, rate))
    return rates
