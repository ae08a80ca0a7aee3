"""options={"device_loop": True} for methods with given steps: all of them are one CUDA graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import graph_loop, native
from .captures import BoundFunc, Captured, CaptureError, Key, captured_for, surroundings
from .device_grid_checkpoint import undo_on_device
from .device_solve import launch
from .problem import Problem
from .solution import Stats
from .state import Dynamics, Func
from .stepping.captured_grid import CapturedGrid, PreparedGrid
from .stepping.fixed_grid import grid_of
from .stepping.hooks import Hooks
from .stepping.tape import Tape

MOST_STEPS = 2000  # of a graph, which has all their kernels


def check_steps(n: int) -> None:
    """Raises CaptureError for more steps than a graph takes."""
    if n > MOST_STEPS:
        raise CaptureError(f"{n} steps are too many for one graph, which takes {MOST_STEPS}")


def within(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that tell what a solve does within its steps."""
    return {name: options[name] for name in ("interp", "max_order", "perturb") if name in options}


class DeviceGrid:
    """A solve of a problem with given steps as one launch; see `Loop`.

    Args:
        problem: the solve.
        tape: notes the steps, if they are to be undone.

    Raises:
        CaptureError: func can't be captured, or there are too many steps.
    """

    last_step = None

    def __init__(self, problem: Problem, tape: Tape | None = None) -> None:
        form, y0, options = problem.form, problem.y0, problem.options
        self.problem, self.bound, self.tape = problem, BoundFunc(problem.written, problem.args), tape
        self.grid = grid_of(options, problem.times, problem.func, form.unpack(y0)).detach().cpu()
        check_steps(len(self.grid) - 1)
        structure = tuple(form.shapes), form.tree and str(form.tree.spec)
        self.key: Key = (
            self.bound.key, y0.shape, y0.dtype, y0.device, structure, problem.method.name,
            *within(options).items(), self.grid.dtype, tuple(self.grid.tolist()), tuple(problem.times.values),
            tape is not None, surroundings(),
        )  # fmt: skip
        self.taken = Stats()
        # Taken at once: whether func can be captured decides who drives the solve.
        self._captured: Captured | None = captured_for(
            self.key, self.bound, y0.device, self._make, self._fill, graph_loop.Graph
        )

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedGrid, list[Tensor]]:
        problem, form, y0 = self.problem, self.problem.form, self.problem.y0
        layout = native.Layout(form.samples, form.segments[-1], form.segments, y0.dtype, y0.device)
        dynamics = Dynamics(func, form, y0, partial(native.copy, layout))
        counts, start, options = Stats(), torch.empty_like(y0), within(problem.options)
        loop = PreparedGrid(
            dynamics, problem.method, layout, problem.times, self.grid, options, problem.rtol, problem.atol
        )

        taped = self.tape is not None  # what the loop keeps must not lead to func, as self does

        def work() -> tuple[Tensor, Tape | None]:
            y = native.copy(layout, start)  # one that nobody has written before
            tape = Tape(y) if taped else None
            loop.hooks = Hooks(tape=tape)
            out = loop.solve(y)
            loop.add_to(counts)
            return out, tape

        return CapturedGrid(work, counts), [start]

    def _fill(self, captured: Captured) -> None:
        captured.inputs[0].copy_(self.problem.y0)
        captured.fill_slots(self.bound)

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape], from the problem's start."""
        captured, self._captured = self._captured, None  # from now on it is anybody's
        assert captured is not None
        self.taken = captured.loop.taken

        def collect(loop: CapturedGrid) -> Tensor:
            out, tape = loop.out
            if self.tape is not None:
                self._note(tape)
            return out.clone()  # type: ignore[no-any-return]

        return launch(captured, self.key, partial(self._fill, captured), collect)

    def _note(self, done: Tape) -> None:
        """Notes the steps of a captured solve."""
        assert self.tape is not None
        self.tape.steps = done.steps
        *states, self.tape.end = torch.stack([*done.states.values(), done.end]).unbind()
        self.tape.states = dict(enumerate(states))
        self.tape.undo = partial(undo_on_device, self.problem.options, self.bound, self.key)

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            stats.add(self.taken)
