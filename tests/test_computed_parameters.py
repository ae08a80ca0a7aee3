"""Tensors of func's that were computed from others before the solve: every gradient arrives, and counts once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fields import Y0, T, assert_close, loss_of
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.func import functional_call

import pyode

F64 = torch.float64
TOLERANCES = {"rtol": 1e-8, "atol": 1e-10}


class Hypernetwork(nn.Module):
    """Weights from a network of its own, which it also uses directly, and from a code that somebody else has."""

    def __init__(self, code: Tensor) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4, dtype=F64)
        self.weight = self.net(code.sin()).view(2, 2).tanh()
        self.shift = self.weight.sum(0) * self.net.bias[:2]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y @ self.weight + self.shift) * self.net.bias.exp().sum() * (1 + t.reshape(-1, 1))


def jointly(func, y0, t, gradient, **options):
    return pyode.odeint(func, y0, t, options={"gradient": gradient, **options}, **TOLERANCES)


def by_samples(func, y0, t, gradient):
    return pyode.solve_ivp(func, y0, t, gradient=gradient, **TOLERANCES).ys


MODES = {
    "checkpoint": partial(jointly, gradient="checkpoint"),
    "checkpoint without graphs": partial(jointly, gradient="checkpoint", graph_bytes=0),
    "checkpoint by samples": partial(by_samples, gradient="checkpoint"),
    "adjoint": partial(jointly, gradient="adjoint"),
    "adjoint by samples": partial(by_samples, gradient="adjoint"),
    "compiled": partial(jointly, gradient="checkpoint", compile=True),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_comes_through_a_computed_tensor_counts_once(mode):
    def gradients(solve):
        torch.manual_seed(0)
        y0, code = Y0.clone().requires_grad_(), torch.tensor([0.3, -0.7], dtype=F64, requires_grad=True)
        func = Hypernetwork(code)
        return list(torch.autograd.grad(loss_of(solve(lambda t, y: func(t, y), y0, T)), [y0, code, *func.parameters()]))

    expected = gradients(partial(jointly, gradient="direct"))
    assert_close(
        gradients(MODES[mode]), expected, 1e-11 if mode in ("checkpoint", "checkpoint without graphs") else 1e-6
    )


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "gl4"])
def test_so_it_does_through_parameters_after_a_step_of_descent(gradient, method):
    # As in meta-learning: the new parameters depend on the old ones, which are found in the module, too.
    def gradients(gradient):
        torch.manual_seed(0)
        net = nn.Linear(2, 2, dtype=F64)
        old = dict(net.named_parameters())
        slopes = torch.autograd.grad(net(Y0).exp().sum(), list(old.values()), create_graph=True)
        new = {name: p - 0.1 * slope for (name, p), slope in zip(old.items(), slopes)}
        options = {"gradient": gradient, **({} if method == "dopri5" else {"step_size": 0.05})}
        y = pyode.odeint(
            lambda t, y: functional_call(net, new, (y,)).tanh(), Y0, T, method=method, options=options, **TOLERANCES
        )
        return list(torch.autograd.grad(loss_of(y), list(old.values())))

    assert_close(gradients(gradient), gradients("direct"), 1e-10 if gradient == "checkpoint" else 1e-4)


@pytest.mark.parametrize("kind", [{}, {"control": "per_sample"}, {"method": "rk4"}, {"method": "adams"}], ids=str)
@pytest.mark.parametrize("in_args", [False, True], ids=["in a closure", "in args"])
def test_what_all_evaluations_share_is_gone_through_again_and_again(kind, in_args):
    # A weight made once, and named is what it was made of: torchdiffeq keeps its graph.
    kind = dict(kind)
    net, options = nn.Linear(2, 4, dtype=F64), {"control": kind.pop("control", "joint")}
    weight = net(torch.ones(2, dtype=F64)).view(2, 2).tanh()
    func, args = (lambda t, y, w=weight: torch.sin(y @ w)), (weight,) if in_args else ()
    t = torch.linspace(0, 1.3, 40, dtype=F64)

    def gradients(odeint, **named):
        loss = loss_of(odeint(func, Y0, t, args=args, options=options, **kind, **named, **TOLERANCES))
        return list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))

    found = gradients(pyode.odeint_adjoint, adjoint_params=tuple(net.parameters()))
    assert_close(found, gradients(pyode.odeint), 1e-5)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_a_tensor_that_is_named_twice_has_its_gradient_once(gradient, control):
    # As networks that share weights, and have their parameters joined.
    weight = torch.eye(2, dtype=F64, requires_grad=True)

    def found(gradient, **kwargs):
        func, given = (lambda t, y, w: torch.sin(y @ w)), {"args": (weight,), "control": control, **TOLERANCES}
        ys = pyode.solve_ivp(func, Y0, T, gradient=gradient, **given, **kwargs).ys
        return list(torch.autograd.grad(loss_of(ys), weight))

    assert_close(found(gradient, params=[weight, weight]), found("direct"), 1e-6)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_second_derivatives_through_computed_tensors(control):
    def solve(y0, raw):
        weight = raw.sin()
        shift = weight[0] * raw[1]

        def func(t, y):
            return torch.tanh(y @ weight + shift) * raw.sum()

        params, options = (raw, weight, shift), {"control": control}
        return pyode.odeint_adjoint(func, y0, T[:2], options=options, adjoint_params=params, rtol=1e-7, atol=1e-8)

    inputs = [Y0.clone().requires_grad_(), torch.tensor([[0.3, 1.0], [-1.2, 0.1]], dtype=F64, requires_grad=True)]
    assert gradgradcheck(solve, inputs, fast_mode=True, rtol=1e-5, atol=1e-6)
