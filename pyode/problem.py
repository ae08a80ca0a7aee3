"""A solve with all its arguments checked, before func is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import methods
from ._ops import native
from ._ops.contract import Grid, Policy, wide_dtype
from .callbacks import callbacks_of
from .compiled.arguments import WithArgs
from .compiled.dynamics import CompiledDynamics, compiled_by
from .control import (
    CONTROLS,
    STEPS_TO_EVENT,
    Times,
    check_dict,
    check_options,
    check_sample_times,
    check_times,
    check_tolerance,
    first_step_from,
    grid_from,
    policy_from,
    times_until_event,
)
from .errors import DynamicsError, InvalidType, InvalidValue, warn
from .methods import TABLEAUS, Method, Tableau
from .state import Form, Func, State, check_y0, with_args
from .stepping.fixed_grid import check_interp
from .stepping.hooks import Callback

Event = Callable[[Tensor, Tensor], Tensor]  # of times [B] and states [B, D]; returns [B, E]
PER_SAMPLE = "with control='per_sample'"


@dataclass(eq=False)
class Problem:
    """A solve with all its arguments checked.

    Attributes:
        written: func as the user gave it, which takes the args.
        func: the function of (t, y) that comes of it.
        kind: by which what is made for this solve is kept for others; see again.py.
    """

    written: Func
    args: tuple[Any, ...]
    func: Func
    form: Form
    y0: Tensor  # packed
    times: Times
    method: Method
    rtol: float | Tensor
    atol: float | Tensor
    options: dict[str, Any]
    policy: Policy
    grid: Grid
    first_step: float | None
    callbacks: dict[str, Callback]
    event: Event | None
    compiled: CompiledDynamics | WithArgs | None = None
    kind: Any = None

    def event_time(self, end: float) -> Tensor:
        """The time at which a solve with an event has ended, as t has times."""
        return self.times.tensor.new_tensor(end)

    @property
    def search_options(self) -> tuple[float, bool]:
        """To which tolerance an event is located, and whether one at the start is skipped."""
        tolerance = self.atol if isinstance(self.atol, float) else float(self.atol.min())
        return tolerance, bool(self.options.get("skip_initial_event", False))


def pose(
    func: Func,
    y0: State,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Any = None,
    args: Any = (),
    strict: bool = False,
) -> Problem:
    """Checks everything that can be checked before func is called.

    Where `strict`, unknown options and parts of several dtypes are errors.
    """
    if not callable(func):
        raise InvalidType(f"func must be callable as func(t, y), not a {type(func).__name__}")
    check_y0(y0)
    found = methods.find(method)
    options = {} if options is None else check_dict(options, "options")
    check_options(options, found, strict)
    check_interp(options)
    form = Form(y0, per_sample=is_per_sample(options, found))
    of_samples = getattr(t, "ndim", 1) == 2 and form.per_sample
    check = partial(check_sample_times, samples=form.samples) if of_samples else check_times
    times = check(t, late=bool(options.get("device_loop")) and isinstance(t, Tensor) and native.on_gpu(t.device))
    if event_fn is not None:
        if form.per_sample:
            raise InvalidValue("odeint has one event for all samples; solve_ivp(event_fn=) has one for each")
        times = times_until_event(times, options)
        options = {"max_num_steps": STEPS_TO_EVENT, **options} if found.adaptive else options
    if strict and len(dtypes := {part.dtype for part in form.parts(y0)}) > 1:
        raise InvalidType(f"all of y0 must be of one dtype; it has {', '.join(sorted(map(str, dtypes)))}")
    compiled = compiled_by(options.get("compile"), func)
    if compiled is not None:
        func = compiled.func
    bound = with_args(func, args)
    packed = form.pack(y0)
    one = one_of(packed, form)
    if t.device != packed.device:
        warn("t is not on the same device as y0. Coercing to y0.device.")
    return Problem(
        written=func,
        args=tuple(args),
        func=for_one_sample(bound, form),
        form=form,
        y0=packed,
        times=times,
        method=found,
        rtol=check_tolerance(rtol, "rtol", form, one),
        atol=check_tolerance(atol, "atol", form, one),
        options=options,
        policy=policy_from(options, found),
        grid=grid_from(options, times, packed.device),
        first_step=first_step_from(options),
        callbacks=callbacks_of(func, found, times.tensor, form.unpack, silent=PER_SAMPLE if form.per_sample else ""),
        event=None if event_fn is None else event_of(event_fn, args, form, packed.shape),
        compiled=None if compiled is None else compiled.with_args(args),
    )


def one_of(y0: Tensor, form: Form) -> Tensor:
    """What a sample of a packed state is like, which may have none."""
    return y0.new_empty(y0.shape[1:]) if form.per_sample else y0


def is_per_sample(options: dict[str, Any], method: Method) -> bool:
    """Whether every sample is to have a step-size controller of its own.

    Raises:
        InvalidValue: the method has no such thing.
    """
    control = options.get("control", "joint")
    if control not in CONTROLS:
        raise InvalidValue(f"control must be one of {', '.join(map(repr, CONTROLS))}, not {control!r}")
    if control == "per_sample" and not (method.adaptive and isinstance(method, Tableau)):
        able = ", ".join(name for name, tableau in TABLEAUS.items() if tableau.adaptive)
        raise InvalidValue(f"control='per_sample' is for methods that choose their steps: {able}; not {method.name}")
    return bool(control == "per_sample")


def for_one_sample(func: Func, form: Form) -> Func:
    """A single sample's func is given its time as [1], like that of several."""
    return partial(_call_with_vector, func) if form.per_sample and form.samples == 1 else func


def _call_with_vector(func: Func, t: Tensor, y: State) -> Any:
    return func(t.reshape(1), y)


def event_of(event_fn: Any, args: Any, form: Form, shape: torch.Size) -> Event:
    """A user's event function, on packed states of this shape that are given as [B, D]; B is 1 under joint control."""
    if not callable(event_fn):
        raise InvalidType(f"event_fn must be callable as event_fn(t, y), not a {type(event_fn).__name__}")
    event_fn, per_sample, B = with_args(event_fn, args), form.per_sample, form.samples

    def event(t: Tensor, flat: Tensor) -> Tensor:
        t = t.to(flat.device, wide_dtype(flat.device))
        value: Any = event_fn(t if per_sample else t[0], form.unpack(flat.reshape(shape)))
        is_real = isinstance(value, Tensor) and not (value.is_complex() or value.dtype is torch.bool)
        if not is_real or (value.numel() == 0 and B):
            raise DynamicsError(f"event_fn must return a tensor of one or several real numbers, not {value!r}")
        if per_sample and (value.dim() not in (1, 2) or len(value) != B):
            raise DynamicsError(f"event_fn must return [B] or [B, E], here with B = {B}, not {tuple(value.shape)}")
        values: Tensor = value.reshape(B, -1) if B else value.reshape(0, 1)
        return values

    return event
