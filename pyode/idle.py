"""Loops of solves that are done, kept for the next solve of the same kind: making one takes longer than a step."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import backend_for, native
from .callbacks import has_callbacks
from .control import Times
from .state import Dynamics, Form, Func
from .stepping.adaptive import AdaptiveLoop
from .stepping.fixed_grid import FixedGridLoop
from .stepping.hooks import NO_HOOKS

LARGEST = 1 << 18  # bytes of a state; a loop keeps the memory of a few


@dataclass
class IdleLoop:
    """A loop that has no func."""

    form: Form
    loop: AdaptiveLoop | FixedGridLoop

    def solve(self, func: Func, y0: Tensor) -> Tensor:
        """Solves for another func and start: [T, *y0.shape]."""
        loop, y0 = self.loop, self.form.pack(y0)
        loop.dynamics = Dynamics(func, self.form, y0, partial(loop.ops.copy, loop.layout))
        return loop.solve(y0)


class IdleLoops(threading.local):
    """Those of a thread, the least recently used first. A loop at work is not among them: func may solve itself."""

    MOST = 16

    def __init__(self) -> None:
        self._loops: OrderedDict[Any, IdleLoop] = OrderedDict()

    def take(self, key: Any) -> IdleLoop | None:
        """Returns the one for a key, which is then no longer here."""
        return self._loops.pop(key, None)

    def put(self, key: Any, idle: IdleLoop) -> None:
        """Keeps a loop whose solve has succeeded, and nothing of what it solved."""
        idle.loop.dynamics, idle.loop.hooks = None, NO_HOOKS  # type: ignore[assignment]
        self._loops[key] = idle
        if len(self._loops) > self.MOST:
            self._loops.popitem(last=False)

    def clear(self) -> None:
        """Forgets all."""
        self._loops.clear()


idle_loops = IdleLoops()


def kind_of(func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any) -> Any:
    """What a solve without options has in common with others that the same loop can do; None if no loop is kept for it.

    Everything that the loop was made from is in it, by value.
    """
    if (
        type(y0) is Tensor
        and type(t) is Tensor
        and type(rtol) is float
        and type(atol) is float
        and y0.is_cpu
        and t.is_cpu
        and t.dim() == 1
        and not t.requires_grad
        and not has_callbacks(func)
        and backend_for(y0) is native
        and not torch.is_inference_mode_enabled()
    ):
        grad = torch.is_grad_enabled()
        return y0.dtype, y0.shape, tuple(t.tolist()), rtol, atol, method, grad, torch.get_num_threads()
    return None


def keep(kind: Any, form: Form, loop: Any) -> None:
    """Makes the loop of a solve that has succeeded idle, if it is one that can be."""
    if (
        isinstance(loop, (AdaptiveLoop, FixedGridLoop))
        and loop.layout.samples * loop.layout.size * loop.layout.dtype.itemsize <= LARGEST
    ):
        loop.times = Times(loop.times.tensor.detach().clone(), loop.times.values)  # the user's may change
        if isinstance(loop, FixedGridLoop):
            loop.grid = loop.times.tensor  # without options, steps end where the outputs are
        idle_loops.put(kind, IdleLoop(form, loop))
