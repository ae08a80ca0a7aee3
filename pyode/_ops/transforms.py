"""Whether torch differentiates or maps a function itself, with tensors that wrap others or carry tangents."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

innermost_transform = torch._C._functorch.peek_interpreter_stack  # of torch.func's that are under way, or None


def transforming() -> bool:
    """Whether one of torch.func's transforms or forward-mode differentiation is under way."""
    return innermost_transform() is not None or forward_ad._current_level >= 0
