"""Solves like one before, by what that one has made: checking arguments and making a loop takes longer than a step.

Such a solve differs in func, if that is not compiled, and in the state's numbers; of all else its kind is made, by
value. Nothing is kept of func and of the states of a solve.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._ops import forced, native
from ._ops.native import IdleLoops, Inspector, Kind, Kinds, SolveAgain, inspector
from ._ops.transforms import innermost_transform
from .callbacks import NAMES as CALLBACKS
from .compiled.dynamics import CompiledDynamics
from .compiled.samples import samples_again
from .compiled.solve import joint_again
from .state import Dynamics, Func
from .stepping.adaptive import AdaptiveLoop
from .stepping.fixed_grid import FixedGridLoop
from .stepping.hooks import NO_HOOKS, raise_it

PER_SAMPLE = {"control": "per_sample"}
LARGEST = 1 << 18  # bytes of a state; a loop keeps the memory of a few


def kinds_by(inspector: Inspector) -> Kinds:
    """What tells the kind of a solve, by an inspector's looks."""
    return Kinds(inspector, forced, torch.is_grad_enabled, innermost_transform, torch.get_num_threads, forward_ad)


kinds = kinds_by(inspector)


def solve_again(
    func: Func,
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: Any,
    options: Any,
    args: Any,
    solver: Callable[..., Any],
) -> tuple[Tensor | None, Kind | None]:
    """Solves as the last solve of the same kind did, where there are no options, but for a compiled func's PER_SAMPLE.

    Args:
        func, y0, t, rtol, atol, method, options, args: as `odeint`'s.
        solver: `odeint` itself, for gradients of gradients of compiled solves.

    Returns:
        The states at the output times, [T, *y0.shape], or None if there was no such solve; and the kind, by which a
        solve is to be kept for the next one, or None if none is kept.
    """
    if isinstance(func, CompiledDynamics):  # which keeps its last solves itself
        plain = (not options or options == PER_SAMPLE) and type(args) is tuple
        kind = kinds.of(y0, t, rtol, atol, ("odeint", method)) if plain else None
        if kind is None:
            return None, None
        compiled = func.with_args(args)

        def eagerly(y: Tensor) -> Tensor:
            found: Tensor = solver(compiled.func, y, t, rtol, atol, method, options)
            return found

        if not options:
            return joint_again(compiled, kind, y0, t, eagerly), kind
        samples = samples_again(compiled, kind, y0, t, eagerly, raise_it)
        return None if samples is None else samples.solve(y0), kind
    ys, loop, kind = idle.loops.solve(func, y0, t, rtol, atol, method, options, args)
    if loop is not None and kind is not None:
        loop.dynamics.set(func)
        ys = loop.solve(y0)
        _put(kind, loop)
    return ys, kind


class Idle(threading.local):
    """A thread's loops that are not at work. Their dynamics are `Dynamics` without a func."""

    MOST = 16

    def __init__(self) -> None:
        self.loops = IdleLoops(kinds, CALLBACKS, torch.is_inference_mode_enabled, self.MOST)


idle = Idle()


def keep(kind: Any, loop: Any) -> None:
    """Makes the loop of a solve that has succeeded idle, if it is one that can be."""
    if (
        isinstance(kind, Kind)
        and isinstance(loop, (AdaptiveLoop, FixedGridLoop))
        and isinstance(loop.dynamics, Dynamics)
        and loop.layout.samples * loop.layout.size * loop.layout.dtype.itemsize <= LARGEST
    ):
        loop.keep_times()
        loop.hooks = NO_HOOKS
        _put(kind, loop)


def _put(kind: Kind, loop: Any) -> None:
    """Makes a loop idle, with nothing of what it solved."""
    if torch.is_grad_enabled():  # the solve's own are needed again where it is differentiated
        loop.dynamics = loop.dynamics.without_func()
    else:
        loop.dynamics.set(None)
        if isinstance(loop, AdaptiveLoop) and loop.single and loop.ops is native:  # nobody looks at its steps
            loop = SolveAgain(loop)
    idle.loops.put(kind, loop)
