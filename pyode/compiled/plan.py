"""A solve with compiled dynamics, with everything fixed but the numbers: to be done again and again."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable
from ctypes import POINTER, c_double
from dataclasses import fields

import torch
from torch import Tensor

from .._ops.contract import INTEGER_FIELDS, REAL_FIELDS, Grid, Policy
from ..errors import SolveError, Status
from ..gradients.time import through_grid
from ..solution import SampleStats, Stats
from .native import GridForm, Library, PolicyForm, Solve, TapeStep

MOST_RECORDED = 1 << 21  # bytes of all evaluations; what leaves the second-level cache is as soon computed again
_MOST_SPARE = 4  # tapes that wait for the next solve, of so many bytes
_MOST_SPARE_BYTES = 1 << 24
_ROW_FIELDS = (*REAL_FIELDS, *INTEGER_FIELDS, "n_f_evals", "last", "finite_start")
_COUNTS = tuple(map(_ROW_FIELDS.index, ("status", "n_f_evals", "n_accepted", "n_rejected", "size1")))


class RowStates:
    """How the solve of every row has ended, where each has steps of its own: kRowWords of csrc/compiled/solve.h."""

    def __init__(self, rows: int) -> None:
        self.words = torch.empty(len(_ROW_FIELDS), rows, dtype=torch.float64, device="cpu")

    def __getitem__(self, name: str) -> Tensor:
        """[rows] of a field."""
        words = self.words[_ROW_FIELDS.index(name)]
        return words if name in REAL_FIELDS else words.view(torch.int64)

    def error(self) -> SolveError:
        """Why the first row that has failed could not go on."""
        status = self["status"]
        tried, finite = self["n_accepted"] + self["n_rejected"], self["finite_start"] != 0
        no_start = (status == int(Status.NON_FINITE)) & (tried == 0)
        status[no_start & finite] = int(Status.STEP_TOO_SMALL)  # a tolerance is 0 where y0 is 0
        b = int((status != int(Status.SUCCESS)).nonzero()[0])
        t, dt = (float(self[name][b]) for name in ("t", "dt_prev"))
        return SolveError(Status(int(status[b])), t, dt, int(tried[b]), b if len(status) > 1 else None)

    def add_to(self, stats: Stats) -> None:
        """Adds what all rows have taken; evaluations of all together count as one, as where func is called."""
        found = self.outcome()[1]
        stats.n_f_evals += int(found.n_f_evals.max())
        stats.n_accepted += int(found.n_accepted.sum())
        stats.n_rejected += int(found.n_rejected.sum())

    def outcome(self) -> tuple[Tensor, SampleStats]:
        """[rows] every row's status, and its counts, in memory of their own."""
        words = self.words[_COUNTS, :]
        status, n_f_evals, n_accepted, n_rejected, _ = words.view(torch.int64).unbind()
        return status, SampleStats(n_f_evals, n_accepted, n_rejected, words[-1])


class Tape:
    """Memory for the notes of a solve's steps.

    Args:
        capacity: of so many steps.
        bytes_a_step: of what is noted of each.
        record: bytes of a block's part of it; 0 where rows have steps of their own.
    """

    def __init__(self, capacity: int, bytes_a_step: int, record: int = 0) -> None:
        self.capacity, self.record, self.size = capacity, record, capacity * bytes_a_step
        # Vectors want to begin at multiples of 64 bytes, which torch gives.
        self.memory = torch.empty(self.size, dtype=torch.uint8, device="cpu")
        self.steps = (TapeStep * capacity)()
        self._addresses = self.memory.data_ptr(), ctypes.addressof(self.steps)

    def attach(self, solve: Solve) -> None:
        """Lets a solve note its steps here."""
        solve.tape, solve.steps = self._addresses
        solve.capacity, solve.record = self.capacity, self.record


class LentTape:
    """A tape that goes back to its plan when nobody needs it any more: new memory would come page by page."""

    __slots__ = ("_spare", "tape")

    def __init__(self, tape: Tape, spare: list[Tape]) -> None:
        self.tape, self._spare = tape, spare

    def __del__(self) -> None:
        if len(self._spare) < _MOST_SPARE and self.tape.size <= _MOST_SPARE_BYTES:
            self._spare.append(self.tape)


def _policy(policy: Policy) -> PolicyForm:
    values = {name.name: getattr(policy, name.name) for name in fields(policy)}
    return PolicyForm(**{**values, "beta": (c_double * 3)(*policy.beta), "alpha": (c_double * 2)(*policy.alpha)})


