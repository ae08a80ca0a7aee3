"""The continuous adjoint's backward solve as one launch on a GPU."""

from __future__ import annotations

import pytest
import torch
from device_loops import DEVICE, MARKS, ON, Field, n_captures, normal, times

import pyode

pytestmark = MARKS


@pytest.mark.parametrize("norm", [None, "seminorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("stops", [{}, {"jump_t": [0.35]}, {"first_step": 0.1}], ids=["", "jump_t", "first_step"])
def test_the_adjoints_gradients_are_those_of_the_host_driven_loop(n, dtype, norm, stops):
    func, y0 = Field(dtype=dtype), normal(5, 3, dtype=dtype)
    found = []
    before = n_captures()
    for more in ({}, ON):
        stats, y = pyode.Stats(), y0.clone().requires_grad_()
        with torch.enable_grad():
            out = pyode.odeint_adjoint(
                func, y, times(n, dtype), rtol=1e-5, atol=1e-7, options={**more, **stops},
                adjoint_options={**more, **stops, "norm": norm, "stats": stats},
            )  # fmt: skip
            found.append((torch.autograd.grad(out.square().mean(), (y, *func.parameters())), stats))
    assert n_captures() == before + 2
    (theirs, their_stats), (ours, our_stats) = found
    for a, b in zip(theirs, ours):
        assert torch.equal(a, b)
    assert our_stats == their_stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("stops", [{}, {"jump_t": [0.35]}], ids=["", "jump_t"])
def test_gradients_of_times_are_those_of_the_host_driven_loop(n, t_dtype, dtype, stops):
    rate, y0, found = normal(3, dtype=dtype).requires_grad_(), normal(5, 3, dtype=dtype), []

    def func(t, y):
        return -rate * y * t + torch.sin(y) / 2

    before = n_captures()
    for more in ({}, ON):
        stats, y, t = pyode.Stats(), y0.clone().requires_grad_(), times(n, t_dtype).requires_grad_()
        with torch.enable_grad():
            out = pyode.odeint_adjoint(
                func, y, t, rtol=1e-5, atol=1e-7, options={**more, **stops}, adjoint_params=(rate,),
                adjoint_options={**more, **stops, "stats": stats},
            )  # fmt: skip
            found.append((torch.autograd.grad(out.abs().square().sum(), (y, t, rate)), stats))
    assert n_captures() == before + 2
    (theirs, their_stats), (ours, our_stats) = found
    assert all(map(torch.equal, theirs, ours))
    assert our_stats == their_stats


def test_training_captures_once_and_follows_the_host_driven_loop():
    finals = []
    y0, before = normal(8, 3), n_captures()
    for more in ({}, ON):
        torch.manual_seed(0)
        func = Field()
        optimizer = torch.optim.SGD(func.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            with torch.enable_grad():
                out = pyode.odeint_adjoint(func, y0, times(), rtol=1e-4, atol=1e-6, options=more)
                (out[-1] - 1).square().mean().backward()
            optimizer.step()
        finals.append([p.detach().clone() for p in func.parameters()])
    for a, b in zip(*finals):
        assert torch.equal(a, b)
    assert n_captures() == before + 2  # forwards and backwards


def gradients_of(func, y0, wanted, args=(), **kwargs):
    """Host-driven and by the device's loop."""
    found = []
    for more in ({}, ON):
        with torch.enable_grad():
            out = pyode.odeint_adjoint(func, y0, times(), rtol=1e-4, atol=1e-6, options=more, args=args, **kwargs)
            found.append(torch.autograd.grad(out.square().sum(), wanted))
    return found


def test_tolerances_of_the_backward_solve_are_copied_in():
    func, y0 = Field(), normal(5, 3)
    for adjoint_rtol in (1e-2, 1e-6):
        theirs, ours = gradients_of(func, y0, tuple(func.parameters()), adjoint_rtol=adjoint_rtol, adjoint_atol=1e-9)
        assert all(map(torch.equal, theirs, ours))


def test_which_of_the_args_wants_a_gradient():
    def func(t, y, a, b):
        return -a * y + 0.5 * b * b

    y0 = torch.ones(2, 3, device=DEVICE)
    for wanted in (0, 1):
        args = [torch.full((3,), 0.7, device=DEVICE), torch.full((3,), 0.3, device=DEVICE)]
        args[wanted].requires_grad_()
        theirs, ours = gradients_of(func, y0, args[wanted], tuple(args))
        assert torch.equal(theirs[0], ours[0])


def test_args_of_an_adjoint_solve():
    def func(t, y, rate):
        return -rate * y

    gradients = []
    for more in ({}, ON):
        rate = torch.full((3,), 0.7, device=DEVICE, requires_grad=True)
        with torch.enable_grad():
            out = pyode.odeint_adjoint(func, normal(1, 3) * 0 + 1, times(), options=more, args=(rate,))
            gradients += torch.autograd.grad(out.sum(), rate)
    assert torch.equal(*gradients)
