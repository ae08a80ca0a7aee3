"""The adjoint's backward solve with given steps as one CUDA graph: the bits and counts of the host-driven one."""

from __future__ import annotations

import pytest
import torch
from device_loops import DEVICE, MARKS, Field, both_gradients, check_same_gradients, normal, times

import pyode
from pyode import device_grid
from pyode.methods import TABLEAUS

pytestmark = MARKS

FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]


def solve(func, y, t, options, adjoint_options, method="rk4", **kwargs):
    return pyode.odeint_adjoint(func, y, t, method=method, options=options, adjoint_options=adjoint_options, **kwargs)


def both(*given, **kwargs):
    return both_gradients(solve, *given, **kwargs)


def check_same(*given, **kwargs):
    check_same_gradients(solve, *given, **kwargs)


@pytest.mark.parametrize("options", [{}, {"step_size": 0.1}, {"perturb": True, "interp": "cubic"}])
@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("method", [*FIXED, "explicit_adams"])
def test_gradients_and_counts_are_those_of_the_host_driven_solve(method, with_time, options):
    func, t = Field(), times(4).requires_grad_(with_time)
    check_same(func, normal(5, 3), t, tuple(func.parameters()), method=method, options=options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("n", [2, 5])
def test_of_every_dtype_backwards_in_time(n, dtype):
    rate, t = normal(3, dtype=dtype).requires_grad_(), times(n).flip(0).requires_grad_()

    def func(t, y):
        return torch.sin(y) / 2 - rate * y * t / 8

    check_same(func, normal(5, 3, dtype=dtype), t, (rate,), adjoint_params=(rate,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_of_a_multistep_method(dtype):
    rate, t = normal(3, dtype=dtype).requires_grad_(), times(3).requires_grad_()

    def func(t, y, real):
        return torch.sin(y) / 2 - rate * y * t / 8 * real

    real = normal(3).requires_grad_()  # an integral of another dtype than the state
    options = {"step_size": 0.1, "max_order": 5}
    check_same(
        func, normal(5, 3, dtype=dtype), t, (rate, real), method="explicit_adams", options=options, args=(real,),
        adjoint_params=(rate,),
    )  # fmt: skip


def test_of_a_structure_behind_an_adaptive_solve_and_with_a_norm_that_nobody_asks():
    def func(t, y, rate):
        return {"a": -rate * y["a"] * t, "b": y["b"] * rate[0]}

    y0, rate = {"a": normal(3), "b": normal(2, 2)}, torch.full((3,), 0.5, device=DEVICE, requires_grad=True)
    backwards = {"step_size": 0.2, "restart": True, "norm": lambda whole: whole[0].abs()}
    kwargs = {"method": "dopri5", "adjoint_method": "rk4", "args": (rate,), "adjoint_params": ()}
    check_same(func, y0, times(4), (rate,), backwards=backwards, **kwargs)


def test_a_grid_of_the_users_and_a_parameter_without_effect():
    func = Field()
    func.unused = torch.nn.Parameter(normal(2))

    def grid(func, y0, t):
        return torch.cat([t[:1], t[:1] * 0.8 + t[-1:] * 0.2, t[-1:]])

    check_same(func, normal(5, 3), times(3), tuple(func.parameters()), options={"grid_constructor": grid})


def test_a_single_time_needs_no_graph():
    func = Field()
    (theirs, _), (ours, _) = both(func, normal(5, 3), times(1), tuple(func.parameters()))
    assert all(map(torch.equal, theirs, ours))


def test_given_steps_are_captured_for_their_times_and_args_copied_in():
    def func(t, y, rate):
        return -rate * y * t

    for t, n in ((times(4), 2), (times(4), 0), (times(4) * 1.1, 2), (times(4), 0)):
        rate = torch.rand(3).to(DEVICE).requires_grad_()
        check_same(func, normal(5, 3), t, (rate,), args=(rate,), captures=n)


def test_more_steps_than_a_graph_takes_are_the_hosts(monkeypatch):
    monkeypatch.setattr(device_grid, "MOST_STEPS", 7)
    with pytest.warns(UserWarning, match="adjoint_options\\['device_loop'\\]: .* 8 steps are too many"):
        check_same(Field(), normal(5, 3), times(2), captures=1, backwards={"step_size": 0.25})


def test_callbacks_are_the_hosts():
    class WithCallback(Field):
        def callback_step_adjoint(self, t, y, dt):
            seen.append(t)

    seen: list[float] = []
    func = WithCallback()
    with pytest.warns(UserWarning, match="callbacks look at every step"):
        check_same(func, normal(5, 3), times(4), tuple(func.parameters()), captures=1)
    assert len(seen) == 2 * 3
