"""odeint_event: solve until an event, with gradients to its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .compiling import not_compiled
from .control import single_time
from .odeint import odeint
from .problem import Event, event_of
from .samples.event_gradients import rate_along, shift_of
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
    state = form.pack(form.at(ys, -1))
    unmet = options.get("on_failure") == "return" and stats.n_events == n_events  # no event moves where it has ended
    if unmet or not torch.is_grad_enabled():
        return event_t, ys
    with torch.no_grad():
        slope = form.pack(func(event_t, form.unpack(state), *args)).to(state.dtype)
    if float(event_t) == float(t0.detach()):  # no step was taken, but the state at a fixed time moves with the start
        state = state - slope * (t0 - t0.detach()).to(slope.real)
    event = event_of(event_fn, args, form, state.shape)
    moved = _shift(event, event_t.reshape(1), state.reshape(1, -1), slope.reshape(1, -1))
    start = form.pack(form.at(ys, 0))
    moved_state = state + slope * moved.to(slope.real)
    return event_t + moved.to(event_t), form.unpack(torch.stack([start, moved_state]), (2,))


def _shift(event: Event, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """How far the event at t and y has moved, 0-dim: 0, with its gradient."""

    def function(i: int, t: Tensor, y: Tensor) -> Tensor:
        return event(t, y)[:, i]

    def distance(function: Callable[[Tensor, Tensor], Tensor]) -> float:
        """From its zero, in time."""
        return float((function(t, y).detach() / rate_along(function, t, y.detach(), slope)).abs().nan_to_num(0.0))

    functions = [partial(function, i) for i in range(event(t, y.detach()).shape[1])]
    closest = min(functions, key=distance) if len(functions) > 1 else functions[0]  # the event is that one's
    return shift_of(closest, t, y, slope)[0]
