"""Solves captured for a GPU to do by itself, kept for others of the same kind.

Of the same kind are those of the same func, shapes, dtypes, method and constants of the controller. What differs from
one to the next is copied in: start, times, tolerances, args. Parameters are read in place.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ._ops import graph_loop
from .compiled.arguments import Slots, kind_of
from .compiled.guards import Guards
from .parameters import all_tensors
from .state import Func, State
from .tree import Tree

Key = tuple[Any, ...]

# From func and, by id, what stands for the tensors that it uses: the loop, and further inputs.
Make = Callable[[Func, dict[int, Tensor]], "tuple[Work, list[Tensor]]"]


class Work(Protocol):
    """What is captured: a CapturedLoop or the like."""

    def trial(self) -> Iterator[None]:
        """Does a part of it, driven by the host, and stops now and then."""

    def capture(self, graph: Any) -> None:
        """Has a graph capture it, after a trial; RuntimeError if something can't be."""


class CaptureError(RuntimeError):
    """A solve can't be captured; says why."""


class BoundFunc:
    """A func with its args, for whose tensors others will stand.

    Attributes:
        func: as the user gave it.
        tensors: those in args.
        key: tells it from others.
    """

    def __init__(self, func: Func, args: tuple[Any, ...]) -> None:
        self.func = func
        self.tree = Tree(args) if args else None
        self.leaves = self.tree.leaves(args) if self.tree is not None else []
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        # A bound method is made anew whenever it is named.
        self.owner: Any = getattr(func, "__self__", func)
        which = getattr(func, "__func__", None)
        trained = tuple(tensor.requires_grad for tensor in self.tensors)
        self.key: Key = id(self.owner), which, kind_of(self.leaves), trained, self.tree and str(self.tree.spec)

    def kept(self) -> tuple[Callable[[], Any], list[Any]]:
        """What tells whether the func is still that of the key: a reference to it, weak if it can be, and its args.

        An id is given out again when its owner is gone.
        """
        try:
            owner: Callable[[], Any] = weakref.ref(self.owner)
        except TypeError:
            owner = partial(_itself, self.owner)
        return owner, [leaf for leaf in self.leaves if not isinstance(leaf, Tensor)]

    def which(self, params: Sequence[Tensor]) -> Key:
        """Tells tensors from others: those in args by their places, the rest by themselves and where they lie."""
        places = {id(x): i for i, x in enumerate(self.tensors)}
        return tuple(places.get(id(p), (id(p), p.data_ptr())) for p in params)

    def with_slots(self) -> tuple[Func, list[Tensor]]:
        """A function of (t, y) with empty tensors in the places of those in args, and these tensors."""
        if self.tree is None:
            return self.func, []
        slots = Slots(self.func, self.tree, self.leaves)
        for slot, given in zip(slots.tensors, self.tensors):
            slot.requires_grad_(given.requires_grad)
        return slots, slots.tensors


class LentFunc:
    """A func that is called until it is taken back: what is captured lives on, for its memory, and must not hold it."""

    def __init__(self, func: Func) -> None:
        self.func: Func | None = func

    def __call__(self, t: Tensor, y: State) -> Any:
        """Calls it."""
        assert self.func is not None
        return self.func(t, y)

    def take_back(self) -> None:
        """Lets go of it."""
        self.func = None


def standing_for(params: Sequence[Tensor], stand_ins: dict[int, Tensor]) -> tuple[Tensor, ...]:
    """What func finds in the places of these tensors while it is captured; see Make.

    Raises:
        CaptureError: one stays where it is.
    """
    if any(id(p) not in stand_ins for p in params):
        raise CaptureError("a tensor that wants a gradient is a global variable of func's, or in a tuple")
    return tuple(stand_ins[id(p)] for p in params)


def becomes_a_constant(x: Tensor, device: torch.device) -> bool:
    """Whether a graph of a device keeps a tensor's value as it is when it is captured: that of a number on the host."""
    return x.dim() == 0 and x.device.type == "cpu" and device.type != "cpu"


def _itself(x: Any) -> Any:
    return x


@dataclass(eq=False)
class Captured:
    """A captured solve.

    Attributes:
        loop: its memory.
        graph: what is launched.
        slots: one tensor for each tensor in args.
        inputs: other tensors to be filled before a launch.
        kept: see BoundFunc.
        guards: on what func was when it was captured.
        tensors: those that func reads in place, with their addresses.
        constants: those of which the graph has the values, and these.
        filled: what the inputs that stay the same are filled with.
    """

    loop: Any
    graph: graph_loop.Graph
    slots: list[Tensor]
    inputs: list[Tensor]
    kept: tuple[Callable[[], Any], list[Any]]
    guards: Guards
    tensors: list[tuple[Tensor, int]] = field(default_factory=list)
    constants: list[tuple[Tensor, Any]] = field(default_factory=list)
    filled: Any = None

    def fill_slots(self, bound: BoundFunc) -> None:
        """Copies in the tensors in args."""
        for slot, given in zip(self.slots, bound.tensors):
            slot.detach().copy_(given)

    def holds(self) -> bool:
        """Whether a launch would still do what func does."""
        return (
            self.kept[0]() is not None
            and self.guards.hold()
            and all(x.data_ptr() == address for x, address in self.tensors)
            and all(x.item() == value for x, value in self.constants)
        )


