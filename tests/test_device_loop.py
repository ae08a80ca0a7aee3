"""A whole solve as one launch on a GPU: the host-driven loop's bits and counts, the cache, and what it can't do.

The solves run on a GPU, or with the kernels on the host (tests/cuda_on_host), where the launch is a loop in Python.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pyode
from pyode import captures
from pyode._ops import native
from pyode.methods import TABLEAUS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
ON = {"device_loop": True}
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU here")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not native.on_gpu(DEVICE), reason="neither a GPU nor its kernels on the host here"),
]


@pytest.fixture(autouse=True)
def _nothing_kept():
    captures.captured_solves.clear()
    yield
    captures.captured_solves.clear()


def n_captures() -> int:
    return captures.captured_solves.n_captures


class Field(nn.Module):
    """Row-wise; t is [] or [B]."""

    def __init__(self, width: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)).to(DEVICE, dtype)
        self.rate = 1.0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * self.net(y) - 0.5 * y + torch.sin(t)[..., None]


def both(func, y0, t, **kwargs):
    """Solutions and counts, host-driven and by the device's loop, of odeint without gradients."""
    found = []
    for more in ({}, ON):
        stats = pyode.Stats()
        given = {"rtol": 1e-4, "atol": 1e-6, **kwargs}
        given["options"] = {**kwargs.get("options", {}), **more, "stats": stats}
        with torch.no_grad():
            found.append((pyode.odeint(func, y0, t, **given), stats))
    return found


def check_same(func, y0, t, **kwargs):
    before = n_captures()
    (theirs, their_stats), (ours, our_stats) = both(func, y0, t, **kwargs)
    assert n_captures() == before + 1
    for a, b in zip(tree_leaves(theirs), tree_leaves(ours)):
        assert torch.equal(a, b)
    assert our_stats == their_stats


def times(n: int = 7, dtype=torch.float32) -> Tensor:
    return torch.linspace(0, 2, n, dtype=dtype, device=DEVICE)


def normal(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_bits_and_counts_are_those_of_the_host_driven_loop(method, control):
    check_same(Field(), normal(20, 3), times(), method=method, options={"control": control})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128, torch.bfloat16, torch.float16])
def test_of_every_dtype(dtype):
    rates = normal(3).to(dtype)
    loose = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {}
    check_same(lambda t, y: -y * rates * rates, normal(5, 3).to(dtype), times(), **loose)


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.05},
        {"step_t": [0.3, 1.5]},
        {"jump_t": [0.7, 1.1]},
        {"jump_t": [0.7, 1.1], "step_t": [0.3], "control": "per_sample"},
        {"max_step": 0.1, "safety": 0.8, "ifactor": 2.0},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("backwards", [False, True])
def test_with_options(options, backwards):
    t = times().flip(0) if backwards else times()
    check_same(Field(), normal(6, 3), t, options=options)


def test_a_structure_a_scalar_and_an_empty_state():
    check_same(lambda t, y: (-y[0], y[1] * t), (normal(3), normal(2, 2)), times())
    check_same(lambda t, y: {"a": -y["a"]}, {"a": normal(3)}, times())
    check_same(lambda t, y: -y, normal(1)[0], times())
    check_same(lambda t, y: -y, normal(0, 3), times())


def test_tolerances_are_copied_in():
    func, y0 = Field(), normal(5, 3)
    each = torch.tensor([1e-3, 1e-5, 1e-4], dtype=torch.float64)
    before = n_captures()
    for rtol, atol in ((1e-3, 1e-5), (1e-5, 1e-7), (each, 1e-6), (1e-4, each)):
        (a, _), (b, _) = both(func, y0, times(), rtol=rtol, atol=atol)
        assert torch.equal(a, b)
    assert n_captures() == before + 3  # numbers; a tensor and a number; a number and a tensor


def test_many_numbers():
    check_same(lambda t, y: -y * t, normal(300_001), times(3))
    check_same(lambda t, y: -y * t[:, None], normal(1000, 33), times(3), options={"control": "per_sample"})


