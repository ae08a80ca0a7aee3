"""Solves like one before, by what that one has made: checking arguments and making a loop takes longer than a step.

Such a solve differs in func, if that is not compiled, and in the state's numbers; of all else its kind is made, by
value. Nothing is kept of func and of the states of a solve.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ._ops import compiled_here
from ._ops.autograd import plain
from .callbacks import has_callbacks
from .compiled.dynamics import CompiledDynamics
from .compiled.prepared import key_of
from .compiled.samples import samples_again
from .compiled.solve import joint_again
from .state import Dynamics, Func
from .stepping.adaptive import AdaptiveLoop
from .stepping.fixed_grid import FixedGridLoop
from .stepping.hooks import NO_HOOKS, raise_it

Kind = tuple[Any, ...]

PER_SAMPLE, ON_DEVICE = {"control": "per_sample"}, {"device_loop": True}
LARGEST = 1 << 18  # bytes of a state; a loop keeps the memory of a few


def solve_again(
    func: Func, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any, args: Any
) -> tuple[Tensor | None, Kind | None]:
    """Solves as the last solve of the same kind did, where func is not compiled and there are no options.

    Args:
        func, y0, t, rtol, atol, method, options, args: as `odeint`'s.

    Returns:
        The states at the output times, [T, *y0.shape], or None if there was no such solve; and the kind, by which a
        solve is to be kept for the next one, or None if none is kept.
    """
    if options or args or isinstance(func, CompiledDynamics) or not _is_plain(y0, t, rtol, atol, options, args):
        return None, None
    grad = torch.is_grad_enabled()
    if (
        not (y0.is_cpu and t.is_cpu and t.dim() == 1 and t.is_floating_point())
        or not (method is None or type(method) is str)
        or (grad and t.requires_grad)
        or has_callbacks(func)
        or torch.is_inference_mode_enabled()
        or not compiled_here()
    ):
        return None, None
    kind = y0.dtype, y0.shape, tuple(t.tolist()), rtol, atol, method, grad, torch.get_num_threads()
    loop = idle_loops.take(kind)
    if loop is None or not callable(func):
        return None, kind
    loop.dynamics.set(func, y0)
    ys = loop.solve(plain(y0))
    idle_loops.put(kind, loop)
    return ys, kind


def _is_plain(y0: Any, t: Any, rtol: Any, atol: Any, options: Any, args: Any) -> bool:
    """Whether arguments are of the kinds that need no further look."""
    return (
        type(y0) is Tensor
        and type(t) is Tensor
        and type(rtol) is float
        and type(atol) is float
        and (options is None or type(options) is dict)
        and type(args) is tuple
    )


def solve_natively_again(
    func: Func,
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    args: Any,
    solver: Callable[..., Any],
) -> tuple[Tensor | None, Kind | None]:
    """The same for a solve that is one launch on a device, and for a compiled func, which keeps the last solve itself.

    Args:
        solver: `odeint` itself, for gradients of gradients of compiled solves.
    """
    if not _is_plain(y0, t, rtol, atol, options, args):
        return None, None
    if options == ON_DEVICE and not args:
        from .device_loop import solve_again as again_on_device  # only those who ask for it wait for its import

        return again_on_device(func, y0, t, rtol, atol, method), None
    if not isinstance(func, CompiledDynamics) or (options and options != PER_SAMPLE):
        return None, None
    compiled = func.with_args(args)

    def eagerly(y: Tensor) -> Tensor:
        found: Tensor = solver(compiled.func, y, t, rtol, atol, method, options)
        return found

    if not options:
        return joint_again(compiled, key_of(y0, rtol, atol, method), y0, t, eagerly), None
    kind = key_of(y0, rtol, atol, "odeint", method)
    loop = samples_again(compiled, kind, y0, t, eagerly, raise_it)
    return None if loop is None else loop.solve(y0), kind


class IdleLoops(threading.local):
    """Those of a thread, the least recently used first. A loop at work is not among them: func may solve itself.

    Their dynamics are `Dynamics` without a func.
    """

    MOST = 16

    def __init__(self) -> None:
        self._loops: OrderedDict[Any, Any] = OrderedDict()

    def take(self, kind: Kind) -> Any:
        """Returns the one for a kind, which is then no longer here."""
        return self._loops.pop(kind, None)

    def put(self, kind: Any, loop: Any) -> None:
        """Keeps a loop whose solve has succeeded, and nothing of what it solved."""
        if torch.is_grad_enabled():  # the solve's own are needed again where it is differentiated
            loop.dynamics = copy(loop.dynamics)
        loop.dynamics.forget()
        self._loops[kind] = loop
        if len(self._loops) > self.MOST:
            self._loops.popitem(last=False)

    def clear(self) -> None:
        """Forgets all."""
        self._loops.clear()


idle_loops = IdleLoops()


def keep(kind: Kind, loop: Any) -> None:
    """Makes the loop of a solve that has succeeded idle, if it is one that can be."""
    if (
        isinstance(loop, (AdaptiveLoop, FixedGridLoop))
        and isinstance(loop.dynamics, Dynamics)
        and loop.layout.samples * loop.layout.size * loop.layout.dtype.itemsize <= LARGEST
    ):
        loop.keep_times()
        loop.hooks = NO_HOOKS
        idle_loops.put(kind, loop)
