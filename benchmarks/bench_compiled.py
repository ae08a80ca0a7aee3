"""Compiled dynamics beside pyode's eager solves, torchdiffeq and diffrax: solving, and training by the steps' gradient.

diffrax runs jitted, with vmap where every sample has steps of its own; in training it is given each of its adjoints,
and the fastest counts. It is left out where jax is missing. Times to compile are reported on their own. A turn lasts
some milliseconds, as in a loop that trains; the last columns have turns of a single call, which finds caches cold and
threads asleep after the others'.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

import pyode

from .cases import Case, cases, flat
from .timing import Contender, interleaved, repeated, seconds_of

try:
    from . import diffrax_cases
except ModuleNotFoundError:
    diffrax_cases = None  # type: ignore[assignment]

TITLE = "Compiled dynamics (dopri5, float32, rtol 1e-5, atol 1e-7)"
COLUMNS = {
    "case": "case",
    "task": "task",
    "compiled_us": "pyode, compiled [us]",
    "eager_us": "pyode, eager [us]",
    "torchdiffeq_us": "torchdiffeq [us]",
    "diffrax_us": "diffrax [us]",
    "to_torchdiffeq": "torchdiffeq / compiled",
    "to_diffrax": "diffrax / compiled",
    "adjoint": "diffrax's adjoint",
    "cold_us": "pyode, single calls [us]",
    "cold_to_torchdiffeq": "torchdiffeq / compiled, single calls",
    "cold_to_diffrax": "diffrax / compiled, single calls",
    "seconds_to_compile": "to compile [s]",
}
PER_SAMPLE = ("vdp256", "lorenz1024")
TURN = 3e-3  # seconds


def solution(case: Case, odeint: Callable[..., Tensor]) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        return case.solve(odeint)


def samples(case: Case, odeint: Callable[..., Tensor]) -> Tensor:
    """Without gradients, every sample with steps of its own."""
    with torch.no_grad():
        return case.solve(odeint, options={"control": "per_sample"})


TASKS: dict[str, Callable[[Case, Callable[..., Tensor]], Any]] = {
    "solve": solution,
    "gradient": lambda case, odeint: case.gradients(odeint),
    "per sample": samples,
}


def tasks_of(case: Case) -> list[str]:
    """What is timed of a case."""
    return ["solve", *(["gradient"] if case.parameters else []), *(["per sample"] if case.name in PER_SAMPLE else [])]


def contenders(case: Case, task: str) -> tuple[dict[str, Contender], float]:
    """Those that are timed, all of which give the same result; and pyode's seconds to trace and compile."""
    run = TASKS[task]
    compiled = Case(case.name, pyode.compile(case.f, strict=True), case.y0, case.t)
    pyode.clear_cache()
    began = time.perf_counter()
    run(compiled, pyode.odeint)
    seconds = time.perf_counter() - began
    all_of_them: dict[str, Contender] = {
        "compiled": lambda: run(compiled, pyode.odeint),
        "eager": lambda: run(case, pyode.odeint),
    }
    if task != "per sample":
        all_of_them["torchdiffeq"] = lambda: run(case, torchdiffeq.odeint)
    if diffrax_cases is not None:
        all_of_them |= diffrax_cases.contenders(case, task)
    expected = flat(all_of_them["eager"]())
    for key, contender in all_of_them.items():
        found = flat(diffrax_cases.as_torch(contender()) if key.startswith("diffrax") else contender())
        # Step for step the same controllers, but diffrax's; it is as close as the tolerances are.
        assert float((found - expected).norm() / expected.norm()) < (1e-2 if case.name == "lorenz1024" else 1e-3)
    return all_of_them, seconds


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every case and task."""
    rows = []
    for case in cases().values():
        for task in tasks_of(case):
            timed, to_compile = contenders(case, task)
            turns = {name: max(1, int(TURN / min(seconds_of(run) for _ in range(3)))) for name, run in timed.items()}
            of_turns = {name: repeated(run, turns[name]) for name, run in timed.items()}
            times = interleaved(of_turns, rounds=1000, seconds=seconds)
            times = {name: value / turns[name] for name, value in times.items()}
            row: dict[str, Any] = {"case": case.name, "task": task, "seconds_to_compile": to_compile}
            for name in ("compiled", "eager", "torchdiffeq"):
                row[f"{name}_us"] = 1e6 * times[name] if name in times else None
            peers = {name: value for name, value in times.items() if name.startswith("diffrax")}
            fastest = min(peers, key=lambda name: peers[name], default=None)
            row["diffrax_us"] = 1e6 * times[fastest] if fastest else None
            row["adjoint"] = fastest.partition(" ")[2] if fastest else None
            for peer in ("torchdiffeq", "diffrax"):
                value = row[f"{peer}_us"]
                row[f"to_{peer}"] = None if value is None else value / row["compiled_us"]
            cold = interleaved(timed, rounds=100, seconds=seconds / 4)
            row["cold_us"] = 1e6 * cold["compiled"]
            for peer, name in (("torchdiffeq", "torchdiffeq"), ("diffrax", fastest)):
                row[f"cold_to_{peer}"] = cold[name] / cold["compiled"] if name in cold else None
            rows.append(row)
    return rows


@pytest.mark.parametrize("solver", ["compiled", "eager", "torchdiffeq", "diffrax"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", cases())
def test_compiled(benchmark: Any, name: str, task: str, solver: str) -> None:
    case = cases()[name]
    if task not in tasks_of(case):
        pytest.skip("not a task of this case")
    found = {key: run for key, run in contenders(case, task)[0].items() if key.partition(" ")[0] == solver}
    if not found:
        pytest.skip(f"{solver} does not do this, or is not installed")
    benchmark.group = f"{name}, {task}"
    benchmark(next(iter(found.values())))
