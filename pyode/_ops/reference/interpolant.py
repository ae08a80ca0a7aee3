"""Dense output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Layout
from .controller import Controller
from .sums import stage_combine, widened


class Interpolant:
    """For each stage the coefficients of x, x^2, ... in its weight, and the weights at x = 1."""

    def __init__(self, coefficients: tuple[tuple[float, ...], ...], end: tuple[float, ...]) -> None:
        self.coefficients, self.end = coefficients, end

    def weights_at(self, x: float) -> tuple[float, ...]:
        """The weights at position x of a step."""
        if x == 1.0:
            return self.end
        weights = []
        for row in self.coefficients:
            weight = 0.0
            for c in reversed(row):
                weight = (weight + c) * x
            weights.append(weight)
        return tuple(weights)


def interpolate_at(interpolant: Interpolant, x: Tensor, y: Tensor, ks: list[Tensor], dt: float | Tensor) -> Tensor:
    """The state at position x, a 0-dim tensor that may require a gradient, of a joint step."""
    wide = widened(y)
    total: Tensor | float = 0.0
    for row, k in zip(interpolant.coefficients, ks):
        if any(row):
            weight: Tensor | float = 0.0
            for c in reversed(row):
                weight = (weight + c) * x
            total = total + weight * widened(k)
    return (wide + dt * total).to(y.dtype)


def interpolate(
    layout: Layout, interpolant: Interpolant, controller: Controller, y: Tensor, ks: list[Tensor], out: Tensor
) -> None:
    """Writes all outputs that the last step passed to their rows of `out`, [T, ...]."""
    single = Layout(1, layout.size, layout.segments, layout.dtype, layout.device)
    for b, (s, times) in enumerate(zip(controller._samples, controller._times)):
        for i in range(s.output_begin, s.output_end):
            time = times.sign * times.outputs[i]
            weights = interpolant.weights_at(1.0 if time == s.t else (time - s.t_prev) / s.dt_prev)
            step = torch.tensor([s.dt_prev], dtype=torch.float64, device="cpu")
            if layout.samples == 1:
                out[i] = stage_combine(single, weights, y, ks, step)
            else:
                out[i, b] = stage_combine(single, weights, y[b], [k if k is None else k[b] for k in ks], step)
