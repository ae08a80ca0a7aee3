"""A library of compiled dynamics, and a solve with it: one native call, without the GIL."""

from __future__ import annotations

import ctypes
import math
import shutil
import threading
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .._ops import native as ops
from .._ops.contract import INTEGER_FIELDS, REAL_FIELDS, Grid, Policy
from .build import build

MOST_RECORDED = 1 << 21  # bytes of all evaluations; what leaves the second-level cache is as soon computed again
_MOST_KEPT = 1 << 24  # bytes of workspace that a thread keeps for its next solve


class _Grid(Structure):
    _fields_ = (
        ("times", c_void_p), ("n_times", c_int64), ("time_stride", c_int64), ("sample_stride", c_int64),
        ("step_t", c_void_p), ("n_step_t", c_int64), ("jump_t", c_void_p), ("n_jump_t", c_int64),
        ("jump_stride", c_int64), ("jump_sample_stride", c_int64),
    )  # fmt: skip


class _Policy(Structure):
    _fields_ = (
        *((name, c_double) for name in ("safety", "ifactor", "dfactor", "min_step", "max_step", "order")),
        ("beta", c_double * 3), ("alpha", c_double * 2), ("least_ulps", c_double), ("cautious", c_int64),
        ("max_num_steps", c_int64), ("clip", c_int64), ("count_per_output", c_int64), ("resume", c_int64),
    )  # fmt: skip


class _Sample(Structure):
    _fields_ = (*((name, c_double) for name in REAL_FIELDS), *((name, c_int64) for name in INTEGER_FIELDS))


class TapeStep(Structure):
    """An accepted step, noted for the gradient."""

    _fields_ = (
        *((name, c_double) for name in ("t0", "dt", "t1", "first_time")),
        *((name, c_int64) for name in ("output_begin", "output_end", "chained", "previous")),
    )


class Solve(Structure):
    """A native call's arguments and results: CompiledSolve of csrc/compiled/blocks.h."""

    _fields_ = (
        ("y0", c_void_p), ("out", c_void_p), ("workspace", c_void_p), ("inputs", c_void_p), ("rows", c_int64),
        ("grid", _Grid), ("policy", _Policy), ("rtol", c_double), ("atol", c_double),
        ("rtol_each", c_void_p), ("atol_each", c_void_p), ("first_step", c_double),
        ("first_steps", c_void_p),
        ("ends", c_void_p), ("n_ends", c_int64), ("stage_times", c_void_p), ("cubic", c_int64),
        ("threads", c_int64), ("run_parallel", c_void_p), ("interrupted", c_void_p),
        ("tape", c_void_p), ("record", c_int64), ("steps", c_void_p), ("capacity", c_int64), ("n_steps", c_int64),
        ("gradient", c_void_p), ("y0_gradient", c_void_p), ("gradients", c_void_p),
        ("arriving_states", c_void_p), ("arrival_times", c_void_p), ("n_arrivals", c_int64),
        ("integral_rtol", c_double), ("integral_atol", c_double), ("seminorm", c_int64),
        ("states", c_void_p), ("sample", _Sample), ("evaluations", c_int64), ("finite_start", c_int64),
    )  # fmt: skip


_ROW_FIELDS = (*REAL_FIELDS, *INTEGER_FIELDS, "n_jumps", "last", "finite_start")


class RowStates:
    """How the solve of every row has ended, where each has steps of its own: kRowWords of csrc/compiled/blocks.h."""

    def __init__(self, rows: int) -> None:
        self.words = torch.empty(len(_ROW_FIELDS), rows, dtype=torch.float64)

    def __getitem__(self, name: str) -> Tensor:
        """[rows] of a field."""
        words = self.words[_ROW_FIELDS.index(name)]
        return words if name in REAL_FIELDS else words.view(torch.int64)


class _Workspace(threading.local):
    """A thread's memory for solves, kept if it is not big."""

    memory: Tensor | None = None

    def take(self, size: int) -> Tensor:
        memory, self.memory = self.memory, None
        return torch.empty(size, dtype=torch.uint8) if memory is None or len(memory) < size else memory

    def put(self, memory: Tensor) -> None:
        if len(memory) <= _MOST_KEPT:
            self.memory = memory


_workspace = _Workspace()


def _policy(policy: Policy) -> _Policy:
    values = {name.name: getattr(policy, name.name) for name in fields(policy)}
    return _Policy(**{**values, "beta": (c_double * 3)(*policy.beta), "alpha": (c_double * 2)(*policy.alpha)})


