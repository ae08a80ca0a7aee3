"""Gradients of implicit methods, by the implicit function theorem, and their adjoint."""

from __future__ import annotations

import math

import pytest
import torch
from implicit_field import METHODS, SYMPLECTIC, TIGHT, Y0, A, f, uneven
from problems import tensor
from torch import Tensor, nn

import pyode
from pyode import Stats
from pyode.methods import IMPLICIT


@METHODS
def test_gradcheck(method, by):
    # Cubic output uses all that a step hands on: its stages, both ends and the slope at its start.
    options = {"step_size": 0.2, "interp": "cubic"}

    def solve(y0, matrix, t):
        return pyode.odeint(lambda t, y: torch.sin(y @ matrix) * (1 + t), y0, t, method=method, options=options)

    inputs = (Y0[:1].clone().requires_grad_(), A.clone().requires_grad_(), uneven(3).requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, **TIGHT)


@pytest.mark.parametrize("method", ["trapezoid", "radauIIA3"])
def test_gradcheck_of_a_complex_tuple(method, by):
    def solve(y, z, t):
        def func(t, s):
            return torch.sin(s[0].real @ A) * t + 0j * s[0], s[1] * 1j - s[1].abs() * s[1] + s[0].sum()

        return torch.cat([part.reshape(-1) for part in pyode.odeint(func, (y + 0j, z), t, method=method)])

    z = torch.tensor([0.3 - 1j, 0.7 + 0.2j], dtype=torch.complex128)
    inputs = (Y0[:1].clone().requires_grad_(), z.requires_grad_(), uneven(2).requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, **TIGHT)


def test_a_stiff_gradient_is_that_of_the_converged_step():
    # Through iterations it would depend on their number; y1 = (y0 + h l c) / (1 + h l) has the gradient below.
    rate, c, h = 1e4, tensor(0.7).requires_grad_(), 0.1
    y0 = tensor(3.0).requires_grad_()
    y = pyode.odeint(lambda t, y: -rate * (y - c), y0, tensor(0, h), method="implicit_euler")[-1]
    gradients = torch.autograd.grad(y.sum(), (y0, c))
    assert torch.allclose(torch.stack(gradients)[:, 0], tensor(1, h * rate) / (1 + h * rate), rtol=1e-12)


def test_a_gradient_is_not_differentiated_again():
    y0 = Y0.clone().requires_grad_()
    y = pyode.odeint(f, y0, uneven(), method="gl4")
    with pytest.raises(pyode.InvalidValue, match="can't be differentiated"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("method", ["gl4", "trapezoid"])
def test_a_start_that_was_written_to_before_the_backward_pass_is_noticed(method, gradient, by):
    y0 = Y0.clone().requires_grad_()
    y = pyode.odeint(f, y0, uneven(), method=method, options={"gradient": gradient})
    y0.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Field(nn.Module):
    """A small network with a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 5).double(), nn.Linear(5, 2).double()
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, t, y):
        return self.second(torch.tanh(self.first(y))) * (1 + t) - y


def gradients_of(solve, field, **kwargs) -> list[Tensor]:
    y0 = Y0.clone().requires_grad_()
    y = solve(field, y0, tensor(0, 0.5, 1), **kwargs)
    inputs = (y0, *field.parameters())
    return list(torch.autograd.grad(y[1:].square().sum(), inputs, materialize_grads=True, allow_unused=True))


@METHODS
def test_adjoint_gradients_tend_to_direct_ones(method):
    field, errors = Field(), []
    for size in (0.1, 0.05):
        found = [
            gradients_of(solve, field, method=method, options={"step_size": size})
            for solve in (pyode.odeint, pyode.odeint_adjoint)
        ]
        errors.append(max(float((a - b).abs().max()) for a, b in zip(*found)))
    if method in SYMPLECTIC:  # their adjoint is their own backward pass: Sanz-Serna, SIAM Rev. 58 (2016)
        assert max(errors) < 1e-10
    else:
        assert math.log2(errors[0] / errors[1]) > IMPLICIT[method].order - 0.4


def test_gmres_makes_no_other_adjoint_gradients(by):
    field = Field()
    found = gradients_of(pyode.odeint_adjoint, field, method="gl4")
    for direct, adjoint in zip(gradients_of(pyode.odeint, field, method="gl4"), found):
        assert torch.allclose(direct, adjoint, atol=1e-10)


def test_adjoint_gradients_reach_times_and_given_parameters_of_a_tuple():
    matrix, t = A.clone().requires_grad_(), tensor(0, 0.3, 0.7).requires_grad_()

    def func(t, s):
        return torch.sin(s[0] @ matrix) * (1 + t), s[1] * t

    y0 = (Y0.clone().requires_grad_(), tensor(2.0).requires_grad_())
    found = []
    for solve, kwargs in ((pyode.odeint, {}), (pyode.odeint_adjoint, {"adjoint_params": (matrix,)})):
        y = solve(func, y0, t, method="gl6", options={"step_size": 0.1}, **kwargs)
        loss = y[0][1:].square().sum() + y[1][-1].sum()
        found.append(torch.autograd.grad(loss, (*y0, matrix)))
    for direct, adjoint in zip(*found):
        assert torch.allclose(direct, adjoint, rtol=1e-9)
    y = pyode.odeint_adjoint(func, y0, t, method="gl6", options={"step_size": 0.05}, adjoint_params=(matrix,))
    (slopes,) = torch.autograd.grad(y[1][-1].sum(), t)
    assert float(slopes[-1]) == pytest.approx(float(y[1][-1].detach() * 0.7), rel=1e-6)


def test_the_backward_solve_counts_its_iterations():
    stats, field = Stats(), Field()
    gradients_of(pyode.odeint_adjoint, field, method="trbdf2", adjoint_options={"step_size": 0.25, "stats": stats})
    assert stats.n_accepted == 4
    assert stats.n_newton >= 8
