"""Direct gradients of per-sample solves: exact for every sample, in the joint solve of one too, and not spoiled."""

from __future__ import annotations

import pytest
import torch
from ensembles import oscillators, van_der_pol
from torch import Tensor

import pyode
from pyode import Status, solve_ivp

F64 = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
SHARED = torch.tensor([0.0, 0.4, 0.5, 1.3], dtype=F64)
OWN = torch.tensor([[0.0, 0.3, 1.0], [0.4, -0.4, 1.2], [0.5, -1.0, 2.0], [1.3, -1.0, 2.2]], dtype=F64)
Y0 = torch.tensor([[1.0, -2.0], [0.5, 0.3], [2.0, 1.0]], dtype=F64)


def field(t: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """Nonlinear, dependent on time, with shared parameters."""
    return torch.tanh(y @ a) * (1 + torch.sin(t))[:, None]


@pytest.mark.parametrize("t", [SHARED, OWN], ids=["shared", "own"])
def test_gradients_of_everything_are_those_of_finite_differences(t):
    a = torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=F64)

    def solve(y0, a, t):
        if t.dim() == 2:  # the padding moves with what it repeats
            t = torch.cat([t, t[-1:] + torch.tensor([0.8, 0.0, 0.2], dtype=F64)])
        return solve_ivp(field, y0, t, args=(a,), **TIGHT).ys

    inputs = tuple(x.clone().requires_grad_() for x in (Y0, a, t[:3]))
    assert torch.autograd.gradcheck(solve, inputs, eps=1e-5, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_one_sample_has_the_joint_gradient(dtype):
    grads = []
    for control in ("per_sample", "joint"):
        y0, t = Y0[2:].to(dtype).requires_grad_(), SHARED.clone().requires_grad_()
        solution = solve_ivp(lambda t, y: -y * y * (1 + t), y0, t, control=control)
        grads.append(torch.autograd.grad(solution.ys.abs().square().sum(), (y0, t)))
    for single, joint in zip(*grads):
        assert torch.equal(single, joint)


def test_a_samples_gradient_does_not_depend_on_the_others():
    y0 = oscillators(6, stiffest=8.0).requires_grad_()
    weights = torch.linspace(-1, 2, 12, dtype=F64).reshape(4, 3)
    (together,) = torch.autograd.grad((weights[:, None] * solve_ivp(van_der_pol, y0, SHARED).ys).sum(), y0)
    for b in range(6):
        row = y0[b : b + 1].detach().requires_grad_()
        (alone,) = torch.autograd.grad((weights[:, None] * solve_ivp(van_der_pol, row, SHARED).ys).sum(), row)
        assert torch.allclose(alone[0], together[b], rtol=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_steps_of_others_that_came_to_nan_do_not_spoil_shared_gradients(fails):
    # The third row is nan above 1.5, where it runs to, or where its first trial overshoots; 0 times nan would reach a.
    def f(t, y, a, rates):
        return a * torch.sqrt(torch.where(y > 1.5, -1.0, 1.0)) + rates * y

    y0, found = torch.tensor([[0.1], [0.2], [1.2]], dtype=F64), []
    rates = torch.tensor([[-0.1], [-0.2], [0.0 if fails else -40.0]], dtype=F64)
    for n in (2, 3):
        a, t = torch.tensor(1.0, dtype=F64, requires_grad=True), SHARED[:3].clone().requires_grad_()
        solution = solve_ivp(f, y0[:n], t, args=(a, rates[:n]), throw=False, first_step=0.4)
        found.append(torch.autograd.grad(solution.ys[:, :2].sum(), (a, t)))
    assert solution.status[2] == (Status.NON_FINITE if fails else Status.SUCCESS)
    assert solution.stats.n_rejected[2] > 0
    for apart, together in zip(*found):
        assert torch.allclose(apart, together, rtol=1e-12)


@pytest.mark.parametrize("t", [SHARED, OWN], ids=["shared", "own"])
def test_the_twin_in_plain_torch_has_the_same_gradients(t):
    found = []
    for backend in ("auto", "reference"):
        y0, times = Y0.clone().requires_grad_(), t.clone().requires_grad_()
        a = torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=F64, requires_grad=True)
        with pyode.backend(backend):
            ys = solve_ivp(field, y0, times, args=(a,)).ys
        weights = torch.linspace(-1, 2, ys.numel(), dtype=F64).reshape(ys.shape)
        found.append(torch.autograd.grad((weights * ys).sum(), (y0, times, a)))
    for native, twin in zip(*found):
        assert torch.allclose(native, twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("times_grad", [False, True])
@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_the_graph_of_one_sample_changes_no_bits(control, times_grad):
    y0 = oscillators(1, stiffest=8.0)
    t = torch.linspace(0, 3, 40, dtype=F64)
    with torch.no_grad():
        without = solve_ivp(van_der_pol, y0, t, control=control)
    recorded = solve_ivp(van_der_pol, y0.requires_grad_(), t.clone().requires_grad_(times_grad), control=control)
    assert torch.equal(without.ys, recorded.ys)


def test_the_graph_changes_no_bits():
    y0 = oscillators(20, stiffest=8.0)
    with torch.no_grad():
        without = solve_ivp(van_der_pol, y0, SHARED)
    recorded = solve_ivp(van_der_pol, y0.requires_grad_(), SHARED)
    assert torch.equal(without.ys, recorded.ys)
    assert torch.equal(without.stats.n_steps, recorded.stats.n_steps)
