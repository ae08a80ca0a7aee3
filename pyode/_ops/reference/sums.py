"""Stage sums and their transpose, and what copies rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..contract import Layout


def widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def per_sample(x: Tensor, layout: Layout, y: Tensor) -> Tensor:
    """[B], of each sample a number, so that it multiplies a state like y."""
    x = x.to(y.device, y.real.dtype if y.is_complex() else y.dtype)
    return x.reshape(()) if layout.samples == 1 else x.reshape(-1, *[1] * (y.dim() - 1))


def weighted_sum(weights: tuple[float, ...], ks: list[Tensor]) -> Tensor | float:
    """sum_j w_j k_j over the weights that are not 0."""
    total: Tensor | None = None
    for w, k in zip(weights, ks):
        if w:
            k = widened(k)
            total = w * k if total is None else torch.add(total, k, alpha=w)
    return 0.0 if total is None else total


def stage_combine(layout: Layout, weights: tuple[float, ...], y: Tensor, ks: list[Tensor], dt: Tensor) -> Tensor:
    """Returns y + dt sum_j w_j k_j; dt is [B]."""
    wide = widened(y)
    step = per_sample(dt, layout, wide)
    moved = wide + step * weighted_sum(weights, ks)
    if layout.samples > 1:
        moved = torch.where(step == 0, wide, moved)
    return moved.to(y.dtype)


def stage_vjp(layout: Layout, weights: tuple[float, ...], g: Tensor, dt: Tensor) -> list[Tensor | None]:
    """Returns [dt w_j g for every j], None where w_j is 0."""
    wide = widened(g)
    scaled = per_sample(dt, layout, wide) * wide
    return [(w * scaled).to(g.dtype) if w else None for w in weights]


def opposites(half: Layout, like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function of f and g that makes [f, -g], like a tensor; `half` is the layout of each."""
    return lambda f, g: torch.stack([f, -g])


def select_rows(layout: Layout, moved: Tensor, stayed: Tensor, accepted: Tensor) -> Tensor:
    """Rows of `moved` where accepted, of `stayed` elsewhere."""
    chosen = accepted.bool().to(moved.device).reshape(-1, *[1] * (moved.dim() - 1))
    return torch.where(chosen, moved, stayed)


def new_states(n: int, y0: Tensor) -> Tensor:
    """A place for n states like y0, [n, ...]."""
    return y0.new_empty((n, *y0.shape))


def copy(layout: Layout, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Copies a state, to the beginning of `out` if given."""
    return y.clone() if out is None else out.view(-1, *y.shape)[0].copy_(y)
