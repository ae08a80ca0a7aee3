"""Gradients within a vmap, in any order: each element's is that of its solve alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import pyode
from pyode import InvalidValue, odeint, solve_ivp
from pyode.methods import TABLEAUS

F64 = torch.float64
T = torch.tensor([0.0, 0.4, 0.5, 1.3], dtype=F64)
OWN = torch.stack([T, 0.2 + 0.5 * T, -T])
WEIGHT = torch.tensor([[0.3, 1.0], [-1.2, 0.1]], dtype=F64)
Y0 = torch.tensor([[1.0, -2.0], [0.5, 0.3], [2.0, 1.0]], dtype=F64)
ROUGH = {"rtol": 1e-4, "atol": 1e-5}
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def field(t: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Of one element; fast enough in time for rejected steps."""
    assert t.dim() == 0
    assert y.shape == (2,)
    return torch.tanh(w @ y) * (1 + torch.sin(5 * t))


def solve(w: Tensor, y0: Tensor, t: Tensor, **kwargs) -> Tensor:
    return odeint(field, y0, t, args=(w,), **{**ROUGH, **kwargs})


def loss(w: Tensor, y0: Tensor, t: Tensor, **kwargs) -> Tensor:
    ys = solve(w, y0, t, **kwargs)
    return (torch.linspace(-1, 2, ys.numel(), dtype=F64).view(ys.shape) * ys).square().sum()


def assert_apart(function, in_dims: tuple[int | None, ...], *inputs: Tensor, rtol: float = 1e-9) -> None:
    """That a vmap of a function is the function of each element."""
    together = vmap(function, in_dims)(*inputs)
    rows = [function(*(x if d is None else x[i] for x, d in zip(inputs, in_dims))) for i in range(3)]
    several = together if isinstance(together, tuple) else (together,)
    for i, ours in enumerate(several):
        apart = torch.stack([row[i] if isinstance(together, tuple) else row for row in rows])
        assert torch.allclose(ours, apart, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("in_dims", [(None, 0, None), (0, None, None), (None, None, 0), (0, 0, 0)], ids=str)
def test_gradients_of_weights_states_and_times(method, in_dims):
    weights = torch.stack([WEIGHT, 2 * WEIGHT, -WEIGHT])
    inputs = [x if d == 0 else x[0] for x, d in zip((weights, Y0, OWN), in_dims)]
    # dopri8's step sizes carry more of the noise of its error estimate.
    rtol = 1e-4 if method == "dopri8" else 1e-8
    assert_apart(grad(lambda *x: loss(*x, method=method), (0, 1, 2)), in_dims, *inputs, rtol=rtol)


@pytest.mark.parametrize("stop", ["step_t", "jump_t"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_where_steps_have_to_end(stop, sign):
    options = {stop: sign * torch.tensor([0.45, 0.9], dtype=F64)}
    function = grad(lambda w, y0, t: loss(w, y0, t, options=options), (0, 1, 2))
    assert_apart(function, (None, 0, None), WEIGHT, Y0, sign * T)


@pytest.mark.parametrize(
    "transform", [jacrev, jacfwd, hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))]
)
def test_jacobians_and_second_derivatives(transform):
    assert_apart(transform(lambda y0: solve(WEIGHT, y0, T[1:])[1]), (0,), Y0)


def test_forward_mode_and_products():
    assert_apart(lambda y0, v: jvp(lambda y: solve(WEIGHT, y, T), (y0,), (v,))[1], (0, 0), Y0, Y0.flip(0))
    assert_apart(lambda y0, v: vjp(lambda y: solve(WEIGHT, y, T)[-1], y0)[1](v)[0], (0, 0), Y0, Y0.flip(0))


def test_transforms_around_the_vmap():
    # The gradient of a penalty on each sample's gradient, by torch.func and by backward().
    def penalty(w):
        return vmap(grad(loss, 1), (None, 0, None))(w, Y0, T).square().sum()

    def one_by_one(w):
        return sum(grad(loss, 1)(w, y0, T).square().sum() for y0 in Y0)

    expected = grad(one_by_one)(WEIGHT)
    assert torch.allclose(grad(penalty)(WEIGHT), expected, rtol=1e-9)
    leaf = WEIGHT.clone().requires_grad_()
    penalty(leaf).backward()
    assert torch.allclose(leaf.grad, expected, rtol=1e-9)


def test_vmaps_within_each_other():
    weights = torch.stack([WEIGHT, 2 * WEIGHT, -WEIGHT, 0 * WEIGHT])
    inner = vmap(grad(loss, 1), (None, 0, None))
    together = vmap(inner, (0, None, None))(weights, Y0, T)
    assert torch.allclose(together, torch.stack([inner(w, Y0, T) for w in weights]), rtol=1e-9)
    # A gradient between them, of a sum over the inner one.
    between = grad(lambda w: vmap(loss, (None, 0, None))(w, Y0, T).sum())
    together = vmap(between)(weights)
    assert torch.allclose(together, torch.stack([between(w) for w in weights]), rtol=1e-9)


def test_samples_within_elements():
    def f(t, y, w):
        assert t.shape == (3,)
        return torch.tanh(y @ w) * (1 + torch.sin(5 * t))[:, None]

    def loss(w, t):
        return odeint(f, Y0, t, args=(w,), options={"control": "per_sample"}, **ROUGH).square().sum()

    weights = torch.stack([WEIGHT, 2 * WEIGHT, -WEIGHT])
    assert_apart(grad(loss, (0, 1)), (0, None), weights, T)
    assert_apart(grad(loss, (0, 1)), (0, None), weights, OWN.T.contiguous())


def test_nested_complex_states_and_what_func_closes_over():
    def loss(a, b, rate):
        def f(t, y):
            return {"z": 1j * rate * (1 + t) * y["z"], "x": y["x"].conj().cos() * y["z"].abs()}

        ys = odeint(f, {"z": torch.complex(a, b), "x": b}, T, **ROUGH)
        return ys["z"].real.square().sum() + (ys["z"].imag * ys["x"].real).sum()

    rates = torch.tensor([0.5, 2.0, 6.0], dtype=F64)
    assert_apart(grad(loss, (0, 1, 2)), (0, 0, 0), Y0, Y0.flip(0), rates)


@pytest.mark.filterwarnings("ignore:the solve failed")
def test_elements_that_fail_have_the_gradient_of_their_last_state():
    options = {"on_failure": "return", "max_num_steps": 3, "max_step": 0.1}
    assert_apart(grad(lambda w, y0, t: loss(w, y0, t, options=options), (0, 1)), (None, 0, None), WEIGHT, Y0, T)


def test_one_element_one_time_and_other_precisions():
    alone = vmap(grad(loss, 1), (None, 0, None))(WEIGHT, Y0[:1], T)
    assert torch.allclose(alone[0], grad(loss, 1)(WEIGHT, Y0[0], T), rtol=1e-9)
    assert torch.equal(vmap(grad(lambda y: solve(WEIGHT, y, T[:1]).sum()))(Y0), torch.ones_like(Y0))
    single = vmap(grad(lambda y: odeint(field, y, T, args=(WEIGHT.float(),), **ROUGH).sum()))(Y0.float())
    double = vmap(grad(lambda y: solve(WEIGHT, y, T).sum()))(Y0)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), double, rtol=1e-4)


