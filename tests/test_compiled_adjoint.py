"""The continuous adjoint's backward solve with compiled dynamics: the eager one's steps and gradients."""

from __future__ import annotations

import pytest
import torch
from fields import Y0, Field, T, assert_close, loss_of
from problems import kepler, kepler_start, tensor
from torch import nn

import pyode
from pyode.methods import TABLEAUS

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
LOOSE = {"rtol": 1e-4, "atol": 1e-5}


def strict(f):
    return pyode.compile(f, strict=True)


def backward(compiled: bool, sign: float = 1.0, **arguments) -> tuple[pyode.Stats, list]:
    """How the backward solve went, and the gradients; compiled, no solve calls func."""
    stats, field, y0 = pyode.Stats(), Field(), Y0.clone().requires_grad_()
    arguments = {"rtol": 1e-6, "atol": 1e-8, **arguments}
    options = {**arguments.pop("adjoint_options", arguments.get("options", {})), "stats": stats}
    f = strict(field) if compiled else field
    params = arguments.pop("adjoint_params", None)
    loss = loss_of(pyode.odeint_adjoint(f, y0, sign * T, adjoint_options=options, adjoint_params=params, **arguments))
    calls = field.calls
    loss.backward()
    assert (field.calls - calls < 2) == compiled  # another method is traced anew
    return stats, [y0.grad, *(p.grad for p in field.trained()), field.unused.grad]


def assert_same(tolerance: float = 1e-10, **arguments) -> None:
    (our_stats, ours), (their_stats, theirs) = (backward(compiled, **arguments) for compiled in (True, False))
    assert our_stats == their_stats
    assert our_stats.n_accepted > 0
    assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_method(method, sign):
    assert_same(method=method, sign=sign, tolerance=1e-8, **LOOSE)


CASES = {
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "another method": {"adjoint_method": "bosh3", "adjoint_options": {}, **LOOSE},
    "another method, a first step": {"adjoint_method": "bosh3", "adjoint_options": {"first_step": 0.01}, **LOOSE},
    "other tolerances": {"adjoint_rtol": 1e-4, "adjoint_atol": 1e-5},
    "tolerances for each number": {"atol": tensor(1e-7, 1e-8), "rtol": torch.full((2, 2), 1e-6).double()},
    "discontinuities": {"options": {"jump_t": tensor(0.45, 0.5), "step_t": tensor(0.4, 0.7)}},
    "bounds": {"options": {"max_step": 0.05, "min_step": 1e-4}},
    "no parameters": {"adjoint_params": ()},
}


@pytest.mark.parametrize("name", CASES)
def test_options(name):
    assert_same(**CASES[name])


def test_a_batch_of_any_size_and_a_tuple():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 70), nn.Tanh(), nn.Linear(70, 3)).double()

    def f(t, y):
        a, b = y
        out = net(torch.cat([a, b], -1))
        return out[:, :1] * torch.cos(t), out[:, 1:]

    for rows in (1, 8, 21):
        y0, found = (torch.randn(rows, 1).double(), torch.randn(rows, 2).double()), []
        for g in (strict(f), f):
            starts = [x.clone().requires_grad_() for x in y0]
            params, options = tuple(net.parameters()), {"stats": pyode.Stats()}
            a, b = pyode.odeint_adjoint(
                g, tuple(starts), T, rtol=1e-6, atol=1e-8, adjoint_params=params, adjoint_options=options
            )
            gradients = torch.autograd.grad(loss_of(a) + loss_of(b), [*starts, *params])
            found.append((options["stats"], gradients))
        assert found[0][0] == found[1][0]
        assert_close(found[0][1], found[1][1], 1e-10)


def test_a_state_that_is_one_row():
    mass = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    y0, t, found = kepler_start(0.3), tensor(0.0, 1.0, 2.0), []
    for f in (strict(lambda t, y: kepler(t, y) * mass), lambda t, y: kepler(t, y) * mass):
        start = y0.clone().requires_grad_()
        y = pyode.odeint_adjoint(f, start, t, rtol=1e-7, atol=1e-9, adjoint_params=(mass,))
        found.append(torch.autograd.grad(loss_of(y), [start, mass]))
    assert_close(*found, 1e-9)


def test_the_same_bits_for_any_number_of_threads():
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    y0, t, f, found = torch.randn(1000, 8), torch.tensor([0.0, 0.5, 1.0]), strict(lambda t, y: net(y)), []
    params = tuple(net.parameters())
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        loss = pyode.odeint_adjoint(f, y0, t, **LOOSE, adjoint_params=params).square().sum()
        found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)]))
    assert all(torch.equal(g, found[0]) for g in found)


def test_what_reaches_parameters_by_a_graph_of_its_own_takes_the_eager_path():
    a = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    skew, found = a - a.T, []
    for f in (strict(lambda t, y: y @ skew), lambda t, y: y @ skew):
        y = pyode.odeint_adjoint(f, Y0, T, adjoint_params=(a,))
        found.append(torch.autograd.grad(loss_of(y), a, retain_graph=True))
    assert_close(*found, 1e-9)


def test_gradients_of_gradients_take_the_eager_path():
    found = []
    for f in (strict(Field()), Field()):
        y0, t = Y0.clone().requires_grad_(), T.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(pyode.odeint_adjoint(f, y0, t)), y0, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), (y0, t)))
    assert_close(*found, 1e-6)


def test_a_backward_solve_that_fails_says_so():
    for f in (strict(Field()), Field()):
        y = pyode.odeint_adjoint(f, Y0.clone().requires_grad_(), T, adjoint_options={"max_num_steps": 1})
        with pytest.raises(pyode.SolveError, match="after 1 step"):
            y.sum().backward()
