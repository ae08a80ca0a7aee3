"""What torchdiffeq's own tests ask of it, by every method."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq
from problems import tensor, turning
from torch import Tensor, nn
from torch.autograd import gradcheck

import pyode
from pyode import Stats
from pyode.methods import IMPLICIT, METHODS

ADAPTIVE = tuple(name for name, method in METHODS.items() if method.adaptive and name != "scipy_solver")
FIXED = tuple(name for name, method in METHODS.items() if not method.adaptive)
NOT_ON_PYPI = ("tsit5", "adams", *IMPLICIT)
EVERY = pytest.mark.parametrize("method", METHODS)
INTERFACES = pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def default_options(method: str) -> dict:
    """Steps small enough for methods that do not choose them."""
    more = {"max_order": 5} if method == "explicit_adams" else {}
    return {"step_size": 0.05, **more} if method in FIXED else {}


def quietly(method: str) -> dict:
    """Tolerances at which implicit_adams' iteration converges."""
    return {"rtol": 1e-5, "atol": 1e-6} if method in ("implicit_adams", "fixed_adams") else {}


class AsModule(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, t, y):
        return self.f(t, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@EVERY
@BACKWARD
def test_in_every_precision_it_is_torchdiffeqs(method, dtype, backward):
    if dtype.is_complex and method == "scipy_solver":
        return  # LSODA is real
    t = torch.linspace(1, 2, 5, dtype=torch.float64)
    t = t.flip(0) if backward else t
    y0 = turning.solution(float(t[0])).to(dtype) * (1 + 0.5j if dtype.is_complex else 1)
    rough = dtype != torch.float64
    kwargs = {"method": method, "options": default_options(method), "rtol": 1e-4, "atol": 1e-5}
    y = pyode.odeint(turning.f, y0, t, **kwargs)
    assert (y.dtype, y.shape) == (dtype, (5, 5))
    if method in (*NOT_ON_PYPI, "fehlberg2", "adaptive_heun"):  # or of other steps, see test_parity.py
        expected = turning.at(t).to(dtype) * (1 + 0.5j if dtype.is_complex else 1)
        assert torch.allclose(y, expected, rtol=1e-2, atol=1e-2)
    else:
        expected = torchdiffeq.odeint(turning.f, y0, t, **kwargs)
        assert torch.allclose(y, expected, rtol=1e-3 if rough else 1e-6, atol=1e-3 if rough else 1e-6)


@EVERY
@INTERFACES
def test_a_tuple_of_two_copies_is_two_solutions(method, interface):
    t = torch.linspace(1, 2, 5, dtype=torch.float64)
    y0 = turning.solution(1.0)

    def both(t, y):
        return turning.f(t, y[0]), turning.f(t, y[1])

    kwargs = {"method": method, "options": default_options(method), **quietly(method)}
    with torch.no_grad():
        together = getattr(pyode, interface)(AsModule(both), (y0, y0), t, **kwargs)
        alone = getattr(pyode, interface)(AsModule(turning.f), y0, t, **kwargs)
    assert torch.equal(together[0], together[1])
    # LSODA's norm is of the whole.
    assert torch.allclose(together[0], alone, rtol=1e-5 if method == "scipy_solver" else 1e-12)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
@BACKWARD
def test_gradients_of_the_start_and_the_times(method, backward):
    t = torch.linspace(1, 2, 5, dtype=torch.float64)
    t, y0 = (t.flip(0) if backward else t), torch.tensor(0.7, dtype=torch.float64)
    # Steps that do not depend on the inputs: else a difference sees them jump.
    forced = {"first_step": 0.21, "min_step": 0.21, "max_step": 0.21}
    options = {} if method in FIXED else forced

    def solve(y0, t):
        return pyode.odeint(
            lambda t, y: torch.sin(y) + t * y, y0, t, method=method, options=options,
            **({"rtol": 1e6} if "adams" in method else {}),
        )  # fmt: skip

    assert gradcheck(solve, (y0.requires_grad_(), t.requires_grad_()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_the_adjoint_is_the_direct_gradient(method):
    found = []
    low = method in ("adaptive_heun", "fehlberg2")
    step = 0.02 if METHODS[method].order <= 2 or "adams" in method else 0.1
    for odeint in (pyode.odeint, pyode.odeint_adjoint):
        func = nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 2)).double()
        for i, p in enumerate(func.parameters()):
            p.data = torch.linspace(-1, 1, p.numel(), dtype=torch.float64).add(0.1 * i).cos().reshape(p.shape)
        module = AsModule(lambda t, y, func=func: func(y))
        module.func, y0 = func, tensor(0.5, -0.2).requires_grad_()
        t = tensor(0.0, 0.5, 1.0).requires_grad_(method not in FIXED)
        options = {"step_size": step} | ({"max_order": 5} if "explicit" in method else {}) if method in FIXED else {}
        if method == "bosh3":  # its outputs between steps are torchdiffeq's, of the first order
            options = {"step_t": t.detach()[1:]}
        tolerances = quietly(method) or {"rtol": 1e-5 if low else 1e-7, "atol": 1e-7 if low else 1e-9}
        odeint(module, y0, t, method=method, options=options, **tolerances)[-1].square().sum().backward()
        found.append([y0.grad, *([] if method in FIXED else [t.grad]), *(p.grad for p in func.parameters())])
    for direct, adjoint in zip(*found):
        assert torch.allclose(adjoint, direct, rtol=0.1 if METHODS[method].order == 1 else 5e-3, atol=1e-4)


class Network(nn.Module):
    """One with many parameters, which counts its evaluations."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(0, 300, 512, dtype=dtype).sin().reshape(2, 256))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(y @ self.weights) @ self.weights.T / 128 * torch.sin(2 * t)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_that_counts_more_costs_more_evaluations(method, dtype):
    func, y0, t = Network(dtype), torch.tensor([1.0, 2.0], dtype=dtype), tensor(0.0, 1.0)
    tolerance = 1e-5 if METHODS[method].order <= 2 else 1e-6 if dtype == torch.float32 else 1e-7
    tolerances = {"rtol": tolerance, "atol": tolerance}
    counts = []
    for factor in (1, 10):
        func.calls = 0
        options = {"norm": lambda error, factor=factor: factor * error.abs().max()}
        pyode.odeint(func, y0, t, method=method, **tolerances, options=options)
        counts.append(func.calls)
    assert counts[0] < counts[1]
    counts = []
    for norm in ({"norm": "seminorm"}, {}):  # which leaves the parameters out
        y = pyode.odeint_adjoint(func, y0, t, method=method, **tolerances, adjoint_options=norm)
        func.calls = 0
        y.sum().backward()
        counts.append(func.calls)
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("most", [math.inf, 1.0])
def test_a_smallest_step_bounds_the_evaluations(most):
    counts = []
    for least in (0.0, 0.5):
        stats = Stats()
        options = {"min_step": least, "max_step": most, "stats": stats}
        pyode.odeint(turning.f, turning.y0, turning.times(), 1e-12, 1e-12, options=options)
        counts.append(stats.n_f_evals)
    assert counts[1] <= 2 + 6 * (3 / 0.5 + 1) < 300 < counts[0]


def rms(x: Tensor) -> Tensor:
    return x.abs().pow(2).mean().sqrt()


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["default", "given options", "seminorm"])
@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("odeint_adjoint", [pyode.odeint_adjoint, torchdiffeq.odeint_adjoint], ids=["ours", "theirs"])
def test_the_adjoints_norm_can_be_seen_and_replaced_at_its_node(odeint_adjoint, shape, kind, tuples):
    params = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))
    y0 = torch.full(shape, 1.0)
    kwargs = {"default": {}, "given options": {"adjoint_options": {}}}.get(kind, {"adjoint_options": {"norm": kind}})
    y = odeint_adjoint(
        lambda t, y: y, (y0, y0) if tuples else y0, torch.tensor([0.0, 1.0]), adjoint_params=params, **kwargs
    )
    node = y[0].grad_fn.next_functions[0][0].next_functions[0][0] if tuples else y.grad_fn
    original, seen = node.adjoint_options["norm"], []
    size = 2 * y0.numel() if tuples else y0.numel()

    def spy(parts):
        assert isinstance(parts, tuple)
        time, state, adjoint, *of_params = parts
        assert time.shape == ()
        assert state.shape == adjoint.shape == ((size,) if tuples else shape)  # of a tuple they are flat
        assert [p.shape for p in of_params] == [p.shape for p in params]
        halves = [half for x in (state, adjoint) for half in (x.chunk(2) if tuples else [x])]
        expected = max([time.abs(), *map(rms, halves), *([] if kind == "seminorm" else map(rms, of_params))])
        found = original(parts)
        seen.append(float(found) == pytest.approx(float(expected), rel=1e-6))
        return found

    node.adjoint_options["norm"] = spy
    (y[0].sum() + y[1].sum()).backward()
    assert seen
    assert all(seen)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params)


@pytest.mark.parametrize("odeint_adjoint", [pyode.odeint_adjoint, torchdiffeq.odeint_adjoint], ids=["ours", "theirs"])
def test_a_norm_of_the_users_is_given_a_tuples_parts_unpacked(odeint_adjoint):
    shapes, param = set(), torch.rand(4, requires_grad=True)

    def norm(parts):
        shapes.add(tuple(tuple(part.shape) for part in parts))
        return max(part.abs().max() for part in parts)

    y0 = (torch.ones(2, 3), torch.tensor(1.0))
    y = odeint_adjoint(
        lambda t, y: y, y0, torch.tensor([0.0, 1.0]), adjoint_params=(param,), adjoint_options={"norm": norm}
    )
    y[0].sum().backward()
    assert shapes == {((), (2, 3), (), (2, 3), (), (4,))}


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED, "scipy_solver"])
def test_an_unused_parameter_has_a_gradient_of_zeros(method):
    module, unused = AsModule(lambda t, y: -y), nn.Parameter(torch.ones(3, dtype=torch.float64))
    module.unused, y0 = unused, tensor(1.0).requires_grad_()
    y = pyode.odeint_adjoint(module, y0, tensor(0.0, 0.1), method=method, rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert torch.equal(unused.grad, torch.zeros(3, dtype=torch.float64))
    assert y0.grad is not None


@EVERY
@INTERFACES
@pytest.mark.parametrize("tuples", [False, True])
def test_one_time_returns_the_start(method, interface, tuples):
    y0 = (tensor(1.0, 2.0), tensor(3.0)) if tuples else tensor(1.0, 2.0)
    module = AsModule(lambda t, y: pytest.fail("func was called"))
    y = getattr(pyode, interface)(module, y0, tensor(0.3), method=method)
    for ours, start in zip(y, y0) if tuples else [(y, y0)]:
        assert torch.equal(ours, start[None])
        assert ours.data_ptr() != start.data_ptr()


class Switch:
    """y' = -y, and 100 - y from t = 0.5 on."""

    def __call__(self, t, y):
        return -y + (100.0 if t > 0.5 else 0.0)


@pytest.mark.parametrize("method", [name for name in ADAPTIVE if name != "adaptive_heun"])
def test_a_known_discontinuity_costs_less(method):
    counts, t, y0 = {}, tensor(0.0, 1.0), tensor(1.0)
    exact = torch.exp(tensor(-1.0)) + 100 * (1 - torch.exp(tensor(-0.5)))
    for name, options in (
        ("nothing", {}), ("step_t", {"step_t": tensor(0.5)}), ("jump_t", {"jump_t": tensor(0.5)}),
    ):  # fmt: skip
        stats, func = Stats(), Switch()
        y = pyode.odeint(func, y0, t, 1e-7, 1e-9, method, {**options, "stats": stats})
        counts[name] = stats.n_f_evals
        if name == "jump_t":
            # t = 1 lies within dopri8's last step, where its dense output is of order 4
            assert torch.allclose(y[-1], exact, rtol=1e-4 if method == "dopri8" else 1e-5)
    assert counts["jump_t"] < counts["step_t"] < counts["nothing"]


@pytest.mark.parametrize("method", ["rk4", "heun2"])
def test_perturb_keeps_a_step_on_its_side_of_a_discontinuity(method):
    def func(t, y):
        return torch.where(t > 0.5, 3.0, 1.0) * torch.ones_like(y)

    errors = {}
    for perturb in (False, True):
        options = {"step_size": 0.25, "perturb": perturb}
        y = pyode.odeint(func, tensor(0.0), tensor(0.0, 1.0), 1.0, 1.0, method, options)
        errors[perturb] = abs(float(y[-1]) - 2.0)
    assert errors[True] < 1e-13 < errors[False]


@EVERY
@INTERFACES
def test_the_parts_of_a_tuple_are_views_of_one_output(method, interface):
    y0 = (tensor(1.0, 0.5), torch.ones(2, 2, dtype=torch.float64))
    a, b = getattr(pyode, interface)(
        AsModule(lambda t, y: (-y[0], -y[1])), y0, tensor(0.0, 0.1), 1e-3, 1e-3, method=method
    )
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert a._base is not None or a._is_view()
    assert (a.shape, b.shape) == ((2, 2), (2, 2, 2))