def _places_for(wanted: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Any]:
    """Memory for gradients, and the addresses."""
    found = [torch.empty(x.shape, dtype=dtype) for x in wanted]
    return found, (c_void_p * max(len(found), 1))(*(x.data_ptr() for x in found))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Library:
    """Compiled dynamics with a method's loop.

    Args:
        source: the C++.
        gradient: whether it has the gradient too.
    """

    def __init__(self, source: str, gradient: bool = False) -> None:
        self.path, temporary = build(source)
        library = ctypes.CDLL(str(self.path))
        if temporary:
            shutil.rmtree(self.path.parent, ignore_errors=True)
        library.arguments_size.restype = c_int64
        assert library.arguments_size() == ctypes.sizeof(Solve)
        library.lanes.restype = c_int64
        self.lanes = int(library.lanes())
        library.record.restype = c_int64
        self.record = int(library.record())  # bytes that the evaluations of a block of rows leave in a step
        for prefix in ("", "reversal_") if gradient else ("",):
            getattr(library, prefix + "workspace").restype = c_int64
            getattr(library, prefix + "workspace").argtypes = (c_int64,)
            getattr(library, prefix + "solve").restype = None
            getattr(library, prefix + "solve").argtypes = (POINTER(Solve),)
        self._library = library
        self.capacity = 32  # steps that a tape has room for; as many as the last solve took, and some

    def plan(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        rows: int,
        grid: Grid,
        policy: Policy,
        rtol: float | Tensor,
        atol: float | Tensor,
        first_step: float | None,
        steps: tuple[Tensor, Tensor] | None = None,
        cubic: bool = False,
    ) -> Plan:
        """What can be done again and again for other states and inputs.

        Args:
            shape, dtype: of the packed state.
            rows: how many rows it has.
            grid, policy, rtol, atol, first_step: as the loops'.
            steps: of a fixed grid, the ends of the steps and the times of the stages and of the end, [N - 1, S + 1], of
                the state's dtype.
            cubic: whether outputs between them lie on cubics.
        """
        n = len(grid.times)
        form = Solve(
            rows=rows,
            grid=_Grid(
                grid.times.data_ptr(), n, *(grid.times.stride() if grid.times.dim() == 2 else (1, 0)),
                _address(grid.step_t), 0 if grid.step_t is None else len(grid.step_t),
                _address(grid.jump_t), 0 if grid.jump_t is None else len(grid.jump_t), 1, 0,
            ),
            policy=_policy(policy),
            rtol=rtol if isinstance(rtol, float) else 0.0,
            atol=atol if isinstance(atol, float) else 0.0,
            rtol_each=None if isinstance(rtol, float) else rtol.data_ptr(),
            atol_each=None if isinstance(atol, float) else atol.data_ptr(),
            first_step=math.nan if first_step is None else first_step,
            ends=None if steps is None else steps[0].data_ptr(),
            n_ends=0 if steps is None else len(steps[0]),
            stage_times=None if steps is None else steps[1].data_ptr(),
            cubic=cubic,
            run_parallel=ops.RUN_PARALLEL,
            interrupted=ops.INTERRUPTED,
        )  # fmt: skip
        return Plan(self, form, (n, *shape), dtype, (grid, rtol, atol, steps))

    def call(self, name: str, solve: Solve) -> None:
        """Calls a native function, with workspace; raises what a signal's handler has raised meanwhile."""
        memory = _workspace.take(int(getattr(self._library, f"{name}workspace")(solve.rows)))
        solve.workspace, solve.threads = memory.data_ptr(), torch.get_num_threads()
        getattr(self._library, f"{name}solve")(byref(solve))
        _workspace.put(memory)
        if solve.sample.status < 0:
            ops.raise_interruption()