@pytest.mark.parametrize("clipped", [True, False])
def test_times_of_each_sample(clipped):
    t = torch.stack([torch.linspace(0, 1 + b, 5) for b in range(4)], 1).to(DEVICE)
    t[:, 3] = t[0, 3]  # has no way to go
    if clipped:
        func, y0 = Field(), normal(4, 3)
        found = [pyode.solve_ivp(func, y0, t, options=more, throw=False) for more in ({}, ON)]
        assert torch.equal(found[0].ys, found[1].ys)
        for name in ("n_accepted", "n_rejected", "n_f_evals", "last_dt"):
            assert torch.equal(getattr(found[0].stats, name), getattr(found[1].stats, name))
        assert torch.equal(found[0].status, found[1].status)
    else:
        check_same(Field(), normal(4, 3), t, options={"control": "per_sample"})


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


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


def test_the_cache_is_bounded_and_lets_go():
    kept = captures.captured_solves
    func = Field()
    for n in range(1, kept.MOST + 4):
        both(func, normal(n, 3), times())
    assert sum(map(len, kept._kept.values())) == kept.MOST
    if DEVICE.type == "cuda":  # on the host the loop still calls func
        del func
        gc.collect()
        assert not kept._kept
    func = Field()
    both(func, normal(2, 3), times())
    assert kept._kept
    pyode.clear_cache()
    assert not kept._kept


def test_a_solve_that_may_be_done_again_keeps_nothing_alive():
    func, y0, t = Field(), normal(4, 3), times()
    for _ in range(3):
        again = pyode.odeint(func, y0, t, options=ON)
    assert torch.equal(again, pyode.odeint(func, y0, t))
    (captured,) = (weakref.ref(one) for some in captures.captured_solves._kept.values() for one in some)
    state = weakref.ref(y0)
    del y0
    assert state() is None
    pyode.clear_cache()
    gc.collect()
    assert captured() is None


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ({"func": lambda t, y: y * y}, "STEP_TOO_SMALL"),
        ({"options": {"max_num_steps": 2}, "rtol": 1e-9, "atol": 1e-9}, "TOO_MANY_STEPS"),
        ({"func": lambda t, y: torch.where(t > 0.5, torch.nan, 1.0) * y}, "NON_FINITE"),
        ({"func": lambda t, y: y * torch.nan}, "NON_FINITE"),
    ],
)
def test_errors_are_those_of_the_host_driven_loop(what, status):
    errors = []
    func, t = what.get("func", lambda t, y: -y), times()
    for more in ({}, ON):
        with pytest.raises(pyode.SolveError) as caught:
            pyode.odeint(
                func, torch.ones(3, device=DEVICE), t, what.get("rtol", 1e-4), what.get("atol", 1e-6),
                options={**what.get("options", {}), **more},
            )  # fmt: skip
        errors.append(caught.value)
    assert errors[0].args == errors[1].args
    assert errors[0].status is pyode.Status[status]
    check_same(lambda t, y: -y, torch.ones(3, device=DEVICE), t)  # and the next one is right


def test_a_failure_that_is_returned():
    def func(t, y):
        return torch.where(t > 0.5, torch.nan, 1.0) * y

    found = []
    for more in ({}, ON):
        with pytest.warns(UserWarning, match="the solve failed"):
            found.append(
                pyode.odeint(func, torch.ones(3, device=DEVICE), times(), options={"on_failure": "return", **more})
            )
    assert torch.equal(*found)
    y0 = torch.tensor([[1.0], [-1.0], [0.5]], device=DEVICE)
    solutions = [
        pyode.solve_ivp(lambda t, y: y * y.abs() * 2, y0, times(), throw=False, options=more) for more in ({}, ON)
    ]
    assert torch.equal(solutions[0].status, solutions[1].status)
    assert torch.equal(solutions[0].ys.nan_to_num(7.0), solutions[1].ys.nan_to_num(7.0))
    assert not solutions[0].success


class Random(nn.Module):
    def forward(self, t, y):
        return y * torch.rand_like(y)


class HostRead(nn.Module):
    def forward(self, t, y):
        return -y if float(t) >= 0 else y


