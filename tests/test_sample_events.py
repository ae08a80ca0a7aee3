"""Events of samples: each ends at its own, is told which it was, and gradients reach where and when."""

from __future__ import annotations

import math

import pytest
import torch
from ensembles import decay, oscillators, van_der_pol
from torch import Tensor

import pyode
from pyode import Status, solve_ivp

F64 = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
T = torch.linspace(0, 3, 7, dtype=F64)
Y0 = torch.tensor([[1.0], [2.0], [4.0], [0.25]], dtype=F64)  # dies out; falls below 1/2 at log(2 y0)


def below_half(t: Tensor, y: Tensor) -> Tensor:
    return y[:, 0] - 0.5


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_each_sample_ends_at_its_own_event(backend, grad):
    with pyode.backend(backend), torch.set_grad_enabled(grad):
        solution = solve_ivp(decay, Y0, T, event_fn=below_half, **TIGHT)
    exact = torch.log(2 * Y0[:3, 0])
    assert torch.allclose(solution.event_t[:3], exact, atol=1e-8)
    assert torch.allclose(solution.event_y[:3], torch.full((3, 1), 0.5, dtype=F64), atol=1e-8)
    assert solution.event_t[3].isnan()
    assert solution.event_y[3].isnan().all()
    assert solution.event_index.tolist() == [0, 0, 0, -1]
    assert solution.status.tolist() == [Status.EVENT] * 3 + [Status.SUCCESS]
    assert solution.success
    behind = T[:, None] > torch.cat([exact, torch.tensor([math.inf], dtype=F64)])
    assert torch.equal(solution.ys[..., 0].isnan(), behind)
    expected = Y0 * torch.exp(-T)[:, None, None]
    assert torch.allclose(solution.ys[~behind], expected[~behind], rtol=1e-7)


@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_of_a_single_sample_that_ends_at_an_event_keep_their_places(control, grad):
    with torch.set_grad_enabled(grad):
        event = below_half if control == "per_sample" else lambda t, y: y[0, 0] - 0.5
        solution = solve_ivp(decay, Y0[:1], T, event_fn=event, control=control, **TIGHT)
    assert solution.ys.shape == (7, 1, 1)
    assert solution.ys[:, 0, 0].isnan().tolist() == [False, False, *[True] * 5]
    assert solution.event_y.shape == ((1, 1) if control == "per_sample" else (1, 1, 1))
    assert solution.event_t.shape == (1,)


def test_the_first_of_several_functions_ends_the_solve():
    def events(t, y):
        assert t.shape == (4,)
        # The second is nan below 1/10, the third at once and without a change of sign.
        return torch.stack([y[:, 0] - 0.5, t - 1.0, torch.sqrt(y[:, 0] - 0.1)], 1)

    solution = solve_ivp(decay, Y0, T, event_fn=events, **TIGHT)
    assert solution.event_index.tolist() == [0, 1, 1, 1]
    assert torch.allclose(solution.event_t, torch.tensor([math.log(2), 1, 1, 1], dtype=F64), atol=1e-8)


def test_events_in_either_direction_of_time():
    t = torch.tensor([[0.0] * 4, [3.0, -3.0, 3.0, -3.0]], dtype=F64)
    solution = solve_ivp(decay, Y0, t, event_fn=lambda t, y: y[:, 0] - 1.5, **TIGHT)
    exact = torch.log(Y0[:, 0] / 1.5)
    exact[0], exact[1] = math.nan, math.nan  # 1 falls and 2 rises
    assert torch.allclose(solution.event_t, exact, atol=1e-8, equal_nan=True)


def test_an_event_at_the_start_counts_unless_it_is_skipped():
    y0 = torch.tensor([[0.5], [1.0]], dtype=F64)
    event = lambda t, y: y[:, 0] - 0.5  # noqa: E731
    at_once = solve_ivp(decay, y0, T, event_fn=event, **TIGHT)
    assert at_once.event_t[0] == 0
    assert torch.equal(at_once.event_y[0], y0[0])
    assert at_once.ys[:, 0, 0].isnan().tolist() == [False] + [True] * 6
    skipped = solve_ivp(decay, y0, T, event_fn=event, options={"skip_initial_event": True}, **TIGHT)
    assert skipped.event_index.tolist() == [-1, 0]
    assert not skipped.ys[:, 0].isnan().any()


