"""What a trace has relied on, beside the values that it reads anew at every solve."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._ops import native
from ..parameters import slots_of

_DEEPEST = 8  # of closures within closures
_CONTAINERS = (list, dict, set, tuple, deque)


class _Slots(Mapping[str, Any]):
    """What an object holds in its slots."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._names = owner, slots_of(owner)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._owner, name, None)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._owner, name, value)  # a frozen dataclass's, too

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def copy(self) -> dict[str, Any]:
        return dict(self)


class Guards:
    """Whether func is still what it was when it was traced.

    Looked at are the identity of parameters, buffers and all tensors in attributes and closures; modules' and other
    objects' plain attributes, training flags among them; functions' code and defaults; the contents of closure cells;
    and what these refer to. Global variables are not, nor are counters: integers in attributes that func itself has
    changed while it was traced.

    Args:
        func: the user's, as it is after it was called.
        before: guards made before it was called.
    """

    def __init__(self, func: Any, before: Guards | None = None) -> None:
        self._attributes: list[tuple[Any, Any]] = []  # containers and copies of them
        self._counters: dict[int, set[Any]] = {}  # by the container's id, the keys
        self._counting: set[int] = set()  # ids of closure cells that count
        self._items: list[tuple[Any, Any, Any]] = []  # a container, a key, the very object that is to be there
        self._cells: list[tuple[types.CellType, Any]] = []
        self._functions: list[tuple[types.FunctionType, Any, Any, Any]] = []  # code and defaults
        self._seen: set[int] = set()
        self._visit(func, _DEEPEST)
        if before is not None:
            self._find_counters(before)
        self._native = native.Guards(self._items, self._cells, self._functions, self._attributes)

    def _find_counters(self, before: Guards) -> None:
        known = {id(container): copy for container, copy in before._attributes}
        for container, now in self._attributes:
            then = _entries(known.get(id(container)))
            keys = {key for key, value in _entries(now).items() if _is_counted(then.get(key), value)}
            keys |= before._counters.get(id(container), set())
            if keys:
                self._counters[id(container)] = keys
        values = {id(cell): value for cell, value in before._cells}
        self._counting = before._counting | {
            id(cell) for cell, value in self._cells if _is_counted(values.get(id(cell)), value)
        }
        self._cells = [(cell, value) for cell, value in self._cells if id(cell) not in self._counting]

    @property
    def tensors(self) -> list[Tensor]:
        """All whose identity is looked at."""
        return [x for x in (*(item for *_, item in self._items), *(x for _, x in self._cells)) if isinstance(x, Tensor)]

    @contextmanager
    def replaced(self, others: dict[int, Tensor]) -> Iterator[set[int]]:
        """Within it func finds other tensors in the places of some, named by their ids.

        Yields the ids of those replaced: what is in a tuple can't be.
        """
        items = [place for place in self._items if id(place[2]) in others and not isinstance(place[0], tuple)]
        cells = [place for place in self._cells if id(place[1]) in others]
        try:
            for container, key, value in items:
                container[key] = others[id(value)]
            for cell, value in cells:
                cell.cell_contents = others[id(value)]
            yield {id(value) for *_, value in (*items, *cells)}
        finally:
            for container, key, value in items:
                container[key] = value
            for cell, value in cells:
                cell.cell_contents = value

    def hold(self) -> bool:
        """Whether nothing has changed."""
        return self._native.hold(self._is_altered)

    def _is_altered(self, now: Any, before: Any) -> bool:
        """Whether more differs than counters."""
        keys = self._counters.get(id(now), ())
        blank = dict.fromkeys(keys)
        return not keys or {**_entries(now), **blank} != {**_entries(before), **blank}

    def _visit(self, value: Any, depth: int) -> None:
        if depth == 0 or id(value) in self._seen or isinstance(value, (Tensor, type, str, bytes, int, float)):
            return
        self._seen.add(id(value))
        if isinstance(value, partial):
            for part in (value.func, value.args, value.keywords):
                self._visit(part, depth - 1)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__, depth)
            self._visit(value.__func__, depth)
        elif isinstance(value, types.FunctionType):
            self._functions.append((value, value.__code__, value.__defaults__, value.__kwdefaults__))
            for cell in value.__closure__ or ():
                self._cells.append((cell, cell.cell_contents))
                self._visit(cell.cell_contents, depth - 1)
            self._visit(value.__defaults__, depth - 1)
            self._visit(value.__kwdefaults__, depth - 1)
        elif isinstance(value, _CONTAINERS):
            self._visit_container(value, depth)
        elif isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] not in ("builtins", "torch"):
            self._visit_container(getattr(value, "__dict__", {}), depth)
            slots = _Slots(value)
            if slots:
                self._visit_container(slots, depth)

    def _visit_container(self, value: Any, depth: int) -> None:
        items = (
            list(value.items())
            if isinstance(value, Mapping)
            else list(enumerate(value))
            if not isinstance(value, set)
            else []
        )
        tensors = [(key, item) for key, item in items if isinstance(item, Tensor)]
        self._items += [(value, key, item) for key, item in tensors]
        if (len(tensors) < len(items) and not isinstance(value, tuple)) or (not items and not isinstance(value, tuple)):
            self._attributes.append((value, value.copy()))
        for _, item in items:
            self._visit(item, depth - 1)


def _entries(container: Any) -> Mapping[Any, Any]:
    """What a dict or list holds, by key or place."""
    if isinstance(container, list):
        return dict(enumerate(container))
    return container if isinstance(container, Mapping) else {}


def _is_counted(then: Any, now: Any) -> bool:
    return type(then) is int and type(now) is int and then != now
