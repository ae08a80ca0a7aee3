"""Which tensors a func uses beside its arguments: found without being told, for the gradients of an adjoint solve."""

from __future__ import annotations

import dis
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .errors import InvalidType

# Functions and objects of these are not looked into.
_LIBRARIES = {*sys.stdlib_module_names, "numpy", "pyode", "scipy", "torch", "torchdiffeq"}
_COLLECTIONS = (list, tuple, set, frozenset, deque)
_ATTRIBUTES_OF_MODULES = frozenset(vars(nn.Module()))
_MAX_HOPS = 2  # from object to object by attributes: a trainer is looked into, all that it leads to is not


def find_parameters(func: Any) -> list[Tensor]:
    """The tensors to which an adjoint solve returns gradients by default.

    Those of a module are its parameters, as in torchdiffeq; of any other callable all that `reachable` finds.
    """
    if not isinstance(func, nn.Module):
        return [tensor for _, tensor in reachable(func)]
    if not getattr(func, "_is_replica", False):
        return list(func.parameters())
    # A DataParallel replica's parameters are plain attributes.
    attributes = (value for part in func.modules() for value in vars(part).values())
    return [value for value in attributes if isinstance(value, Tensor) and value.requires_grad]


def named_parameters(params: Iterable[Tensor], name: str, args: Any) -> list[Tensor]:
    """Those that an argument of this name lists, and those in args, each once.

    Raises:
        InvalidType: one of them is no tensor.
    """
    params = list(params)
    for i, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise InvalidType(f"{name}[{i}] must be a tensor, not a {type(param).__name__}")
    found = [*params, *(x for _, x in reachable(args, "args") if x.requires_grad)]
    return list({id(x): x for x in found}.values())


def lost_gradient(func: Any, listed: Iterable[Tensor]) -> str | None:
    """The name of a tensor that func can reach and that wants a gradient, but gets none from those listed."""
    known = {id(tensor) for tensor in listed}
    known_nodes = {tensor.grad_fn for tensor in listed if tensor.grad_fn is not None}
    for name, tensor in reachable(func):
        if not tensor.requires_grad or id(tensor) in known:
            continue
        # A tensor computed from those listed passes its gradient on to them.
        nodes, seen = [tensor.grad_fn], set(known_nodes)
        while nodes:
            node = nodes.pop()
            if node is None or hasattr(node, "variable"):
                if id(tensor if node is None else node.variable) not in known:
                    return name
            elif node not in seen:
                seen.add(node)
                nodes.extend(before for before, _ in node.next_functions if before is not None)
    return None


def reachable(root: Any, name: str = "func") -> list[tuple[str, Tensor]]:
    """Every tensor that requires gradient, and every module's parameter, to be reached from an object, with names.

    The ways: items, attributes, what a bound method or functools.partial holds, a function's closure, its defaults and
    the globals it names. Functions and objects of torch and other libraries are not looked into.
    """
    return [
        (path, value)
        for path, value in _walk(root, name)
        if isinstance(value, Tensor) and (value.requires_grad or isinstance(value, nn.Parameter))
    ]


def all_tensors(root: Any) -> list[Tensor]:
    """Every tensor to be reached from an object in the ways that `reachable` goes."""
    return [value for _, value in _walk(root, "") if isinstance(value, Tensor)]


class Loan:
    """The parameters that the modules in a func have now, to be lent to them again when func is evaluated later.

    torch.func.functional_call gives a module other parameters for the time of a call: in the backward pass it has its
    own again, to which the gradients do not belong.
    """

    def __init__(self, func: Any) -> None:
        modules = [value for _, value in _walk(func, "") if isinstance(value, nn.Module)]
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (held, dict(held))
            for module in modules
            for held in (module._parameters, module._buffers)
            if isinstance(held, dict)  # a scripted module can be lent none
        ]

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Within it they have them."""
        other = [
            (held, then, dict(held))
            for held, then in self._held
            if any(held.get(name) is not tensor for name, tensor in then.items())
        ]
        for held, then, _ in other:
            held.update(then)
        try:
            yield
        finally:
            for held, _, now in other:
                held.update(now)


def _walk(root: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every object to be reached from one, once, with the way as its name."""
    seen: dict[int, Any] = {}  # keeps the objects, whose ids would be given out again
    waiting = [(name, root, 0)]
    while waiting:
        name, value, hops = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield name, value
        if not isinstance(value, Tensor):
            waiting.extend(reversed(list(_inside(name, value, hops))))


def _inside(name: str, value: Any, hops: int) -> Iterator[tuple[str, Any, int]]:
    """What an object holds, with names, and how many objects lie on the way."""
    if isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", item, hops) for key, item in value.items())
    elif isinstance(value, _COLLECTIONS):
        yield from ((f"{name}[{i}]", item, hops) for i, item in enumerate(value))
    elif isinstance(value, partial):
        yield f"{name}.func", value.func, hops
        yield f"{name}.args", value.args, hops
        yield f"{name}.keywords", value.keywords, hops
    elif isinstance(value, MethodType):
        yield f"{name}.__self__", value.__self__, hops
        yield name, value.__func__, hops
    elif isinstance(value, FunctionType):
        yield from ((f"{name}: {its}", held, hops) for its, held in _held_by(value))
    elif isinstance(value, nn.Module):
        for members in (value._parameters, value._buffers, value._modules):
            yield from ((f"{name}.{key}", member, hops) for key, member in members.items())
        own = ((key, member) for key, member in vars(value).items() if key not in _ATTRIBUTES_OF_MODULES)
        if not _of_library(type(value)):
            yield from ((f"{name}.{key}", member, hops) for key, member in own)
            yield name, type(value).forward, hops
    elif not isinstance(value, type) and not _of_library(type(value)) and hops < _MAX_HOPS:
        slots = {slot: getattr(value, slot, None) for slot in slots_of(value)}
        attributes = {**getattr(value, "__dict__", {}), **slots}
        yield from ((f"{name}.{key}", member, hops + 1) for key, member in attributes.items())
        if callable(value):
            yield name, type(value).__call__, hops


def slots_of(value: Any) -> list[str]:
    """The names of an object's slots."""
    several = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    return [slot for slots in several for slot in ((slots,) if isinstance(slots, str) else slots)]


def _held_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function holds on to, with names."""
    if _of_library(function):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "defaults", function.__defaults__
    yield "defaults", function.__kwdefaults__
    yield "attributes", vars(function)
    for name in _globals_in(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


@lru_cache(maxsize=256)
def _globals_in(code: CodeType) -> tuple[str, ...]:
    """The global variables that code names, and the code of functions inside it."""
    own = [str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _globals_in(constant)]
    return tuple(dict.fromkeys(own + inner))


def _of_library(thing: Any) -> bool:
    """Whether a function or class is a library's."""
    return str(getattr(thing, "__module__", None)).partition(".")[0] in _LIBRARIES
