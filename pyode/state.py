"""What users have (a tensor or a tuple of them, and a func on it) and what the loops work on: one contiguous tensor.

A tensor keeps its shape. The parts of a tuple lie one behind the other in a flat tensor, each a segment of the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ._ops.autograd import plain
from .errors import DynamicsError, InvalidType, InvalidValue

State = Tensor | tuple[Tensor, ...]
Func = Callable[[Tensor, Any], Any]


def check_y0(y0: State) -> None:
    """Raises InvalidType or InvalidValue unless y0 is a state that can be solved for."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    if isinstance(y0, Tensor) and (y0.is_floating_point() or y0.is_complex()):
        return
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise InvalidType(f"y0 must be a tensor or a tuple of tensors, not {_kind(y0)}")
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))  # parts of several dtypes are promoted
    if not (dtype.is_floating_point or dtype.is_complex):
        raise InvalidType(f"y0 must be floating or complex, not {dtype}; convert it: y0.float()")
    for i, part in enumerate(parts):
        name = f"y0[{i}]" if isinstance(y0, tuple) else "y0"
        if part.device != parts[0].device:
            raise InvalidValue(
                f"all of y0 must be on one device; y0[0] is on {parts[0].device}, {name} on {part.device}"
            )


def _kind(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(sorted({type(v).__name__ for v in value})) or 'nothing'}"
    return f"a {type(value).__name__}"


class Form:
    """The shape of the user's state, and the way to and from the tensor that the loops work on."""

    def __init__(self, y0: State) -> None:
        self.is_tuple = isinstance(y0, tuple)
        parts = y0 if isinstance(y0, tuple) else (y0,)
        self.shapes = [part.shape for part in parts]
        self.sizes = [part.numel() for part in parts]
        self.segments = (0, *accumulate(self.sizes))

    def pack(self, state: State) -> Tensor:
        """One contiguous tensor; parts of different dtypes are promoted."""
        if isinstance(state, tuple):
            return torch.cat([part.reshape(-1) for part in state])
        return plain(state)

    def unpack(self, y: Tensor, leading: tuple[int, ...] = ()) -> State:
        """The user's state, as views; `leading` dimensions come before those of the state."""
        if not self.is_tuple:
            return y
        return tuple(part.view((*leading, *shape)) for part, shape in zip(torch.split(y, self.sizes, -1), self.shapes))

    def spread(self, tolerance: Any, name: str) -> Any:
        """A tolerance for the packed state from one for the user's: a number or tensor, or one for each part."""
        if not self.is_tuple or not isinstance(tolerance, (Sequence, Tensor)):
            return tolerance
        if isinstance(tolerance, Tensor) and tolerance.dim() == 0:
            return tolerance
        if len(tolerance) != len(self.sizes):
            raise InvalidValue(
                f"{name} must have one entry for each of the {len(self.sizes)} parts of y0, not {len(tolerance)}"
            )
        parts = [torch.as_tensor(part, dtype=torch.float64) for part in tolerance]
        for i, (part, shape) in enumerate(zip(parts, self.shapes)):
            if part.numel() != 1 and part.numel() != shape.numel():
                raise InvalidValue(f"{name}[{i}] has shape {tuple(part.shape)}; y0[{i}] has {tuple(shape)}")
        return torch.cat([part.reshape(-1).expand(size) for part, size in zip(parts, self.sizes)])


class Dynamics:
    """The user's func on packed states: what it returns is checked, counted, and made contiguous.

    Args:
        func: as the user gave it.
        form: of the user's state.
        y0: the packed state at the start; all others are of its shape, dtype and device.
        copy: how to copy a state.
    """

    def __init__(self, func: Func, form: Form, y0: Tensor, copy: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.func, self.form, self.copy = func, form, copy
        self.shape, self.dtype, self.device = y0.shape, y0.dtype, y0.device
        self.n_evals = 0
        self._watch = not y0.is_inference() and not torch.is_inference_mode_enabled()
        self._may_be_lazy = y0.is_complex() or y0.numel() == 1  # a conj() or neg view that is contiguous all the same
        self._first: Tensor | None = None
        self._copies = False
        self.direct: tuple[Any, ...] | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Returns func(t, y), packed."""
        n = self.n_evals = self.n_evals + 1
        version = y._version if self._watch else 0
        if self.form.is_tuple:
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
        return k if n > 2 and not self._copies else self._own(k)

    trial = __call__  # notes nothing, and the graph is torch's own

    def count(self, n: int) -> None:
        """Adds evaluations that were made directly."""
        self.n_evals += n

    def accept(self, k: Any, y: Tensor) -> Tensor:
        """Checks and packs what func returned directly for y."""
        self._check_version(y, 0)
        return self._pack(k)

    def _check_version(self, y: Tensor, version: int) -> None:
        if self._watch and y._version != version:
            raise DynamicsError("func wrote into its input y; it must leave y as it is and return a new tensor")

    def _own(self, k: Tensor) -> Tensor:
        """A copy, if func returns the same memory again and again: the first evaluation's, and then as need be."""
        if k.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(k):
            return k
        if self.n_evals == 1:
            self._first = k
            return self.copy(k)
        if self._first is not None:
            self._copies = k.data_ptr() == self._first.data_ptr()
            self._first = None
            if not (self._copies or self._may_be_lazy or self.form.is_tuple):
                self.direct = (self.func, Tensor, self.dtype, self.shape, self.device, self._watch)
        return self.copy(k) if self._copies else k

    def _pack(self, k: Any) -> Tensor:
        form = self.form
        if not form.is_tuple:
            return self._checked(k, self.shape, "func")
        if not isinstance(k, (tuple, list)):
            raise DynamicsError(f"func must return a tuple of {len(form.shapes)} tensors, as y0 is one, not {_kind(k)}")
        if len(k) != len(form.shapes):
            raise DynamicsError(f"func must return {len(form.shapes)} tensors, one for each of y0's, not {len(k)}")
        parts = enumerate(zip(k, form.shapes))
        return torch.cat([self._checked(part, shape, f"func()[{i}]").reshape(-1) for i, (part, shape) in parts])

    def _checked(self, k: Any, shape: torch.Size, name: str) -> Tensor:
        if not isinstance(k, Tensor):
            raise DynamicsError(f"{name} must be a tensor, as y0's is, not {_kind(k)}")
        if k.shape != shape:
            raise DynamicsError(f"{name} must return the shape of the state, {tuple(shape)}, not {tuple(k.shape)}")
        if k.device != self.device:
            raise DynamicsError(f"{name} must return a tensor on the state's device, {self.device}, not {k.device}")
        if k.is_complex() and not self.dtype.is_complex:
            raise DynamicsError(f"{name} returned {k.dtype} for a state of {self.dtype}; make y0 complex")
        return plain(k.to(self.dtype))
