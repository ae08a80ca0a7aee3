"""What a solve by a captured one is, forwards and backwards: what is copied in, one launch, and how it went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._ops import backend_for, graph_loop, native
from ._ops.contract import Flag, Grid, Layout
from ._ops.words import Readings
from .captures import Captured, CaptureError, Key, captured_solves
from .control import Times, UnreadTimes, check_times
from .errors import warn
from .methods import ImplicitTableau, Method, Tableau
from .methods.adams import VariableAdams
from .methods.external import ScipySolver
from .methods.multistep import FixedAdams
from .stepping.captured import CapturedLoop
from .stepping.outcome import Outcome

Found = TypeVar("Found")


@dataclass(eq=False)
class Given:
    """What differs between solves of one kind, beside their states and args.

    Args:
        times: the output times.
        grid: with their values on the device.
        rtol, atol: numbers or tensors.
        first_step: a number, or of samples a tensor; None if it is to be chosen.

    Attributes:
        mark: equal where all is; where that can't be told, equal to nothing else.
    """

    times: Times
    grid: Grid
    rtol: float | Tensor
    atol: float | Tensor
    first_step: float | Tensor | None
    mark: object = field(init=False)

    def __post_init__(self) -> None:
        grid, numbers = self.grid, (self.rtol, self.atol)
        told = grid.times.dim() == 1 and grid.step_t is None and grid.jump_t is None
        told = told and not self.times.unread and not any(isinstance(number, Tensor) for number in numbers)
        self.mark = (*numbers, self.first_step, tuple(self.times.values)) if told else object()

    @property
    def kind(self) -> Key:
        """What is the same for solves of one kind."""
        prescribed = (None if x is None else x.shape for x in (self.grid.times, self.grid.step_t, self.grid.jump_t))
        tensors = (isinstance(tolerance, Tensor) for tolerance in (self.rtol, self.atol))
        return (*prescribed, *tensors, self.first_step is None, self.times.unread)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor, Grid, Times]:
        """Where the like is copied to: tolerances, the grid, and the output times."""
        stops = (None if x is None else torch.empty_like(x) for x in (self.grid.step_t, self.grid.jump_t))
        grid = Grid(torch.empty_like(self.grid.times), *stops)
        rtol, atol = (
            torch.empty_like(x) if isinstance(x, Tensor) else torch.zeros((), dtype=torch.float64, device=device)
            for x in (self.rtol, self.atol)
        )
        return rtol, atol, grid, UnreadTimes(grid.times, check_times)

    def fill(self, captured: Captured) -> None:
        """Copies all to its place, unless it is there."""
        if captured.filled == self.mark:
            return
        loop, captured.filled = captured.loop, None
        pairs = [(loop.rtol, self.rtol), (loop.atol, self.atol), (loop.first_step, self.first_step)]
        pairs += [(getattr(loop.grid, name), getattr(self.grid, name)) for name in ("times", "step_t", "jump_t")]
        for place, given in pairs:
            if isinstance(place, Tensor) and given is not None:
                place.copy_(given) if isinstance(given, Tensor) else place.fill_(given)
        captured.filled = self.mark


def obstacle(y: Tensor, method: Method) -> str | None:
    """Why no solve of states like y by a method can be one launch; None if some can."""
    if not native.on_gpu(y.device):
        return f"the state is on the {y.device.type.upper()}"
    if backend_for(y) is not native:
        return "pyode's CUDA kernels can't work on the state"
    hosts = _what_is_the_hosts(method)
    if hosts is not None:
        return hosts
    if graph_loop.is_capturing(y.device):
        return "a graph is being captured"
    return None


def _what_is_the_hosts(method: Method) -> str | None:
    """What of a method's steps the host does, if anything."""
    if isinstance(method, VariableAdams):
        return f"it chooses the orders and sizes of the steps of {method.name!r}"
    if isinstance(method, ImplicitTableau) or (isinstance(method, FixedAdams) and method.implicit):
        return f"it looks whether the equations of a step of {method.name!r} are solved"
    if isinstance(method, ScipySolver):
        return "SciPy runs there"
    return None


def unless(why: str | None, make: Callable[[], Found], options: dict[str, Any], which: str) -> Found | None:
    """What `make` makes; None where there is a reason why not, or func can't be captured: told, but for "auto"."""
    if why is None:
        try:
            return make()
        except CaptureError as error:
            why = str(error)
    if options["device_loop"] != "auto":
        warn(f"{which}['device_loop']: the host drives this solve, because {why}")
    return None


def launch(captured: Captured, key: Key, fill: Callable[[], None], collect: Callable[[Any], Found]) -> Found:
    """One launch of a captured solve, which is kept for others then.

    Args:
        fill: copies in what is to be solved.
        collect: copies out what has come of it; others use its memory behind that.
    """
    try:
        with captured.graph.in_use():
            fill()
            captured.graph.launch()
            return collect(captured.loop)
    finally:  # of an interrupt too: the device may be at work on it
        captured_solves.put(key, captured)


class DeviceSolve(Outcome):
    """One solve by a captured one; see `AdaptiveLoop`, whose counts and errors it has.

    Attributes:
        end: the last state and its derivative, if it has failed.
    """

    def __init__(self, tableau: Tableau, layout: Layout, given: Given) -> None:
        self.tableau, self.layout, self.given, self.times = tableau, layout, given, given.times
        self.evals_before_steps = 1 if given.first_step is not None else 2
        self.end: tuple[Tensor, Tensor] | None = None

    def copy(self, loop: CapturedLoop) -> None:
        """Takes a copy of how the solve goes, and of its last state, without waiting for its end."""
        self.unread = True
        self.controller: Readings = loop.controller.readings()
        self._crossings = loop.crossings.clone()
        self._last = loop.y.clone(), loop.k.clone()

    def read(self, loop: CapturedLoop) -> None:
        """The same; here the host waits, once."""
        self.copy(loop)
        self.look()

    def look(self) -> None:
        """See Outcome."""
        super().look()
        if has_failed(self.controller):
            self.times.check()
            self.end = self._last
            self.tell_apart(*self.end)

    @property
    def n_jumps(self) -> Tensor:
        """See Outcome."""
        return self._crossings[0].cpu()

    @property
    def n_evals(self) -> int:
        """See Outcome; those that a turn of the loop makes in vain, behind the end, are none."""
        steps = self.controller.field("n_accepted") + self.controller.field("n_rejected")
        if len(steps) == 0:
            return self.evals_before_steps
        turns, crossed = torch.stack([steps.max(), self._crossings[1, 0]]).tolist()
        return int(self.evals_before_steps + turns * len(self.tableau.rows) + crossed)


def has_failed(controller: Readings) -> bool:
    """Whether some sample has; this waits for the device."""
    _, flags = controller.flags()
    return bool(flags & Flag.FAILED)
