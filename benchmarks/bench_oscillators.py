"""256 van der Pol oscillators, from easy to stiff, in one batch: the work of each against that of its solve alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import pyode

from .timing import seconds_of

TITLE = "256 van der Pol oscillators, mu from 1 to 30 (t in [0, 20], rtol 1e-5, atol 1e-7, float64, dopri5)"
COLUMNS = {
    "solver": "step sizes",
    "mean": "accepted steps, mean",
    "most": "accepted steps, most",
    "to_alone": "mean / alone",
    "calls": "calls of f",
    "rows": "rows given to f",
    "seconds": "time [s]",
    "error": "largest error",
}
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # torchode does
MU = torch.linspace(1, 30, 256, dtype=torch.float64)
Y0 = torch.tensor([2.0, 0.0], dtype=torch.float64).expand(256, 2).contiguous()
T = torch.tensor([0.0, 20.0], dtype=torch.float64)
TOLERANCES = {"rtol": 1e-5, "atol": 1e-7}


@dataclass
class Result:
    """The steps that each sample has accepted, and its last state."""

    n_accepted: Tensor
    y: Tensor


class Oscillators:
    """The right-hand side, for any rows; counts its calls and their rows."""

    def __init__(self) -> None:
        self.calls = self.rows = 0

    def __call__(self, t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        """dy/dt of y [B, 2] with mu [B]."""
        self.calls += 1
        self.rows += len(y)
        x, v = y.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x], -1)


def by_pyode(f: Oscillators, rows: slice = slice(None), **arguments: Any) -> Result:
    solution = pyode.solve_ivp(f, Y0[rows], T, args=(MU[rows],), **(TOLERANCES | arguments))
    return Result(solution.stats.n_accepted, solution.ys[-1])


def by_running_rows(f: Oscillators) -> Result:
    """With mu beside the state, where it is cut like it."""
    solution = pyode.solve_ivp(lambda t, s: (f(t, *s), torch.zeros_like(s[1])), (Y0, MU), T, compact=True, **TOLERANCES)
    return Result(solution.stats.n_accepted, solution.ys[0][-1])


def one_after_the_other(f: Oscillators) -> Result:
    several = [by_pyode(f, slice(b, b + 1)) for b in range(len(MU))]
    return Result(torch.cat([r.n_accepted for r in several]), torch.cat([r.y for r in several]))


def by_torchode(f: Oscillators) -> Result:
    import torchode

    term = torchode.ODETerm(lambda t, y: f(t, y, MU))
    control = torchode.IntegralController(**TOLERANCES, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
    found = solver.solve(torchode.InitialValueProblem(y0=Y0, t_eval=T.expand(len(Y0), 2).contiguous()))
    return Result(found.stats["n_accepted"], found.ys[:, -1])


def by_scipy(f: Oscillators) -> Result:
    """RK45, whose error weights are 3/2 of dopri5's, on plain numbers, one after the other."""
    from scipy.integrate import solve_ivp

    accepted, states = [], []
    for mu in MU.tolist():

        def one(t: float, y: Any, mu: float = mu) -> list[float]:
            f.calls += 1
            f.rows += 1
            return [y[1], mu * (1 - y[0] * y[0]) * y[1] - y[0]]

        found = solve_ivp(one, (0.0, 20.0), [2.0, 0.0], **TOLERANCES)
        accepted.append(len(found.t) - 1)
        states.append(found.y[:, -1].tolist())
    return Result(torch.tensor(accepted), torch.tensor(states, dtype=torch.float64))


CONTENDERS: dict[str, Callable[[Oscillators], Result]] = {
    "one for all": lambda f: by_pyode(f, control="joint"),
    "one for each": by_pyode,
    "one for each, compact": by_running_rows,
    "alone, one after the other": one_after_the_other,
    "torchode": by_torchode,
    "SciPy's RK45, one after the other": by_scipy,
}


@cache
def exact() -> Tensor:
    """The last states, to more digits."""
    return by_pyode(Oscillators(), method="dopri8", rtol=1e-12, atol=1e-13).y


def check() -> None:
    """Each sample takes the steps that it takes alone, and has the same bits."""
    together = by_pyode(Oscillators())
    for b in (0, 100, 255):
        alone = by_pyode(Oscillators(), slice(b, b + 1))
        assert torch.equal(alone.n_accepted[0], together.n_accepted[b])
        assert torch.equal(alone.y[0], together.y[b])


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for each contender; the time is the least of three, of the slow ones of one."""
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        check()
        alone = float(one_after_the_other(Oscillators()).n_accepted.double().mean())
        for name, solve in CONTENDERS.items():
            f = Oscillators()
            try:
                result = solve(f)
            except ModuleNotFoundError:
                continue
            times = [seconds_of(lambda solve=solve: solve(Oscillators()))]  # type: ignore[misc]
            while len(times) < 3 and sum(times) < seconds / 6:
                times.append(seconds_of(lambda solve=solve: solve(Oscillators())))  # type: ignore[misc]
            accepted = result.n_accepted.double()
            rows.append(
                {
                    "solver": name,
                    "mean": float(accepted.mean()),
                    "most": int(accepted.max()),
                    "to_alone": float(accepted.mean()) / alone,
                    "calls": f.calls,
                    "rows": f.rows,
                    "seconds": min(times),
                    "error": float((result.y - exact()).abs().max()),
                }
            )
    return rows


@pytest.mark.parametrize("solver", ["one for all", "one for each", "one for each, compact"])
def test_oscillators(benchmark: Any, solver: str) -> None:
    with torch.no_grad():
        check()
        benchmark(CONTENDERS[solver], Oscillators())
