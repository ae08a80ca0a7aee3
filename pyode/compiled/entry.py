"""What func has been compiled to, for states of one shape and one method."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from .._ops.native import Forms, inspector
from ..errors import CompileError
from ..methods import Tableau
from .graph import Graph
from .lowering import Lowering
from .native import TIME, Library
from .source import backsolve_source, solver_source
from .struct import REGISTER, Dynamics
from .trace import holds, same_operators, taken_apart, trace, trace_vjp

LARGEST_ROW = 4096  # numbers in a state that is one row because its rows are mixed
MOST_STACK = 1 << 21  # bytes that a block of rows may take of it; threads have 8 MB, as a rule
_tracing = RLock()  # torch's tracing is one thread's at a time


class Entry:
    """Dynamics compiled for states of one shape, but for the number of rows, and one method.

    Where `per_sample`, every row has a time and a step-size controller of its own.

    Attributes:
        method: whose steps are compiled in.
        rows: whether rows are computed side by side; otherwise the state is one row.
        mixed: why it is, if so.
        origin: the entry of which this is a copy with other tensors in `args`, or itself.
        source: the C++.
        seconds: how long it took to trace and to compile.
        operators: the names of the ATen operators.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        shapes: list[torch.Size],
        is_tuple: bool,
        dtype: torch.dtype,
        method: Tableau,
        per_sample: bool = False,
    ) -> None:
        self._per_sample, self.mixed = per_sample, ""
        self._single: bool | None = None  # whether func does with a single row what it does with several
        began = time.perf_counter()
        together = min(map(len, shapes)) > 0 and len({shape[0] for shape in shapes}) == 1
        with _tracing:
            try:
                if not together:
                    raise CompileError("the parts of the state have different numbers of rows")
                lowered = self._lower(func, shapes, is_tuple, dtype, rows=True)
                if not self.serves(shapes[0][0]):
                    raise CompileError("func depends on the number of rows")
            except Exception as error:  # rows are mixed, or func fails for another number of them
                if per_sample or sum(shape.numel() for shape in shapes) > LARGEST_ROW:
                    raise
                self.mixed = str(error).splitlines()[0]
                lowered = self._lower(func, shapes, is_tuple, dtype, rows=False)
        self.method = method
        self._inputs, self._given = lowered.inputs, dict[int, Tensor]()
        self.origin = self
        self._forms = Forms(inspector, self._inputs)
        self._dynamics = Dynamics(lowered.outputs, dtype, self.rows, own_times=per_sample)
        self._check_stack(self._dynamics)
        self.source = solver_source(self._dynamics, method, per_sample=per_sample)
        self._plain: list[Library] = []  # none or one
        self._trained: dict[tuple[int, ...], Library] = {}
        self._backsolving: dict[tuple[int, ...], Library] = {}
        self._adjoints: dict[tuple[int, ...], Dynamics] = {}
        self.seconds = time.perf_counter() - began

    def _lower(
        self, func: Callable[..., Any], shapes: list[torch.Size], is_tuple: bool, dtype: torch.dtype, rows: bool
    ) -> Lowering:
        self.rows = rows
        self._func, self._shapes, self._is_tuple, self._dtype = func, shapes, is_tuple, dtype
        self._traced = trace(func, shapes, is_tuple, dtype, rows, self._per_sample)
        traced = taken_apart(self._traced, shapes, dtype, rows, self._per_sample)
        self._conditions = traced.meta["conditions"]
        self.operators = [
            node.target.overloadpacket.__name__
            for node in traced.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
        ]
        return Lowering(traced, dtype, rows, own_times=self._per_sample)

    def serves(self, rows: int) -> bool:
        """Whether func does the same for so many rows; one is to torch a special case, and traced to see."""
        if rows != 1 or not self.rows:
            return all(holds(condition, rows) for condition in self._conditions)
        if self._single is None:
            shapes = [torch.Size((1, *shape[1:])) for shape in self._shapes]
            single = trace(self._func, shapes, self._is_tuple, self._dtype, False, self._per_sample)
            self._single = same_operators(single, self._traced)
        return self._single

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that func uses, read at every solve."""
        return [self._given.get(id(x), x) for x in self._inputs] if self._given else self._inputs

    def given(self, tensors: dict[int, Tensor]) -> Entry:
        """The same for other tensors in `args`, by the ids of those that were traced in their places."""
        other = copy(self)
        other._given = tensors
        return other

    @property
    def library(self) -> Library:
        """A library that solves: the last one with a gradient, if there is one."""
        if self._trained:
            return next(reversed(self._trained.values()))
        if not self._plain:
            with _tracing:
                self._plain.append(self._build(self.source))
        return self._plain[0]

    @property
    def libraries(self) -> list[Library]:
        """All that there are."""
        return [*self._plain, *self._trained.values(), *self._backsolving.values()]

    def _build(self, source: str, gradient: bool = False, timed: bool = False) -> Library:
        began = time.perf_counter()
        library = Library(source, gradient, timed)
        self.origin.source = source
        self.origin.seconds += time.perf_counter() - began
        return library

    def trained(self, wanted: tuple[int, ...]) -> Library:
        """The library that has the gradient too, with respect to the state and to some of the inputs, or TIME."""
        if wanted not in self._trained:
            with _tracing:
                source = solver_source(self._adjoint(wanted), self.method, self._per_sample)
                self._trained[wanted] = self._build(source, True, TIME in wanted)
        return self._trained[wanted]

    def backsolving(self, wanted: tuple[int, ...]) -> Library:
        """The library of the continuous adjoint's backward solve, likewise."""
        if wanted not in self._backsolving:
            with _tracing:
                alone = self._adjoint(()) if self._per_sample else None
                source = backsolve_source(self._adjoint(wanted), self.method, alone)
                self._backsolving[wanted] = self._build(source, timed=TIME in wanted)
        return self._backsolving[wanted]

    def _check_stack(self, dynamics: Dynamics) -> None:
        """Raises CompileError where a block of rows, with a step's stages and what they are computed by, is too big."""
        states = (3 if dynamics.has_way_back else 1) * (len(self.method.rows) + 4)
        state = sum(dynamics.widths) * (REGISTER if self.rows else self._dtype.itemsize)
        if dynamics.local_bytes + states * state > MOST_STACK:
            raise CompileError(f"rows of {sum(dynamics.widths)} numbers, with which the stack would overflow")

    def _adjoint(self, wanted: tuple[int, ...]) -> Dynamics:
        """The dynamics with their way back."""
        if wanted not in self._adjoints:
            lowered = self._lower_vjp([self._inputs[i] for i in wanted if i != TIME])
            gradients = lowered.gradients
            if TIME in wanted:
                gradients = gradients + self._lower_vjp([], lowered.graph).gradients
            adjoint = Dynamics(
                lowered.outputs, self._dtype, self.rows, self._per_sample, lowered.pulled, gradients, TIME in wanted,
                evaluations=len(self.method.rows) + 2,
            )  # fmt: skip
            self._check_stack(adjoint)
            self._adjoints[wanted] = adjoint
        return self._adjoints[wanted]

    def _lower_vjp(self, inputs: list[Tensor], beside: Graph | None = None) -> Lowering:
        """The vector-Jacobian product with gradients to some inputs; or, beside that one's graph, the one to time."""
        times = self._per_sample
        traced = trace_vjp(self._traced, self._shapes, self._dtype, self.rows, inputs, times, beside is not None)
        if traced.meta["conditions"] - self._conditions:
            raise CompileError("the gradient depends on the number of rows")
        return Lowering(traced, self._dtype, self.rows, True, self._inputs, times, beside)

    def fits(self) -> bool:
        """Whether the inputs are still of their shapes and dtypes."""
        return self._forms.hold()

    def rows_of(self, shape: torch.Size) -> int:
        """How many rows a state has whose first part has this shape."""
        return shape[0] if self.rows else 1
