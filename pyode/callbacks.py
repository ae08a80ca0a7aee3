"""The callbacks that a func may carry as attributes, by torchdiffeq's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops.contract import wide_dtype
from .errors import warn
from .methods import Method
from .methods.external import ScipySolver
from .stepping.hooks import Callback

NAMES = ("callback_step", "callback_accept_step", "callback_reject_step")


def _names_in(func: Any, suffix: str = "") -> list[str]:
    """The callbacks that a func carries."""
    # Not hasattr: a module's search for an attribute that it lacks takes as long as a stage.
    own, kind = getattr(func, "__dict__", {}), type(func)
    return [name for name in NAMES if name + suffix in own or hasattr(kind, name + suffix)]


def has_callbacks(func: Any) -> bool:
    """Whether a func carries any."""
    return bool(_names_in(func))


def callbacks_of(
    func: Any,
    method: Method,
    time: Tensor,
    unpack: Callable[[Tensor], Any],
    suffix: str = "",
    silent: str = "",
) -> dict[str, Callback]:
    """A func's callbacks, by the names of `Hooks`: "step", "accept", "reject".

    They are called as callback(t0, y0, dt) with the time and the state at a step's start and its size, 0-dim tensors.
    Those that the method does not call are named in a warning.

    Args:
        func: may carry callbacks.
        method: one that chooses its steps calls all three, one that does not the first only, SciPy's none.
        time: a tensor whose device, and for a method that does not choose its steps whose dtype, times have.
        unpack: from a packed state to the user's.
        suffix: "_adjoint" for those of a backward solve.
        silent: where none is called, as the end of the warning: "with ...", "in ...".
    """
    names = _names_in(func, suffix)
    none = bool(silent) or isinstance(method, ScipySolver)
    supported = () if none else NAMES if method.adaptive else NAMES[:1]
    if unsupported := {name + suffix for name in names if name not in supported}:
        warn(f"Solver '{method.name}' does not support callbacks {unsupported} {silent}".rstrip())
    dtype = wide_dtype(time.device) if method.adaptive else time.dtype

    def wrap(callback: Callable[[Tensor, Any, Tensor], Any]) -> Callback:
        def call(t: float, y: Tensor, dt: float) -> None:
            t_, dt_ = torch.tensor([t, dt], dtype=dtype, device=time.device).unbind()
            callback(t_, unpack(y), dt_)

        return call

    return {name.split("_")[1]: wrap(getattr(func, name + suffix)) for name in names if name in supported}