class CapturedSolves:
    """Those not in use, the least recently used first. One in use is not among them: a launch has its memory for it."""

    MOST, MOST_REFUSED = 16, 256

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, list[Captured]] = OrderedDict()
        self._lock = threading.RLock()  # what the collector finalizes within it comes here too
        self._watched: set[int] = set()  # ids of funcs
        self._refused: dict[Key, str] = {}
        self.n_captures = 0

    def refuse(self, key: Key, why: str) -> None:
        """Notes that there is no use in trying to capture."""
        with self._lock:
            if len(self._refused) >= self.MOST_REFUSED:
                self._refused.pop(next(iter(self._refused)))
            self._refused[key] = why

    def refused(self, key: Key) -> str | None:
        """Why there is no use in trying; None if there may be."""
        return self._refused.get(key)

    def watch(self, owner: Any) -> None:
        """Lets go of what is known of a func when the func is no more."""
        with self._lock, contextlib.suppress(TypeError):
            if id(owner) not in self._watched:
                weakref.finalize(owner, self.forget, id(owner)).atexit = False
                self._watched.add(id(owner))

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
            self._watched.discard(owner)
            gone = [self._kept.pop(key) for key in list(self._kept) if key[0][0] == owner]
            self._refused = {key: why for key, why in self._refused.items() if key[0][0] != owner}
        for captured in (captured for some in gone for captured in some):
            captured.graph.wait()

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            gone, self._kept = self._kept, OrderedDict()
            self._refused.clear()
        for captured in (captured for some in gone.values() for captured in some):
            captured.graph.wait()


captured_solves = CapturedSolves()
_capturing = threading.RLock()  # one capture at a time


def captured_for(
    key: Key,
    bound: BoundFunc,
    device: torch.device,
    make: Make,
    fill: Callable[[Captured], None],
    kind: type[graph_loop.Graph],
) -> Captured:
    """A captured solve for a key, which begins with that of the func: one that was kept, or a new one.

    Args:
        make: from func and, by id, what stands for the tensors in args and for those that func finds by itself, makes
            the loop and further inputs.
        fill: copies in what a launch is to work on.
        kind: of graph.

    Raises:
        CaptureError: func can't be captured.
    """
    captured = captured_solves.take(key)
    if captured is not None:
        return captured
    why = captured_solves.refused(key)
    if why is not None:
        raise CaptureError(why)
    captured_solves.watch(bound.owner)
    try:
        return _capture(bound, device, make, fill, kind)
    except CaptureError as error:
        captured_solves.refuse(key, str(error))
        raise


def _capture(
    bound: BoundFunc, device: torch.device, make: Make, fill: Callable[[Captured], None], kind: type[graph_loop.Graph]
) -> Captured:
    try:
        graph = kind(device)
    except RuntimeError as error:
        raise CaptureError(str(error)) from error
    with _capturing, graph.aside(), torch.no_grad(), _nothing_cast_before():
        func, slots = bound.with_slots()
        if any(becomes_a_constant(slot, device) for slot in slots):
            raise CaptureError("a number in args is on the CPU, where a graph would not read it again")
        before = Guards(bound.func)
        # A graph that somebody else holds has a tensor's gradient summed up on his stream. These are in none: the same
        # memory as tensors of their own.
        others = {id(x): x.detach().requires_grad_() for x in before.tensors if x.requires_grad}
        with before.replaced(others) as replaced:
            stand_ins = {id(x): slot for x, slot in zip(bound.tensors, slots)}
            stand_ins |= {name: x for name, x in others.items() if name in replaced}
            lent = LentFunc(func)
            loop, inputs = make(lent, stand_ins)
            captured = Captured(loop, graph, slots, inputs, bound.kept(), before)
            fill(captured)
            _warm_up(loop, device)
            try:
                loop.capture(graph)
            except RuntimeError as error:
                raise CaptureError(f"func can't be captured: {str(error).splitlines()[0]}") from error
    captured.guards = Guards(bound.func, before)
    # Those that no guard knows, in global variables, are to live on at least: the graph has their addresses.
    used = {id(x): x for x in (*captured.guards.tensors, *all_tensors(bound.func))}
    captured.tensors = [(x, x.data_ptr()) for x in used.values()]
    captured.constants = [(x, x.item()) for x in used.values() if becomes_a_constant(x, device)]
    lent.take_back()
    captured_solves.n_captures += 1
    return captured


@contextlib.contextmanager
def _nothing_cast_before() -> Iterator[None]:
    """Within it autocast keeps no copies of parameters, which would go into a graph in their places."""
    caches = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caches)


def _warm_up(loop: Work, device: torch.device) -> None:
    """Solves, driven by the host.

    So func, and the libraries that it uses, have done what they do once. Raises CaptureError if func is random.
    """
    before = graph_loop.random_state(device)
    for _ in loop.trial():
        if not torch.equal(before, graph_loop.random_state(device)):
            raise CaptureError("func uses random numbers, which would be the same ones at every launch")


def surroundings() -> Key:
    """What else the numbers of a captured func depend on."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
