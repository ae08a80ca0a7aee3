"""A solve under torch.func.vmap: every batch element is solved on its own, all in one per-sample solve.

The solve leaves the vmap, where states are plain tensors with the batch in front, and goes back into it for every call
of func: so func sees what it would see alone, and may use tensors that are batched, in args or from around it.

Where grad or jvp lie within a vmap, as in vmap(grad(...)), it leaves all of them and notes its steps, which are then
taken again under them (gradients/replayed.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch

from . import methods
from .compiled.dynamics import CompiledDynamics
from .control import check_dict
from .errors import InvalidType, InvalidValue
from .gradients.replayed import Again, replay
from .methods import Tableau
from .solution import SampleStats, Solution
from .state import Form, Func, State, check_y0, with_args
from .stepping.tape import Step, Tape
from .tree import Tree

T = TypeVar("T")
VMAP = _functorch.TransformType.Vmap


def under_vmap(method: str | None) -> bool:
    """Whether a vmap is under way, and the method is one that chooses its steps."""
    if _functorch.peek_interpreter_stack() is None:
        return False
    if not any(layer.key() == VMAP for layer in _functorch.get_interpreter_stack()):
        return False
    found = methods.find(method)
    if found.adaptive and not isinstance(found, Tableau):
        raise InvalidValue(f"{found.name!r} is not for torch.func.vmap, which needs an explicit Runge-Kutta method")
    return found.adaptive


class Levels:
    """Some transforms, the innermost ones, and one solve's states in them and outside of them.

    Args:
        y0: the user's state, in the transforms.
        per_sample: whether its first axis counts samples; if not, each batch element is one.
        depth: how many transforms.
    """

    def __init__(self, y0: State, per_sample: bool, depth: int) -> None:
        check_y0(y0)
        inwards = _functorch.get_interpreter_stack()[-depth:]
        self._sizes = [_functorch.CVmapInterpreterPtr(x).batchSize() if x.key() == VMAP else None for x in inwards]
        self._numbers = [x.level() for x in inwards]
        self._layers: list[Any] = []  # as long as they are left, the innermost first
        self.batch = math.prod(size for size in self._sizes if size is not None)
        self.form, self.per_sample = Form(y0, per_sample), per_sample
        self.samples = self.form.samples
        self.y0 = self.states_out(y0)

    def _leave(self) -> None:
        self._layers = [_functorch.pop_dynamic_layer_stack() for _ in self._numbers]

    def _enter(self) -> None:
        while self._layers:
            _functorch.push_dynamic_layer_stack(self._layers.pop())

    @contextmanager
    def left(self) -> Iterator[None]:
        """Outside of the transforms."""
        self._leave()
        try:
            yield
        finally:
            self._enter()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Back in them."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _outside(self, x: Tensor, change: Callable[[Tensor, bool], T]) -> T:
        """What becomes outside of a tensor of the transforms: [batch, ...], and whether the elements have their own."""
        n, batched = 0, False
        try:
            for number, size in zip(reversed(self._numbers), reversed(self._sizes)):
                self._layers.append(_functorch.pop_dynamic_layer_stack())
                if size is None:
                    x = _functorch._unwrap_for_grad(x, number)
                else:
                    batched |= _functorch.is_batchedtensor(x) and _functorch.maybe_get_level(x) == number
                    x, n = _functorch._remove_batch_dim(x, number, size, 0), n + 1
            return change(x if n == 1 else x.flatten(0, n - 1), batched)
        finally:
            self._enter()

    def differ(self, y0: State, t: Tensor, func: Func) -> bool:
        """Whether the elements of the batch have solves of their own."""

        def batched(x: Any) -> bool:
            return isinstance(x, Tensor) and self._outside(x, lambda _, batched: batched)

        if batched(t) or any(map(batched, self.form.parts(y0))):
            return True
        part = self.form.parts(y0)[0]
        start = t[0].to(part.real.dtype)
        with torch.no_grad():
            k = func(start.expand(self.samples) if self.per_sample else start, y0)
        return any(map(batched, Tree(k).leaves(k)))

    def out(self, x: Tensor, axis: int = 0) -> Tensor:
        """A tensor of the transforms as one outside: batch and samples, which lie at `axis`, as one axis."""

        def joined(x: Tensor, batched: bool) -> Tensor:
            x = x.movedim(0, axis)
            return x.flatten(axis, axis + 1) if self.per_sample else x

        return self._outside(x, joined)

    def back(self, x: Tensor, axis: int = 0) -> Tensor:
        """The reverse, outside."""
        sizes = [size for size in self._sizes if size is not None]
        rest = [self.samples, *x.shape[axis + 1 :]] if self.per_sample else x.shape[axis + 1 :]
        if self.per_sample or len(sizes) > 1:
            x = x.reshape(*x.shape[:axis], *sizes, *rest)
        for number, size in zip(self._numbers, self._sizes):
            if size is not None:
                x = _functorch._add_batch_dim(x, axis, number)
        return x

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

        def columns(t: Tensor, batched: bool) -> Tensor:
            if not batched:
                return t[0]
            t = t.movedim(0, -1)
            return t.repeat_interleave(self.samples, -1) if self.per_sample else t

        return self._outside(t, columns)

    def func(self, func: Func, args: Any) -> Func:
        """The user's func as one outside of the vmap, of times [B] and states with B in front."""
        func = with_args(func.func if isinstance(func, CompiledDynamics) else func, args)

        def outside(t: Tensor, y: State) -> Any:
            t, y = self.back(t), self.states_back(y)
            with self.entered():
                return self.states_out(func(t, y))

        return outside

    def reduced(self, function: Callable[..., Any], args: Any = ()) -> Callable[..., Any]:
        """An event function or norm: as func, but it returns numbers, [B] or [B, E]."""

        def outside(*inputs: Any) -> Any:
            *t, y = inputs
            t, y = [self.back(x) for x in t], self.states_back(y)
            with self.entered():
                value = function(*t, y, *args)
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


