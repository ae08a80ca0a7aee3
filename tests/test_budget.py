"""What one step may cost: calls into native code, allocations, launches; and what a solve may keep in memory."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyode
from pyode._ops import native
from pyode.methods import TABLEAUS

ADAPTIVE = pytest.mark.parametrize("method", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
BIG = 5000  # numbers in a state whose memory is counted; nothing else is as big


def forced(n: int) -> dict[str, float]:
    """Options for exactly n steps to t = 1, all accepted."""
    return {"first_step": 1 / n, "min_step": 1 / n, "max_step": 1 / n}


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each compiled function is called, each phase of the controller, and an adaptive loop to take steps."""
    counter: Counter = Counter()
    compiled = native._C

    class Controller(compiled.Controller):
        def run(self, *args):
            counter["control"] += 1
            return super().run(*args)

    class Steps(native.Steps):
        def take(self, *args):
            counter["take"] += 1
            return super().take(*args)

    class Counting:
        def __getattr__(self, name):
            found = Controller if name == "Controller" else getattr(compiled, name)
            if not name.islower() or not callable(found):
                return found

            def counted(*args):
                counter[name] += 1
                return found(*args)

            return counted

    monkeypatch.setattr(native, "_C", Counting())
    monkeypatch.setattr(native, "Steps", Steps)
    return counter


def solve(n: int, method: str = "dopri5", f=lambda t, y: -y, t: Tensor | None = None, size: int = 5, device="cpu"):
    y0 = torch.ones(size, device=device)
    t = torch.tensor([0.0, 1.0], device=device) if t is None else t
    adaptive = method in TABLEAUS and TABLEAUS[method].adaptive
    return pyode.odeint(f, y0, t, 1e-3, 1e-3, method, forced(n) if adaptive else {"step_size": 1 / n})


