"""The backward solve of samples with steps of their own as one launch on a GPU: the bits and counts of the host's."""

from __future__ import annotations

import pytest
import torch
from device_loops import (
    DEVICE,
    MARKS,
    ON,
    Field,
    both_gradients,
    check_same_gradients,
    check_training,
    normal,
    times,
)

import pyode

pytestmark = MARKS


def by_odeint(func, y, t, options, adjoint_options, **kwargs):
    options, adjoint_options = ({"control": "per_sample", **some} for some in (options, adjoint_options))
    return pyode.odeint_adjoint(func, y, t, 1e-4, 1e-6, options=options, adjoint_options=adjoint_options, **kwargs)


def by_solve_ivp(func, y, t, options, adjoint_options, **kwargs):
    return pyode.solve_ivp(
        func, y, t, rtol=1e-4, atol=1e-6, gradient="adjoint", options=options, adjoint_options=adjoint_options, **kwargs
    ).ys


def jointly(*given, **kwargs):
    return by_solve_ivp(*given, control="joint", **kwargs)


INTERFACES = [by_odeint, by_solve_ivp, jointly]


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solve", INTERFACES)
def test_gradients_and_counts_are_those_of_the_host_driven_loop(solve, dtype, with_time, n):
    func, t = Field(dtype=dtype), times(n, dtype).requires_grad_(with_time)
    check_same_gradients(solve, func, normal(4, 3, dtype=dtype), t, tuple(func.parameters()))


@pytest.mark.parametrize("options", [{"jump_t": [0.7, 2.0]}, {"step_t": [0.3, 1.1]}, {"max_step": 0.2}], ids=str)
@pytest.mark.parametrize("solve", INTERFACES)
def test_with_options_backwards_in_time(solve, options):
    func, t = Field(), times(4).flip(0).requires_grad_()
    check_same_gradients(solve, func, normal(4, 3), t, tuple(func.parameters()), options)


@pytest.mark.parametrize("solve", [by_odeint, by_solve_ivp])
def test_of_complex_samples_with_times_of_their_own(solve):
    t = torch.stack([torch.linspace(0, 1 + b, 5) for b in range(4)], 1).to(DEVICE)
    t[:, 3] = t[0, 3]  # has no way to go
    t[3:, 1] = t[3, 1]
    rate = normal(3, dtype=torch.complex64).requires_grad_()

    def func(t, y):
        return torch.sin(y) / 2 - rate * y * t[:, None] / 8

    kwargs = {"adjoint_params" if solve is by_odeint else "params": (rate,)}
    check_same_gradients(solve, func, normal(4, 3, dtype=torch.complex64), t.requires_grad_(), (rate,), **kwargs)


def test_of_a_single_sample_in_a_structure_with_args():
    def func(t, y, rate):
        return {"a": -rate * y["a"] * t[:, None], "b": y["b"] * rate[0]}

    y0, rate = {"a": normal(1, 3), "b": normal(1, 2, 2)}, torch.full((3,), 0.5, device=DEVICE, requires_grad=True)
    check_same_gradients(by_solve_ivp, func, y0, times(4), (rate,), backwards={"method": "tsit5"}, args=(rate,))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("samples", [0, 2])
def test_where_nothing_moves(samples, n):
    t = torch.ones(n, samples, device=DEVICE).requires_grad_()  # of each sample all times are one
    func = Field()
    (theirs, their_stats), (ours, our_stats) = both_gradients(
        by_solve_ivp, func, normal(samples, 3), t, tuple(func.parameters())
    )
    assert all(map(torch.equal, theirs, ours))
    assert our_stats == their_stats == pyode.Stats()


def test_a_tolerance_for_each_number():
    func, rtol = Field(), torch.tensor([1e-3, 1e-5, 1e-4], dtype=torch.float64)
    check_same_gradients(by_solve_ivp, func, normal(4, 3), times(4), tuple(func.parameters()), backwards={"rtol": rtol})


def test_behind_events():
    func, t = Field(), times(4).requires_grad_()
    kwargs = {"event_fn": lambda t, y: t - torch.linspace(0.5, 3, 4, device=DEVICE), "forwards": False, "captures": 1}
    check_same_gradients(by_solve_ivp, func, normal(4, 3), t, tuple(func.parameters()), **kwargs)


class Shared(torch.autograd.Function):
    """-rate * y, with a gradient to rate that is nan where nothing arrives."""

    @staticmethod
    def forward(ctx, rate, y):
        ctx.save_for_backward(rate, y)
        return -rate * y

    @staticmethod
    def backward(ctx, g):
        rate, y = ctx.saved_tensors
        total = g.abs().sum()
        return (-g * y).sum(0) * (total / total), -rate * g


def test_steps_that_no_sample_has_accepted_give_nothing():
    rate = torch.full((3,), 3.0, device=DEVICE, requires_grad=True)
    kwargs = {"params": (rate,), "backwards": {"max_step": 0.5, "rtol": 1e-7, "atol": 1e-9}}
    check_same_gradients(by_solve_ivp, lambda t, y: Shared.apply(rate, y), normal(2, 3), times(3), (rate,), **kwargs)


def test_training_captures_once_and_times_and_args_are_copied_in():
    def solve(func, y0, more, scale, i):
        return by_odeint(func, y0, times() * (1 + i / 8), more, more, args=(scale,))

    check_training(solve)


@pytest.mark.parametrize("solve", INTERFACES)
def test_errors_are_those_of_the_host_driven_loop(solve):
    func, y, errors = Field(), normal(4, 3).requires_grad_(), []
    for more in ({}, ON):
        stats = pyode.Stats()
        with torch.enable_grad():
            out = solve(func, y, times(3), more, {**more, "max_step": 1e-2, "max_num_steps": 3, "stats": stats})
            with pytest.raises(pyode.SolveError) as caught:
                out.sum().backward()
        errors.append((caught.value, stats))
    (theirs, their_stats), (ours, our_stats) = errors
    assert str(ours) == str(theirs)
    assert our_stats == their_stats


def test_compact_looks_at_every_step():
    func = Field()
    with pytest.warns(UserWarning, match=r"adjoint_options\['device_loop'\]: .* compact"):
        check_same_gradients(
            by_solve_ivp,
            func,
            normal(4, 3),
            times(3),
            tuple(func.parameters()),
            compact=True,
            forwards=False,
            captures=0,
        )
