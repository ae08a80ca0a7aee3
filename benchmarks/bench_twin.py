"""The compiled ops against their twin in plain torch, in the same loops; needs nothing but torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pyode

from .cases import Case, cases, flat
from .timing import Contender, interleaved

TITLE = "pyode against its pure-Python twin (dopri5, float32, rtol 1e-5, atol 1e-7)"
COLUMNS = {
    "case": "case",
    "task": "task",
    "twin_ms": "pure Python [ms]",
    "pyode_ms": "pyode [ms]",
    "speedup": "pyode vs pure Python",
}
TRAINED = ("spiral20x2", "big256x64")


def solution(case: Case) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        return case.solve(pyode.odeint)


def tasks() -> dict[tuple[str, str], Contender]:
    """What is timed, by case and kind."""
    everything: dict[tuple[str, str], Contender] = {}
    for name, case in cases().items():
        everything[name, "solve"] = lambda case=case: solution(case)
    for name in TRAINED:
        case = cases()[name]
        for kind, odeint in (("direct", pyode.odeint), ("adjoint", pyode.odeint_adjoint)):
            everything[name, f"gradient, {kind}"] = lambda case=case, odeint=odeint: case.gradients(odeint)
    return everything


def by_twin(task: Contender) -> Any:
    """The same, in plain torch."""
    with pyode.backend("reference"):
        return task()


def check(task: Contender) -> None:
    """Both agree to rounding, which the dynamics amplify."""
    ours, twin = flat(task()), flat(by_twin(task))
    assert float((ours - twin).norm() / twin.norm()) < 1e-4


def contenders(task: Contender) -> dict[str, Contender]:
    """Those that are timed."""
    return {"pure Python": lambda: by_twin(task), "pyode": task}


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for each task."""
    rows = []
    for (case, kind), task in tasks().items():
        check(task)
        times = interleaved(contenders(task), seconds=seconds)
        rows.append(
            {
                "case": case,
                "task": kind,
                "twin_ms": 1e3 * times["pure Python"],
                "pyode_ms": 1e3 * times["pyode"],
                "speedup": times["pure Python"] / times["pyode"],
            }
        )
    return rows


def pytest_generate_tests(metafunc: Any) -> None:
    """Every task with both; a hook, so that this file can do without pytest."""
    metafunc.parametrize("solver", ["pure Python", "pyode"])
    metafunc.parametrize("key", tasks(), ids=", ".join)


def test_twin(benchmark: Any, key: tuple[str, str], solver: str) -> None:
    benchmark.group = ", ".join(key)
    task = tasks()[key]
    check(task)
    benchmark(contenders(task)[solver])