def test_an_event_on_the_way_out_and_back_is_found_behind_a_skipped_start():
    # A throw from the ground, in one big step: it is on the ground again at t = 2.
    f = lambda t, y: torch.stack([y[:, 1], torch.full_like(y[:, 1], -1.0)], 1)  # noqa: E731
    y0 = torch.tensor([[0.0, 1.0], [0.0, 0.5]], dtype=F64)
    solution = solve_ivp(f, y0, T, event_fn=lambda t, y: y[:, 0], options={"skip_initial_event": True})
    assert torch.allclose(solution.event_t, torch.tensor([2.0, 1.0], dtype=F64), atol=1e-5)


@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_an_event_in_the_last_step_that_is_allowed(control):
    event = below_half if control == "per_sample" else lambda t, y: y[:, 0].max() - 0.5
    needed = int(solve_ivp(decay, Y0[1:2], T, event_fn=event, control=control).stats.n_steps)
    solution = solve_ivp(decay, Y0[1:2], T, event_fn=event, control=control, max_num_steps=needed)
    assert solution.success
    assert solution.event_index.tolist() == [0]


def test_events_are_the_same_alone():
    y0 = oscillators(9, stiffest=5.0)
    event = lambda t, y: torch.stack([y[:, 0] - 1.0, y[:, 1] + 2.0], 1)  # noqa: E731
    with torch.no_grad():
        together = solve_ivp(van_der_pol, y0, T, event_fn=event)
        for b in range(9):
            alone = solve_ivp(van_der_pol, y0[b : b + 1], T, event_fn=event)
            assert alone.event_index[0] == together.event_index[b]
            # Bisection halves the longest of the steps' intervals for all.
            assert torch.allclose(alone.event_t[0], together.event_t[b], atol=1e-6, equal_nan=True)
            assert torch.allclose(alone.ys[:, 0], together.ys[:, b], rtol=0, atol=0, equal_nan=True)
            assert alone.stats.n_steps[0] == together.stats.n_steps[b]


def test_events_of_nested_states():
    y0 = {"a": Y0, "b": torch.zeros(4, 2, dtype=F64)}
    f = lambda t, y: {"a": -y["a"], "b": torch.ones_like(y["b"])}  # noqa: E731
    solution = solve_ivp(f, y0, T, event_fn=lambda t, y: y["a"][:, 0] - 0.5, **TIGHT)
    assert torch.allclose(solution.event_y["b"][:3], solution.event_t[:3, None].expand(3, 2))
    assert solution.event_y["b"][3].isnan().all()
    assert solution.ys["b"][-1, :3].isnan().all()


def test_an_event_is_told_where_another_sample_fails():
    f = lambda t, y: torch.where(y > 3, torch.nan, -y)  # noqa: E731
    solution = solve_ivp(f, Y0, T, event_fn=below_half, throw=False, **TIGHT)
    assert solution.status.tolist() == [Status.EVENT, Status.EVENT, Status.NON_FINITE, Status.SUCCESS]
    assert solution.event_t[2].isnan()


# Gradients.


@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_gradients_of_times_and_states_are_those_of_the_closed_form(control):
    # y = y0 exp(-a t) meets c at log(y0 / c) / a.
    y0 = Y0[:3].clone().requires_grad_() if control == "per_sample" else Y0[1:2].clone().requires_grad_()
    a, c = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (1.3, 0.5))
    event = (lambda t, y, a, c: y[:, 0] - c) if control == "per_sample" else (lambda t, y, a, c: y[0, 0] - c)
    solution = solve_ivp(lambda t, y, a, c: -a * y, y0, T, args=(a, c), event_fn=event, control=control, **TIGHT)
    exact = torch.log(y0[:, 0] / c) / a
    weights = torch.linspace(1, 2, len(y0), dtype=F64)
    found = torch.autograd.grad((weights * solution.event_t).sum(), (y0, a, c), retain_graph=True)
    expected = torch.autograd.grad((weights * exact).sum(), (y0, a, c))
    for x, y in zip(found, expected):
        assert torch.allclose(x, y, rtol=1e-6)
    # The state at the event is c, whatever the rest.
    by_y0, by_a, by_c = torch.autograd.grad(solution.event_y.sum(), (y0, a, c))
    assert torch.allclose(by_y0, torch.zeros_like(by_y0), atol=1e-6)
    assert torch.allclose(by_a, torch.zeros_like(by_a), atol=1e-6)
    assert float(by_c) == pytest.approx(len(y0), rel=1e-6)