class Plan:
    """A solve with everything fixed but the state and the inputs' values.

    Args:
        library: of its dynamics.
        form: the native call's arguments, but for those.
        shape, dtype: of the outputs.
        kept: whose memory the arguments point to.
    """

    def __init__(self, library: Library, form: Solve, shape: tuple[int, ...], dtype: torch.dtype, kept: object) -> None:
        self.library, self._form, self._kept = library, form, kept
        self.shape, self.dtype = shape, dtype
        self._pointers: tuple[list[int], Any] = ([], None)

    @property
    def n_steps(self) -> int:
        """How many steps a fixed grid has; 0 where the method chooses them."""
        return max(int(self._form.n_ends) - 1, 0)

    def tape(self, y0: Tensor, rows: int) -> Tape:
        """For a solve of about as many steps as the last one."""
        library, capacity = self.library, self.n_steps or self.library.capacity
        blocks = -(-rows // library.lanes)
        record = library.record
        if capacity * blocks * record > MOST_RECORDED:
            record = library.lanes * (y0.numel() // rows) * y0.itemsize
        return Tape(capacity, blocks * record, record)

    def run(
        self, y0: Tensor, inputs: list[Tensor], tape: Tape | None = None, states: RowStates | None = None
    ) -> tuple[Tensor, Solve]:
        """Solves from a packed, contiguous state.

        Args:
            y0: the state.
            inputs: the tensors that func has closed over.
            tape: where the steps are noted, if the gradient is wanted.
            states: where rows with steps of their own tell how they ended.

        Returns:
            The states at the output times, and how it ended.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        solve = Solve.from_buffer_copy(self._form)
        solve.y0, solve.out = y0.data_ptr(), out.data_ptr()
        kept = self._point_to(inputs, solve)
        if tape is not None:
            tape.attach(solve)
        if states is not None:
            solve.states = states.words.data_ptr()
        self.library.call("", solve)
        del kept
        return out, solve

    def run_back(
        self,
        z: Tensor,
        inputs: list[Tensor],
        times: Tensor,
        ys: Tensor,
        gradient: Tensor,
        tolerances: tuple[float, float],
        seminorm: bool,
        wanted: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], Solve]:
        """The backward solve of the continuous adjoint.

        Args:
            z: [2, ...] the state and the adjoint at the last output time.
            inputs: the tensors that func has closed over.
            times: [T] float64, of the forward solve's outputs.
            ys, gradient: [T, ...] the states there, and the gradients that arrive.
            tolerances: rtol and atol for the integrals.
            seminorm: whether they have no share in the norm.
            wanted: the inputs whose gradients are wanted.

        Returns:
            The state and the adjoint at the first output time, the gradients, and how the solve ended.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        found, array = _places_for(wanted, self.dtype)
        solve = Solve.from_buffer_copy(self._form)
        solve.y0, solve.out, solve.gradients = z.data_ptr(), out.data_ptr(), ctypes.addressof(array)
        solve.arriving_states, solve.gradient = ys.data_ptr(), gradient.data_ptr()
        solve.arrival_times, solve.n_arrivals = times.data_ptr(), len(times)
        (solve.integral_rtol, solve.integral_atol), solve.seminorm = tolerances, seminorm
        kept = self._point_to(inputs, solve)
        self.library.call("", solve)
        del kept
        return out[1], found, solve

    def undo(
        self, solve: Solve, gradient: Tensor, y0: Tensor, inputs: list[Tensor], wanted: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the start and of the wanted inputs, from that of the outputs and a tape's notes."""
        start = torch.empty_like(y0)
        found, array = _places_for(wanted, self.dtype)
        solve.gradient, solve.y0_gradient, solve.gradients = (
            gradient.data_ptr(),
            start.data_ptr(),
            ctypes.addressof(array),
        )
        kept = self._point_to(inputs, solve)
        self.library.call("reversal_", solve)
        del kept
        return start, [g.to(x.dtype) for g, x in zip(found, wanted)]

    def _point_to(self, inputs: list[Tensor], solve: Solve) -> object:
        """Sets the inputs' addresses; returns what has to live until the call is over."""
        dtype = self.dtype
        kept = [x if x.dtype is dtype and x.is_contiguous() else x.detach().to(dtype).contiguous() for x in inputs]
        addresses = [x.data_ptr() for x in kept]
        known, array = self._pointers
        if array is None or known != addresses:
            array = (c_void_p * max(len(addresses), 1))(*addresses)
            self._pointers = addresses, array
        solve.inputs = ctypes.addressof(array)
        return kept, array


class Tape:
    """Memory for the notes of a solve's steps.

    Args:
        capacity: of so many steps.
        bytes_a_step: of what is noted of each.
        record: bytes of a block's part of it; 0 where rows have steps of their own.
    """

    def __init__(self, capacity: int, bytes_a_step: int, record: int = 0) -> None:
        self.capacity, self.record = capacity, record
        # Vectors want to begin at multiples of 64 bytes, which torch gives.
        self.memory = torch.empty(capacity * bytes_a_step, dtype=torch.uint8)
        self.steps = (TapeStep * capacity)()

    def attach(self, solve: Solve) -> None:
        """Lets a solve note its steps here."""
        solve.tape, solve.steps, solve.capacity = self.memory.data_ptr(), ctypes.addressof(self.steps), self.capacity
        solve.record = self.record
