"""options={"device_loop": True}: a whole adaptive solve as one launch on a GPU."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import graph_loop, native
from ._ops.contract import Layout
from .callbacks import has_callbacks
from .captures import BoundFunc, Captured, Key, captured_for, captured_solves, surroundings
from .device_checkpoint import TooManySteps, note, room_for
from .device_grid import DeviceGrid
from .device_solve import DeviceSolve, Given, has_failed, launch, obstacle, unless
from .methods import Tableau
from .parameters import reachable
from .problem import Problem, for_one_sample
from .state import Dynamics, Func
from .stepping.captured import CapturedLoop
from .stepping.hooks import Hooks
from .stepping.outputs import column

DEFAULT = "dopri5"


class DeviceLoop(DeviceSolve):
    """A solve of a problem as one launch.

    Args:
        problem: of a kind that can be captured; see `device_loop`.
        hooks: for what happens after a failure.

    Raises:
        CaptureError: func can't be captured.
    """

    def __init__(self, problem: Problem, hooks: Hooks) -> None:
        assert isinstance(problem.method, Tableau)
        form, y0 = problem.form, problem.y0
        layout = Layout(form.samples, form.segments[-1], form.segments, y0.dtype, y0.device)
        given = Given(problem.times, problem.grid, problem.rtol, problem.atol, problem.first_step)
        super().__init__(problem.method, layout, given)
        self.problem, self.hooks, self.bound = problem, hooks, BoundFunc(problem.written, problem.args)
        structure = form.per_sample, tuple(form.shapes), form.tree and str(form.tree.spec)
        self.key: Key = (
            self.bound.key, y0.shape, y0.dtype, y0.device, structure, problem.method.name, astuple(problem.policy),
            given.kind, hooks.tape is not None, surroundings(),
        )  # fmt: skip
        self.room = None if hooks.tape is None else room_for(0, y0, form.samples, self.key)
        # Taken at once: whether func can be captured decides who drives the solve, and so does what its steps take.
        self._captured: Captured | None = self._capture()
        self._out = None if hooks.tape is None else self._launch_with_room()

    def _capture(self) -> Captured:
        return captured_for(self.key, self.bound, self.problem.y0.device, self._make, self._fill, graph_loop.GraphLoop)

    def _launch_with_room(self) -> Tensor:
        while True:
            try:
                return self._launch()
            except TooManySteps as found:
                self.room = room_for(found.n, self.problem.y0, self.layout.samples, self.key)
                captured_solves.take(self.key)  # the one that is too small is not to be found again
                self._captured = self._capture()

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedLoop, list[Tensor]]:
        problem, form, y0 = self.problem, self.problem.form, self.problem.y0
        layout = native.Layout(form.samples, form.segments[-1], form.segments, y0.dtype, y0.device)
        dynamics = Dynamics(for_one_sample(func, form), form, y0, partial(native.copy, layout))
        rtol, atol, grid, times = self.given.places(y0.device)
        first_step = problem.first_step is not None
        loop = CapturedLoop(
            dynamics, self.tableau, layout, rtol, atol, problem.policy, grid, times,
            y0=y0, first_step=first_step, checks=self.given.times.unread, room=self.room,
        )  # fmt: skip
        return loop, []

    def _fill(self, captured: Captured) -> None:
        captured.loop.y.copy_(self.problem.y0)
        self.given.fill(captured)
        captured.fill_slots(self.bound)

    def _launch(self) -> Tensor:
        captured, self._captured = self._captured, None  # from now on it is anybody's
        assert captured is not None

        def collect(loop: CapturedLoop) -> Tensor:
            out, tape = loop.out.clone(), self.hooks.tape
            self.read(loop) if self.hooks.waits or tape is not None else self.copy(loop)
            if tape is not None:
                note(tape, loop, self.times, self.problem.options, self.bound, self.key)
            return out

        return launch(captured, self.key, partial(self._fill, captured), collect)

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape], from the problem's start and first step.

        Where the hooks do not want to wait, those behind a failure may be anything.
        """
        out, tape = self._launch() if self._out is None else self._out, self.hooks.tape
        if self.end is not None:
            self.hooks.fail(self.error(*self.end))
            out = torch.where(column(self.left(), out), self.end[0], out)
            if tape is not None:
                tape.left = self.left()
                if tape.undo is not None:  # what then is to be undone is the host's
                    tape.steps, tape.undo = tape.undo.steps(), None
        return out


