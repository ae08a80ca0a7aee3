"""Gradients of odeint_adjoint's gradients: the continuous adjoint differentiated once more."""

from __future__ import annotations

import pytest
import torch
from fields import Field, loss_of
from problems import tensor
from torch.autograd import gradgradcheck

import pyode

Y0, T, A = tensor(1.0, -0.4), tensor(0.0, 0.3, 0.8), tensor(0.3, 1.0, -1.2, 0.1).view(2, 2)
TIGHT = {"rtol": 1e-7, "atol": 1e-8}
# A difference with steps of 1e-6 is right to 1e-7 or so where the solves are to 1e-8.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
def test_second_derivatives_are_the_finite_differences(method, sign):
    options = {} if method == "dopri5" else {"step_size": 0.04, "interp": "cubic"}

    def solve(y0, a, t):
        def f(t, y):
            return torch.sin(y @ a) * (1 + t * t)

        return pyode.odeint_adjoint(f, y0, t, method=method, options=options, adjoint_params=(a,), **TIGHT)

    inputs = [x.clone().requires_grad_() for x in (Y0, A, sign * T)]
    assert gradgradcheck(solve, inputs, fast_mode=True, **CLOSE)


def test_of_complex_states_and_real_parameters():
    def solve(y0, rate):
        return pyode.odeint_adjoint(lambda t, y: rate * y * y.abs() * 1j, y0, T, adjoint_params=(rate,), **TIGHT)

    inputs = [
        torch.tensor([1 + 1j, 0.3 - 0.5j], dtype=torch.complex128, requires_grad=True),
        tensor(0.7).requires_grad_(),
    ]
    assert gradgradcheck(solve, inputs, fast_mode=True, **CLOSE)


@pytest.mark.parametrize(
    ("parts", "method"),
    [(1, {}), (2, {}), (1, {"method": "gl6", "options": {"step_size": 0.05}})],
    ids=["a tensor", "a tuple", "an implicit method"],
)
def test_a_hessian_vector_product_is_that_of_backpropagation(parts, method):
    def product(odeint, **kwargs):
        field = Field()
        y0 = torch.tensor([[1.0, -2.0], [0.5, 0.3]], dtype=torch.float64, requires_grad=True)

        def f(t, y):
            return field(t, y) if parts == 1 else (field(t, y[0]), (y[0] * y[1]).cos())

        y = odeint(f, y0 if parts == 1 else (y0, y0.sin()), T, **TIGHT, **kwargs)
        inputs = [y0, *field.trained()]
        loss = loss_of(y) if parts == 1 else loss_of(y[0]) + loss_of(y[1])
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        along = sum((torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view(g.shape) * g).sum() for g in gradients)
        return [*gradients, *torch.autograd.grad(along, inputs)]

    for ours, exact in zip(product(pyode.odeint_adjoint, **method), product(pyode.odeint)):
        assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-5)  # some 100 times the solves' tolerance


def test_a_gradient_penalty_trains_and_sees_hooks_once():
    def penalty(hooked):
        field = Field()
        if hooked:
            field.rate.register_hook(lambda g: 2 * g)
        y0 = tensor(1.0, 0.5).requires_grad_()
        y = pyode.odeint_adjoint(field, y0, T, **TIGHT)
        (gradient,) = torch.autograd.grad(y[-1].sum(), y0, create_graph=True)
        gradient.square().sum().backward()
        return field.rate.grad

    assert torch.allclose(penalty(True), 2 * penalty(False), rtol=1e-12)