def check_transforms(gradient: Any) -> None:
    """Raises InvalidValue unless gradients are direct where a transform of torch.func is under way.

    A vmap is over when a backward pass begins, and grad and jvp enter none of another kind.
    """
    if gradient != "direct" and torch._C._are_functorch_transforms_active():
        raise InvalidValue(f"under torch.func's grad, jvp and vmap gradients are 'direct', not {gradient!r}")


def odeint_vmapped(
    odeint: Callable[..., Any], take_steps: Callable[..., Tape], func: Func, y0: State, t: Tensor,
    options: dict[str, Any] | None, args: Any, event_fn: Any, **others: Any,
) -> Any:  # fmt: skip
    """See `odeint`; `take_steps`, with the same arguments, notes its steps. None if no element differs from others."""
    if event_fn is not None:
        raise InvalidValue("odeint has no events under torch.func.vmap; solve_ivp(event_fn=) has one for each element")
    options = {} if options is None else dict(check_dict(options, "options"))
    check_transforms(options.get("gradient", "direct"))
    per_sample = options.get("control") == "per_sample"
    if _functorch.peek_interpreter_stack().key() != VMAP:
        return _taken_again(take_steps, func, y0, t, per_sample, options, args, **others)
    level = Levels(y0, per_sample, 1)
    times, outside = level.times_out(t), level.func(func, args)
    options = {**level.options(options), "control": "per_sample"}
    with level.left():
        ys = level.states_back(odeint(outside, level.y0, times, options=options, **others), 1)
    return ys


