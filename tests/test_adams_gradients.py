"""Gradients of the variable-coefficient Adams method."""

from __future__ import annotations

import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from problems import growth, leaf, tensor
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import pyode

A = torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=torch.float64)
Y0 = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
T = tensor(0.0, 0.1, 0.6, 1.1)
# Steps of one size, so that moving an input moves no step; no output at a step's end.
FORCED = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}
TIGHT = {"rtol": 1e-6, "atol": 1e-7}  # a difference with steps of 1e-6 is right to 1e-9 or so


def field(matrix: Tensor):
    return lambda t, y: torch.sin(y @ matrix) * (1 + t * t)


def dense(*problem, **kwargs) -> pyode.DenseOutput:
    return pyode.odeint_dense(*problem, rtol=1e-8, atol=1e-8, method="adams", **kwargs)


class TestGradients:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
    @pytest.mark.parametrize("jump", [False, True], ids=["smooth", "jump"])
    def test_they_are_the_finite_differences(self, sign, jump, backend):
        # The step that ends at a discontinuity gets longer and shorter with the start; those behind stay in place.
        options = {**FORCED, "jump_t": tensor(sign * 0.7)} if jump else FORCED

        def solve(y0, matrix, t):
            with pyode.backend(backend):
                return pyode.odeint(field(matrix), y0, t, method="adams", options=options)

        inputs = (leaf(Y0), leaf(A), leaf(sign * T))
        assert gradcheck(solve, inputs, **TIGHT)
        assert gradgradcheck(solve, inputs, fast_mode=True, **TIGHT)

    def test_of_complex_states_and_tuples(self):
        y0, b = torch.tensor([1 + 1j, 0.3 - 2j], dtype=torch.complex128), tensor(0.3)
        factor = torch.tensor(0.3 - 1j, dtype=torch.complex128)

        def solve(y0, b, factor, t):
            def f(t, y):
                return factor * y[0] * y[0].abs() + t * y[0].conj(), -y[1] * y[0].abs().sum() + 0j

            return pyode.odeint(f, (y0, b), t, method="adams", options=FORCED)

        assert gradcheck(solve, (leaf(y0), leaf(b + 0j), leaf(factor), leaf(T)), **TIGHT)

    def test_steps_that_are_chosen_count_as_constants(self):
        p, y0, t = leaf(tensor(0.7)), leaf(tensor(2.0)), leaf(tensor(0.2, 1.0))
        y = pyode.odeint(lambda t, y: p * y, y0, t, 1e-10, 1e-10, method="adams")[-1]
        gradients = torch.autograd.grad(y.sum(), (y0, p, t))
        e = math.exp(0.7 * 0.8)
        for gradient, expected in zip(gradients, (e, 0.8 * 2 * e, tensor(-1.4 * e, 1.4 * e))):
            assert torch.allclose(gradient, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-8)

    def test_of_dense_output_with_respect_to_its_time(self):
        t = leaf(tensor(0.7))
        (gradient,) = torch.autograd.grad(dense(growth.f, growth.y0, 0.0, 2.0)(t).sum(), t)
        assert float(gradient) == pytest.approx(float(growth.solution(0.7)) * math.cos(0.7), rel=1e-6)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_torch_func_and_forward_mode_agree(self):
        def solve(y0):
            return pyode.odeint(field(A), y0, T, method="adams", options=FORCED).square().sum()

        y0 = leaf(Y0)
        (gradient,) = torch.autograd.grad(solve(y0), y0)
        assert torch.allclose(torch.func.grad(solve)(Y0), gradient, rtol=1e-12)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(solve(forward_ad.make_dual(Y0, torch.ones_like(Y0)))).tangent
        assert float(tangent) == pytest.approx(float(gradient.sum()), rel=1e-12)

    def test_the_adjoint_agrees(self):
        found = []
        for adjoint in (False, True):
            y0, matrix, t = inputs = leaf(Y0), leaf(A), leaf(T)
            arguments = (field(matrix), y0, t, 1e-10, 1e-10, "adams")
            y = pyode.odeint_adjoint(*arguments, adjoint_params=(matrix,)) if adjoint else pyode.odeint(*arguments)
            found.append(torch.autograd.grad((y * torch.arange(8).view(4, 1, 2)).sum(), inputs))
        for direct, adjoint in zip(*found):
            assert torch.allclose(direct, adjoint, rtol=1e-7, atol=1e-7)
