"""Under which circumstances func is evaluated: those of the forward pass come back when it is evaluated later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .parameters import Loan


class Circumstances:
    """What func is evaluated under now, beside its arguments: autocast, the parameters of its modules.

    Args:
        func: the user's.
        device: of the state.
        params: those whose hooks are not to be called when it is evaluated again.
    """

    def __init__(self, func: Any, device: torch.device, params: Sequence[Tensor] = ()) -> None:
        self._params = params
        self._loan = Loan(func)
        self._kind = kind = device.type
        self._enabled = torch.is_autocast_enabled(kind)
        self._autocast = partial(
            torch.autocast,
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=self._enabled,
            cache_enabled=torch.is_autocast_cache_enabled(),
        )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within it all is as it was, and hooks on the parameters are not called.

        They are to see the whole gradient, once, not every stage's share.
        """
        hooks = [(held, dict(held)) for held in (p._backward_hooks for p in self._params) if held]
        for held, _ in hooks:
            held.clear()
        differs = self._enabled or torch.is_autocast_enabled(self._kind)
        try:
            with self._loan.renewed(), self._autocast() if differs else contextlib.nullcontext():
                yield
        finally:
            for held, its in hooks:
                held.update(its)
