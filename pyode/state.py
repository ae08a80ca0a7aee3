"""What users have (a tensor or a structure of tensors, and a func on it) and what the loops work on: one tensor.

A tensor keeps its shape. The parts of a structure lie one behind the other in a flat one, each a segment of the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from functools import partial, reduce
from itertools import accumulate
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from ._ops.autograd import plain
from ._ops.native import Calls, inspector
from .errors import DynamicsError, InvalidType, InvalidValue
from .tree import Tree

State = Any  # a tensor, a tuple of tensors, or any structure that `Tree` knows
Func = Callable[..., Any]  # of (t, y)
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bfloat16, torch.float16)


def with_args(func: Func, args: Any) -> Func:
    """func(t, y, *args) as a function of (t, y); func itself where there are none.

    Raises:
        InvalidType: args are not a tuple or list.
    """
    if not isinstance(args, (tuple, list)):
        raise InvalidType(f"args must be a tuple of what func takes behind t and y, not {_kind(args)}; for one: (x,)")
    return partial(_call_with, func, args) if args else func  # what a search for parameters looks into


def _call_with(func: Func, args: Any, t: Tensor, y: State) -> Any:
    return func(t, y, *args)


def check_y0(y0: State) -> None:
    """Raises InvalidType or InvalidValue unless y0 is a state that can be solved for."""
    if isinstance(y0, Tensor) and y0.dtype in DTYPES and y0.layout is torch.strided:
        return
    tree = Tree(y0)
    parts, names = tree.leaves(y0), tree.names("y0")
    if not parts:
        raise InvalidType(f"y0 must be a tensor or a tuple, list, dict, ... of tensors, not {_kind(y0)}")
    for part, name in zip(parts, names):
        if not isinstance(part, Tensor):
            raise InvalidType(f"y0 must be a tensor or a tuple, list, dict, ... of tensors; {name} is {_kind(part)}")
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))  # parts of several dtypes are promoted
    if dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InvalidType(f"y0 must be floating or complex, not {dtype}; convert it: y0.float(). Known are {known}")
    for part, name in zip(parts, names):
        if part.layout is not torch.strided:
            raise InvalidType(f"{name} must be dense, not of layout {part.layout}; convert it: {name}.to_dense()")
        if part.device != parts[0].device:
            raise InvalidValue(
                f"all of y0 must be on one device; {names[0]} is on {parts[0].device}, {name} on {part.device}"
            )


def _kind(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(sorted({type(v).__name__ for v in value})) or 'nothing'}"
    return f"a {type(value).__name__}"


class Form:
    """The shape of the user's state, and the way to and from the tensor that the loops work on.

    Args:
        y0: the state at the start.
        per_sample: whether the first axis of every part counts the samples, and the packed state is [samples, ...] too.

    Attributes:
        is_tensor: whether the state is one, and keeps its shape.
        is_tuple: whether it is a flat tuple, named or not; func may return any tuple or list for it.
        samples: how many; 1 if all of the state is one sample.
        segments: where the parts of one sample lie.
    """

    def __init__(self, y0: State, per_sample: bool = False) -> None:
        self.is_tensor = isinstance(y0, Tensor)
        self.is_tuple = isinstance(y0, tuple) and all(isinstance(part, Tensor) for part in y0)
        self.tree = None if self.is_tensor or (self.is_tuple and type(y0) is tuple) else Tree(y0)
        parts = self.parts(y0)
        self.shapes = [part.shape for part in parts]
        self.per_sample = per_sample
        if per_sample:
            self._check_samples()
        self.samples = self.shapes[0][0] if per_sample else 1
        self.sizes = [part.numel() // max(self.samples, 1) for part in parts]
        self.segments = (0, *accumulate(self.sizes))

    def _check_samples(self) -> None:
        """Raises InvalidValue unless the first axis of all parts is of one length."""
        names = self.names("y0")
        for shape, name in zip(self.shapes, names):
            if not shape:
                raise InvalidValue(
                    f"{name} must have a first axis, which counts the samples, not shape (); control='joint' has none"
                )
            if shape[0] != self.shapes[0][0]:
                raise InvalidValue(
                    f"the first axis of every part of y0 counts the samples; {name} has shape {tuple(shape)}, "
                    f"{names[0]} has {tuple(self.shapes[0])}"
                )

    def parts(self, state: State) -> Sequence[Any]:
        """The tensors of a state.

        Raises:
            ValueError: the state is of another structure than y0.
        """
        if self.is_tensor:
            return (state,)
        return state if self.tree is None else self.tree.leaves(state)

    def names(self, root: str) -> list[str]:
        """How each part is written, given the name of the whole."""
        if self.is_tensor:
            return [root]
        return [f"{root}[{i}]" for i in range(len(self.shapes))] if self.tree is None else self.tree.names(root)

    def pack(self, state: State) -> Tensor:
        """One contiguous tensor; parts of different dtypes are promoted."""
        return plain(state) if self.is_tensor else self.join(self.parts(state))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts of a structure, packed."""
        leading = [self.samples] if self.per_sample else []
        return torch.cat([part.reshape(*leading, size) for part, size in zip(parts, self.sizes)], -1)

    def at(self, states: State, i: int) -> State:
        """The state at the i-th of the output times whose states these are."""
        return self.build(part[i] for part in self.parts(states))

    def unpack(self, y: Tensor, leading: tuple[int, ...] = ()) -> State:
        """The user's state, as views; `leading` dimensions come before those of the state."""
        if self.is_tensor:
            return y
        # Not torch.split, whose parts may not be written into where there is a graph.
        flat = ((y.narrow(-1, at, n), shape) for at, n, shape in zip(self.segments, self.sizes, self.shapes))
        if self.per_sample:  # the parts lie apart
            return self.build(part.reshape((*leading, *shape)) for part, shape in flat)
        return self.build(part.view((*leading, *shape)) for part, shape in flat)

    def build(self, parts: Iterator[Tensor]) -> State:
        """The user's structure of these parts."""
        if self.is_tensor:
            return next(parts)
        return tuple(parts) if self.tree is None else self.tree.build(parts)

    def spread(self, tolerance: Any, name: str) -> Any:
        """A tolerance for the packed state from one for the user's: a number or tensor, or one for each part.

        Those for the parts are in a structure like y0's, or in a flat sequence.
        """
        each = self._for_each(tolerance)
        if each is None:
            return tolerance
        if len(each) != len(self.sizes):
            raise InvalidValue(
                f"{name} must have one entry for each of the {len(self.sizes)} parts of y0, not {len(each)}"
            )
        tensors = [torch.as_tensor(part, dtype=torch.float64, device="cpu") for part in each]
        shapes = [shape[1:] for shape in self.shapes] if self.per_sample else self.shapes
        for part, shape, its_name, whole in zip(tensors, shapes, self.names(name), self.names("y0")):
            if part.numel() != 1 and part.numel() != shape.numel():
                raise InvalidValue(f"{its_name} has shape {tuple(part.shape)}; {whole} has {tuple(shape)}")
        return torch.cat([part.reshape(-1).expand(size) for part, size in zip(tensors, self.sizes)])

    def _for_each(self, tolerance: Any) -> Sequence[Any] | Tensor | None:
        """The parts' tolerances; None if there is one for all."""
        if self.tree is not None:
            with suppress(ValueError):
                return self.tree.leaves(tolerance)
        several = isinstance(tolerance, Sequence) or (isinstance(tolerance, Tensor) and tolerance.dim() > 0)
        return tolerance if several and not self.is_tensor else None


