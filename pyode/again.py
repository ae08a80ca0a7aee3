"""Solves like one before, by what that one has made: checking arguments and making a loop takes longer than a step.

Such a solve differs in func, if that is not compiled, and in the state's numbers; of all else its kind is made, by
value. Nothing is kept of func and of the states of a solve.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
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
    """Solves as the last solve of the same kind did.

    Args:
        func, y0, t, rtol, atol, method, options, args: as `odeint`'s.
        solver: `odeint` itself, for gradients of gradients of compiled solves.

    Returns:
        The states at the output times, [T, *y0.shape], or None if there was no such solve; and the kind, by which a
        solve is to be kept for the next one, or None if none is kept.
    """
    simple = type(y0) is Tensor and type(t) is Tensor and type(rtol) is float and type(atol) is float
    if not (simple and type(args) is tuple and (options is None or type(options) is dict)):
        return None, None
    if args and not isinstance(func, CompiledDynamics):
        return None, None
    if options == ON_DEVICE and not args:
        from .device_loop import solve_again as again_on_device  # only those who ask for it wait for its import

        return again_on_device(func, y0, t, rtol, atol, method), None
    if isinstance(func, CompiledDynamics):
        return _compiled_again(func, y0, t, rtol, atol, method, options, args, solver)
    if options:
        return None, None
    kind = _kind_of(func, y0, t, rtol, atol, method)
    loop = None if kind is None else idle_loops.take(kind)
    if loop is None or not callable(func):
        return None, kind
    loop.dynamics.set(func, y0)
    ys = loop.solve(plain(y0))
    idle_loops.put(kind, loop)
    return ys, kind


def _compiled_again(
    func: CompiledDynamics,
    y0: Tensor,
    t: Tensor,
    rtol: float,
    atol: float,
    method: str | None,
    options: Any,
    args: tuple[Any, ...],
    solver: Callable[..., Any],
) -> tuple[Tensor | None, Kind | None]:
    """The same where func is compiled, and keeps the last solve itself."""
    if options and options != PER_SAMPLE:
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


def _kind_of(func: Func, y0: Tensor, t: Tensor, rtol: float, atol: float, method: str | None) -> Kind | None:
    """What a solve without options has in common with others that the same loop can do; None if none is kept for it."""
    if (
        y0.is_cpu
        and t.is_cpu
        and t.dim() == 1
        and t.is_floating_point()
        and (method is None or type(method) is str)
        and not t.requires_grad
        and not has_callbacks(func)
        and compiled_here()
        and not torch.is_inference_mode_enabled()
    ):
        grad = torch.is_grad_enabled()
        return y0.dtype, y0.shape, tuple(t.tolist()), rtol, atol, method, grad, torch.get_num_threads()
    return None


class IdleLoops(threading.local):
    """Those of a thread, the least recently used first. A loop at work is not among them: func may solve itself.

    Their dynamics are `Dynamics` without a func.
    """

    MOST = 16

    def __init__(self) -> None:
        self._loops: OrderedDict[Any, Any] = OrderedDict()

    def take(self, kind: Kind) -> AdaptiveLoop | FixedGridLoop | None:
        """Returns the one for a kind, which is then no longer here."""
        return self._loops.pop(kind, None)

    def put(self, kind: Any, loop: Any) -> None:
        """Keeps a loop whose solve has succeeded, and nothing of what it solved."""
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
