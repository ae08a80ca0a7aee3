"""The five cases on a GPU, timed by CUDA events, and what pyode launches and waits for in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from torch.profiler import ProfilerActivity, profile

import pyode
from pyode.methods import TABLEAUS

from .cases import Case, cases
from .timing import Contender, device_seconds_of, interleaved, repeated

TITLE = "On the GPU (dopri5, float32, rtol 1e-5, atol 1e-7)"
COLUMNS = {
    "case": "case",
    "task": "task",
    "f_only_ms": "f only [ms]",
    "torchdiffeq_ms": "torchdiffeq [ms]",
    "pyode_ms": "pyode [ms]",
    "speedup": "pyode vs torchdiffeq",
    "launches": "our launches a step",
    "waits": "waits a step",
}
TRAINED = ("spiral20x2", "big256x64")
STAGES = len(TABLEAUS["dopri5"].rows)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def device_cases() -> dict[str, Case]:
    """The five, on the GPU."""
    return {name: case.to("cuda") for name, case in cases().items()}


def contenders(case: Case, task: str) -> dict[str, Contender]:
    """Those that are timed."""
    if task == "solve":
        n = case.count_evaluations(torchdiffeq.odeint)
        return {
            "torchdiffeq": lambda: case.solve(torchdiffeq.odeint),
            "pyode": lambda: case.solve(pyode.odeint),
            "f only": repeated(case.f, n, case.t[0], case.y0),
        }
    theirs, ours = {
        "direct": (torchdiffeq.odeint, pyode.odeint),
        "adjoint": (torchdiffeq.odeint_adjoint, pyode.odeint_adjoint),
    }[task]
    return {"torchdiffeq": lambda: case.gradient(theirs), "pyode": lambda: case.gradient(ours)}


def check(case: Case) -> None:
    """The solution agrees with torchdiffeq's and with our own on the CPU, to rounding that the dynamics amplify."""
    ours, theirs = case.solve(pyode.odeint), case.solve(torchdiffeq.odeint)
    on_cpu = case.to("cpu").solve(pyode.odeint).to(ours.device)
    for other in (theirs, on_cpu):
        assert float((ours - other).abs().max() / other.abs().max()) < 1e-3


def trace(case: Case) -> dict[str, float]:
    """What the profiler sees of a solve: our kernels, and the host's waits for the device, in all and a step."""
    stats = pyode.Stats()
    case.solve(pyode.odeint)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        case.solve(pyode.odeint, options={"stats": stats})
        torch.cuda.synchronize()
    events = profiler.events()
    device = torch.autograd.DeviceType.CUDA
    launches = sum(event.device_type == device and "pyode" in event.name for event in events)
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaEventSynchronize") for event in events)
    return {
        "launches": launches,
        "waits": waits,
        "steps": stats.n_steps,
        "launches_a_step": launches / stats.n_steps,
        "waits_a_step": waits / stats.n_steps,
    }


def measure(seconds: float = 10.0) -> list[dict[str, Any]]:
    """A row for each case and task; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    rows = []
    for name, case in device_cases().items():
        for task in ("solve", "direct", "adjoint") if name in TRAINED else ("solve",):
            with torch.set_grad_enabled(task != "solve"):
                if task == "solve":
                    check(case)
                times = interleaved(contenders(case, task), seconds=seconds, clock=device_seconds_of)
                traced = trace(case) if task == "solve" else {}
            rows.append(
                {
                    "case": name,
                    "task": task,
                    "f_only_ms": 1e3 * times["f only"] if "f only" in times else None,
                    "torchdiffeq_ms": 1e3 * times["torchdiffeq"],
                    "pyode_ms": 1e3 * times["pyode"],
                    "speedup": times["torchdiffeq"] / times["pyode"],
                    "launches": traced.get("launches_a_step"),
                    "waits": traced.get("waits_a_step"),
                }
            )
    return rows


@needs_gpu
@pytest.mark.parametrize("name", cases())
def test_launches(name: str) -> None:
    """A launch for each stage, the error norm and the control; one more for a step with output, a few at the start."""
    case = device_cases()[name]
    with torch.no_grad():
        traced = trace(case)
    assert traced["launches"] > 0
    assert traced["launches"] <= (STAGES + 2) * traced["steps"] + len(case.t) + 8
    assert traced["waits"] <= traced["steps"] + 8


@needs_gpu
@pytest.mark.parametrize("solver", ["torchdiffeq", "pyode", "f only"])
@pytest.mark.parametrize("name", cases())
def test_solve(benchmark: Any, name: str, solver: str) -> None:
    benchmark.group = name
    case = device_cases()[name]
    with torch.no_grad():
        check(case)
        contender = contenders(case, "solve")[solver]

        def run() -> None:
            contender()
            torch.cuda.synchronize()

        benchmark(run)


@needs_gpu
@pytest.mark.parametrize("solver", ["torchdiffeq", "pyode"])
@pytest.mark.parametrize("task", ["direct", "adjoint"])
@pytest.mark.parametrize("name", TRAINED)
def test_training(benchmark: Any, name: str, task: str, solver: str) -> None:
    benchmark.group = f"{name}, {task}"
    contender = contenders(device_cases()[name], task)[solver]

    def run() -> None:
        contender()
        torch.cuda.synchronize()

    benchmark(run)
