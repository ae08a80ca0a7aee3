"""The seam: the ops in two interchangeable modules of the same names, `native` (compiled) and `reference` (torch)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Literal

from torch import Tensor

from . import native, reference
from .contract import Layout

forced: ContextVar[str] = ContextVar("pyode_backend", default="auto")


def backend_for(y: Tensor) -> ModuleType:
    """The module whose ops work on states like y: the compiled one where it can."""
    return native if forced.get() != "reference" and native.supports(y) else reference


def backend_of(layout: Layout) -> ModuleType:
    """The module that made a layout."""
    return native if isinstance(layout, native.Layout) else reference


@contextlib.contextmanager
def backend(name: Literal["auto", "reference"]) -> Iterator[None]:
    """Within it, solves use the named ops: "auto", the default, or "reference", plain torch.

    For comparing the two, in tests and benchmarks, and to see whether a problem lies in the compiled code.
    """
    if name not in ("auto", "reference"):
        from ..errors import InvalidValue

        raise InvalidValue(f"backend must be 'auto' or 'reference', not {name!r}")
    token = forced.set(name)
    try:
        yield
    finally:
        forced.reset(token)