def device_loop(problem: Problem, hooks: Hooks) -> DeviceLoop | DeviceGrid | None:
    """The loop for a solve whose options ask for a device loop; None, with a warning of why, if there can be none."""

    def make() -> DeviceLoop | DeviceGrid:
        if not problem.method.adaptive:
            return DeviceGrid(problem, hooks.tape)
        loop = DeviceLoop(problem, hooks)
        _remembered.add(loop)
        return loop

    why = obstacle(problem.y0, problem.method) or _what_looks_on(problem, hooks)
    return unless(why, make, problem.options, "options")


def _what_looks_on(problem: Problem, hooks: Hooks) -> str | None:
    """What has to see every step, if anything has."""
    if "norm" in problem.options:
        return "options['norm'] is a function of the user's"
    if hooks.tape is not None and hooks.tape.most < math.inf:
        return "options['checkpoints'] keeps a part of the states"
    if hooks.tape is not None and problem.method.adaptive and hooks.tape.time:
        return "gradient='checkpoint' has the gradient of times from every step"
    if problem.callbacks or hooks.step or hooks.after_step:
        return "callbacks, events, dense output, progress and compact look at every step"
    wanting = (problem.y0, problem.times.tensor, *(x for _, x in reachable(problem.func)))
    if torch.is_grad_enabled() and any(x.requires_grad for x in wanting):
        return "gradient='direct' records every step; 'adjoint' does not"
    return None


@dataclass(eq=False)
class _Prepared:
    """A solve that was done, to be done again from another start; nothing of func, and of no state.

    Attributes:
        func, t: references to them.
        version: of t, which is to be unchanged.
        key, given: of the solve.
    """

    func: weakref.ref[Any]
    t: weakref.ref[Tensor]
    version: int
    key: Key
    given: Given


class _Remembered:
    """The last solves that may be done again."""

    MOST = 16

    def __init__(self) -> None:
        self._solves: OrderedDict[Key, _Prepared] = OrderedDict()

    @staticmethod
    def _kind(func: Any, y0: Tensor, t: Tensor, rtol: float, atol: float, method: str | None) -> Key:
        return id(func), y0.shape, y0.dtype, y0.device, id(t), rtol, atol, method or DEFAULT, surroundings()

    def add(self, loop: DeviceLoop) -> None:
        """Remembers a solve, if all that it was made from are its arguments."""
        problem, given = loop.problem, loop.given
        func, t, rtol, atol = problem.written, problem.times.tensor, problem.rtol, problem.atol
        plain = problem.options == {"device_loop": True} and problem.form.is_tensor and not problem.args
        plain = plain and loop.hooks.tape is None
        if not (plain and isinstance(rtol, float) and isinstance(atol, float)):
            return
        with suppress(TypeError):  # not everything that can be called can be referred to weakly
            prepared = _Prepared(weakref.ref(func), weakref.ref(t), t._version, loop.key, replace_times(given))
            self._solves[self._kind(func, problem.y0, t, rtol, atol, problem.method.name)] = prepared
            if len(self._solves) > self.MOST:
                with suppress(KeyError):
                    self._solves.popitem(last=False)

    def find(self, func: Any, y0: Tensor, t: Tensor, rtol: float, atol: float, method: str | None) -> _Prepared | None:
        """The one with these arguments."""
        found = self._solves.get(self._kind(func, y0, t, rtol, atol, method))
        if found is None or found.func() is not func or found.t() is not t or t._version != found.version:
            return None
        return found


_remembered = _Remembered()


def replace_times(given: Given) -> Given:
    """The same without the user's tensor of times."""
    return Given(given.times.in_tensor(given.grid.times), given.grid, given.rtol, given.atol, given.first_step)


def solve_again(func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any) -> Tensor | None:
    """A solve like one that was done before, from another start, without a look at all the rest.

    None if there was none, or if it fails: then it is to be told.
    """
    if not (type(y0) is Tensor and type(t) is Tensor and type(rtol) is float and type(atol) is float):
        return None
    if torch.is_grad_enabled() or not y0.is_contiguous() or has_callbacks(func):
        return None
    prepared = _remembered.find(func, y0, t, rtol, atol, method)
    captured = None if prepared is None or graph_loop.is_capturing(y0.device) else captured_solves.take(prepared.key)
    if prepared is None or captured is None:
        return None

    def fill() -> None:
        captured.loop.y.copy_(y0)
        prepared.given.fill(captured)

    def collect(loop: CapturedLoop) -> Tensor | None:
        out = loop.out.clone()
        return None if has_failed(loop.controller) else out

    return launch(captured, prepared.key, fill, collect)
