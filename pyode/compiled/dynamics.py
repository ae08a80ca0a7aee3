"""pyode.compile: what stands for a func whose solves are native calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CompileError, InvalidType
from ..methods import Tableau
from .guards import Guards

if TYPE_CHECKING:
    from .entry import Entry
    from .native import Library

DTYPES = (torch.float32, torch.float64)


class CompiledDynamics(nn.Module):
    """A func that solves with explicit Runge-Kutta methods as one native call, and can do all that the func can.

    Made by `pyode.compile`. Called itself, it calls func.
    """

    def __init__(self, func: Callable[..., Any], strict: bool = False) -> None:
        super().__init__()
        self.func, self.strict = func, strict
        self._entries: dict[Any, Entry] = {}
        self._distinct: list[Entry] = []
        self._guards: Guards | None = None
        self._refused: dict[Any, str] = {}
        self._lock = RLock()
        self.last: object = None  # the last solve, prepared to be done again

    def forward(self, t: Tensor, y: Any) -> Any:
        """func(t, y)."""
        return self.func(t, y)

    @property
    def source(self) -> str:
        """The C++ of what was compiled last; empty before the first solve."""
        return self._distinct[-1].source if self._distinct else ""

    def entry(
        self, shapes: list[torch.Size], is_tuple: bool, dtype: torch.dtype, method: Tableau, per_sample: bool = False
    ) -> Entry | None:
        """What was compiled for such a state, now if need be; None, after one warning, where that can't be done.

        Raises:
            CompileError: it can't be done, and `strict` is wanted.
        """
        key = (*shapes, is_tuple, dtype, method.name, per_sample)
        if not self.unchanged():
            with self._lock:
                self._entries.clear()
                self._refused.clear()
                self.last = None
        found = self._entries.get(key)
        if found is None and key not in self._refused:
            with self._lock:
                found = self._entries.get(key) or self._make(key, shapes, is_tuple, dtype, method, per_sample)
                self._distinct = list(dict.fromkeys(self._entries.values()))
                self._guards = Guards(self.func)  # as func is after it was called; it may count its calls
        return found

    def trained(self, entry: Entry) -> Library | None:
        """An entry's library with gradients to what requires them now; None, after a warning, if there is none."""
        wanted = tuple(i for i, x in enumerate(entry.inputs) if x.requires_grad)
        return self._gradient(entry.trained, entry, wanted)

    def backsolving(self, entry: Entry, wanted: tuple[int, ...]) -> Library | None:
        """An entry's library of the continuous adjoint, with gradients to some of its inputs; None likewise."""
        return self._gradient(entry.backsolving, entry, wanted)

    def _gradient(
        self, make: Callable[[tuple[int, ...]], Library], entry: Entry, wanted: tuple[int, ...]
    ) -> Library | None:
        key = entry, wanted
        if key in self._refused:
            return None
        try:
            with self._lock:
                return make(wanted)
        except Exception as error:
            self.refuse(key, f"its gradient: {str(error).splitlines()[0]}")
            return None

    def unchanged(self) -> bool:
        """Whether func is as it was when it was traced, but for the values of its tensors."""
        guards = self._guards
        return guards is None or (guards.hold() and all(entry.fits() for entry in self._distinct))

    def _make(
        self,
        key: Any,
        shapes: list[torch.Size],
        is_tuple: bool,
        dtype: torch.dtype,
        method: Tableau,
        per_sample: bool,
    ) -> Entry | None:
        """An entry that serves states of another number of rows too, or a new one."""
        tails = (*(shape[1:] for shape in shapes), is_tuple, dtype, method.name, per_sample)
        together = all(len(shape) > 0 and shape[0] == shapes[0][0] for shape in shapes)
        entry = self._entries.get(tails) if together else None
        # Tracing needs parts of torch that take a while to import.
        from .entry import Entry

        try:
            if dtype not in DTYPES:
                raise CompileError(f"a state of {dtype}; there are float32 and float64")
            entry = entry or Entry(self.func, shapes, is_tuple, dtype, method, per_sample)
        except CompileError as error:
            self.refuse(key, str(error))
            return None
        except (
            Exception
        ) as error:  # whatever func or torch raises on fake tensors; run eagerly, func shows what is wrong
            self.refuse(key, f"it can't be traced: {type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        if entry.rows:
            self._entries[tails] = entry
        self._entries[key] = entry
        return entry

    def refuse(self, key: Any, reason: str) -> None:
        """Notes that something runs eagerly, and says so once; raises, if `strict`."""
        if self.strict:
            raise CompileError(reason)
        if reason not in self._refused.values():
            warnings.warn(f"{_name(self.func)} is not compiled and runs eagerly: {reason}", stacklevel=6)
        self._refused[key] = reason

    def __repr__(self) -> str:
        lines = [f"compiled {_name(self.func)}"]
        for entry in self._distinct:
            n = sum(tensor.numel() for tensor in entry.inputs)
            lines.append(
                f"  operators: {', '.join(dict.fromkeys(entry.operators))}\n"
                f"  tensors read: {len(entry.inputs)}, {n} numbers\n"
                f"  {'rows side by side' if entry.rows else 'rows mixed: the state is one row'}\n"
                f"  {entry.library.path}, {entry.seconds:.2f} s"
            )
        lines += [f"  not compiled: {reason}" for reason in dict.fromkeys(self._refused.values())]
        return "\n".join(lines)


def _name(func: Any) -> str:
    return str(getattr(func, "__qualname__", type(func).__name__))


def compile(func: Callable[..., Any], strict: bool = False) -> CompiledDynamics:
    """Returns what stands for func in `odeint` and its kin, and makes a solve one native call.

    func is traced at the first solve, written out as C++ and compiled around the solver's loop. Nothing else changes:
    the same arguments, results to rounding, and in float64 the same steps. What can't be compiled runs as func does.

    Args:
        func: called as func(t, y); see docs/compiled.md for what it may do.
        strict: raise where func can't be compiled, instead of warning and running it eagerly.

    Returns:
        A callable module; its parameters are func's. `print` it to see what was made of func; `source` is the C++.

    Raises:
        InvalidType: func is not callable.
        CompileError: at the first solve, if strict.
    """
    if not callable(func):
        raise InvalidType(f"func must be callable as func(t, y), not a {type(func).__name__}")
    return CompiledDynamics(func, strict)


@lru_cache(maxsize=16)
def compiled_once(func: Callable[..., Any]) -> CompiledDynamics:
    """The same for the same func; the last few are remembered."""
    return CompiledDynamics(func)
