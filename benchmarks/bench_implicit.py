"""Implicit methods: what a step takes, in time, evaluations, and iterations of Newton and of GMRES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyode

from .cases import Func, Mlp
from .timing import interleaved

TITLE = "Implicit methods (no gradients)"
COLUMNS = {
    "case": "case",
    "method": "method",
    "steps": "steps",
    "milliseconds": "a step [ms]",
    "evaluations": "evaluations a step",
    "newton": "Newton iterations a step",
    "krylov": "GMRES iterations a step",
    "error": "error",
}


@dataclass
class StiffCase:
    """dy/dt = f(t, y) from y0 through all of t, a step to each; float64.

    Attributes:
        tolerance: how far its end may be from that with steps of a quarter, relative to the largest number.
    """

    name: str
    f: Func
    y0: Tensor
    t: Tensor
    method: str
    tolerance: float

    def solve(self, stats: pyode.Stats | None = None) -> Tensor:
        """The state at the end."""
        with torch.no_grad():
            return pyode.odeint(self.f, self.y0, self.t, method=self.method, options={"stats": stats})[-1]

    @property
    def steps(self) -> int:
        """How many."""
        return len(self.t) - 1

    def error(self) -> float:
        """Of the end, against steps of a quarter in float64, relative to the largest number."""
        quarters = torch.arange(4, dtype=torch.float64) / 4
        t = self.t.double()
        fine = torch.cat([(t[:-1, None] + quarters * t.diff()[:, None]).reshape(-1), t[-1:]])
        end = replace(self, t=fine).solve()
        return float((self.solve() - end).abs().max() / end.abs().max())


def robertson(t: Tensor, y: Tensor) -> Tensor:
    """Three reactions with rates from 0.04 to 3e7 (Hairer, Wanner II, IV.1)."""
    a, b, c = y.unbind(-1)
    slow, middle, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([middle - slow, slow - middle - fast, fast], -1)


def heat(n: int) -> Func:
    """u' = u_xx on (0, 1), zero at both ends, by central differences at n points."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        padded = nn.functional.pad(y, (1, 1))
        return (padded[2:] - 2 * y + padded[:-2]) * (n + 1) ** 2

    return f


class StiffMlp(nn.Module):
    """A tanh network beside decay with rates from 1 to 10 000; [B, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp([8, 64, 8]).double()
        self.rates = torch.logspace(0, 4, 8, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        return self.net(t, y) - self.rates * y


def bump(n: int) -> Tensor:
    """A smooth start for the heat equation."""
    return torch.exp(-200 * (torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1] - 0.4) ** 2)


def cases() -> dict[str, StiffCase]:
    """All, by name and method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, states = StiffMlp(), torch.randn(16, 8, dtype=torch.float64)
    geometric = torch.cat([torch.zeros(1), torch.logspace(-6, torch.tensor(40.0).log10().item(), 40)])
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    def even(end: float, steps: int) -> Tensor:
        return torch.linspace(0, end, steps + 1, dtype=torch.float64)

    all_cases = [
        StiffCase("Robertson, to t = 40 in 40 growing steps", robertson, start, geometric, "radauIIA5", 1e-5),
        StiffCase("Robertson, to t = 40 in 40 growing steps", robertson, start, geometric, "trbdf2", 1e-2),
        StiffCase("heat, 400 points, dt = 1e-3", heat(400), bump(400), even(0.02, 20), "trbdf2", 1e-2),
        StiffCase("heat, 100 000 points, dt = 1e-8", heat(100_000), bump(100_000), even(3e-8, 3), "trbdf2", 1e-6),
        StiffCase("heat, 100 000 points, dt = 1e-7", heat(100_000), bump(100_000), even(3e-7, 3), "trbdf2", 1e-6),
        *(
            StiffCase("stiff network, 16 x 8, dt = 0.05", network, states, even(1.0, 20), method, tolerance)
            for method, tolerance in (("implicit_euler", 0.1), ("sdirk2", 0.1), ("trbdf2", 0.1), ("radauIIA5", 1e-3))
        ),
    ]
    return {f"{case.name}, {case.method}": case for case in all_cases}


def check(case: StiffCase) -> float:
    """The steps are small enough to mean something; returns their error."""
    error = case.error()
    assert error < case.tolerance
    return error


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every case."""
    rows = []
    for name, case in cases().items():
        error, stats = check(case), pyode.Stats()
        case.solve(stats)
        solve: Callable[[], Any] = case.solve
        time = interleaved({name: solve}, rounds=3, seconds=seconds, warm_up=0)[name]
        rows.append(
            {
                "case": case.name,
                "method": case.method,
                "steps": case.steps,
                "milliseconds": 1e3 * time / case.steps,
                "evaluations": stats.n_f_evals / case.steps,
                "newton": stats.n_newton / case.steps,
                "krylov": stats.n_krylov / case.steps,
                "error": error,
            }
        )
    return rows


@pytest.mark.parametrize("case", cases().values(), ids=cases())
def test_implicit(benchmark: Any, case: StiffCase) -> None:
    benchmark.group = case.name
    check(case)
    benchmark.pedantic(case.solve, rounds=3, warmup_rounds=1)
