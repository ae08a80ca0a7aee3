"""options={"device_loop": True}: a whole adaptive solve as one launch on a GPU."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import backend_for, graph_loop, native
from ._ops.contract import Flag, Grid, Layout
from .captures import (
    BoundFunc,
    Captured,
    CaptureError,
    captured_for,
    captured_solves,
    fill_tolerances,
    places_for_tolerances,
    surroundings,
)
from .control import Times
from .errors import warn
from .methods import Tableau
from .parameters import reachable
from .problem import Problem, for_one_sample
from .state import Dynamics, Func
from .stepping.captured import CapturedLoop
from .stepping.hooks import Hooks
from .stepping.outcome import Outcome
from .stepping.outputs import column

DEFAULT = "dopri5"
MOST_DONE = 16  # solves that may be done again
_done: dict[object, tuple[Any, Any, int, Any]] = {}


class DeviceLoop(Outcome):
    """One solve by a captured one; see `AdaptiveLoop`, whose counts and errors it has.

    Args:
        problem: of a kind that can be captured; see `obstacle`.
        hooks: for what happens after a failure.

    Raises:
        CaptureError: func can't be captured.
    """

    def __init__(self, problem: Problem, hooks: Hooks) -> None:
        assert isinstance(problem.method, Tableau)
        self.problem, self.hooks, self.tableau, self.times = problem, hooks, problem.method, problem.times
        form, y0 = problem.form, problem.y0
        self.layout = Layout(form.samples, form.segments[-1], form.segments, y0.dtype, y0.device)
        self.evals_before_steps = 1 if problem.first_step is not None else 2
        self.bound = BoundFunc(problem.written, problem.args)
        self.key = (self.bound.key, *self._kind(), surroundings())
        self.constants = self._constants()
        self.captured = captured_for(self.key, self.bound, problem.y0.device, self._make, self._fill)

    def _kind(self) -> tuple[object, ...]:
        problem, form, grid, y0 = self.problem, self.problem.form, self.problem.grid, self.problem.y0
        prescribed = (None if stops is None else stops.shape for stops in (grid.step_t, grid.jump_t))
        tolerances = (isinstance(tolerance, Tensor) for tolerance in (problem.rtol, problem.atol))
        return (
            (y0.shape, y0.dtype, y0.device, form.per_sample, tuple(form.shapes), form.tree and str(form.tree.spec)),
            (problem.method.name, astuple(problem.policy), grid.times.shape, *prescribed, *tolerances),
            problem.first_step is None,
        )

    def _constants(self) -> object:
        """What is equal where the same is to be copied in; what never is, if it can't be compared."""
        problem = self.problem
        known = problem.grid.times.dim() == 1 and problem.grid.step_t is None and problem.grid.jump_t is None
        if not known or isinstance(problem.rtol, Tensor) or isinstance(problem.atol, Tensor):
            return object()
        return problem.rtol, problem.atol, problem.first_step, tuple(problem.times.values)

    def _make(self, func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedLoop, list[Tensor]]:
        problem, form, y0 = self.problem, self.problem.form, self.problem.y0
        layout = native.Layout(form.samples, form.segments[-1], form.segments, y0.dtype, y0.device)
        stops = (None if x is None else torch.empty_like(x) for x in (problem.grid.step_t, problem.grid.jump_t))
        grid = Grid(torch.empty_like(problem.grid.times), *stops)
        dynamics = Dynamics(for_one_sample(func, form), form, y0, partial(native.copy, layout))
        loop = CapturedLoop(
            dynamics, self.tableau, layout, *places_for_tolerances(problem.rtol, problem.atol, y0.device),
            problem.policy, grid, Times(grid.times, problem.times.values),
            y0=y0, first_step=problem.first_step is not None,
        )  # fmt: skip
        loop.y.copy_(y0)  # the warm-up's, too
        return loop, []

    def _fill(self, captured: Captured) -> None:
        """Copies in all but the start, unless it is there."""
        loop, problem = captured.loop, self.problem
        for slot, given in zip(captured.slots, self.bound.tensors):
            slot.detach().copy_(given)
        if captured.filled == self.constants:
            return
        loop.grid.times.copy_(problem.grid.times)
        for name in ("step_t", "jump_t"):
            if (stops := getattr(problem.grid, name)) is not None:
                getattr(loop.grid, name).copy_(stops)
        fill_tolerances(loop, problem.rtol, problem.atol)
        if loop.first_step is not None and problem.first_step is not None:
            loop.first_step.fill_(problem.first_step)
        captured.filled = self.constants

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape], from the problem's start and first step."""
        captured, loop, y = self.captured, self.captured.loop, None
        with captured.graph.in_use():
            loop.y.copy_(y0)
            self._fill(captured)
            captured.graph.launch()
            out = loop.out.clone()
            self.controller, self._crossings = loop.controller.readings(), loop.crossings.clone()
            _, flags = self.controller.flags()
            if flags & Flag.FAILED:
                y, k = loop.y.clone(), loop.k.clone()
        captured_solves.put(self.key, captured)
        if y is not None:
            self.hooks.fail(self.error(y, k))
            out = torch.where(column(self.left(), out), y, out)
        return out

    def again(self, y0: Tensor) -> Tensor | None:
        """Solves from another start; None where nothing is kept for it, or where that fails: then it is to be told."""
        captured = captured_solves.take(self.key)
        if captured is None:
            return None
        with captured.graph.in_use():
            captured.loop.y.copy_(y0)
            self._fill(captured)
            captured.graph.launch()
            out = captured.loop.out.clone()
            _, flags = captured.loop.controller.flags()
        captured_solves.put(self.key, captured)
        return None if flags & Flag.FAILED else out

    @property
    def n_jumps(self) -> Tensor:
        """See Outcome."""
        return self._crossings[0].cpu()

    @property
    def n_evals(self) -> int:
        """See Outcome; those that a turn of the loop makes in vain, behind the end, are none."""
        return self.evals_before_steps + evals_of(self.controller, self._crossings, self.tableau)


