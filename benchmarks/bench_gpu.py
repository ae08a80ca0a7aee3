"""On a GPU, driven by the host and by the device itself: times, and what pyode launches and waits for in a step."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pyode
from pyode.methods import TABLEAUS

from .cases import Case, Mlp, cases
from .timing import Contender, device_seconds_of, interleaved

TITLE = "On the GPU (dopri5, float32, rtol 1e-5, atol 1e-7)"
COLUMNS = {
    "case": "case",
    "task": "task",
    "f_only_ms": "f only [ms]",
    "torchdiffeq_ms": "torchdiffeq [ms]",
    "diffrax_ms": "diffrax [ms]",
    "host_ms": "pyode [ms]",
    "device_ms": "device loop [ms]",
    "over_f_only": "device loop / f only",
    "host_speedup": "pyode vs torchdiffeq",
    "device_speedup": "device loop vs torchdiffeq",
    "launches": "our launches a step",
    "waits": "waits a step",
    "device_waits": "waits a solve, device loop",
    "missed": "targets missed",
}
TRAINED = ("spiral20x2", "big256x64", "cnf512")
STAGES = len(TABLEAUS["dopri5"].rows)
DEVICE_LOOP = {"device_loop": True}
MOST_IN_A_GRAPH = 256  # evaluations of f
MOST_OVER_F_ONLY = {"vdp256": 1.3, "lorenz1024": 1.3, "cnf512": 1.3, "spiral20x2": 1.5, "big256x64": 1.5}
LEAST_SPEEDUP = 10.0  # of the device's loop over torchdiffeq, for every case but the flow
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Flow(nn.Module):
    """A continuous normalizing flow of two dimensions: the state is a point and its log density, [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp([2, 64, 64, 2])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Where the points go, and minus the divergence there."""
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            z = y[:, :2] if training else y[:, :2].detach().requires_grad_()
            if not z.requires_grad:
                z = z.requires_grad_()
            velocity = self.net(t, z)
            divergence = sum(
                torch.autograd.grad(velocity[:, i].sum(), z, create_graph=training, retain_graph=True)[0][:, i]
                for i in range(2)
            )
        out = torch.cat([velocity, -divergence[:, None]], 1)
        return out if training else out.detach()


def device_cases() -> dict[str, Case]:
    """The five, and a flow, on the GPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        flow = Case("cnf512", Flow(), torch.randn(512, 3), torch.tensor([0.0, 1.0]))
    return {name: case.to("cuda") for name, case in {**cases(), "cnf512": flow}.items()}


def on_device(odeint: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, by the device's loop."""
    return lambda *arguments, **more: odeint(*arguments, **more, options=DEVICE_LOOP)


def replayed(f: Callable[..., Any], n: int, *arguments: Any) -> Contender:
    """Replays n calls of f(*arguments) from CUDA graphs."""

    def graph_of(calls: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                f(*arguments)
        return graph

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        f(*arguments)
    torch.cuda.synchronize()
    times, rest = divmod(n, MOST_IN_A_GRAPH)
    graphs = [graph_of(MOST_IN_A_GRAPH)] * times if times else []
    if rest:
        graphs.append(graph_of(rest))

    def run() -> None:
        for graph in graphs:
            graph.replay()

    return run


def diffrax_contenders(name: str) -> dict[str, Contender]:
    """diffrax on the same GPU, if it is there."""
    if find_spec("diffrax") is None or name not in cases():
        return {}
    import jax

    from . import diffrax_cases

    if jax.default_backend() != "gpu":
        return {}
    return diffrax_cases.contenders(cases()[name], "solve")


def contenders(case: Case, task: str) -> dict[str, Contender]:
    """Those that are timed."""
    if task == "solve":
        n = case.count_evaluations(torchdiffeq.odeint)
        return {
            "torchdiffeq": lambda: case.solve(torchdiffeq.odeint),
            "host": lambda: case.solve(pyode.odeint),
            "device": lambda: case.solve(on_device(pyode.odeint)),
            "f only": replayed(case.f, n, case.t[0], case.y0),
            **diffrax_contenders(case.name),
        }
    if task == "direct":
        theirs, ours = torchdiffeq.odeint, pyode.odeint
        return {"torchdiffeq": lambda: case.gradients(theirs), "host": lambda: case.gradients(ours)}
    if task == "checkpoint":
        host, device = ({"gradient": "checkpoint", **more} for more in ({}, DEVICE_LOOP))
        return {
            "torchdiffeq": lambda: case.gradients(torchdiffeq.odeint),
            "host": lambda: case.gradients(pyode.odeint, options=host),
            "device": lambda: case.gradients(pyode.odeint, options=device),
        }
    adjoint = pyode.odeint_adjoint
    return {
        "torchdiffeq": lambda: case.gradients(torchdiffeq.odeint_adjoint),
        "host": lambda: case.gradients(adjoint),
        "device": lambda: case.gradients(on_device(adjoint)),
    }


def check(case: Case) -> None:
    """The solution agrees with torchdiffeq's and with our own on the CPU, to rounding that the dynamics amplify.

    That of the device's loop is the same to the bit.
    """
    ours, theirs = case.solve(pyode.odeint), case.solve(torchdiffeq.odeint)
    on_cpu = case.to("cpu").solve(pyode.odeint).to(ours.device)
    for other in (theirs, on_cpu):
        assert float((ours - other).abs().max() / other.abs().max()) < 1e-3
    assert torch.equal(ours, case.solve(on_device(pyode.odeint)))


def trace(case: Case, **options: Any) -> dict[str, float]:
    """What the profiler sees of a solve: our kernels, and the host's waits for the device, in all and a step."""
    stats = pyode.Stats()
    case.solve(pyode.odeint, options={"stats": stats})
    case.solve(pyode.odeint, options=options)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        case.solve(pyode.odeint, options=options)
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


def missed(row: dict[str, Any]) -> str:
    """Which targets of the device's loop a row does not reach."""
    found = []
    most, least = MOST_OVER_F_ONLY.get(row["case"]), LEAST_SPEEDUP if row["case"] in cases() else 0.0
    if row["over_f_only"] and most and row["over_f_only"] > most:
        found.append(f"f only x {most:g}")
    if row["device_speedup"] and row["device_speedup"] < least:
        found.append(f"torchdiffeq / {least:g}")
    if row["diffrax_ms"] and row["device_ms"] > row["diffrax_ms"]:
        found.append("diffrax")
    if row["device_waits"] and row["device_waits"] > 1:
        found.append("1 wait")
    return ", ".join(found)


def row_of(case: Case, task: str, seconds: float) -> dict[str, Any]:
    """What is measured of a task."""
    with torch.set_grad_enabled(task != "solve"), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*device_loop")  # the host is to drive none of the device's solves
        if task == "solve":
            check(case)
        times = interleaved(contenders(case, task), seconds=seconds, clock=device_seconds_of)
        host, device = (trace(case), trace(case, **DEVICE_LOOP)) if task == "solve" else ({}, {})
    ms = {who: 1e3 * time for who, time in times.items()}
    row = {
        "case": case.name,
        "task": task,
        "f_only_ms": ms.get("f only"),
        "torchdiffeq_ms": ms["torchdiffeq"],
        "diffrax_ms": ms.get("diffrax"),
        "host_ms": ms["host"],
        "device_ms": ms.get("device"),
        "over_f_only": ms["device"] / ms["f only"] if "f only" in ms else None,
        "host_speedup": ms["torchdiffeq"] / ms["host"],
        "device_speedup": ms["torchdiffeq"] / ms["device"] if "device" in ms else None,
        "launches": host.get("launches_a_step"),
        "waits": host.get("waits_a_step"),
        "device_waits": device.get("waits"),
    }
    return {**row, "missed": missed(row)}


def measure(seconds: float = 10.0) -> Iterator[dict[str, Any]]:
    """A row for each case and task; none without a GPU.

    Raises:
        RuntimeError: some failed, behind the others' rows.
    """
    failed = []
    for name, case in device_cases().items() if torch.cuda.is_available() else ():
        for task in ("solve", "direct", "checkpoint", "adjoint") if name in TRAINED else ("solve",):
            try:
                row = row_of(case, task, seconds)
            except Exception:
                traceback.print_exc()
                failed.append(f"{name}, {task}")
                continue
            print({what: value for what, value in row.items() if value is not None}, flush=True)
            yield row
    if failed:
        raise RuntimeError(f"not measured: {'; '.join(failed)}")


@needs_gpu
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
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
@pytest.mark.parametrize("solver", ["torchdiffeq", "host", "device", "f only"])
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
@pytest.mark.parametrize("solver", ["torchdiffeq", "host"])
@pytest.mark.parametrize("task", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("name", TRAINED)
def test_training(benchmark: Any, name: str, task: str, solver: str) -> None:
    benchmark.group = f"{name}, {task}"
    contender = contenders(device_cases()[name], task)[solver]

    def run() -> None:
        contender()
        torch.cuda.synchronize()

    benchmark(run)
