"""pyode.compile: what stands for a func whose solves are native calls."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompileError, InvalidType
from ..methods import Tableau
from .emit import Dynamics
from .guards import Guards
from .lowering import Lowering
from .native import Library
from .source import solver_source
from .trace import trace, trace_vjp

DTYPES = (torch.float32, torch.float64)
LARGEST_ROW = 4096  # numbers in a state that is one row because its rows are mixed
_tracing = RLock()  # torch's tracing is one thread's at a time


class Entry:
    """Dynamics compiled for states of one shape, but for the number of rows, and one method.

    Attributes:
        rows: whether rows are computed side by side; otherwise the state is one row.
        inputs: the tensors that func has closed over, read at every solve.
        source: the C++.
        seconds: how long it took to trace and to compile.
        operators: the names of the ATen operators.
    """

    def __init__(
        self, func: Callable[..., Any], shapes: list[torch.Size], is_tuple: bool, dtype: torch.dtype, method: Tableau
    ) -> None:
        began = time.perf_counter()
        together = min(map(len, shapes)) > 0 and len({shape[0] for shape in shapes}) == 1
        with _tracing:
            try:
                if not together:
                    raise CompileError("the parts of the state have different numbers of rows")
                lowered = self._lower(func, shapes, is_tuple, dtype, rows=True)
            except Exception:  # rows are mixed, or func fails for another number of them
                if sum(shape.numel() for shape in shapes) > LARGEST_ROW:
                    raise
                lowered = self._lower(func, shapes, is_tuple, dtype, rows=False)
        self._method, self._shapes, self._dtype = method, shapes, dtype
        self.inputs = lowered.inputs
        self._forms = [(x.dtype, x.shape) for x in self.inputs]
        self._dynamics = Dynamics(lowered.outputs, dtype, self.rows)
        self.source = solver_source(self._dynamics, method)
        self.library = Library(self.source)
        self._trained: dict[tuple[int, ...], Library] = {}
        self.seconds = time.perf_counter() - began

    def _lower(
        self, func: Callable[..., Any], shapes: list[torch.Size], is_tuple: bool, dtype: torch.dtype, rows: bool
    ) -> Lowering:
        self.rows = rows
        self._traced = traced = trace(func, shapes, is_tuple, dtype, rows)
        self.operators = [
            node.target.overloadpacket.__name__
            for node in traced.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
        ]
        return Lowering(traced, dtype, rows)

    def trained(self, wanted: tuple[int, ...]) -> Library:
        """The library that has the gradient too, with respect to the state and to some of the inputs."""
        if wanted not in self._trained:
            with _tracing:
                inputs = [self.inputs[i] for i in wanted]
                traced = trace_vjp(self._traced, self._shapes, self._dtype, self.rows, inputs)
                lowered = Lowering(traced, self._dtype, self.rows, totals=True, inputs=self.inputs)
                adjoint = Dynamics(lowered.outputs, self._dtype, self.rows, lowered.gradients)
                self.source = solver_source(self._dynamics, self._method, adjoint)
                self._trained[wanted] = Library(self.source, gradient=True)
        return self._trained[wanted]

    def fits(self) -> bool:
        """Whether the inputs are still of their shapes and dtypes."""
        return all(x.dtype is dtype and x.shape == shape for x, (dtype, shape) in zip(self.inputs, self._forms))

    def rows_of(self, shape: torch.Size) -> int:
        """How many rows a state has whose first part has this shape."""
        return shape[0] if self.rows else 1


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

    def entry(self, shapes: list[torch.Size], is_tuple: bool, dtype: torch.dtype, method: Tableau) -> Entry | None:
        """What was compiled for such a state, now if need be; None, after one warning, where that can't be done.

        Raises:
            CompileError: it can't be done, and `strict` is wanted.
        """
        key = (*shapes, is_tuple, dtype, method.name)
        if not self.unchanged():
            with self._lock:
                self._entries.clear()
                self._refused.clear()
                self.last = None
        found = self._entries.get(key)
        if found is None and key not in self._refused:
            with self._lock:
                found = self._entries.get(key) or self._make(key, shapes, is_tuple, dtype, method)
                self._distinct = list(dict.fromkeys(self._entries.values()))
                self._guards = Guards(self.func)  # as func is after it was called; it may count its calls
        return found

    def trained(self, entry: Entry) -> Library | None:
        """An entry's library with gradients to what requires them now; None, after a warning, if there is none."""
        wanted = tuple(i for i, x in enumerate(entry.inputs) if x.requires_grad)
        key = entry, wanted
        if key in self._refused:
            return None
        try:
            with self._lock:
                return entry.trained(wanted)
        except Exception as error:
            self.refuse(key, f"its gradient: {str(error).splitlines()[0]}")
            return None

    def unchanged(self) -> bool:
        """Whether func is as it was when it was traced, but for the values of its tensors."""
        guards = self._guards
        return guards is None or (guards.hold() and all(entry.fits() for entry in self._distinct))

    def _make(
        self, key: Any, shapes: list[torch.Size], is_tuple: bool, dtype: torch.dtype, method: Tableau
    ) -> Entry | None:
        """An entry that serves states of another number of rows too, or a new one."""
        tails = (*(shape[1:] for shape in shapes), is_tuple, dtype, method.name)
        together = all(len(shape) > 0 and shape[0] == shapes[0][0] for shape in shapes)
        entry = self._entries.get(tails) if together else None
        try:
            if dtype not in DTYPES:
                raise CompileError(f"a state of {dtype}; there are float32 and float64")
            entry = entry or Entry(self.func, shapes, is_tuple, dtype, method)
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