def _owners_of_new() -> int:
    k = object()
    return getrefcount(k)


_OURS = _owners_of_new()  # what getrefcount says of a local variable's value that nobody else holds


class Dynamics:
    """The user's func on packed states: what it returns is checked, counted, and made contiguous.

    Args:
        func: as the user gave it.
        form: of the user's state.
        y0: the packed state at the start; all others are of its shape, dtype and device.
        copy: how to copy a state.
    """

    def __init__(self, func: Func, form: Form, y0: Tensor, copy: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.form, self.copy = form, copy
        self.shape, self.dtype, self.device = y0.shape, y0.dtype, y0.device
        self._names = form.names("func()")
        self._may_be_lazy = y0.is_complex() or y0.numel() == 1  # a conj() or neg view that is contiguous all the same
        self._watch = not (y0.is_inference() or torch.is_inference_mode_enabled())
        self._make_calls()
        self.set(func)

    def _make_calls(self) -> None:
        self.calls = Calls(inspector, self.form.is_tensor and not self._may_be_lazy, self._watch)

    def set(self, func: Func | None) -> None:
        """Makes it another func's, for states of the same shape, dtype and device, and as much of inference mode.

        With None it lets go of its func and of all that this has returned, until there is another.
        """
        self.func: Any = func
        self.calls.restart()

    def without_func(self) -> Dynamics:
        """A copy without func."""
        new = copy(self)
        new._make_calls()
        new.set(None)
        return new

    @property
    def n_evals(self) -> int:
        """How often func was called."""
        return self.calls.n

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Returns func(t, y), packed."""
        self.calls.n += 1
        version = y._version if self._watch else 0
        if not self.form.is_tensor:
            k = self._pack(self.func(t, self.form.unpack(y)))
        else:
            k = self.func(t, y)
            if not (
                type(k) is Tensor
                and k.dtype is self.dtype
                and k.shape == self.shape
                and k.device == self.device
                and k.is_contiguous()
            ) or (self._may_be_lazy and (k.is_conj() or k.is_neg())):
                k = self._pack(k)
        self._check_version(y, version)
        return k if self.calls.settled and getrefcount(k) == _OURS else self._own(k)

    trial = __call__  # notes nothing, and the graph is torch's own

    def accept(self, k: Any, y: Tensor) -> Tensor:
        """See RightHandSide."""
        self._check_version(y, 0)
        return self.copy(self._pack(k))

    def _check_version(self, y: Tensor, version: int) -> None:
        if self._watch and y._version != version:
            raise DynamicsError("func wrote into its input y; it must leave y as it is and return a new tensor")

    def _own(self, k: Tensor) -> Tensor:
        """A copy, if func holds on to what it returns, and may write there again: of the first, then as need be.

        Of a tensor with a graph that is to be feared only if it has been written to; the graph itself may hold it.
        """
        if (k.requires_grad and k._version == 0) or torch._C._functorch.is_functorch_wrapped_tensor(k):
            return k
        if not (self.calls.settled or self.calls.copies):
            self.calls.settle(k)
        return k.clone() if k.requires_grad else self.copy(k)

    def _pack(self, k: Any) -> Tensor:
        form = self.form
        if form.is_tensor:
            return self._checked(k, self.shape, "func")
        parts = zip(self._parts(k), form.shapes, self._names)
        return form.join([self._checked(part, shape, name) for part, shape, name in parts])

    def _parts(self, k: Any) -> Sequence[Any]:
        form = self.form
        if form.is_tuple:
            if not isinstance(k, (tuple, list)):
                raise DynamicsError(
                    f"func must return a tuple of {len(form.shapes)} tensors, as y0 is one, not {_kind(k)}"
                )
            if len(k) != len(form.shapes):
                raise DynamicsError(f"func must return {len(form.shapes)} tensors, one for each of y0's, not {len(k)}")
            return k
        try:
            return form.parts(k)
        except ValueError as error:
            raise DynamicsError(f"func must return a structure like y0's: {error}") from error

    def _checked(self, k: Any, shape: torch.Size, name: str) -> Tensor:
        if not isinstance(k, Tensor):
            raise DynamicsError(f"{name} must return a tensor, as y0's is, not {_kind(k)}")
        if k.shape != shape:
            raise DynamicsError(f"{name} must return the shape of the state, {tuple(shape)}, not {tuple(k.shape)}")
        if k.device != self.device:
            raise DynamicsError(f"{name} must return a tensor on the state's device, {self.device}, not {k.device}")
        if k.is_complex() and not self.dtype.is_complex:
            raise DynamicsError(f"{name} returned {k.dtype} for a state of {self.dtype}; make y0 complex")
        return plain(k.to(self.dtype))