def _taken_again(
    take_steps: Callable[..., Tape], func: Func, y0: State, t: Tensor, per_sample: bool, options: dict[str, Any],
    args: Any, method: str | None, **others: Any,
) -> State | None:  # fmt: skip
    """A solve outside of all transforms, and its steps once more inside."""
    levels = Levels(y0, per_sample, _functorch.get_dynamic_layer_stack_depth())
    times, outside, inside = levels.times_out(t), levels.func(func, args), with_args(func, args)
    if not levels.differ(y0, t, inside):
        return None
    n = levels.batch * levels.samples
    options = {**levels.options(options), "control": "per_sample"}
    with levels.left(), torch.no_grad():
        tape = take_steps(outside, levels.y0, times, method=method, options=options, **others)
        steps = [_again(step, n, levels.back) for step in tape.steps]
        left = None if tape.left is None else [levels.back(row.expand(n)) for row in tape.left]
    tableau = methods.find(method)
    assert isinstance(tableau, Tableau)
    return replay(inside, levels.form, tableau, steps, y0, t, left)


def _again(step: Step, n: int, back: Callable[[Tensor], Tensor]) -> Again:
    """A step of n samples, taken outside of the transforms, for use inside."""
    outputs: dict[int, tuple[Tensor, Tensor]] = {}
    device = step.dt.device
    for passed in step.outputs:
        index, samples = (torch.as_tensor(x, device=device).reshape(-1) for x in (passed.index, passed.samples))
        position = torch.as_tensor(passed.position, dtype=torch.float64, device=device).reshape(-1)
        for i in set(index.tolist()):
            there, where = outputs.setdefault(i, (torch.zeros_like(step.dt, dtype=torch.bool), step.dt.new_zeros(n)))
            some = samples[index == i]
            there[some], where[some] = True, position[index == i]
    on_jump = torch.as_tensor(step.on_jump, device=device)
    return Again(
        dt=back(step.dt),
        times=[back(row) for row in step.times.reshape(-1, n)],
        opening=None if step.opening is None else back(step.opening.reshape(n)),
        on_jump=back(on_jump.expand(n)) if bool(on_jump.any()) else None,
        outputs={i: (back(there), back(where)) for i, (there, where) in outputs.items()},
        polynomial=step.outputs[0].polynomial if step.outputs else None,
    )


def solve_ivp_vmapped(
    solve_ivp: Callable[..., Solution], func: Func, y0: State, t: Tensor, *, control: str, args: Any, event_fn: Any,
    gradient: str, compact: bool, dense_output: bool, options: dict[str, Any] | None, **others: Any,
) -> Solution | None:  # fmt: skip
    """See `solve_ivp`; None if no element of the batch differs from others."""
    inner = _functorch.peek_interpreter_stack().key()
    if inner != VMAP:
        levels = Levels(y0, control == "per_sample", _functorch.get_dynamic_layer_stack_depth())
        if not levels.differ(y0, t, with_args(func, args)):
            return None
        raise InvalidValue(
            f"solve_ivp can't be used where {inner.name.lower()} lies within a vmap, as in vmap(grad(...)); odeint "
            "can, also with options={'control': 'per_sample'}"
        )
    check_transforms(gradient)
    if compact or dense_output:
        raise InvalidValue(f"{'compact' if compact else 'dense_output'} is not for solves under torch.func.vmap")
    level = Levels(y0, control == "per_sample", 1)
    times, outside = level.times_out(t), level.func(func, args)
    event = level.reduced(event_fn, args) if callable(event_fn) else event_fn

    def each(x: Tensor) -> Tensor:
        return level.back(x if level.per_sample else x[:, None])

    with level.left():
        found = solve_ivp(outside, level.y0, times, event_fn=event, options=level.options(options), **others)
        stats = SampleStats(*(each(getattr(found.stats, field.name)) for field in fields(SampleStats)))
        return replace(
            found, ts=t, ys=level.states_back(found.ys, 1), status=each(found.status), stats=stats,
            event_t=each(found.event_t), event_index=each(found.event_index),
            event_y=level.form.build(map(each, level.form.parts(found.event_y))),
        )  # fmt: skip
