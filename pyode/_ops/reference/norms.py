"""The scaled error and its mean squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Layout, largest, wide_dtype
from .sums import per_sample, weighted_sum, widened


def scaled_error(error: Tensor, y0: Tensor, y1: Tensor, rtol: float | Tensor, atol: float | Tensor) -> Tensor:
    """error / (atol + rtol max(|y0|, |y1|)); 0 where there is no error, nan where the state is not finite."""
    if y0.is_complex():  # tolerances are given twice, for both members of a pair
        rtol, atol = (x[..., 0] if isinstance(x, Tensor) else x for x in (rtol, atol))
    size = torch.maximum(y0.abs(), y1.abs())
    tolerated = atol + rtol * size
    return torch.where(error == 0, error, error / tolerated) + (size - size)


def scaled_step_error(
    layout: Layout,
    weights: tuple[float, ...],
    y0: Tensor,
    y1: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> Tensor:
    """The scaled error of dt sum_j w_j k_j, of the state's shape."""
    wide = widened(y0)
    error = (per_sample(dt, layout, wide) * weighted_sum(weights, ks)).expand(wide.shape)
    return scaled_error(error, wide, widened(y1), rtol, atol)


def mean_square_errors(
    layout: Layout,
    rows: Sequence[tuple[float, ...]],
    y0: Tensor,
    y1: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> list[float]:
    """See native.mean_square_errors."""
    with torch.no_grad():
        ratios = [scaled_step_error(layout, weights, y0, y1, ks, dt, rtol, atol) for weights in rows]
        return [largest([mean for (mean,) in segment_means(layout, ratio)]) for ratio in ratios]


def segment_means(layout: Layout, ratio: Tensor) -> list[list[float]]:
    """The mean squares over each segment, of every sample; 0 over an empty one."""
    flat = ratio.detach().abs().reshape(layout.samples, layout.size)
    flat = flat.to(wide_dtype(flat.device)).square()
    return [
        flat[:, begin:end].mean(1).tolist() if end > begin and layout.samples else [0.0] * layout.samples
        for begin, end in zip(layout.segments, layout.segments[1:])
    ]