def of_one_step(counter: Counter, method: str, **kwargs) -> dict[str, int]:
    """Counts of a solve of 16 steps minus those of one of 4, by step."""
    counts = []
    for n in (4, 16):
        counter.clear()
        with torch.no_grad():
            solve(n, method, **kwargs)
        counts.append(dict(counter))
    few, many = counts
    extra = {name: many.get(name, 0) - few.get(name, 0) for name in many}
    assert all(count % 12 == 0 for count in extra.values()), extra
    return {name: count // 12 for name, count in extra.items() if count}


@ADAPTIVE
def test_steps_are_one_native_call_together(method, calls, device):
    # It calls func for every stage.
    assert of_one_step(calls, method, device=device) == {}


@ADAPTIVE
def test_callbacks_make_a_step_three_native_calls(method, calls):
    def f(t, y):
        return -y

    f.callback_step = lambda t, y, dt: None
    assert of_one_step(calls, method, f=f) == {"stages": 1, "error_norm": 1, "control": 1}


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"])
def test_steps_of_fixed_size_are_one_native_call_together(method, calls):
    assert of_one_step(calls, method) == {}


def test_outputs_are_written_by_the_call_that_takes_the_steps(calls):
    options = {"first_step": 0.25}
    with torch.no_grad():
        for options in (None, {"first_step": 0.25}):
            calls.clear()
            pyode.odeint(lambda t, y: -y, torch.ones(5), torch.linspace(0, 1, 100), 1e-3, 1e-3, options=options)
            assert calls.pop("take") == 1
            assert set(calls) <= {"stage_combine", "error_norm", "control"}  # of the start


class Allocations(TorchDispatchMode):
    """Counts the operations that make a tensor, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counter: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counter[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@ADAPTIVE
def test_a_step_allocates_nothing(method, device):
    stages = len(TABLEAUS[method].rows)
    with Allocations() as mode:
        made = of_one_step(mode.counter, method, f=lambda t, y: -y, device=device)
    assert made.pop("neg") == stages
    if device.type == "cpu":
        assert made == {}
    else:
        assert made.pop("_to_copy") == 1  # the flags, to the host
        check_allocations(made, stages)


@ADAPTIVE
def test_where_func_keeps_its_input_a_step_allocates_a_tensor_a_stage_and_one_for_the_times(method, device):
    with Allocations() as mode:
        made = of_one_step(mode.counter, method, f=lambda t, y: y, device=device)
    if device.type == "cuda":
        assert made.pop("_to_copy") == 1  # the flags, to the host
    check_allocations(made, len(TABLEAUS[method].rows))


def check_allocations(made: dict[str, int], stages: int) -> None:
    """The rest are views."""
    new = {name: n for name, n in made.items() if name not in ("unbind", "slice", "select", "alias", "view", "detach")}
    assert sum(new.values()) <= stages + 1, made
    assert set(new) <= {"empty_like", "empty", "new_empty"}


class Live(TorchDispatchMode):
    """The largest number of states' memories that were alive at once, but for one that was there before."""

    def __init__(self, known: Tensor | None = None) -> None:
        super().__init__()
        self.known = None if known is None else known.data_ptr()
        self.references: dict[int, weakref.ref] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= 4 * BIG:
                self.references[id(x)] = weakref.ref(x)
        self.count()
        return out

    def memories(self) -> dict[int, int]:
        """Bytes by address."""
        alive = [x for x in (reference() for reference in self.references.values()) if x is not None]
        found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
        found.pop(self.known, None)
        return found

    def count(self) -> None:
        """Updates `most`."""
        self.most = max(self.most, sum(self.memories().values()) // (4 * BIG))


def most_states_alive(n: int, method: str, T: int, device) -> int:
    """During a solve of n steps with T outputs, beyond the output itself and y0."""
    gc.collect()
    t = torch.linspace(0, 1, T, device=device)
    options = forced(n) if TABLEAUS[method].adaptive else {"step_size": 1 / n}
    y0 = torch.ones(BIG, device=device)
    with torch.no_grad(), Live(y0) as live:
        pyode.odeint(lambda t, y: -y, y0, t, 1e-3, 1e-3, method, options)
    return live.most - T


@pytest.mark.parametrize("method", list(TABLEAUS))
def test_a_solve_without_gradients_keeps_some_states_whatever_its_number_of_steps(method, device):
    evaluations = max(len(TABLEAUS[method].rows), len(TABLEAUS[method].b))
    few, many = (most_states_alive(n, method, 3, device) for n in (16, 64))
    assert few == many <= evaluations + 4
    assert most_states_alive(16, method, 30, device) <= few


class Decay(nn.Module):
    def __init__(self, device) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((BIG,), -1.0, device=device))

    def forward(self, t, y):
        return self.rate * y


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_adjoints_memory_does_not_grow_with_the_number_of_steps(method, device):
    most = []
    for n in (4, 32):
        func = Decay(device)
        y0 = torch.ones(BIG, device=device, requires_grad=True)
        t = torch.tensor([0.0, 0.5, 1.0], device=device)
        options = forced(n) if method == "dopri5" else {"step_size": 1 / n}
        gc.collect()
        with Live() as live:
            y = pyode.odeint_adjoint(func, y0, t, rtol=1e-3, atol=1e-3, method=method, options=options)
            y[1:].square().sum().backward()
        assert y0.grad is not None
        assert func.rate.grad is not None
        most.append(live.most)
        del func, y0, y
    assert most[0] == most[1]


def test_a_failed_solve_leaves_nothing_behind(device):
    def f(t, y):
        if float(t) > 0.5:
            raise KeyError("mine")
        return -y

    y0 = torch.ones(BIG, device=device)
    with torch.no_grad(), Live() as live:
        with pytest.raises(KeyError):
            pyode.odeint(f, y0, torch.tensor([0.0, 1.0], device=device), 1e-3, 1e-3)
        gc.collect()
        assert set(live.memories()) <= {y0.untyped_storage().data_ptr()}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_step_launches_no_more_than_its_stages_and_two_kernels():
    from torch.profiler import ProfilerActivity, profile

    def kernels(n: int) -> int:
        with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as trace:
            solve(n, f=lambda t, y: y, size=1000, device="cuda")
            torch.cuda.synchronize()
        return sum(event.count for event in trace.key_averages() if "pyode" in event.key)

    solve(4, device="cuda")
    assert kernels(32) - kernels(4) <= 28 * (6 + 2)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("odeint", [pyode.odeint, pyode.odeint_adjoint])
def test_nothing_is_left_of_a_solve_and_its_graph(odeint, method):
    net = torch.nn.Linear(3, 3)

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y)

    def solves():
        for _ in range(5):
            odeint(
                Field(), torch.ones(2, 3), torch.linspace(0, 1, 4), method=method, rtol=1e-3, atol=1e-3
            ).sum().backward()
        gc.collect()
        return len(gc.get_objects())

    solves()
    before = solves()
    assert solves() <= before + 3  # a leaked graph would be dozens of nodes


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("interface", ["odeint", "solve_ivp"])
def test_the_outputs_go_with_the_last_reference_to_them(interface, gradient, control):
    # And their graph with them, at once: a cycle would keep both until Python looks for cycles.
    weight, t = torch.eye(3, requires_grad=True), torch.linspace(0, 1, 4)

    def func(t, y):
        return torch.tanh(y @ weight)

    def outputs():
        if interface == "odeint":
            return pyode.odeint(func, torch.ones(2, 3), t, options={"gradient": gradient, "control": control})
        return pyode.solve_ivp(func, torch.ones(2, 3), t, gradient=gradient, control=control).ys

    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            ys = outputs()
            if backward:
                ys.sum().backward()
            alive = weakref.ref(ys)
            del ys
            assert alive() is None
    finally:
        gc.enable()


FAULTS = """
import resource

import torch

import pyode

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

y0, t = torch.ones(200_000), torch.tensor([0.0, 1.0])
with torch.no_grad():
    for n in range(30):
        if n == 20:
            before = faults()
        pyode.odeint(lambda t, y: -y, y0, t)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the system's malloc is another")
def test_what_a_solve_frees_is_not_fetched_from_the_system_again():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3000  # pages; the states of ten solves have 15 000
