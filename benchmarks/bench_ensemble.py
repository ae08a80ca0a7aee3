"""Many trajectories of the Lorenz system with a step size each: time, memory, and where the time goes."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import pyode

from .cases import Counted, lorenz

TITLE = "Ensembles of Lorenz systems (t in [0, 1], rtol = atol = 1e-6, float32, dopri5, a step size each)"
COLUMNS = {
    "samples": "trajectories",
    "seconds": "time [s]",
    "mean_steps": "steps, mean",
    "rounds": "steps, slowest",
    "f_share": "share of f",
    "compact_seconds": "compact [s]",
    "rate": "trajectories / s",
    "megabytes": "peak memory [MB]",
}
SIZES = tuple(10**k for k in range(2, 7))
T = torch.tensor([0.0, 1.0])


def starts(n: int) -> Tensor:
    """n of them around the attractor: [n, 3]."""
    generator = torch.Generator().manual_seed(2)
    return torch.tensor([1.0, 1.0, 25.0]) + 2 * torch.randn(n, 3, generator=generator)


def solve(y0: Tensor, f: Any = lorenz, compact: bool = False) -> pyode.Solution:
    """By a step size for each."""
    return pyode.solve_ivp(f, y0, T, rtol=1e-6, atol=1e-6, compact=compact)


class Timed:
    """A func and the seconds spent in it."""

    def __init__(self, f: Any) -> None:
        self.f, self.seconds = f, 0.0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y)."""
        began = time.perf_counter()
        k: Tensor = self.f(t, y)
        self.seconds += time.perf_counter() - began
        return k


def check() -> None:
    """A trajectory does not depend on how many there are."""
    y0 = starts(1000)
    many, few = solve(y0), solve(y0[:10])
    assert many.success
    assert torch.equal(many.ys[:, :10], few.ys)


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every number of trajectories; the largest are solved once."""
    rows = []
    with torch.no_grad():
        check()
        for n in SIZES:
            y0, best, f = starts(n), float("inf"), Timed(lorenz)
            spent = 0.0
            while spent < seconds / 4 or best == float("inf"):
                timed = Timed(lorenz)
                began = time.perf_counter()
                solution = solve(y0, timed)
                took = time.perf_counter() - began
                spent += took
                if took < best:
                    best, f = took, timed
            began = time.perf_counter()
            solve(y0, compact=True)
            compact = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append(
                {
                    "samples": n,
                    "seconds": best,
                    "mean_steps": float(solution.stats.n_steps.double().mean()),
                    "rounds": int(solution.stats.n_steps.max()),
                    "f_share": f.seconds / best,
                    "compact_seconds": compact,
                    "rate": n / best,
                    "megabytes": peak,
                }
            )
    return rows


@pytest.mark.parametrize("samples", SIZES[:3])
def test_ensemble(benchmark: Any, samples: int) -> None:
    y0 = starts(samples)
    counted = Counted(lorenz)
    with torch.no_grad():
        check()
        benchmark(solve, y0, counted)
    assert counted.n
