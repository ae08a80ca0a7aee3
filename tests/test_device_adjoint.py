"""The continuous adjoint's backward solve as one launch on a GPU."""

from __future__ import annotations

import pytest
import torch
from device_loops import DEVICE, MARKS, ON, Field, HostRead, both_gradients, check_same_gradients, normal, times

import pyode

pytestmark = MARKS


def solve(func, y, t, options, adjoint_options, **kwargs):
    given = {"rtol": 1e-5, "atol": 1e-7, "options": options, "adjoint_options": adjoint_options, **kwargs}
    return pyode.odeint_adjoint(func, y, t, **given)


INTERVALS = pytest.mark.parametrize(("n", "restart"), [(2, False), (6, False), (4, True)])  # of outputs


@pytest.mark.parametrize("norm", [None, "seminorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stops", [{}, {"jump_t": [0.35]}, {"first_step": 0.1}], ids=["", "jump_t", "first_step"])
@INTERVALS
def test_the_adjoints_gradients_are_those_of_the_host_driven_loop(n, restart, dtype, norm, stops):
    func, backwards = Field(dtype=dtype), {"norm": norm, "restart": restart}
    check_same_gradients(
        solve, func, normal(5, 3, dtype=dtype), times(n, dtype), tuple(func.parameters()), stops, backwards
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stops", [{}, {"jump_t": [0.35]}], ids=["", "jump_t"])
@INTERVALS
def test_gradients_of_times_are_those_of_the_host_driven_loop(n, restart, t_dtype, dtype, stops):
    rate, t = normal(3, dtype=dtype).requires_grad_(), times(n, t_dtype).requires_grad_()

    def func(t, y):
        return -rate * y * t + torch.sin(y) / 2

    kwargs = {"backwards": {"restart": restart}, "adjoint_params": (rate,)}
    check_same_gradients(solve, func, normal(5, 3, dtype=dtype), t, (rate,), stops, **kwargs)


def test_of_tensors_of_which_one_was_computed_from_the_other():
    base = normal(3).requires_grad_()
    with torch.enable_grad():
        rate = base.exp()

    def func(t, y):
        return -rate * y + base * torch.sin(y)

    (theirs, _), (ours, _) = both_gradients(solve, func, normal(5, 3), times(4), (base,), adjoint_params=(base, rate))
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("restart", [False, True])
def test_what_can_not_be_captured_is_the_hosts(restart):
    kwargs = {"backwards": {"restart": restart}, "forwards": False, "captures": 0}
    with pytest.warns(UserWarning, match=r"adjoint_options\['device_loop'\]: .* can't be captured"):
        check_same_gradients(solve, HostRead(), normal(5, 3), times(4).requires_grad_(), **kwargs)


def test_a_solve_without_integrals():
    check_same_gradients(solve, lambda t, y: torch.sin(y) * t, normal(5, 3), times(4), adjoint_params=())


@pytest.mark.parametrize("restart", [False, True])
def test_errors_are_those_of_the_host_driven_loop(restart):
    func, y, errors = Field(), normal(4, 3).requires_grad_(), []
    for more in ({}, ON):
        stats = pyode.Stats()
        backwards = {**more, "max_step": 0.3, "max_num_steps": 3, "restart": restart, "stats": stats}
        with torch.enable_grad():
            out = solve(func, y, torch.tensor([0.0, 1.5, 2.0], device=DEVICE), more, backwards)
            with pytest.raises(pyode.SolveError) as caught:
                out.sum().backward()
        errors.append((caught.value, stats))
    (theirs, their_stats), (ours, our_stats) = errors
    assert ours.args == theirs.args
    assert our_stats == their_stats


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
