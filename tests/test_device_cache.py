"""Captured solves: what is read in place, what is captured anew, what is let go, and whose memory it is."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from device_loops import DEVICE, MARKS, ON, Field, HostRead, both, n_captures, normal, on_gpu, times
from torch import nn

import pyode
from pyode import captures

pytestmark = MARKS


def test_args_are_copied_in():
    def func(t, y, rate, factor):
        return -rate * factor * y

    y0, before = normal(4, 3), n_captures()
    for rate in (0.5, 1.5):
        args = (torch.full((3,), rate, device=DEVICE), 2.0)
        (a, _), (b, _) = both(func, y0, times(), args=args)
        assert torch.equal(a, b)
    assert n_captures() == before + 1
    both(func, y0, times(), args=(torch.ones(3, device=DEVICE), 3.0))
    assert n_captures() == before + 2


def test_a_number_on_the_host_is_noticed_when_it_changes(monkeypatch):
    # On a GPU that is what a graph keeps; with the kernels on the host all are on the host.
    if DEVICE.type == "cpu":
        monkeypatch.setattr(captures, "becomes_a_constant", lambda x, device: x.dim() == 0)
    rate, y0 = torch.tensor(0.5), normal(4, 3)

    def func(t, y):
        return -rate * y

    before = n_captures()
    for change in (1.0, 1.0, 3.0):
        rate.mul_(change)
        (a, _), (b, _) = both(func, y0, times())
        assert torch.equal(a, b)
    assert n_captures() == before + 2
    with pytest.warns(UserWarning, match="a number in args is on the CPU"):
        pyode.odeint(lambda t, y, rate: -rate * y, y0, times(), options=ON, args=(rate,))


def test_parameters_are_read_in_place():
    func, y0, before = Field(), normal(4, 3), n_captures()
    for _ in range(5):
        (a, _), (b, _) = both(func, y0, times())
        assert torch.equal(a, b)
        for p in func.parameters():
            p.mul_(1.1)
    assert n_captures() == before + 1


@pytest.mark.parametrize("change", ["moved", "replaced", "attribute", "shape", "dtype", "method", "constant"])
def test_what_is_captured_anew(change):
    func, y0, kwargs = Field(), normal(4, 3), {}
    both(func, y0, times())
    before = n_captures()
    if change == "moved":
        func.net[0].weight.data = func.net[0].weight.data * 0.5
    elif change == "replaced":
        func.net[0].weight = nn.Parameter(func.net[0].weight * 0.5)
    elif change == "attribute":
        func.rate = 2.0
    elif change == "shape":
        y0 = normal(5, 3)
    elif change == "dtype":
        func.double()
        y0 = y0.double()
    elif change == "method":
        kwargs = {"method": "tsit5"}
    else:
        kwargs = {"options": {"safety": 0.7}}
    (a, _), (b, _) = both(func, y0, times(), **kwargs)
    assert torch.equal(a, b)
    assert n_captures() == before + 1


def test_the_cache_is_bounded_and_lets_go(tmp_path, monkeypatch):
    kept = captures.captured_solves
    func = Field()
    for n in range(1, kept.MOST + 4):
        both(func, normal(n, 3), times())
    assert sum(map(len, kept._kept.values())) == kept.MOST
    func = Field()
    both(func, normal(2, 3), times())
    assert kept._kept
    monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))  # compiled dynamics of other tests stay
    pyode.clear_cache()
    assert not kept._kept


@pytest.mark.parametrize(
    ("gradient", "options"),
    [
        ("adjoint", {}),
        ("adjoint", {"jump_t": [0.7]}),
        ("adjoint", {"control": "per_sample"}),
        ("adjoint", {"method": "rk4"}),
        ("checkpoint", {"method": "rk4"}),
        ("checkpoint", {}),
    ],
)
def test_what_is_captured_goes_with_func(gradient, options):
    func, y, t = Field(), normal(4, 3).requires_grad_(), times()
    method = options.pop("method", None)
    with torch.enable_grad():
        pyode.odeint(func, y, t, method=method, options={**options, **ON, "gradient": gradient}).sum().backward()
    kept = captures.captured_solves._kept
    assert len(kept) == 2  # forwards and backwards
    for lent in gc.get_objects():  # on the host, where it is called again, this has not been done
        if isinstance(lent, captures.LentFunc):
            lent.func = None
    del func, lent
    gc.collect()
    assert not kept


def test_a_solve_that_may_be_done_again_keeps_nothing_alive(tmp_path, monkeypatch):
    func, y0, t = Field(), normal(4, 3), times()
    for _ in range(3):
        again = pyode.odeint(func, y0, t, options=ON)
    assert torch.equal(again, pyode.odeint(func, y0, t))
    (captured,) = (weakref.ref(one) for some in captures.captured_solves._kept.values() for one in some)
    state = weakref.ref(y0)
    del y0
    assert state() is None
    monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))  # compiled dynamics of other tests stay
    pyode.clear_cache()
    gc.collect()
    assert captured() is None


def test_what_func_finds_in_global_variables_lives_on():
    names = {"torch": torch, "rates": torch.tensor([1.0, 2.0, 3.0], device=DEVICE)}
    exec("def func(t, y): return -rates * y", names)
    y0 = torch.ones(3, device=DEVICE)
    (a, _), (b, _) = both(names["func"], y0, times())
    assert torch.equal(a, b)
    held = [x for some in captures.captured_solves._kept.values() for captured in some for x, _ in captured.tensors]
    assert any(x is names["rates"] for x in held)


@on_gpu
def test_failed_captures_keep_no_memory():
    y0 = normal(1000, 3)

    def tries(n):
        for _ in range(n):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pyode.odeint(HostRead(), y0, times(), 1e-3, 1e-3, options=ON)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = tries(3)
    assert tries(10) <= first


@on_gpu
def test_a_failed_capture_leaves_random_numbers_as_they_were():
    torch.cuda.manual_seed(1)
    expected = torch.rand(3, device=DEVICE)
    torch.cuda.manual_seed(1)
    with pytest.warns(UserWarning, match="can't be captured"):
        pyode.odeint(HostRead(), normal(5, 3), times(), 1e-3, 1e-3, options=ON)
    assert torch.equal(torch.rand(3, device=DEVICE), expected)


@on_gpu
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_between_launch_and_end_the_host_does_not_wait():
    from torch.profiler import ProfilerActivity, profile

    func, y0 = Field(), normal(50, 3)
    host_times = times().cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyode.odeint(func, y0, host_times, options=ON)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            pyode.odeint(func, y0, host_times, options=ON)
    names = [event.name for event in profiler.events()]
    assert names.count("cudaGraphLaunch") == 1
    assert sum(name in ("cudaStreamSynchronize", "cudaEventSynchronize") for name in names) == 1