def test_where_no_element_differs_there_is_one_solve():
    # As in jacfwd, where a vmap runs over the directions.
    shapes = set()

    def f(t, y):
        shapes.add(y.shape)
        return torch.tanh(WEIGHT @ y)

    found = jacfwd(lambda y: odeint(f, y, T, **ROUGH)[-1])(Y0[0])
    assert torch.allclose(found, jacrev(lambda y: odeint(f, y, T, **ROUGH)[-1])(Y0[0]), rtol=1e-9)
    assert shapes == {(2,)}
    by_ivp = jacfwd(lambda y: solve_ivp(f, y, T, control="joint").ys[-1])(Y0[0])
    assert torch.allclose(by_ivp, found, rtol=1e-2)


def test_func_is_called_for_all_elements_at_once():
    calls = []

    def run(y0):
        def f(t, y):
            calls.append(1)
            return torch.tanh(WEIGHT @ y)

        return odeint(f, y0, T, **ROUGH).sum()

    alone = []
    for y0 in Y0:
        calls.clear()
        grad(run)(y0)
        alone.append(len(calls))
    calls.clear()
    vmap(grad(run))(Y0)
    assert len(calls) <= 2 * max(alone)  # once for the steps, once for their graph


def test_what_fails_leaves_the_transforms_as_they_were():
    def f(t, y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vmap(grad(lambda y: odeint(f, y, T).sum()))(Y0)
    refused = [
        lambda y: solve_ivp(lambda t, y: -y, y, T, control="joint").ys.sum(),
        lambda y: odeint(lambda t, y: -y, y, T, options={"gradient": "checkpoint"}).sum(),
        lambda y: odeint(lambda t, y: -y, y, T, method="adams").sum(),
    ]
    for function in refused:
        with pytest.raises(InvalidValue, match="vmap"):
            vmap(grad(function))(Y0)
    assert torch.equal(vmap(grad(lambda y: y.square().sum()))(Y0), 2 * Y0)


def test_the_twin_does_the_same():
    with pyode.backend("reference"):
        twin = vmap(grad(loss, 1), (None, 0, None))(WEIGHT, Y0, T)
    assert torch.allclose(twin, vmap(grad(loss, 1), (None, 0, None))(WEIGHT, Y0, T), rtol=1e-9)
