"""A solve under torch.func.vmap: every batch element is solved on its own, all in one per-sample solve.

The solve leaves the vmap, where states are plain tensors with the batch in front, and goes back into it for every call
of func: so func sees what it would see alone, and may use tensors that are batched, in args or from around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from torch._C import _functorch

from . import methods
from .compiled.dynamics import CompiledDynamics
from .control import check_dict
from .errors import InvalidType, InvalidValue
from .methods import Tableau
from .solution import SampleStats, Solution
from .state import Form, Func, State, check_y0, with_args


def under_vmap(method: str | None) -> bool:
    """Whether a vmap is under way, innermost, and the method is one that chooses its steps."""
    top = _functorch.peek_interpreter_stack()
    if top is None or top.key() != _functorch.TransformType.Vmap:
        return False
    found = methods.find(method)
    if found.adaptive and not isinstance(found, Tableau):
        raise InvalidValue(f"{found.name!r} is not for torch.func.vmap, which needs an explicit Runge-Kutta method")
    return found.adaptive


class Level:
    """The innermost vmap, and one solve's states in it and outside of it.

    Args:
        y0: the user's state, in the vmap.
        per_sample: whether its first axis counts samples; if not, each batch element is one.
    """

    def __init__(self, y0: State, per_sample: bool) -> None:
        check_y0(y0)
        top = _functorch.peek_interpreter_stack()
        vmap = _functorch.CVmapInterpreterPtr(top)  # points into the other, which therefore has to live
        self.level, self.batch = vmap.level(), vmap.batchSize()
        self.form, self.per_sample = Form(y0, per_sample), per_sample
        self.samples = self.form.samples
        self.y0 = self.states_out(y0)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Outside of the vmap."""
        self._layer = _functorch.pop_dynamic_layer_stack()
        try:
            yield
        finally:
            _functorch.push_dynamic_layer_stack(self._layer)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Back in it."""
        _functorch.push_dynamic_layer_stack(self._layer)
        try:
            yield
        finally:
            self._layer = _functorch.pop_dynamic_layer_stack()

    def _plain(self, x: Tensor) -> Tensor:
        """Of whatever is batched here or not, [batch, ...]."""
        return _functorch._remove_batch_dim(x, self.level, self.batch, 0)

    def out(self, x: Tensor, axis: int = 0) -> Tensor:
        """A tensor of the vmap as one outside: batch and samples, which lie at `axis`, as one axis."""
        x = self._plain(x).movedim(0, axis)
        return x.flatten(axis, axis + 1) if self.per_sample else x

    def back(self, x: Tensor, axis: int = 0) -> Tensor:
        """The reverse."""
        if self.per_sample:
            x = x.reshape(*x.shape[:axis], self.batch, self.samples, *x.shape[axis + 1 :])
        return _functorch._add_batch_dim(x, axis, self.level)

    def states_out(self, state: Any) -> Any:
        """The same for a user's state; what is none is left for the solve to complain about."""
        try:
            parts = self.form.parts(state)
        except ValueError:
            return state
        return self.form.build(self.out(x) if isinstance(x, Tensor) else x for x in parts)

    def states_back(self, state: State, axis: int = 0) -> State:
        """The reverse."""
        return self.form.build(self.back(x, axis) for x in self.form.parts(state))

    def times_out(self, t: Any) -> Any:
        """[T], or [T, B] where they are batched or each sample has its own."""
        if not isinstance(t, Tensor):
            raise InvalidType(f"t must be a tensor, not a {type(t).__name__}: torch.linspace(0., 1., 10), for example")
        if self.per_sample and t.dim() == 2:
            return self.out(t, 1)
        if not (_functorch.is_batchedtensor(t) and _functorch.maybe_get_level(t) == self.level):
            return t
        t = self._plain(t).movedim(0, -1)
        return t.repeat_interleave(self.samples, -1) if self.per_sample else t

    def func(self, func: Func, args: Any) -> Func:
        """The user's func as one outside of the vmap, of times [B] and states with B in front."""
        func = with_args(func.func if isinstance(func, CompiledDynamics) else func, args)

        def outside(t: Tensor, y: State) -> Any:
            with self.entered():
                return self.states_out(func(self.back(t), self.states_back(y)))

        return outside

    def reduced(self, function: Callable[..., Any], args: Any = ()) -> Callable[..., Any]:
        """An event function or norm: as func, but it returns numbers, [B] or [B, E]."""

        def outside(*inputs: Any) -> Any:
            *t, y = inputs
            with self.entered():
                value = function(*map(self.back, t), self.states_back(y), *args)
                if not isinstance(value, Tensor):
                    return value
                value = self.out(value)
                return value if self.per_sample or value.dim() < 2 else value.flatten(1)

        return outside

    def options(self, options: dict[str, Any] | None) -> dict[str, Any]:
        """The options of the solve outside."""
        options = {} if options is None else dict(check_dict(options, "options"))
        options.pop("compile", None)
        if callable(options.get("norm")):
            options["norm"] = self.reduced(options["norm"])
        return options


def no_second_solve(gradient: Any) -> None:
    """Raises InvalidValue unless gradients are direct: a vmap is over when its backward pass begins."""
    if gradient != "direct":
        raise InvalidValue(f"under torch.func.vmap gradients are 'direct', not {gradient!r}")


def odeint_vmapped(
    odeint: Callable[..., Any], func: Func, y0: State, t: Tensor, options: dict[str, Any] | None, args: Any,
    event_fn: Any, **others: Any,
) -> Any:  # fmt: skip
    """See `odeint`."""
    if event_fn is not None:
        raise InvalidValue("odeint has no events under torch.func.vmap; solve_ivp(event_fn=) has one for each element")
    options = {} if options is None else dict(check_dict(options, "options"))
    no_second_solve(options.get("gradient", "direct"))
    level = Level(y0, options.get("control") == "per_sample")
    times, outside = level.times_out(t), level.func(func, args)
    options = {**level.options(options), "control": "per_sample"}
    with level.left():
        ys = odeint(outside, level.y0, times, options=options, **others)
    return level.states_back(ys, 1)


def solve_ivp_vmapped(
    solve_ivp: Callable[..., Solution], func: Func, y0: State, t: Tensor, *, control: str, args: Any, event_fn: Any,
    gradient: str, compact: bool, dense_output: bool, options: dict[str, Any] | None, **others: Any,
) -> Solution:  # fmt: skip
    """See `solve_ivp`."""
    no_second_solve(gradient)
    if compact or dense_output:
        raise InvalidValue(f"{'compact' if compact else 'dense_output'} is not for solves under torch.func.vmap")
    level = Level(y0, control == "per_sample")
    times, outside = level.times_out(t), level.func(func, args)
    event = level.reduced(event_fn, args) if callable(event_fn) else event_fn
    with level.left():
        found = solve_ivp(outside, level.y0, times, event_fn=event, options=level.options(options), **others)

    def each(x: Tensor) -> Tensor:
        return level.back(x if level.per_sample else x[:, None])

    stats = SampleStats(*(each(getattr(found.stats, field.name)) for field in fields(SampleStats)))
    event_y = level.form.build(
        level.back(x if level.per_sample else x[:, None]) for x in level.form.parts(found.event_y)
    )
    return replace(
        found, ts=t, ys=level.states_back(found.ys, 1), status=each(found.status), stats=stats,
        event_t=each(found.event_t), event_index=each(found.event_index), event_y=event_y,
    )  # fmt: skip
