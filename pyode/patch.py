"""patch_torchdiffeq: pyode in torchdiffeq's place, for programs and libraries that import it."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from itertools import accumulate
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from .adjoint import odeint_adjoint
from .dense import odeint_dense
from .events import odeint_event
from .methods import METHODS
from .odeint import odeint
from .parameters import find_parameters

VERSION = "0.2.5"  # of torchdiffeq, whose interface is met
_NAME = "torchdiffeq"


def patch_torchdiffeq() -> ExitStack:
    """Puts pyode in torchdiffeq's place: from now on, `import torchdiffeq` gives this process pyode.

    torchdiffeq need not be installed. Modules that have imported it before keep what they have; a warning names them.
    Of torchdiffeq's internal names a few in common use are there; others raise an error that says which these are.

    Returns:
        What undoes it: call its close(), or use it as a context manager. It may be ignored.

    Example::

        pyode.patch_torchdiffeq()
        import torchcde  # solves with pyode
    """
    undo = ExitStack()
    if _NothingElse in sys.meta_path:
        return undo
    before = {name: module for name, module in sys.modules.items() if _belongs(name)}
    users = _users_of_torchdiffeq() if before else []
    if users:
        warnings.warn(
            f"torchdiffeq was imported before it was patched, and is still used by {', '.join(users)}; call "
            "patch_torchdiffeq() before they are imported",
            stacklevel=2,
        )
    for name in before:
        del sys.modules[name]
    sys.modules.update(_modules())
    sys.meta_path.insert(0, _NothingElse)

    @undo.callback
    def _restore() -> None:
        sys.meta_path.remove(_NothingElse)
        for name in [name for name in sys.modules if _belongs(name)]:
            del sys.modules[name]
        sys.modules.update(before)

    return undo


def _belongs(name: Any) -> bool:
    return str(name).partition(".")[0] == _NAME


def _users_of_torchdiffeq() -> list[str]:
    """The modules with a global variable that is of torchdiffeq."""

    def is_torchdiffeqs(value: Any) -> bool:
        kind = type(value)  # and not isinstance, nor other attributes: some objects warn when they are looked at
        if issubclass(kind, ModuleType):
            return _belongs(value.__name__)
        return issubclass(kind, (FunctionType, type)) and _belongs(value.__module__)

    def uses(module: Any) -> bool:
        return any(map(is_torchdiffeqs, list(getattr(module, "__dict__", {}).values())))

    found = {name: module for name, module in sorted(sys.modules.items()) if not _belongs(name) and uses(module)}
    first = {id(module): name for name, module in reversed(found.items())}  # multiprocessing has __main__ twice
    return sorted(first.values())


def _modules() -> dict[str, ModuleType]:
    """The modules that stand in for torchdiffeq's, by name."""
    internal = {name: _module(f"_impl.{name}", _PUBLIC | names) for name, names in _INTERNAL.items()}
    # As in torchdiffeq, the attribute odeint is the function, in front of the module of this name.
    impl = _module("_impl", internal | _PUBLIC)
    package = _module("", {**_PUBLIC, "_impl": impl, "__version__": VERSION})
    return {module.__name__: module for module in (package, impl, *internal.values())}


def _module(suffix: str, names: dict[str, Any]) -> ModuleType:
    name = f"{_NAME}.{suffix}" if suffix else _NAME
    module = ModuleType(name, "pyode, in torchdiffeq's place.")
    module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=True)
    module.__path__ = []  # a package: "from it import what it lacks" asks _NothingElse, which knows what to say

    def missing(attribute: str) -> Any:
        raise AttributeError(_not_offered(f"{name}.{attribute}"), name=attribute, obj=module)

    vars(module).update(names, __getattr__=missing, __file__=__file__)
    return module


class _NothingElse:
    """Finds none of torchdiffeq's other modules, and says so."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """See importlib.abc.MetaPathFinder."""
        if _belongs(name):
            raise ImportError(_not_offered(name), name=name)


def _not_offered(name: str) -> str:
    internal = (f"_impl.{module}.{its}" for module, names in _INTERNAL.items() for its in names)
    return (
        f"pyode is in torchdiffeq's place and has no {name}; it has {', '.join([*_PUBLIC, *internal])}. Code that "
        "needs more of torchdiffeq's inside has to run without pyode.patch_torchdiffeq()"
    )


def _rms_norm(x: Tensor) -> Tensor:
    return x.abs().square().mean().sqrt()


def _linf_norm(x: Tensor) -> Tensor:
    return x.abs().max()


def _zero_norm(x: Tensor) -> float:
    return 0.0


def _mixed_norm(parts: tuple[Tensor, ...]) -> Tensor | float:
    """The largest RMS."""
    return max(map(_rms_norm, parts), default=0.0)


def _flat_to_shape(flat: Tensor, length: tuple[int, ...], shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    """The parts of a tuple, from [*length, N] with one behind the other."""
    ends = accumulate(shape.numel() for shape in shapes)
    return tuple(flat[..., end - s.numel() : end].view((*length, *s)) for s, end in zip(shapes, ends))


_PUBLIC: dict[str, Any] = {f.__name__: f for f in (odeint, odeint_adjoint, odeint_event, odeint_dense)}
_INTERNAL: dict[str, dict[str, Any]] = {
    "odeint": {"SOLVERS": MappingProxyType(METHODS)},
    "adjoint": {"find_parameters": find_parameters},
    "misc": {f.__name__: f for f in (_rms_norm, _linf_norm, _zero_norm, _mixed_norm, _flat_to_shape)},
}