def evals_of(controller: native.Readings, crossings: Tensor, tableau: Tableau) -> int:
    """How often func was called in the steps of all samples together, and behind discontinuities."""
    steps = controller.field("n_accepted") + controller.field("n_rejected")
    if len(steps) == 0:
        return 0
    turns, crossed = torch.stack([steps.max(), crossings[1, 0]]).tolist()
    return int(turns * len(tableau.rows) + crossed)


def obstacle(problem: Problem, hooks: Hooks) -> str | None:
    """Why a solve can't be one launch, as far as it can be told before trying; None if it may."""
    y0, method = problem.y0, problem.method
    if not native.on_gpu(y0.device):
        return f"the state is on the {y0.device.type.upper()}"
    if backend_for(y0) is not native:
        return "pyode's CUDA kernels can't work on the state"
    if not isinstance(method, Tableau) or not method.adaptive:
        return f"{method.name!r} is not an explicit method that chooses its steps"
    if "norm" in problem.options:
        return "options['norm'] is a function of the user's"
    if hooks.tape is not None:
        return "gradient='checkpoint' notes every step"
    if problem.callbacks or hooks.step or hooks.after_step:
        return "callbacks, events, dense output, progress and compact look at every step"
    if graph_loop.is_capturing(y0.device):
        return "a graph is being captured"
    if torch.is_grad_enabled() and any(
        x.requires_grad for x in (y0, problem.times.tensor, *(x for _, x in reachable(problem.func)))
    ):
        return "gradient='direct' records every step; 'adjoint' does not"
    return None


def device_loop(problem: Problem, hooks: Hooks) -> DeviceLoop | None:
    """The loop for a solve whose options ask for a device loop; None, with a warning of why, if there can be none."""
    why = obstacle(problem, hooks)
    if why is None:
        try:
            return _remembered(DeviceLoop(problem, hooks))
        except CaptureError as error:
            why = str(error)
    if problem.options["device_loop"] != "auto":
        warn(f"options['device_loop']: the host drives this solve, because {why}")
    return None


def solve_again(func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: str | None) -> Tensor | None:
    """A solve like one that was done before, from another start, without a look at all the rest; None if it is not.

    The times are the very tensor of that one, unchanged.
    """
    if type(y0) is not Tensor or torch.is_grad_enabled() or not y0.is_contiguous():
        return None
    kind = (id(func), y0.shape, y0.dtype, y0.device, id(t), rtol, atol, method or DEFAULT, surroundings())
    its_func, its_t, version, loop = _done.get(kind, (None, None, 0, None))
    if loop is None or its_func is None or its_t is None:
        return None
    if its_func() is not func or its_t() is not t or t._version != version or graph_loop.is_capturing(y0.device):
        return None
    again: Tensor | None = loop.again(y0)
    return again


def _remembered(loop: DeviceLoop) -> DeviceLoop:
    """The loop, which `solve_again` then finds if it may."""
    problem = loop.problem
    t, plain = problem.times.tensor, problem.options == {"device_loop": True} and problem.form.is_tensor
    if plain and not problem.args and isinstance(problem.rtol, float) and isinstance(problem.atol, float):
        y0, func = problem.y0, problem.written
        kind = (
            id(func), y0.shape, y0.dtype, y0.device, id(t), problem.rtol, problem.atol, problem.method.name,
            surroundings(),
        )  # fmt: skip
        with suppress(TypeError):  # not everything that can be called can be referred to weakly
            _done[kind] = weakref.ref(func), weakref.ref(t), t._version, loop
            while len(_done) > MOST_DONE:
                _done.pop(next(iter(_done)), None)
    return loop
