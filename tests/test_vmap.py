"""torch.func.vmap over a solve: each batch element as if solved alone, all at once in the per-sample solver."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

import pyode
from pyode import InvalidValue, SolveError, Status, odeint, odeint_adjoint, solve_ivp

F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
MU = torch.tensor([0.5, 2.0, 6.0], dtype=F64)
Y0 = torch.tensor([[2.0, 0.0], [1.0, 0.5], [-1.0, 3.0]], dtype=F64)
TIMES = torch.stack([T, 0.25 + 2 * T, -0.1 * T])
TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def van_der_pol(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    """One oscillator: t a number, y [2]; sums and products only."""
    assert t.shape == ()
    assert y.shape == (2,)
    return torch.stack([y[1], mu * (1 - y[0] * y[0]) * y[1] - y[0] + t * 0.125])


def solve(y0: Tensor, t: Tensor, mu: Tensor) -> Tensor:
    return odeint(van_der_pol, y0, t, args=(mu,))


def by_ivp(y0: Tensor, t: Tensor, mu: Tensor) -> Tensor:
    return solve_ivp(van_der_pol, y0, t, args=(mu,), control="joint", **TIGHT).ys


def loop(function, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Tensor:
    """What vmap is to return."""
    rows = range(3)
    return torch.stack([function(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims))) for i in rows])


@pytest.mark.parametrize("function", [solve, by_ivp])
@pytest.mark.parametrize("grad_enabled", [False, True])
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, 1, 0)], ids=str)
def test_each_element_has_the_bits_of_its_solve_alone(function, in_dims, grad_enabled):
    inputs = [x if d == 0 else x.T.contiguous() if d == 1 else x[0] for x, d in zip((Y0, TIMES, MU), in_dims)]
    with torch.set_grad_enabled(grad_enabled):
        together = vmap(function, in_dims)(*inputs)
        assert torch.equal(together, loop(function, in_dims, *inputs))


def test_func_is_called_for_all_at_once_and_as_often_as_the_slowest_needs():
    calls = []

    def count(t, y, mu):
        calls.append(1)
        return van_der_pol(t, y, mu)

    def counted(y0, mu):
        return odeint(count, y0, T, args=(mu,))

    vmap(counted)(Y0, MU)
    together = len(calls)
    alone = []
    for y0, mu in zip(Y0, MU):
        calls.clear()
        counted(y0, mu)
        alone.append(len(calls))
    # A sample's first call of func and its first step take place when everybody's do.
    assert together == max(alone) < sum(alone)


def test_out_dims_chunks_and_what_func_closes_over():
    closed = lambda mu: odeint(lambda t, y: van_der_pol(t, y, mu), Y0[0], T)  # noqa: E731
    expected = torch.stack([closed(mu) for mu in MU])
    assert torch.equal(vmap(closed, out_dims=1)(MU), expected.transpose(0, 1))
    assert torch.equal(vmap(closed, chunk_size=2)(MU), expected)


def test_nested_vmaps_are_one_solve():
    calls = []

    def f(t, y, mu):
        calls.append(1)
        return van_der_pol(t, y, mu)

    both = lambda y0: vmap(lambda mu: odeint(f, y0, T, args=(mu,)))(MU)  # noqa: E731
    together = vmap(both)(Y0)
    assert together.shape == (3, 3, 5, 2)
    n = len(calls)
    for i in range(3):
        for j in range(3):
            calls.clear()
            assert torch.equal(together[i, j], solve(Y0[i], T, MU[j]))
            assert len(calls) <= n


def test_per_sample_solves_are_batched_over_samples_and_elements():
    def f(t, y, mu):
        assert (t.shape, y.shape) == ((3,), (3, 2))
        return torch.stack([y[:, 1], mu * (1 - y[:, 0] * y[:, 0]) * y[:, 1] - y[:, 0]], 1)

    def run(mu, t):
        found = solve_ivp(f, Y0, t, args=(mu,))
        return found.ys, found.status, found.stats.n_steps, found.event_t

    t = torch.stack([T, 2 * T, 0.5 * T], 1)
    together = vmap(run, (0, None))(MU, t)
    for i, mu in enumerate(MU):
        for x, y in zip(together, run(mu, t)):
            assert torch.equal(x[i].nan_to_num(), y.nan_to_num())
    batched = vmap(run)(MU, torch.stack([t, t / 2, t + 1]))
    assert torch.equal(batched[0][1], run(MU[1], t / 2)[0])
    ys = vmap(lambda mu: odeint(f, Y0, T, args=(mu,), options={"control": "per_sample"}))(MU)
    assert torch.equal(ys[2], odeint(f, Y0, T, args=(MU[2],), options={"control": "per_sample"}))


def test_nested_states_tolerances_and_norms():
    def run(a, b):
        f = lambda t, y: {"a": -y["a"] * y["b"][0], "b": (y["b"][0] * 0.5,)}  # noqa: E731
        norm = lambda e: torch.maximum(e["a"].abs().max(), e["b"][0].abs().max())  # noqa: E731
        rtol = {"a": torch.tensor([1e-5, 1e-7], dtype=F64), "b": (1e-6,)}
        ys = odeint(f, {"a": a, "b": (b,)}, T, rtol=rtol, options={"norm": norm})
        return ys["a"], ys["b"][0]

    for together, apart in zip(vmap(run)(Y0, MU), zip(*map(run, Y0, MU))):
        assert torch.allclose(together, torch.stack(apart), rtol=1e-12)


# Gradients.


def test_gradients_pass_through_a_vmap():
    def loss(solved, y0, t, mu):
        return (solved(y0, t, mu) * torch.linspace(1, 2, 10, dtype=F64).reshape(5, 2)).sum()

    found, expected = [], []
    for result, solved in (
        (found, vmap(solve)),
        (expected, lambda *inputs: loop(solve, (0, 0, 0), *inputs)),
    ):
        inputs = [x.clone().requires_grad_() for x in (Y0, TIMES, MU)]
        result += torch.autograd.grad(loss(solved, *inputs), inputs)
    for x, y in zip(found, expected):
        assert torch.allclose(x, y, rtol=1e-9)


def test_gradients_of_shared_parameters_add_up():
    w = torch.tensor([[0.3, 1.0], [-1.2, 0.1]], dtype=F64, requires_grad=True)
    run = lambda y0: odeint(lambda t, y: torch.tanh(w @ y), y0, T)  # noqa: E731
    (together,) = torch.autograd.grad(vmap(run)(Y0).square().sum(), w)
    (apart,) = torch.autograd.grad(sum(run(y0).square().sum() for y0 in Y0), w)
    assert torch.allclose(together, apart, rtol=1e-9)


def test_grad_and_jacrev_of_a_vmap():
    w = torch.tensor([[0.3, 1.0], [-1.2, 0.1]], dtype=F64)

    def loss(w):
        run = lambda y0: odeint(lambda t, y: torch.tanh(w @ y), y0, T, rtol=1e-5, atol=1e-6)  # noqa: E731
        return vmap(run)(Y0)[:, -1].square().sum(0)

    leaf = w.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in loss(leaf)])
    assert torch.allclose(jacrev(loss)(w), expected, rtol=1e-9)
    assert torch.allclose(grad(lambda w: loss(w).sum())(w), expected.sum(0), rtol=1e-9)


# Events, failures, and what is refused.


def test_events_of_elements_and_their_gradients():
    def run(y0, rate, level):
        event = lambda t, y, rate: torch.stack([y[0] - level, t - 1.5])  # noqa: E731
        found = solve_ivp(lambda t, y, rate: -rate * y, y0, T, args=(rate,), event_fn=event, control="joint", **TIGHT)
        return found.event_t, found.event_index, found.event_y, found.status, found.ys

    y0, rate, level = Y0.abs(), MU.clone().requires_grad_(), torch.tensor([1.0, 0.5, 1e-9], dtype=F64)
    together = vmap(run)(y0, rate, level)
    for i in range(3):
        for x, y in zip(together, run(y0[i], rate[i], level[i])):
            assert torch.allclose(x[i].double(), y.double(), rtol=1e-7, equal_nan=True)
    assert together[1].flatten().tolist() == [0, 0, 1]
    (found,) = torch.autograd.grad(together[0][:2].sum(), rate)
    exact = -torch.log(y0[:2, 0] / level[:2]) / MU[:2] ** 2
    assert torch.allclose(found[:2], exact, rtol=1e-6)


def test_failures_of_elements():
    run = lambda y0, throw: solve_ivp(  # noqa: E731
        lambda t, y: y * y, y0, T, control="joint", throw=throw
    )
    y0 = torch.tensor([[0.1], [2.0], [-1.0]], dtype=F64)
    ys, status = vmap(lambda y: (lambda s: (s.ys, s.status))(run(y, False)))(y0)
    assert (status[:, 0] == Status.SUCCESS).tolist() == [True, False, True]
    assert ys[1, -1].isnan().all()
    assert not ys[[0, 2]].isnan().any()
    with pytest.raises(SolveError):
        vmap(lambda y: run(y, True).ys)(y0)
    assert torch.equal(vmap(lambda y: -y)(y0), -y0)  # and the vmap stack is as it was


def test_an_exception_of_funcs_leaves_vmap_as_it_was():
    def f(t, y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vmap(lambda y: odeint(f, y, T))(Y0)
    assert torch.equal(vmap(solve, (0, None, None))(Y0, T, MU[0])[0], solve(Y0[0], T, MU[0]))


def test_what_is_refused_under_vmap():
    f = lambda t, y: -y  # noqa: E731
    refused = [
        lambda y: odeint_adjoint(f, y, T, adjoint_params=()),
        lambda y: odeint(f, y, T, options={"gradient": "checkpoint"}),
        lambda y: odeint(f, y, T, method="adams"),
        lambda y: odeint(f, y, T[:2], event_fn=lambda t, y: y[0]),
        lambda y: solve_ivp(f, y, T, gradient="adjoint").ys,
        lambda y: solve_ivp(f, y, T, compact=True).ys,
        lambda y: solve_ivp(f, y, T, dense_output=True).ys,
    ]
    for function in refused:
        with pytest.raises(InvalidValue, match="vmap"):
            vmap(function)(Y0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_both_backends(backend):
    with pyode.backend(backend), torch.no_grad():
        together = vmap(solve)(Y0, TIMES, MU)
    assert torch.allclose(together, vmap(solve)(Y0, TIMES, MU), rtol=1e-8)
