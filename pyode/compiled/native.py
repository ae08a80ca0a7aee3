"""A library of compiled dynamics, and what its functions are given: native calls, without the GIL."""

from __future__ import annotations

import ctypes
import shutil
from ctypes import POINTER, Structure, addressof, byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from .._ops.contract import INTEGER_FIELDS, REAL_FIELDS
from .._ops.native import call_compiled
from .build import build

TIME = -1  # stands for time where gradients to inputs are named by their numbers


class GridForm(Structure):
    """Grid of csrc/core/controller.h."""

    _fields_ = (
        ("times", c_void_p), ("n_times", c_int64), ("time_stride", c_int64), ("sample_stride", c_int64),
        ("step_t", c_void_p), ("n_step_t", c_int64), ("jump_t", c_void_p), ("n_jump_t", c_int64),
        ("jump_stride", c_int64), ("jump_sample_stride", c_int64),
    )  # fmt: skip


class PolicyForm(Structure):
    """Policy of csrc/core/controller.h."""

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
        *((name, c_int64) for name in ("output_begin", "output_end", "chained", "on_jump", "previous")),
    )


class Solve(Structure):
    """A native call's arguments and results: CompiledSolve of csrc/compiled/solve.h."""

    _fields_ = (
        ("y0", c_void_p), ("out", c_void_p), ("workspace", c_void_p), ("inputs", c_void_p), ("rows", c_int64),
        ("grid", GridForm), ("policy", PolicyForm), ("rtol", c_double), ("atol", c_double),
        ("rtol_each", c_void_p), ("atol_each", c_void_p), ("first_step", c_double),
        ("first_steps", c_void_p),
        ("ends", c_void_p), ("n_ends", c_int64), ("stage_times", c_void_p), ("cubic", c_int64),
        ("threads", c_int64), ("run_parallel", c_void_p), ("interrupted", c_void_p),
        ("tape", c_void_p), ("record", c_int64), ("steps", c_void_p), ("capacity", c_int64), ("n_steps", c_int64),
        ("gradient", c_void_p), ("y0_gradient", c_void_p), ("gradients", c_void_p),
        ("output_time_gradient", c_void_p), ("end_gradient", c_void_p),
        ("arriving_states", c_void_p), ("arrival_times", c_void_p), ("n_arrivals", c_int64),
        ("integral_rtol", c_double), ("integral_atol", c_double), ("first_measured", c_int64),
        ("states", c_void_p), ("n_failed", c_int64), ("sample", _Sample), ("evaluations", c_int64),
        ("finite_start", c_int64),
    )  # fmt: skip


class Library:
    """Compiled dynamics with a method's loop.

    Args:
        source: the C++.
        gradient: whether it has the gradient too.
        timed: whether that to time, too.
    """

    def __init__(self, source: str, gradient: bool = False, timed: bool = False) -> None:
        self.timed = timed
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
        prefixes = ("", "reversal_") if gradient else ("",)
        for prefix in prefixes:
            getattr(library, prefix + "workspace").restype = c_int64
            getattr(library, prefix + "workspace").argtypes = (POINTER(Solve),)
        self._library = library
        self._functions = {
            prefix: int(ctypes.cast(getattr(library, prefix + "solve"), c_void_p).value or 0) for prefix in prefixes
        }
        self.capacity = 32  # steps that a tape has room for; as many as the last solve took, and some

    def workspace(self, name: str, solve: Solve) -> int:
        """Bytes of workspace that a native function wants for a solve of so many rows, output times and steps."""
        return int(getattr(self._library, f"{name}workspace")(byref(solve)))

    def call(self, name: str, solve: Solve, workspace: int, inputs: list[Tensor], dtype: torch.dtype) -> None:
        """Calls a native function, with workspace and the tensors that func has closed over, as ones of a dtype.

        Raises what a signal's handler has raised meanwhile.
        """
        function, arguments, threads = self._functions[name], addressof(solve), torch.get_num_threads()
        if not call_compiled(function, arguments, workspace, threads, inputs, dtype):
            plain = [x.detach().to(dtype).contiguous() for x in inputs]
            call_compiled(function, arguments, workspace, threads, plain, dtype)
