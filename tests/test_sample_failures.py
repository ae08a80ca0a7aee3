"""What happens when samples fail, and when they are done: statuses, throw, compact."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from ensembles import blow_up, counts, decay, nan_above, oscillators, van_der_pol

from pyode import SolveError, Status, solve_ivp
from pyode.methods import IMPLICIT, METHODS

F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
Y0 = torch.tensor([[1.0], [2.0], [-3.0]], dtype=F64)


def test_a_row_for_every_status():
    # y' = y^2 blows up; func ends; an event; too many steps; all is well.
    def f(t, y):
        kind, x = y[:, 1], y[:, 0]
        slope = torch.where(kind == 0, x * x, torch.where(kind == 3, -1e4 * (x - torch.cos(t)), torch.ones_like(x)))
        slope = torch.where((kind == 1) & (x > 1.6), torch.nan, slope)
        return torch.stack([slope, torch.zeros_like(slope)], 1)

    def reached_its_end(t, y):
        return torch.where(y[:, 1] == 2, y[:, 0] - 2.2, 1.0)

    y0 = torch.tensor([[1.0, 0], [1.0, 1], [1.0, 2], [1.0, 3], [-9.0, 4]], dtype=F64)
    t = torch.linspace(0, 4, 9, dtype=F64)
    solution = solve_ivp(f, y0, t, throw=False, max_num_steps=900, event_fn=reached_its_end)
    statuses = [
        Status.STEP_TOO_SMALL, Status.NON_FINITE, Status.EVENT, Status.TOO_MANY_STEPS, Status.SUCCESS,
    ]  # fmt: skip
    assert solution.status.tolist() == statuses
    assert not solution.success
    for status in statuses:
        assert status.sentence in solution.message
    lost = solution.ys[..., 0].isnan()
    assert not lost[:, 4].any()
    assert lost[:, 1].tolist() == [time > 0.6 for time in t.tolist()]
    assert lost[:, 0].tolist() == [time >= 1 for time in t.tolist()]
    assert lost[:, 2].tolist() == [time > 1.2 for time in t.tolist()]
    assert lost[-1, 3]
    for b in range(5):
        with torch.no_grad():
            alone = solve_ivp(f, y0[b : b + 1], t, throw=False, max_num_steps=900, event_fn=reached_its_end)
        assert torch.equal(alone.ys[:, 0].nan_to_num(), solution.ys[:, b].nan_to_num())
        assert torch.equal(alone.status, solution.status[b : b + 1])
        assert torch.equal(counts(alone)[:, 0], counts(solution)[:, b])


def test_the_status_of_an_implicit_solve_whose_equations_are_not_solved():
    how = {"method": "implicit_euler", "control": "joint", "options": {"max_iters": 1, "step_size": 0.5}}
    solution = solve_ivp(lambda t, y: -(y**3), 3 * Y0, T, throw=False, **how)
    assert solution.status.tolist() == [Status.NOT_CONVERGED]
    assert solution.message == Status.NOT_CONVERGED.sentence
    assert torch.equal(solution.ys[0], 3 * Y0)
    assert solution.ys[1:].isnan().all()
    with pytest.raises(SolveError, match="Newton"):
        solve_ivp(lambda t, y: -(y**3), 3 * Y0, T, **how)


@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("grad", [False, True])
def test_throw_raises_what_the_status_tells_otherwise(control, grad):
    y0, t = torch.tensor([[0.1], [2.0]], dtype=F64).requires_grad_(grad), torch.linspace(0, 1, 5, dtype=F64)
    with pytest.raises(SolveError) as caught:
        solve_ivp(blow_up, y0, t, control=control)
    assert caught.value.sample == (1 if control == "per_sample" else None)
    assert caught.value.t == pytest.approx(0.5, abs=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve_ivp(blow_up, y0, t, control=control, throw=False)
    assert solution.status[-1] == caught.value.status
    assert solution.ys[3:, 1].isnan().all()
    assert not solution.ys[:2].isnan().any()
    assert solution.ys[:, 0].isnan().any() == (control == "joint")


@pytest.mark.parametrize("how", [{}, {"control": "joint"}, {"compile": True}], ids=["per_sample", "joint", "compiled"])
def test_no_tolerance_at_the_start_is_no_inf_in_func(how):
    # One start has no size and atol is 0; another is nan.
    def ones(t, y):
        return y * 0 + 1

    y0 = torch.tensor([[1.0], [0.0], [math.nan], [0.0]], dtype=F64)[: 2 if "control" in how else 4]
    status = solve_ivp(ones, y0, T, atol=0.0, throw=False, **how).status.tolist()
    too_small, non_finite = Status.STEP_TOO_SMALL, Status.NON_FINITE
    assert status == ([too_small] if "control" in how else [Status.SUCCESS, too_small, non_finite, too_small])
    with pytest.raises(SolveError) as caught:
        solve_ivp(ones, y0, T, atol=0.0, **how)
    assert caught.value.status is too_small
    assert caught.value.n_steps == 0


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_the_gradients_of_healthy_samples_are_those_without_the_failed_ones(gradient):
    found, t = [], torch.linspace(0, 1, 5, dtype=F64)
    for start in ([0.1, 0.5, 2.0], [0.1, 0.5]):
        y0 = torch.tensor(start, dtype=F64)[:, None].requires_grad_()
        solution = solve_ivp(blow_up, y0, t, throw=False, gradient=gradient, params=())
        good = solution.status == Status.SUCCESS
        found.append(torch.autograd.grad(solution.ys[:, good].square().sum(), y0)[0])
    assert good.all()
    assert len(good) == 2
    assert torch.equal(found[0][:2], found[1])
    assert torch.equal(found[0][2], torch.zeros(1, dtype=F64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_start_that_is_not_finite_fails_alone(value):
    y0 = Y0.clone()
    y0[1] = value
    solution = solve_ivp(decay, y0, T, throw=False)
    assert solution.status.tolist() == [Status.SUCCESS, Status.NON_FINITE, Status.SUCCESS]
    assert solution.ys[1:, 1].isnan().all()
    assert torch.equal(solution.ys[:, [0, 2]], solve_ivp(decay, Y0[[0, 2]], T).ys)


def test_a_limit_in_the_domain_is_approached_by_its_sample_only():
    f = nan_above(1.5, lambda t, y: torch.ones_like(y))
    y0 = torch.tensor([[0.1], [0.9], [-5.0]], dtype=F64)
    solution = solve_ivp(f, y0, T, throw=False)
    assert solution.status.tolist() == [Status.NON_FINITE, Status.NON_FINITE, Status.SUCCESS]
    assert torch.allclose(solution.ys[:, 2, 0], -5 + T)
    assert solution.ys[:, 1, 0].isnan().tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("event", [False, True])
def test_a_sample_that_is_done_is_fed_its_last_state(event):
    fed = []

    def f(t, y):
        fed.append((t.clone(), y.clone()))
        return -y

    ends = torch.tensor([0.1, 2.0, 2.0], dtype=F64)
    event_fn = (lambda t, y: torch.where(ends < 1, y[:, 0] - 0.95, 1.0)) if event else None
    with torch.no_grad():
        solution = solve_ivp(f, Y0, torch.stack([0 * ends, ends]), event_fn=event_fn, options={"max_step": 0.1})
    assert solution.stats.n_steps[0] < 4 < solution.stats.n_steps[1]
    last = [(t[0], y[0]) for t, y in fed[-12:]]  # in the last two steps
    assert len({float(t) for t, _ in last}) == 1
    assert float(last[0][0]) == pytest.approx(0.1)
    assert all(torch.equal(y, last[0][1]) for _, y in last)
    if not event:
        assert torch.equal(last[0][1], solution.ys[-1, 0])


@pytest.mark.parametrize("grad", [False, True])
def test_compact_calls_func_with_the_running_rows_only_and_changes_nothing(grad):
    y0 = oscillators(64).requires_grad_(grad)
    t = torch.stack([torch.zeros(64, dtype=F64), torch.linspace(0.05, 2, 64, dtype=F64)])
    sizes = {True: [], False: []}

    def f(t, y, compact):
        assert t.shape == (len(y),)
        sizes[compact].append(len(y))
        return van_der_pol(t, y)

    def event(t, y, compact):
        return y[:, 0] - 1.9

    solutions = [solve_ivp(f, y0, t, args=(c,), compact=c, event_fn=event, rtol=1e-6) for c in (True, False)]
    compact, plain = solutions
    rows = sizes[True][:-1] if grad else sizes[True]  # the last call is for the events' gradients
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 48
    assert sum(sizes[True]) < 0.9 * sum(sizes[False])
    assert torch.equal(compact.ys.nan_to_num(), plain.ys.nan_to_num())
    assert torch.equal(counts(compact), counts(plain))
    assert torch.equal(compact.event_t.nan_to_num(), plain.event_t.nan_to_num())
    if grad:
        both = [torch.autograd.grad(s.ys.nansum() + s.event_t.nansum(), y0)[0] for s in (compact, plain)]
        assert torch.equal(*both)


def test_compact_takes_nested_states():
    f = lambda t, y: {"a": -y["a"], "b": y["b"] * 0.0}  # noqa: E731
    y0 = {"a": Y0, "b": torch.ones(3, 2, dtype=F64)}
    t = torch.tensor([[0.0, 0, 0], [0.1, 0.2, 8.0]], dtype=F64)
    compact, plain = (solve_ivp(f, y0, t, compact=c).ys["a"] for c in (True, False))
    assert torch.equal(compact, plain)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.adaptive or name in IMPLICIT])
def test_a_solve_of_any_method_that_fails_says_how_far_it_came(method):
    def f(t, y):  # ends at 0.5
        return torch.where(t < 0.5, -y, torch.nan * y.detach())

    t = torch.linspace(0, 1, 6, dtype=F64)
    how = {"method": method, "control": "joint", "rtol": 1e-5, "atol": 1e-6}
    solution = solve_ivp(f, Y0, t, throw=False, **how)
    assert not solution.success
    reached = solution.ys[:, 0, 0].isfinite()
    assert reached[0]
    assert not reached[3:].any()
    accuracy = 0.05 if method == "implicit_euler" else 2e-3  # two steps of 0.2
    assert torch.allclose(solution.ys[reached, :, 0], Y0[:, 0] * torch.exp(-t[reached, None]), rtol=accuracy)
    with pytest.raises(SolveError) as caught:
        solve_ivp(f, Y0, t, **how)
    assert caught.value.status == solution.status
    assert float(t[reached][-1]) <= caught.value.t <= 0.5
