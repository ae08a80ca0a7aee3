"""The continuous adjoint of samples with steps of their own, compiled: the eager one's steps and gradients."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from ensembles import blow_up, columns, oscillators, van_der_pol
from fields import Driven, T, assert_close, loss_of
from problems import tensor
from torch import Tensor, nn

import pyode
from pyode.methods import TABLEAUS

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
PER_SAMPLE = {"control": "per_sample"}
OWN = columns((-1.0) ** torch.arange(21), torch.arange(21) % 4, 0.2 + torch.linspace(0, 1, 63).double().reshape(3, 21))


def strict(f):
    return pyode.compile(f, strict=True)


def starts(samples: int) -> Tensor:
    return torch.linspace(-1, 2, 2 * samples).double().reshape(samples, 2).requires_grad_()


def backward(compiled: bool, t: Tensor = T, samples: int = 21, **arguments) -> tuple[pyode.Stats, list]:
    """How the backward solve went, and the gradients; compiled, no solve calls func but to be traced."""
    stats, field, y0, t = pyode.Stats(), Driven(), starts(samples), t.clone().requires_grad_()
    options = {**arguments.pop("adjoint_options", {}), "stats": stats}
    solution = pyode.solve_ivp(
        strict(field) if compiled else field, y0, t, gradient="adjoint", adjoint_options=options,
        **{"rtol": 1e-6, "atol": 1e-8, **arguments},
    )  # fmt: skip
    loss_of(solution.ys.nan_to_num()).backward()
    assert (field.calls < 4) == compiled
    return stats, [y0.grad, t.grad, *(p.grad for p in field.trained()), field.unused.grad]


def assert_same(t: Tensor = T, samples: int = 21, tolerance: float = 1e-10, **arguments) -> None:
    (ours, our_gradients), (theirs, their_gradients) = (
        backward(compiled, t, samples, **arguments) for compiled in (True, False)
    )
    assert (ours.n_accepted, ours.n_rejected) == (theirs.n_accepted, theirs.n_rejected)
    assert ours.n_accepted > 0
    if arguments.get("control") == "joint":
        assert ours.n_f_evals <= theirs.n_f_evals  # what gives the parameters' gradients needs no evaluation of its own
    elif samples == 1:  # else evaluations of several samples are one where func is called
        assert ours.n_f_evals == theirs.n_f_evals
    assert_close(our_gradients, their_gradients, tolerance)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_method(method):
    assert_same(method=method, rtol=1e-4, tolerance=1e-8)


CASES = {
    "one sample": {"samples": 1},
    "many samples": {"samples": 150},
    "times of their own": {"t": OWN},
    "another method": {"adjoint_options": {"method": "bosh3", "rtol": 1e-4}},
    "tolerances for each number": {"atol": tensor(1e-7, 1e-8), "rtol": tensor(1e-6, 1e-5)},
    "discontinuities": {"options": {"jump_t": tensor(0.45, 0.5), "step_t": tensor(0.4, 0.7)}},
    "bounds": {"adjoint_options": {"max_step": 0.05, "min_step": 1e-3}},
    "a controller": {"controller": "PID"},
    "no parameters": {"params": ()},
    "failures": {"max_num_steps": 13, "throw": False},
}


@pytest.mark.parametrize("name", CASES)
def test_options(name):
    assert_same(**CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if name != "times of their own"])
def test_options_where_all_samples_take_one_step(name):
    assert_same(control="joint", **CASES[name])


def test_a_discontinuity_is_seen_from_its_side():
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def growth(t: Tensor, y: Tensor) -> Tensor:  # y' = -y, then 2 y
        return rate * y * torch.where(t < 0.5, -torch.ones_like(t), 2.0)[:, None]

    options = {**PER_SAMPLE, "jump_t": tensor(0.5)}
    y = pyode.odeint_adjoint(strict(growth), starts(5), tensor(0.0, 1.0), options=options, adjoint_params=(rate,))
    (found,) = torch.autograd.grad(y[-1].sum(), rate)
    assert torch.allclose(found, 0.5 * torch.exp(tensor(0.5)) * starts(5).sum(), rtol=1e-6)


def test_odeint_adjoint_a_tuple_and_rows_of_many_numbers():
    net = nn.Sequential(nn.Linear(3, 70), nn.Tanh(), nn.Linear(70, 3)).double()

    def f(t, y):
        a, b = y
        out = net(torch.cat([a, b], -1))
        return out[:, :1] * torch.cos(t)[:, None], out[:, 1:]

    for rows in (1, 8, 45):
        y0, found = (torch.randn(rows, 1).double(), torch.randn(rows, 2).double()), []
        for g in (strict(f), f):
            parts, params = [x.clone().requires_grad_() for x in y0], tuple(net.parameters())
            a, b = pyode.odeint_adjoint(
                g, tuple(parts), T, rtol=1e-6, atol=1e-8, options=PER_SAMPLE, adjoint_params=params
            )
            found.append([a.detach(), b.detach(), *torch.autograd.grad(loss_of(a) + loss_of(b), [*parts, *params])])
        assert_close(*found, 1e-10)


def test_lanes_without_a_row_do_not_spoil_the_sums():
    """Where no row is, f is not asked either."""
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    f = lambda t, y: -weight * y * torch.log(y) * torch.sqrt(1.0 - t)[:, None]  # noqa: E731
    y0, found = torch.linspace(0.5, 2, 3).double()[:, None], []
    for g in (strict(f), f):
        y = pyode.odeint_adjoint(g, y0, tensor(0.0, 0.7), options=PER_SAMPLE, adjoint_params=(weight,))
        found.append(torch.autograd.grad(loss_of(y), [weight]))
    assert bool(found[0][0].isfinite())
    assert_close(*found, 1e-10)


def test_the_same_bits_for_any_number_of_threads():
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))
    y0, t, found = torch.randn(700, 4), torch.linspace(0, 2, 5), []
    f = strict(lambda t, y: net(y) * torch.cos(t)[:, None])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        start, times = y0.clone().requires_grad_(), t.clone().requires_grad_()
        ys = pyode.solve_ivp(f, start, times, gradient="adjoint", params=net.parameters()).ys
        gradients = torch.autograd.grad(ys.square().sum(), [start, times, *net.parameters()])
        found.append(torch.cat([g.reshape(-1) for g in gradients]))
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_sample_has_the_same_bits_alone_and_in_a_crowd():
    f, found = strict(van_der_pol), []
    for rows in (slice(0, 40), slice(7, 8)):
        y0 = oscillators(40, stiffest=8.0)[rows].requires_grad_()
        ys = pyode.odeint_adjoint(f, y0, T, options=PER_SAMPLE, adjoint_params=())
        found.append(torch.autograd.grad(ys.square().sum(), y0)[0])
    assert torch.equal(found[0][7], found[1][0])


@pytest.mark.filterwarnings("ignore:the solve failed")
def test_behind_a_failure_gradients_are_those_of_the_last_state():
    t, found = tensor(0.0, 0.25, 1.0), []
    for f in (strict(blow_up), blow_up):
        y0 = tensor(0.1, 2.0)[:, None].requires_grad_()
        options = {**PER_SAMPLE, "on_failure": "return", "max_num_steps": 40}
        ys = pyode.odeint_adjoint(f, y0, t, rtol=1e-9, options=options, adjoint_params=(), adjoint_options={})
        found.append([ys.detach(), *torch.autograd.grad(ys[:, 0].sum() + ys[1].sum() + ys[2].log().sum(), y0)])
    assert_close(*found, 1e-6)


def test_events_end_samples_where_the_adjoint_begins():
    found = []
    for field in (strict(Driven()), Driven()):
        y0, own = starts(9), [p for p in field.parameters() if p.requires_grad]
        solution = pyode.solve_ivp(
            field, y0, T, event_fn=lambda t, y: y[:, 0] - 0.5, gradient="adjoint", rtol=1e-7, atol=1e-9
        )
        assert 0 < int((solution.event_index >= 0).sum()) < 9
        loss = loss_of(solution.ys.nan_to_num()) + loss_of(solution.event_y.nan_to_num()) + solution.event_t.nansum()
        found.append(torch.autograd.grad(loss, [y0, *own], allow_unused=True))
    assert_close(*found, 1e-9)


@pytest.mark.parametrize("time", [False, True])
def test_an_event_ends_all_samples_where_the_adjoint_begins(time):
    found = []
    for field in (strict(Driven()), Driven()):
        y0, t, own = starts(9), T.clone().requires_grad_(time), [p for p in field.parameters() if p.requires_grad]
        solution = pyode.solve_ivp(
            field, y0, t, event_fn=lambda t, y: y[0, 0] + 0.5, control="joint", gradient="adjoint", rtol=1e-7, atol=1e-9
        )
        assert 0.3 < solution.event_t < 0.31
        loss = loss_of(solution.ys.nan_to_num()) + loss_of(solution.event_y.nan_to_num()) + solution.event_t.sum()
        found.append(torch.autograd.grad(loss, [y0, *own, *([t] if time else [])], allow_unused=True))
    assert_close(*found, 1e-9)


def test_a_tuple_whose_parts_take_one_step():
    weight, found = torch.linspace(-1, 1, 4).double().reshape(2, 2).requires_grad_(), []
    f = lambda t, y: (torch.tanh(y[1] @ weight), -y[0] * t)  # noqa: E731
    for g in (strict(f), f):
        parts = starts(4), starts(4)
        ys = pyode.solve_ivp(g, parts, T, control="joint", gradient="adjoint", params=(weight,)).ys
        found.append(torch.autograd.grad(loss_of(ys[0]) + loss_of(ys[1] * ys[0]), [*parts, weight]))
    assert_close(*found, 1e-9)


def test_args():
    weight, found = torch.linspace(-1, 1, 4).double().reshape(2, 2).requires_grad_(), []
    f = lambda t, y, w, c: c * torch.tanh(y @ w)  # noqa: E731
    for g in (strict(f), f):
        ys = pyode.odeint_adjoint(g, starts(6), T, options=PER_SAMPLE, args=(weight, 0.5), adjoint_params=())
        found.append(torch.autograd.grad(loss_of(ys), [weight]))
    assert_close(*found, 1e-10)


def test_a_gradient_that_is_lost_is_told():
    a, b = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    f, y0 = strict(lambda t, y: a * torch.sin(b * y)), starts(3)
    for params in ((a, b), (), (a,)):
        ys = pyode.solve_ivp(f, y0, T, gradient="adjoint", params=params).ys
        with pytest.warns(UserWarning, match="shape .2,. that requires") if len(params) == 1 else nullcontext():
            torch.autograd.grad(ys.sum(), y0)


def test_gradients_of_gradients_take_the_eager_path():
    found = []
    for f in (strict(Driven()), Driven()):
        y0 = starts(3)
        ys = pyode.odeint_adjoint(f, y0, T, options=PER_SAMPLE)
        (g,) = torch.autograd.grad(loss_of(ys), y0, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), y0))
    assert_close(*found, 1e-8)


def test_a_backward_solve_that_fails_says_where():
    errors = []
    for f in (strict(Driven()), Driven()):
        y = pyode.odeint_adjoint(f, starts(4), T, options=PER_SAMPLE, adjoint_options={"max_num_steps": 3})
        with pytest.raises(pyode.SolveError, match="sample 0") as caught:
            y.sum().backward()
        errors.append((caught.value.status, caught.value.n_steps, pytest.approx(caught.value.t)))
    assert errors[0] == errors[1]


@pytest.mark.usefixtures("_optimised")
def test_an_interrupt_stops_it(request):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores the signal
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    f, ends = strict(lambda t, y: torch.cos(t)[:, None] * y), torch.full((64,), 1e-6).double()

    def solve() -> Tensor:
        y0, options = torch.ones(64, 1).double().requires_grad_(), {"max_num_steps": 2**40, "max_step": 1e-9}
        t = torch.stack([0 * ends, ends])
        return pyode.odeint_adjoint(f, y0, t, options=PER_SAMPLE, adjoint_params=(), adjoint_options=options).sum()

    solve().backward()  # compiles
    ends[33] = 1.0
    loss = solve()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    began = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert time.perf_counter() - began < 1.3
