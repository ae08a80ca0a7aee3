"""Which tensors a func uses beside its arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .errors import InvalidValue


def find_parameters(func: Any) -> list[Tensor]:
    """The parameters of a module; of a DataParallel replica, whose parameters are plain attributes, those.

    Raises:
        InvalidValue: func is not a module.
    """
    if not isinstance(func, nn.Module):
        raise InvalidValue(
            "func must be an nn.Module for its parameters to be found; name the tensors that it uses in "
            "options['params'] (an empty list if there are none)"
        )
    if not getattr(func, "_is_replica", False):
        return list(func.parameters())
    return [
        value
        for part in func.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and value.requires_grad
    ]
