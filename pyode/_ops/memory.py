"""Tensors that the compiled ops are given to make others like, or to read only."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Freed, this makes glibc's malloc keep twice as much from now on (mallopt(3), M_MMAP_THRESHOLD): what a solve frees at
# its end would go back to the system otherwise, for the next one to fetch page by page.
torch.empty(1 << 24, dtype=torch.uint8, device="cpu")

# Tells of a tensor what there is to know, without Python objects; None in older torch.
exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)

# How many hold on to a storage of a given address; None where torch doesn't tell: then no tensor is given out again.
storage_uses = getattr(torch._C, "_storage_Use_Count", None) if hasattr(Tensor, "_use_count") else None


@lru_cache(maxsize=64)
def unit_steps(samples: int, device: torch.device) -> Tensor:
    """A step size of 1 for each sample; never written."""
    return torch.ones(samples, dtype=torch.float64, device=device)


def with_views(like: Tensor) -> tuple[Tensor, ...]:
    """A new tensor like another, and its rows."""
    whole = torch.empty_like(like)
    return (whole, *whole.unbind())


def as_view(like: Tensor) -> Tensor:
    """A trial's time, a view as those of stages are: torch.compile would compile func anew for what is none."""
    return like.new_empty((2, *like.shape))[0]


@lru_cache(maxsize=64)
def pattern(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to make others like, which is faster than to name shape, dtype and device; never written or read."""
    return torch.empty(shape, dtype=dtype, device=device)