class WithCallback(nn.Module):
    def forward(self, t, y):
        return -y

    def callback_step(self, t, y, dt):
        pass


@pytest.mark.parametrize(
    ("func", "kwargs", "reason"),
    [
        (Random(), {}, "random numbers"),
        pytest.param(HostRead(), {}, "can't be captured", marks=on_gpu),
        (WithCallback(), {}, "callbacks"),
        (lambda t, y: -y, {"method": "rk4"}, "not an explicit method that chooses its steps"),
        (lambda t, y: -y, {"method": "adams"}, "not an explicit method that chooses its steps"),
        (lambda t, y: -y, {"options": {"norm": lambda y: y.abs().max()}}, "options\\['norm'\\]"),
    ],
)
def test_what_the_host_drives_instead_is_told(func, kwargs, reason):
    y0 = torch.ones(3, device=DEVICE)
    options = {**kwargs.pop("options", {}), **ON}
    with pytest.warns(UserWarning, match=reason) as caught:
        y = pyode.odeint(func, y0, times(), 1e-3, 1e-5, **kwargs, options=options)
    assert len(caught) == 1
    assert y.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyode.odeint(func, y0, times(), 1e-3, 1e-5, **kwargs, options={**options, "device_loop": "auto"})
    check_same(Field(), normal(4, 3), times())  # and the next one can be captured


def test_what_func_finds_in_global_variables_lives_on():
    names = {"torch": torch, "rates": torch.tensor([1.0, 2.0, 3.0], device=DEVICE)}
    exec("def func(t, y): return -rates * y", names)
    y0 = torch.ones(3, device=DEVICE)
    (a, _), (b, _) = both(names["func"], y0, times())
    assert torch.equal(a, b)
    held = [x for some in captures.captured_solves._kept.values() for captured in some for x, _ in captured.tensors]
    assert any(x is names["rates"] for x in held)


def test_what_could_not_be_captured_is_not_tried_again():
    class Counting(Random):
        calls = 0

        def forward(self, t, y):
            Counting.calls += 1
            return super().forward(t, y)

    func, counts = Counting(), []
    for _ in range(3):
        before, stats = Counting.calls, pyode.Stats()
        with pytest.warns(UserWarning, match="random numbers"):
            pyode.odeint(func, torch.ones(3, device=DEVICE), times(), 1e-1, 1e-1, options={**ON, "stats": stats})
        counts.append(Counting.calls - before - stats.n_f_evals)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_a_graph_through_every_step_is_the_hosts():
    with torch.enable_grad(), pytest.warns(UserWarning, match="gradient='direct'"):
        y = pyode.odeint(Field(), normal(4, 3), times(), options=ON)
    assert y.requires_grad


