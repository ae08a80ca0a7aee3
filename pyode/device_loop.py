"""options={"device_loop": True}: a whole adaptive solve as one launch on a GPU, captured once and used again.

A captured solve is kept for solves of the same kind: of the same func, shapes, dtypes, method and constants of the
controller. What differs from one to the next is copied in: start, times, tolerances, args. Parameters are read in
place.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import backend_for, native
from ._ops.contract import Flag, Grid
from .compiled.arguments import Slots, kind_of
from .compiled.guards import Guards
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
from .tree import Tree

Key = tuple[Any, ...]

STEPS_A_TURN = 4  # of the device's loop: a turn itself takes as long as a few small kernels


@dataclass
class Captured:
    """A captured solve.

    Attributes:
        loop: its memory.
        graph: what is launched.
        slots: one tensor for each tensor in args.
        guards: on what func was when it was captured.
        tensors: those that func reads in place, with their addresses.
    """

    loop: CapturedLoop
    graph: native.GraphLoop
    slots: list[Tensor]
    guards: Guards
    tensors: list[tuple[Tensor, int]]

    def holds(self) -> bool:
        """Whether a launch would still do what func does."""
        return self.guards.hold() and all(x.data_ptr() == address for x, address in self.tensors)


class CapturedSolves:
    """Those not in use, the least recently used first. One in use is not among them: a launch has its memory for it."""

    MOST = 16

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, list[Captured]] = OrderedDict()
        self._lock = threading.Lock()
        self.n_captures = 0

    def take(self, key: Key) -> Captured | None:
        """Returns one for a key, which is then no longer here."""
        with self._lock:
            found = self._kept.pop(key, [])
            fits = next((captured for captured in found if captured.holds()), None)
            rest = [captured for captured in found if captured is not fits and captured.holds()]
            if rest:
                self._kept[key] = rest
            stale = [captured for captured in found if captured is not fits and not any(captured is x for x in rest)]
        for captured in stale:
            captured.graph.wait()
        return fits

    def put(self, key: Key, captured: Captured) -> None:
        """Keeps one."""
        dropped = None
        with self._lock:
            self._kept.setdefault(key, []).append(captured)
            self._kept.move_to_end(key)
            if sum(map(len, self._kept.values())) > self.MOST:
                oldest = next(iter(self._kept))
                dropped = self._kept[oldest].pop(0)
                if not self._kept[oldest]:
                    del self._kept[oldest]
        if dropped is not None:
            dropped.graph.wait()

    def forget(self, owner: int) -> None:
        """Drops those of a func that is no more."""
        with self._lock:
            gone = [self._kept.pop(key) for key in list(self._kept) if key[0][0] == owner]
        for captured in (captured for some in gone for captured in some):
            captured.graph.wait()

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            gone, self._kept = self._kept, OrderedDict()
        for captured in (captured for some in gone.values() for captured in some):
            captured.graph.wait()


def _repeat(work: Callable[[], None], times: int) -> None:
    for _ in range(times):
        work()


captured_solves = CapturedSolves()
_capturing = threading.RLock()  # one capture at a time


class CaptureError(RuntimeError):
    """A solve can't be captured; says why."""


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
        self.layout = _layout_of(problem)
        self.func, args = problem.written, problem.args
        self.tree = Tree(args) if args else None
        self.leaves = self.tree.leaves(args) if self.tree is not None else []
        self.evals_before_steps = 1 if problem.first_step is not None else 2
        self.key = self._key()
        self.captured = captured_solves.take(self.key) or self._capture()

    def solve(self, y0: Tensor, first_step: float | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]; see AdaptiveLoop."""
        captured, loop, y = self.captured, self.captured.loop, None
        with captured.graph.in_use():
            self._copy_in(captured, y0)
            captured.graph.launch()
            out = loop.out.clone()
            self.controller, self._crossings = loop.controller.readings(), loop.crossings.clone()
            if self.controller.flags_of(1) & Flag.FAILED:
                y, k = loop.y.clone(), loop.k.clone()
        captured_solves.put(self.key, captured)
        if y is not None:
            self.hooks.fail(self.error(y, k))
            out = torch.where(column(self.left(), out), y, out)
        return out

    @property
    def n_jumps(self) -> Tensor:
        """See Outcome."""
        return self._crossings[0].cpu()

    @property
    def n_evals(self) -> int:
        """See Outcome; those that a turn of the loop makes in vain, behind the end, are none."""
        steps = self.controller.field("n_accepted") + self.controller.field("n_rejected")
        turns, crossed = torch.stack([steps.max(), self._crossings[1, 0]]).tolist() if len(steps) else (0, 0)
        return self.evals_before_steps + turns * len(self.tableau.rows) + crossed

    def _key(self) -> Key:
        problem, form, grid, y0 = self.problem, self.problem.form, self.problem.grid, self.problem.y0
        prescribed = (None if stops is None else stops.shape for stops in (grid.step_t, grid.jump_t))
        tolerances = (isinstance(tolerance, Tensor) for tolerance in (problem.rtol, problem.atol))
        return (
            (id(_owner(self.func)), getattr(self.func, "__func__", None), kind_of(self.leaves), _spec(self.tree)),
            (y0.shape, y0.dtype, y0.device, form.per_sample, tuple(form.shapes), _spec(form.tree)),
            (problem.method.name, astuple(problem.policy), grid.times.shape, *prescribed, *tolerances),
            problem.first_step is None,
            (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
            torch.get_float32_matmul_precision(),
        )

    def _copy_in(self, captured: Captured, y0: Tensor) -> None:
        loop, problem = captured.loop, self.problem
        loop.y.copy_(y0)
        loop.grid.times.copy_(problem.grid.times)
        for name in ("step_t", "jump_t"):
            if (stops := getattr(problem.grid, name)) is not None:
                getattr(loop.grid, name).copy_(stops)
        for tolerance, given in ((loop.rtol, problem.rtol), (loop.atol, problem.atol)):
            assert isinstance(tolerance, Tensor)
            tolerance.copy_(given) if isinstance(given, Tensor) else tolerance.fill_(given)
        if loop.first_step is not None and problem.first_step is not None:
            loop.first_step.fill_(problem.first_step)
        for slot, given in zip(captured.slots, (x for x in self.leaves if isinstance(x, Tensor))):
            slot.detach().copy_(given)

    def _capture(self) -> Captured:
        problem = self.problem
        slots = None if self.tree is None else Slots(self.func, self.tree, self.leaves)
        try:
            graph = native.GraphLoop(problem.y0.device)
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        with _capturing, graph.aside(), torch.no_grad():
            loop = self._loop(for_one_sample(slots or self.func, problem.form))
            captured = Captured(loop, graph, [] if slots is None else slots.tensors, Guards(self.func), [])
            self._copy_in(captured, problem.y0)
            _warm_up(loop, problem.y0.device)
            captured.guards = Guards(self.func, captured.guards)
            captured.tensors = [(x, x.data_ptr()) for x in captured.guards.tensors]
            loop.controller.stay_on_device(graph.condition)
            try:
                graph.capture(loop.open, partial(_repeat, loop.step, STEPS_A_TURN))
            except RuntimeError as error:
                raise CaptureError(f"func can't be captured: {str(error).splitlines()[0]}") from error
        loop.dynamics = None  # type: ignore[assignment]  # func may go
        weakref.finalize(_owner(self.func), captured_solves.forget, self.key[0][0])
        captured_solves.n_captures += 1
        return captured

    def _loop(self, func: Func) -> CapturedLoop:
        """With memory of its own, on the current stream."""
        problem, y0, layout = self.problem, self.problem.y0, _layout_of(self.problem)
        stops = (None if x is None else torch.empty_like(x) for x in (problem.grid.step_t, problem.grid.jump_t))
        grid = Grid(torch.empty_like(problem.grid.times), *stops)
        rtol, atol = (
            torch.empty_like(x) if isinstance(x, Tensor) else torch.zeros((), dtype=torch.float64, device=y0.device)
            for x in (problem.rtol, problem.atol)
        )
        return CapturedLoop(
            Dynamics(func, problem.form, y0, partial(native.copy, layout)), self.tableau, layout, rtol, atol,
            problem.policy, grid, Times(grid.times, problem.times.values),
            y0=y0, first_step=problem.first_step is not None,
        )  # fmt: skip


def _warm_up(loop: CapturedLoop, device: torch.device) -> None:
    """Lets func, and the libraries that it uses, do what they do once; and sees whether it is random."""
    before = native.random_state(device)
    loop.open()
    loop.step()
    if not torch.equal(before, native.random_state(device)):
        raise CaptureError("func uses random numbers, which would be the same ones at every launch")


def _owner(func: Any) -> Any:
    """What a bound method, which is made anew whenever it is named, is a method of; or else func."""
    return getattr(func, "__self__", func)


def _spec(tree: Tree | None) -> str:
    return "" if tree is None else str(tree.spec)


def _layout_of(problem: Problem) -> native.Layout:
    form, y0 = problem.form, problem.y0
    return native.Layout(form.samples, form.segments[-1], form.segments, y0.dtype, y0.device)


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
    if native.is_capturing(y0.device):
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
            return DeviceLoop(problem, hooks)
        except CaptureError as error:
            why = str(error)
    if problem.options["device_loop"] != "auto":
        warn(f"options['device_loop']: the host drives this solve, because {why}")
    return None