def test_gradients_are_those_of_finite_differences():
    # Of the time, too, and of the start's: events that depend on t explicitly.
    y0, mu = torch.tensor([[1.5, 0.0], [1.0, 0.5]], dtype=F64), torch.tensor(1.2, dtype=F64)
    start = torch.tensor([0.0, 0.3], dtype=F64)

    def both(y0, mu, start):
        def f(t, y, mu):
            return torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0] + torch.sin(t)], 1)

        t = torch.stack([start, torch.full_like(start, 6.0)])
        event = lambda t, y, mu: y[:, 0] + 0.1 * t * mu  # noqa: E731
        solution = solve_ivp(f, y0, t, args=(mu,), event_fn=event, **TIGHT)
        assert solution.event_index.tolist() == [0, 0]
        return solution.event_t, solution.event_y

    inputs = tuple(x.clone().requires_grad_() for x in (y0, mu, start))
    assert torch.autograd.gradcheck(both, inputs, eps=1e-5, atol=1e-4, rtol=1e-4)


def test_a_function_without_a_derivative_has_events_without_gradients():
    y0 = Y0.clone().requires_grad_()
    solution = solve_ivp(decay, y0, T, event_fn=lambda t, y: torch.sign(y[:, 0].detach() - 0.5), **TIGHT)
    assert torch.allclose(solution.event_t[:3], torch.log(2 * Y0[:3, 0]), atol=1e-8)
    (found,) = torch.autograd.grad(solution.event_y.nansum(), y0)
    assert found.isfinite().all()


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_at_an_event_at_the_start_are_the_limit_of_those_before_it(gradient, control, shared):
    # y = y0 exp(a (t - t0)) and event y = c + b t: along f - b = a y - b at the event, its time moves by
    # (a y dt0 - exp(a (t - t0)) dy0) / (a y - b); one sample starts on the event, the other a little before it.
    a, b, c = 1.3, 0.25, 0.5  # whose sums are exact
    before = torch.tensor([0.25, 0.25 - 1e-6], dtype=F64)
    y0 = ((c + b * 0.25) * torch.exp(a * (before - 0.25)))[:, None].requires_grad_()
    level = torch.tensor(c, dtype=F64, requires_grad=True)
    found = []
    for i in (0, 1):
        start = before[i : i + 1].clone().requires_grad_()
        t = torch.stack([start, start + 1.0]) if not shared else torch.cat([start, start + 1.0])
        event = lambda t, y: (y[..., 0] - level - b * t) if control == "per_sample" else y[0, 0] - level - b * t  # noqa: E731
        if control == "joint":
            t = t.reshape(-1)
        solution = solve_ivp(
            lambda t, y: a * y, y0[i : i + 1], t, event_fn=event, control=control, gradient=gradient, **TIGHT
        )
        assert solution.status.tolist() == [Status.EVENT]
        assert solution.event_t.item() == pytest.approx(0.25)
        for x in (solution.event_t, solution.event_y):
            grads = torch.autograd.grad(x.sum(), (y0, start, level), retain_graph=True)
            found.append(torch.stack([grads[0][i, 0], grads[1][0], grads[2]]))
    y = c + b * 0.25
    by_time = torch.tensor([-1.0, a * y, 1.0], dtype=F64) / (a * y - b)
    exact = (by_time, a * y * by_time + torch.tensor([1.0, -a * y, 0.0], dtype=F64))
    for i in range(4):
        assert torch.allclose(found[i], exact[i % 2], rtol=1e-4), i


def test_gradients_at_an_event_at_the_start_and_of_none():
    y0 = torch.tensor([[0.5], [1.0], [0.1]], dtype=F64, requires_grad=True)
    solution = solve_ivp(decay, y0, T, event_fn=below_half, **TIGHT)
    (found,) = torch.autograd.grad(solution.event_t.nansum(), y0)
    assert torch.allclose(found[:, 0], torch.tensor([2.0, 1.0, 0.0], dtype=F64), rtol=1e-6)