@pytest.mark.parametrize("norm", [None, "seminorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("stops", [{}, {"jump_t": [0.35]}, {"first_step": 0.1}], ids=["", "jump_t", "first_step"])
def test_the_adjoints_gradients_are_those_of_the_host_driven_loop(n, dtype, norm, stops):
    func, y0 = Field(dtype=dtype), normal(5, 3, dtype=dtype)
    found = []
    before = n_captures()
    for more in ({}, ON):
        stats, y = pyode.Stats(), y0.clone().requires_grad_()
        with torch.enable_grad():
            out = pyode.odeint_adjoint(
                func, y, times(n, dtype), rtol=1e-5, atol=1e-7, options={**more, **stops},
                adjoint_options={**more, **stops, "norm": norm, "stats": stats},
            )  # fmt: skip
            found.append((torch.autograd.grad(out.square().mean(), (y, *func.parameters())), stats))
    assert n_captures() == before + 2
    (theirs, their_stats), (ours, our_stats) = found
    for a, b in zip(theirs, ours):
        assert torch.equal(a, b)
    assert our_stats == their_stats


def test_training_captures_once_and_follows_the_host_driven_loop():
    finals = []
    y0, before = normal(8, 3), n_captures()
    for more in ({}, ON):
        torch.manual_seed(0)
        func = Field()
        optimizer = torch.optim.SGD(func.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            with torch.enable_grad():
                out = pyode.odeint_adjoint(func, y0, times(), rtol=1e-4, atol=1e-6, options=more)
                (out[-1] - 1).square().mean().backward()
            optimizer.step()
        finals.append([p.detach().clone() for p in func.parameters()])
    for a, b in zip(*finals):
        assert torch.equal(a, b)
    assert n_captures() == before + 2  # forwards and backwards


def gradients_of(func, y0, wanted, args=(), **kwargs):
    """Host-driven and by the device's loop."""
    found = []
    for more in ({}, ON):
        with torch.enable_grad():
            out = pyode.odeint_adjoint(func, y0, times(), rtol=1e-4, atol=1e-6, options=more, args=args, **kwargs)
            found.append(torch.autograd.grad(out.square().sum(), wanted))
    return found


def test_tolerances_of_the_backward_solve_are_copied_in():
    func, y0 = Field(), normal(5, 3)
    for adjoint_rtol in (1e-2, 1e-6):
        theirs, ours = gradients_of(func, y0, tuple(func.parameters()), adjoint_rtol=adjoint_rtol, adjoint_atol=1e-9)
        assert all(map(torch.equal, theirs, ours))


def test_which_of_the_args_wants_a_gradient():
    def func(t, y, a, b):
        return -a * y + 0.5 * b * b

    y0 = torch.ones(2, 3, device=DEVICE)
    for wanted in (0, 1):
        args = [torch.full((3,), 0.7, device=DEVICE), torch.full((3,), 0.3, device=DEVICE)]
        args[wanted].requires_grad_()
        theirs, ours = gradients_of(func, y0, args[wanted], tuple(args))
        assert torch.equal(theirs[0], ours[0])


def test_args_of_an_adjoint_solve():
    def func(t, y, rate):
        return -rate * y

    gradients = []
    for more in ({}, ON):
        rate = torch.full((3,), 0.7, device=DEVICE, requires_grad=True)
        with torch.enable_grad():
            out = pyode.odeint_adjoint(func, normal(1, 3) * 0 + 1, times(), options=more, args=(rate,))
            gradients += torch.autograd.grad(out.sum(), rate)
    assert torch.equal(*gradients)


@on_gpu
def test_two_streams_and_two_threads():
    func, starts = Field(), [normal(50, 3) for _ in range(8)]
    expected = [pyode.odeint(func, y0, times(), options={}) for y0 in starts]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(3):
        found = []
        for i, y0 in enumerate(starts):
            with torch.cuda.stream(streams[i % 4]):
                found.append(pyode.odeint(func, y0, times(), options=ON))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))
    results: dict[int, bool] = {}

    def work(i):
        with torch.no_grad(), torch.cuda.stream(streams[i]):
            results[i] = all(
                torch.equal(pyode.odeint(func, y0, times(), options=ON), y) for y0, y in zip(starts, expected)
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: True, 1: True}


@on_gpu
def test_many_solves_keep_no_memory():
    func, y0 = Field(), normal(50, 3)

    def solves(n):
        for _ in range(n):
            pyode.odeint(func, y0, times(), 1e-3, 1e-3, options=ON)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    allocated, reserved = solves(10)
    later = solves(3000)
    assert later[0] <= allocated
    assert later[1] == reserved


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


@pytest.mark.parametrize("interface", ["odeint_adjoint", "solve_ivp"])
def test_a_backward_solve_of_samples_is_the_hosts(interface):
    func, y0, t = Field(), normal(4, 3), times()
    gradients = []
    with torch.enable_grad():
        for more in ({}, {**ON}):
            y = y0.clone().requires_grad_()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if interface == "solve_ivp":
                    out = pyode.solve_ivp(func, y, t, gradient="adjoint", options=more, adjoint_options=more).ys
                else:
                    out = pyode.odeint_adjoint(func, y, t, options={"control": "per_sample", **more})
                gradients.append(torch.autograd.grad(out.square().sum(), y)[0])
            told = [str(warning.message) for warning in caught if "device_loop" in str(warning.message)]
            assert len(told) == len(more)
    assert torch.equal(*gradients)
