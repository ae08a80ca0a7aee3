"""Compiled dynamics: pyode compiled and eager, and torchdiffeq; solving, and training by the gradient of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

import pyode

from .cases import Case, cases
from .timing import Contender, interleaved

TITLE = "Compiled dynamics (dopri5, float32, rtol 1e-5, atol 1e-7)"
COLUMNS = {
    "case": "case",
    "task": "task",
    "torchdiffeq_us": "torchdiffeq [us]",
    "eager_us": "pyode, eager [us]",
    "compiled_us": "pyode, compiled [us]",
    "speedup": "compiled vs torchdiffeq",
}


def solution(case: Case, odeint: Callable[..., Tensor]) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        return case.solve(odeint)


TASKS: dict[str, Callable[[Case, Callable[..., Tensor]], Tensor]] = {
    "solve": solution,
    "gradient": lambda case, odeint: case.gradient(odeint),
}


def contenders(case: Case, task: str) -> dict[str, Contender]:
    """Those that are timed; all give the same result."""
    run = TASKS[task]
    compiled = Case(case.name, pyode.compile(case.f, strict=True), case.y0, case.t)
    all_of_them: dict[str, Contender] = {
        "torchdiffeq": lambda: run(case, torchdiffeq.odeint),
        "eager": lambda: run(case, pyode.odeint),
        "compiled": lambda: run(compiled, pyode.odeint),
    }
    expected, *others = (contender() for contender in all_of_them.values())
    for other in others:
        assert float((other - expected).norm() / expected.norm()) < 1e-4
    return all_of_them


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every case and task."""
    rows = []
    for case in cases().values():
        for task in TASKS if case.parameters else ("solve",):
            timed = contenders(case, task)
            times = interleaved(timed, rounds=100, seconds=seconds)
            rows.append(
                {
                    "case": case.name,
                    "task": task,
                    **{f"{name}_us": 1e6 * value for name, value in times.items()},
                    "speedup": times["torchdiffeq"] / times["compiled"],
                }
            )
    return rows


@pytest.mark.parametrize("solver", ["torchdiffeq", "eager", "compiled"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", cases())
def test_compiled(benchmark: Any, name: str, task: str, solver: str) -> None:
    case = cases()[name]
    if task == "gradient" and not case.parameters:
        pytest.skip("nothing to train")
    benchmark.group = f"{name}, {task}"
    benchmark(contenders(case, task)[solver])
