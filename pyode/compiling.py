"""How a solve looks to torch.compile: a call that it does not look into."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch._C._dynamo import eval_frame
from torch.compiler import is_dynamo_compiling

# What torch.compile does with the frames of this thread; None outside of what it has compiled.
_at_work = getattr(eval_frame, "get_eval_frame_callback", lambda: "unknown")

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(f: Callable[P, R]) -> Callable[P, R]:
    """The same function; torch.compile breaks its graph at a call of it, and leaves the frames inside alone.

    As torch.compiler.disable has it, but without importing the compiler, which takes seconds, and without its wrapper's
    microseconds: it is asked only where it is there already, and at work. A compiled func within a solve remains
    compiled.
    """
    apart: list[Callable[P, R]] = []

    @wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules or (not is_dynamo_compiling() and _at_work() is None):
            return f(*args, **kwargs)
        if not apart:
            apart.append(sys.modules["torch._dynamo"].disable(f))
        return apart[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
