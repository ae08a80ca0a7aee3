"""Many trajectories of the Lorenz system with a step size each: time, memory, and where the time goes."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import pyode
from pyode._ops import native

from .cases import Counted, lorenz
from .timing import seconds_of

TITLE = "Ensembles of Lorenz systems (t in [0, 1], rtol = atol = 1e-6, float32, dopri5, a step size each)"
COLUMNS = {
    "samples": "trajectories",
    "mean_steps": "steps, mean",
    "rounds": "steps, slowest",
    "seconds": "time [s]",
    "rate": "trajectories / s",
    "megabytes": "peak memory [MB]",
    "f": "share of f",
    "stages": "stage sums",
    "error_norm": "error norm",
    "controller": "controller",
    "rest": "rest",
    "compact_seconds": "compact [s]",
    "compiled_seconds": "compiled [s]",
}
SIZES = tuple(10**k for k in range(2, 7))
T = torch.tensor([0.0, 1.0])


def starts(n: int) -> Tensor:
    """n of them around the attractor: [n, 3]."""
    generator = torch.Generator().manual_seed(2)
    return torch.tensor([1.0, 1.0, 25.0]) + 2 * torch.randn(n, 3, generator=generator)


def solve(y0: Tensor, f: Any = lorenz, **arguments: Any) -> pyode.Solution:
    """By a step size for each."""
    return pyode.solve_ivp(f, y0, T, rtol=1e-6, atol=1e-6, **arguments)


class Clock:
    """Adds up the seconds spent in functions, by name, without those spent in others of them."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.inside = 0.0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its seconds noted."""

        def call(*arguments: Any, **named: Any) -> Any:
            outside, self.inside, began = self.inside, 0.0, time.perf_counter()
            result = function(*arguments, **named)
            took = time.perf_counter() - began
            self.seconds[name] += took - self.inside
            self.inside = outside + took
            return result

        return call


def taken_apart(y0: Tensor) -> tuple[pyode.Solution, dict[str, float]]:
    """A solve and what has which share of its time. Its ops are called one by one, as `check_every` has them."""
    clock = Clock()
    ops = {"stages": native, "error_norm": native.Controller, "run": native.Controller}
    with ExitStack() as stack:
        for name, owner in ops.items():
            stack.enter_context(patch.object(owner, name, clock.timed(name, getattr(owner, name))))
        began = time.perf_counter()
        solution = solve(y0, clock.timed("f", lorenz), options={"check_every": 2})
        whole = time.perf_counter() - began
    spent = {"controller" if name == "run" else name: s / whole for name, s in clock.seconds.items()}
    return solution, {**spent, "rest": 1 - sum(spent.values())}


def check() -> None:
    """A trajectory does not depend on how many there are, nor on how the solve is carried out."""
    y0 = starts(1000)
    many, few = solve(y0), solve(y0[:10])
    assert many.success
    assert torch.equal(many.ys[:, :10], few.ys)
    assert torch.equal(taken_apart(y0)[0].ys, many.ys)
    assert torch.allclose(solve(y0, compile=True).ys, many.ys, rtol=1e-3)


def least(seconds: float, y0: Tensor, **arguments: Any) -> float:
    """The time of a solve, the least of some in so many seconds."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        times.append(seconds_of(lambda: solve(y0, **arguments)))
    return min(times)


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every number of trajectories; the largest are solved once."""
    rows = []
    with torch.no_grad():
        check()
        for n in SIZES:
            y0 = starts(n)
            took = least(seconds / 5, y0)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            solution, shares = taken_apart(y0)
            row = {
                "samples": n,
                "mean_steps": float(solution.stats.n_steps.double().mean()),
                "rounds": int(solution.stats.n_steps.max()),
                "seconds": took,
                "rate": n / took,
                "megabytes": peak,
                **shares,
                "compact_seconds": least(seconds / 10, y0, compact=True),
                "compiled_seconds": least(seconds / 10, y0, compile=True),
            }
            rows.append(row)
    return rows


@pytest.mark.parametrize("samples", SIZES[:3])
def test_ensemble(benchmark: Any, samples: int) -> None:
    y0 = starts(samples)
    counted = Counted(lorenz)
    with torch.no_grad():
        check()
        benchmark(solve, y0, counted)
    assert counted.n
