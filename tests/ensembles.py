"""Batches of problems of different difficulty, whose rows are computed to the same bits in any company."""

from __future__ import annotations

import torch
from torch import Tensor


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    """Each row an oscillator whose last number is its mu; sums and products only."""
    x, v, mu = y.unbind(-1)
    return torch.stack([v, mu * (1 - x * x) * v - x, torch.zeros_like(mu)], -1)


def oscillators(n: int, dtype: torch.dtype = torch.float64, stiffest: float = 30.0) -> Tensor:
    """n of them with mu from 1 to `stiffest`: [n, 3]."""
    mu = torch.linspace(1, stiffest, n, dtype=dtype)
    return torch.stack([torch.full_like(mu, 2.0), torch.zeros_like(mu), mu], -1)


def decay(t: Tensor, y: Tensor) -> Tensor:
    """Every row dies out; of any shape."""
    return -y


def blow_up(t: Tensor, y: Tensor) -> Tensor:
    """y' = y^2, which reaches infinity at t = 1 / y0."""
    return y * y


def nan_above(limit: float, func):
    """func with nan in the rows where the first number is above a limit."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y[:, :1] > limit, torch.nan, func(t, y))

    return f


def counts(solution) -> Tensor:
    """[4, B] of a solution's statistics, last_dt among them."""
    stats = solution.stats
    return torch.stack([stats.n_f_evals, stats.n_accepted, stats.n_rejected, stats.last_dt])


def columns(draw_sign: Tensor, lengths: Tensor, steps: Tensor) -> Tensor:
    """[T, B] times in directions of their own, padded with their last."""
    t = torch.cat([steps.new_zeros(1, steps.shape[1]), steps.cumsum(0)])
    last = t.gather(0, lengths[None])
    index = torch.arange(len(t))[:, None]
    return draw_sign * torch.where(index <= lengths, t, last)