def _places_for(wanted: list[Tensor], dtype: torch.dtype, timed: bool) -> tuple[list[Tensor], array[int]]:
    """Memory for gradients, that to time behind the others if there is one, and the addresses."""
    found = [
        torch.empty_like(x)
        if x.dtype is dtype and x.is_contiguous()
        else torch.empty(x.shape, dtype=dtype, device="cpu")
        for x in wanted
    ]
    if timed:
        found.append(torch.empty((), dtype=dtype, device="cpu"))
    return found, _addresses_of(found)


def _addresses_of(tensors: list[Tensor]) -> array[int]:
    return array("Q", [x.data_ptr() for x in tensors])


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _strides(times: Tensor | None) -> tuple[int, ...]:
    """From time to time, and from row to row: [n] times are those of all rows."""
    return (1, 0) if times is None or times.dim() == 1 else times.stride()


class Plan:
    """A solve that can be done for other states and inputs.

    Args:
        library: of its dynamics.
        shape, dtype: of the packed state.
        rows: how many rows it has.
        grid, policy, rtol, atol, first_step: as the loops'.
        steps: of a fixed grid, the ends of the steps and the times of the stages and of the end, [N - 1, S + 1], of the
            state's dtype.
        cubic: whether outputs between them lie on cubics.
        per_sample: whether rows have steps of their own.
    """

    def __init__(
        self,
        library: Library,
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
        per_sample: bool = False,
    ) -> None:
        n = len(grid.times)
        self.library, self.rows, self.per_sample = library, rows, per_sample
        self.shape, self.dtype = (n, *shape), dtype
        # An empty tensor is sooner made like another.
        self._like = torch.empty((), dtype=dtype, device="cpu").expand(self.shape)
        self._kept = grid, rtol, atol, steps  # whose memory the form points to
        self._form = Solve(
            rows=rows,
            grid=GridForm(
                grid.times.data_ptr(), n, *_strides(grid.times),
                _address(grid.step_t), 0 if grid.step_t is None else len(grid.step_t),
                _address(grid.jump_t), 0 if grid.jump_t is None else len(grid.jump_t), *_strides(grid.jump_t),
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
        )  # fmt: skip
        self._n_steps = 0 if steps is None else len(steps[0]) - 1
        self.ends_of: Callable[[Tensor], Tensor] | None = None  # of a fixed grid, as a function of the output times
        self._workspaces: dict[str, int] = {}
        self._spare: list[Tape] = []

    def run(self, y0: Tensor, inputs: list[Tensor], states: RowStates | None = None) -> tuple[Tensor, Solve]:
        """Solves from a packed, contiguous state.

        Args:
            y0: the state.
            inputs: the tensors that func has closed over.
            states: where rows with steps of their own tell how they ended.

        Returns:
            The states at the output times, and how it ended.
        """
        return self._run(y0, inputs, None, states)

    def _run(
        self, y0: Tensor, inputs: list[Tensor], tape: Tape | None, states: RowStates | None
    ) -> tuple[Tensor, Solve]:
        out = torch.empty_like(self._like, memory_format=torch.contiguous_format)
        solve = Solve.from_buffer_copy(self._form)
        solve.y0, solve.out = y0.data_ptr(), out.data_ptr()
        if tape is not None:
            tape.attach(solve)
        if states is not None:
            solve.states = states.words.data_ptr()
        self._call("", solve, inputs)
        return out, solve

    def run_noting(
        self, y0: Tensor, inputs: list[Tensor], states: RowStates | None = None
    ) -> tuple[Tensor, Solve, LentTape]:
        """The same, with the notes for `undo`, in which the solve's results point into the tape."""
        library = self.library
        while True:
            lent = LentTape(self._tape(y0), self._spare)
            out, solve = self._run(y0, inputs, lent.tape, states)
            library.capacity = solve.n_steps + solve.n_steps // 4 + 4
            if solve.n_steps <= lent.tape.capacity:
                return out, solve, lent

    def _tape(self, y0: Tensor) -> Tape:
        """For a solve of about as many steps as the last one."""
        library, least = self.library, self._n_steps or self.library.capacity
        try:
            tape = self._spare.pop()
            if tape.capacity >= least:
                return tape
        except IndexError:
            pass
        if self.per_sample:
            return Tape(max(least, 32 * self.rows), y0.nbytes // self.rows)
        blocks, record = -(-self.rows // library.lanes), library.record
        if library.timed or least * blocks * record > MOST_RECORDED:  # derivatives are not in it, and time wants them
            record = library.lanes * (y0.nbytes // self.rows)
        return Tape(least, blocks * record, record)

    def run_back(
        self,
        z: Tensor,
        inputs: list[Tensor],
        times: Tensor,
        ys: Tensor,
        gradient: Tensor,
        wanted: list[Tensor],
        tolerances: tuple[float, float] = (0.0, 0.0),
        first_measured: int = 0,
        states: RowStates | None = None,
        first_steps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor], Solve]:
        """The backward solve of the continuous adjoint.

        Args:
            z: [2, ...] the state and the adjoint at the last output time; of rows with steps of their own [B, 2, ...],
                before its gradient has arrived.
            inputs: the tensors that func has closed over.
            times: [T] or [T, B] float64, of the forward solve's outputs.
            ys, gradient: [T, ...] the states there, and the gradients that arrive.
            wanted: the inputs whose gradients are wanted.
            tolerances: rtol and atol for the integrals.
            first_measured: the first of them, time's being the last, that has a share in the norm of a state.
            states, first_steps: of rows with steps of their own: where they tell how they ended, and [B] float64.

        Returns:
            The state and the adjoint at the first output time, the gradients of the times, like these, if they are
            wanted, and of the inputs, and how the solve ended.
        """
        out = torch.empty_like(self._like, memory_format=torch.contiguous_format)
        found, places = _places_for(wanted, self.dtype, self.library.timed)
        of_times = torch.zeros(times.shape, dtype=torch.float64, device="cpu")
        solve = Solve.from_buffer_copy(self._form)
        if states is not None:
            solve.states, solve.first_steps = states.words.data_ptr(), _address(first_steps)
        solve.output_time_gradient = of_times.data_ptr()
        solve.y0, solve.out, solve.gradients = z.data_ptr(), out.data_ptr(), places.buffer_info()[0]
        solve.arriving_states, solve.gradient = ys.data_ptr(), gradient.data_ptr()
        solve.arrival_times, solve.n_arrivals = times.data_ptr(), len(times)
        (solve.integral_rtol, solve.integral_atol), solve.first_measured = tolerances, first_measured
        self._call("", solve, inputs)
        if self.library.timed:
            of_start = found.pop()
            if states is None:  # else they are there already, one for each
                of_times[0] = of_start
        return out[1], of_times, found, solve

    def undo(
        self, solved: Solve, gradient: Tensor, y0: Tensor, inputs: list[Tensor], wanted: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the start and of what is wanted, from that of the outputs and a solve's notes.

        Args:
            solved, gradient, y0, inputs: the solve, what arrives at its outputs, and what it was of.
            wanted: some inputs; behind them the output times, if the library has their gradient.
        """
        start, timed = torch.empty_like(y0), self.library.timed
        found, places = _places_for(wanted[:-1] if timed else wanted, self.dtype, timed)
        solve = Solve.from_buffer_copy(solved)  # another thread may be at it too
        if timed:
            rows, n = self.rows if self.per_sample else 1, self.shape[0]
            outputs, ends = (
                torch.zeros(*x, dtype=torch.float64, device="cpu") for x in ((n, rows), (solved.n_steps + 1,))
            )
            solve.output_time_gradient, solve.end_gradient = outputs.data_ptr(), ends.data_ptr()
        solve.gradient, solve.y0_gradient = gradient.data_ptr(), start.data_ptr()
        solve.gradients = places.buffer_info()[0]
        self._call("reversal_", solve, inputs)
        if timed:
            found[-1] = self._of_times(wanted[-1], outputs, ends, solved)
        return start, [g if g.dtype is x.dtype else g.to(x.dtype) for g, x in zip(found, wanted)]

    def _of_times(self, t: Tensor, outputs: Tensor, ends: Tensor, solved: Solve) -> Tensor:
        """The gradient of the output times, from those of outputs that move, [T, rows], and of the steps' ends."""
        if self.ends_of is not None:
            return through_grid(self.ends_of, t, ends, outputs[:, 0])
        if not self.per_sample:  # else natively
            steps = ctypes.cast(solved.steps, POINTER(TapeStep))
            jumps = range(solved.n_steps if self._form.grid.n_jump_t else 0)
            first = next((n for n in jumps if steps[n].on_jump), solved.n_steps)
            outputs[0] += ends[: first + 1].sum()  # what ends at a discontinuity, and is behind it, does not move
        return (outputs if t.dim() == 2 else outputs.sum(1)).to(t)

    def _call(self, name: str, solve: Solve, inputs: list[Tensor]) -> None:
        size = self._workspaces.get(name)
        if size is None:
            size = self.library.workspace(name, solve)
            if not self.library.timed:  # else it depends on the number of steps
                self._workspaces[name] = size
        self.library.call(name, solve, size, inputs, self.dtype)
