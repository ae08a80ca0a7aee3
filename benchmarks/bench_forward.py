"""Solving without gradients: pyode, torchdiffeq, and f alone, evaluated as often as torchdiffeq does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq

import pyode

from .cases import Case, cases
from .timing import Contender, interleaved, repeated

TITLE = "Solving (dopri5, float32, rtol 1e-5, atol 1e-7, no gradients)"
COLUMNS = {
    "case": "case",
    "evaluations": "evaluations of f",
    "f_only_ms": "f only [ms]",
    "torchdiffeq_to_f": "torchdiffeq / f only",
    "pyode_to_f": "pyode / f only",
    "speedup": "pyode vs torchdiffeq",
}


def contenders(case: Case) -> dict[str, Contender]:
    """Those that are timed."""
    n = case.count_evaluations(torchdiffeq.odeint)
    return {
        "torchdiffeq": lambda: case.solve(torchdiffeq.odeint),
        "pyode": lambda: case.solve(pyode.odeint),
        "f only": repeated(case.f, n, case.t[0], case.y0),
    }


def check(case: Case) -> None:
    """Both solvers take the same steps and, but for float32 rounding that the dynamics amplify, agree."""
    stats = pyode.Stats()
    ours, theirs = case.solve(pyode.odeint, options={"stats": stats}), case.solve(torchdiffeq.odeint)
    n = case.count_evaluations(torchdiffeq.odeint)
    assert abs(stats.n_f_evals - n) <= 0.02 * n
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every case."""
    rows = []
    with torch.no_grad():
        for case in cases().values():
            check(case)
            times = interleaved(contenders(case), seconds=seconds)
            rows.append(
                {
                    "case": case.name,
                    "evaluations": case.count_evaluations(torchdiffeq.odeint),
                    "f_only_ms": 1e3 * times["f only"],
                    "torchdiffeq_ms": 1e3 * times["torchdiffeq"],
                    "pyode_ms": 1e3 * times["pyode"],
                    "torchdiffeq_to_f": times["torchdiffeq"] / times["f only"],
                    "pyode_to_f": times["pyode"] / times["f only"],
                    "speedup": times["torchdiffeq"] / times["pyode"],
                }
            )
    return rows


@pytest.mark.parametrize("solver", ["torchdiffeq", "pyode", "f only"])
@pytest.mark.parametrize("case", cases().values(), ids=cases())
def test_forward(benchmark: Any, case: Case, solver: str) -> None:
    benchmark.group = case.name
    with torch.no_grad():
        check(case)
        benchmark(contenders(case)[solver])
