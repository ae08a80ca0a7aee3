"""The variable-coefficient Adams method: its strategy, and what every method has to do."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import exponential, growth, kepler, kepler_start, linear, rigid_body, spiral, tensor, van_der_pol
from torch import Tensor

import pyode
from pyode import SolveError, Stats, Status
from pyode.methods import METHODS

ADAMS = METHODS["adams"]
ORDERS = range(1, ADAMS.max_order + 1)


class TestStrategy:
    def evals(self, f, y0, t, tolerance, **options) -> int:
        stats = Stats()
        pyode.odeint(f, y0, t, tolerance, tolerance, "adams", {"stats": stats, **options})
        return stats.n_f_evals

    def test_a_step_costs_two_evaluations_and_a_rejected_one_one(self):
        stats = Stats()
        pyode.odeint(kepler, kepler_start(0.7), tensor(0, 20), 1e-6, 1e-6, "adams", {"stats": stats})
        assert stats.n_rejected > 0
        assert stats.n_f_evals == 2 + 2 * stats.n_accepted + stats.n_rejected  # two for the first step

    def test_the_tighter_the_tolerance_the_more_a_high_order_pays(self):
        def ratio(tolerance):
            return self.evals(kepler, kepler_start(0.1), tensor(0, 20), tolerance, max_order=4) / self.evals(
                kepler, kepler_start(0.1), tensor(0, 20), tolerance
            )

        assert 0.8 < ratio(1e-3) < 1.3
        assert ratio(1e-10) > 3

    def test_evaluations_hardly_grow_with_the_digits(self):
        few, many = (self.evals(rigid_body.f, rigid_body.y0, tensor(0, 20), 10.0**-digits) for digits in (4, 12))
        assert many < 5 * few  # of a method of order 5 it would be 40 times as many

    @pytest.mark.parametrize("size", [0.05, 0.25])
    def test_sizes_may_be_prescribed(self, size):
        seen = []

        def f(t, y):
            seen.append(float(t))
            return -y

        options = {"first_step": size, "min_step": size, "max_step": size}
        pyode.odeint(f, tensor(1.0), tensor(0, 4), method="adams", options=options)
        assert seen[1::2] == seen[2::2]
        assert np.diff(seen[::2]) == pytest.approx(size)

    def test_a_first_step_is_taken_as_given(self):
        seen = []

        def f(t, y):
            seen.append(float(t))
            return -y

        pyode.odeint(f, tensor(1.0), tensor(0, 1), 1e-3, 1e-3, method="adams", options={"first_step": 0.01})
        assert seen[:3] == [0.0, 0.01, 0.01]

    def test_safety_makes_steps_smaller(self):
        problem = (kepler, kepler_start(0.3), tensor(0, 10), 1e-6)
        assert self.evals(*problem, safety=0.5) > 1.3 * self.evals(*problem)

    def test_stiffness_is_survived(self):
        # The steps of an explicit method stay where it is stable; a high order, less stable, does not pay.
        y = pyode.odeint(lambda t, y: -1000 * (y - torch.cos(t)), tensor(0.0), tensor(0, 2), 1e-4, 1e-4, "adams")
        assert float(y[-1]) == pytest.approx(math.cos(2), abs=2e-3)

    def test_an_unannounced_discontinuity_is_survived(self):
        y = pyode.odeint(lambda t, y: torch.where(t < 1, 1.0, -3.0) * y, tensor(1.0), tensor(0, 2), 1e-8, 1e-8, "adams")
        assert float(y[-1]) == pytest.approx(math.exp(-2), rel=1e-6)


class TestDenseOutput:
    @pytest.mark.parametrize("problem", [rigid_body, linear, growth], ids=lambda problem: problem.name)
    def test_it_is_as_accurate_as_the_steps(self, problem):
        t = problem.times(200)
        y = pyode.odeint(problem.f, problem.y0, t, 1e-11, 1e-11, "adams")
        assert float((y - problem.at(t)).abs().max()) < 1e-9

    def test_it_is_once_differentiable_from_step_to_step(self):
        stats = Stats()
        segments = dense(kepler, kepler_start(0.6), 0.0, 7.0, options={"stats": stats})._segments
        assert stats.n_rejected > 0  # which must leave nothing behind
        for a, b in pairwise(segments):
            assert a.t1 == b.t0
            assert torch.equal(a.at(a.t1), b.at(b.t0))
            assert torch.allclose(slope(a, a.t1), kepler(None, b.y), rtol=1e-9, atol=1e-11)
            assert torch.allclose(slope(b, b.t0), kepler(None, b.y), rtol=1e-9, atol=1e-11)

    def test_many_times_at_once_are_each_alone(self):
        t = torch.rand(2, 50, dtype=torch.float64) * 5
        solution = dense(rigid_body.f, rigid_body.y0, 0.0, 5.0)
        assert torch.allclose(solution(t), torch.stack([solution(x) for x in t.reshape(-1)]).view(2, 50, 3), rtol=1e-12)
        assert torch.allclose(solution(t), rigid_body.at(t.reshape(-1)).view(2, 50, 3), atol=1e-6)

    def test_the_number_of_outputs_changes_no_step(self):
        ends = [
            pyode.odeint(van_der_pol, tensor(2, 0), torch.linspace(0, 5, n, dtype=torch.float64), method="adams")[-1]
            for n in (2, 77)
        ]
        assert torch.equal(*ends)


def dense(*problem, **kwargs) -> pyode.DenseOutput:
    return pyode.odeint_dense(*problem, rtol=1e-8, atol=1e-8, method="adams", **kwargs)


def slope(segment, t: float) -> Tensor:
    return torch.autograd.functional.jacobian(segment.sample, tensor(t))[0, ..., 0]


class TestAnyState:
    def test_time_may_run_backwards(self):
        mirrored = pyode.odeint(lambda t, y: -van_der_pol(-t, y), tensor(2, 0), tensor(0, 1, 5), method="adams")
        backwards = pyode.odeint(van_der_pol, tensor(2, 0), tensor(0, -1, -5), method="adams")
        assert torch.equal(mirrored, backwards)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
    def test_a_complex_state_is_two_real_ones(self, dtype):
        rate = torch.tensor(-0.1 + 2j, dtype=dtype)
        y = pyode.odeint(lambda t, y: rate * y, torch.ones(3, dtype=dtype), tensor(0, 2), 1e-5, 1e-5, "adams")
        assert y.dtype is dtype
        exact = torch.exp(2 * rate)
        assert float((y[-1] - exact).abs().max()) < 1e-4

    def test_every_part_of_a_tuple_is_in_tolerance(self):
        def f(t, y):
            return torch.zeros_like(y[0]), van_der_pol(t, y[1])

        idle, y = pyode.odeint(f, (torch.ones(10_000), tensor(2, 0)), tensor(0, 10), 1e-7, 1e-7, "adams")
        alone = pyode.odeint(van_der_pol, tensor(2, 0), tensor(0, 10), 1e-12, 1e-12, "adams")
        assert (idle == 1).all()
        assert float((y - alone).abs().max()) < 1e-5

    @pytest.mark.parametrize("shape", [(), (0,), (3, 1, 2)])
    def test_any_shape_is_a_state(self, shape):
        y = pyode.odeint(lambda t, y: -y, torch.ones(shape, dtype=torch.float64), tensor(0, 1), method="adams")
        assert torch.allclose(y[-1], torch.full(shape, math.exp(-1), dtype=torch.float64), rtol=1e-6)

    @pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-5])
    @pytest.mark.parametrize(
        ("f", "y0"), [(spiral, tensor(2, 0)), (kepler, kepler_start(0.5)), (van_der_pol, tensor(2, 0))]
    )
    def test_in_single_precision_it_takes_hardly_more_steps(self, f, y0, tolerance):
        # Differences of a high order are mostly rounding then; steps must not shrink because of them.
        evals, ends = [], []
        for dtype in (torch.float32, torch.float64):
            stats = Stats()
            options = {"stats": stats}
            ends.append(pyode.odeint(f, y0.to(dtype), tensor(0, 10), tolerance, tolerance, "adams", options)[-1])
            evals.append(stats.n_f_evals)
        assert evals[0] < 1.15 * evals[1]
        exact = pyode.odeint(f, y0, tensor(0, 10), 1e-12, 1e-12, "dopri8")[-1]
        assert float((ends[0] - exact).abs().max()) < 500 * tolerance

    def test_tolerances_may_differ_from_number_to_number(self):
        def evals(atol) -> int:
            stats = Stats()
            pyode.odeint(rigid_body.f, rigid_body.y0, tensor(0, 5), 0.0, atol, "adams", {"stats": stats})
            return stats.n_f_evals

        assert evals(1e-8) == evals(tensor(1e-8, 1e-8, 1e-8)) > evals(tensor(1e-8, 1e-4, 1e-4)) > evals(1e-4)

    def test_a_norm_of_the_users_decides(self):
        def solve(norm):
            stats = Stats()
            options = {"stats": stats, "norm": norm}
            return pyode.odeint(kepler, kepler_start(0.5), tensor(0, 5), 1e-6, 1e-6, "adams", options), stats

        rms, stats = solve(lambda error: error.square().mean().sqrt())
        default, default_stats = solve(None)
        assert torch.allclose(rms, default, rtol=1e-9)
        assert stats == default_stats
        assert solve(lambda error: 100 * error.abs().max())[1].n_f_evals > 1.2 * stats.n_f_evals

    def test_both_backends_take_the_same_steps(self):
        found = []
        for backend in ("auto", "reference"):
            stats = Stats()
            with pyode.backend(backend):
                y = pyode.odeint(kepler, kepler_start(0.5), tensor(0, 1, 5), method="adams", options={"stats": stats})
            found.append((y, stats))
        (y, stats), (other, other_stats) = found
        assert stats == other_stats
        assert torch.allclose(y, other, rtol=1e-11)


class TestPrescribedTimes:
    def test_steps_end_at_step_t(self):
        seen = set()

        def f(t, y):
            seen.add(float(t))
            return van_der_pol(t, y)

        stops = [0.5, 0.51, 2.0]
        pyode.odeint(f, tensor(2, 0), tensor(0, 3), method="adams", options={"step_t": stops})
        assert set(stops) <= seen

    def test_a_stop_costs_few_steps_more(self):
        evals = []
        for options in ({}, {"step_t": torch.arange(1, 10) + 1e-6}):
            stats = Stats()
            pyode.odeint(kepler, kepler_start(0.1), tensor(0, 10), method="adams", options={**options, "stats": stats})
            evals.append(stats.n_f_evals)
        assert evals[1] < 1.5 * evals[0]

    @pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
    def test_a_discontinuity_is_seen_from_before_and_then_from_behind(self, sign):
        seen = []

        def f(t, y):
            seen.append(sign * float(t))
            return torch.where(sign * t < 1, sign * y, -3 * sign * y)

        y = pyode.odeint(f, tensor(1.0), sign * tensor(0, 1, 2), 1e-9, 1e-9, "adams", {"jump_t": [sign]})
        assert y[1:].reshape(-1).tolist() == pytest.approx([math.exp(1), math.exp(-2)], rel=1e-8)
        assert not [t for t in seen if t == 1.0]
        assert max(t for t in seen if t < 1) == pytest.approx(1, abs=1e-15)
        assert min(t for t in seen if t > 1) == pytest.approx(1, abs=1e-15)

    def test_a_discontinuity_that_is_named_is_cheap(self):
        evals = []
        for options in ({}, {"jump_t": [0.3, 0.8, 1.7]}):
            stats = Stats()

            def f(t, y):
                return torch.where((t < 0.3) | (t > 0.8), -y, 5 * y) * torch.where(t < 1.7, 1, -1)

            pyode.odeint(f, tensor(1.0), tensor(0, 2), 1e-9, 1e-9, "adams", {**options, "stats": stats})
            evals.append(stats.n_f_evals)
        assert evals[1] < 0.8 * evals[0]


ONE = tensor(1.0)


class TestFailures:
    def status_of(self, f, y0: Tensor = ONE, **kwargs) -> Status:
        with pytest.raises(SolveError) as caught:
            pyode.odeint(f, y0, tensor(0, 2), method="adams", **kwargs)
        return caught.value.status

    def test_each_says_why(self):
        assert self.status_of(lambda t, y: y * y) in (Status.STEP_TOO_SMALL, Status.NON_FINITE)  # infinite at 1
        assert self.status_of(lambda t, y: y * math.nan) is Status.NON_FINITE
        assert self.status_of(lambda t, y: torch.where(t > 0.5, math.nan, y)) is Status.NON_FINITE
        assert self.status_of(lambda t, y: y, options={"max_num_steps": 5}) is Status.TOO_MANY_STEPS
        assert self.status_of(lambda t, y: torch.ones_like(y), tensor(0.0), atol=0.0) is Status.STEP_TOO_SMALL

    def test_max_num_steps_is_of_an_output_interval(self):
        t, stats = torch.linspace(0, 10, 41, dtype=torch.float64), Stats()
        options = {"max_num_steps": 40, "stats": stats}
        pyode.odeint(kepler, kepler_start(0.1), t, 1e-6, 1e-6, "adams", options)
        assert stats.n_steps > 40

    def test_the_last_good_state_may_stand_for_the_rest(self):
        options = {"max_num_steps": 30, "on_failure": "return"}
        with pytest.warns(UserWarning, match="max_num_steps"):
            y = pyode.odeint(lambda t, y: -y, tensor(1.0), tensor(0, 0.1, 100, 200), method="adams", options=options)
        assert torch.equal(y[2], y[3])
        assert 0 < float(y[2]) < float(y[1])

    def test_a_failure_of_a_solve_within_func_is_passed_on(self):
        error = SolveError(Status.NON_FINITE, 0.0, 0.0, 0)

        def f(t, y):
            raise error

        with pytest.raises(SolveError) as caught:
            pyode.odeint(f, tensor(1.0), tensor(0, 1), method="adams", options={"on_failure": "return"})
        assert caught.value is error

    @pytest.mark.parametrize("order", [0, 13, "high"])
    def test_an_order_that_there_is_not_is_refused(self, order):
        with pytest.raises(ValueError, match="max_order") if order != "high" else pytest.raises(TypeError):
            pyode.odeint(lambda t, y: y, tensor(1.0), tensor(0, 1), method="adams", options={"max_order": order})

    def test_what_torchdiffeq_took_in_2018_is_taken_without_a_warning(self):
        options = {"max_order": 7, "safety": 0.9, "ifactor": 10.0, "dfactor": 0.2, "first_step": 1e-4}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = pyode.odeint(exponential.f, exponential.y0, exponential.times(2), method="adams", options=options)
        assert torch.allclose(y[-1], exponential.solution(3.0), rtol=1e-6)


def test_events_are_found_within_a_step():
    t, y = pyode.odeint_event(
        lambda t, y: torch.stack([y[1], -torch.ones_like(y[1])]),  # a ball thrown upwards
        tensor(0, 1),
        torch.zeros((), dtype=torch.float64),
        event_fn=lambda t, y: y[0] + (t == 0),
        method="adams",
    )
    assert float(t) == pytest.approx(2, abs=1e-8)
    assert y[-1].tolist() == pytest.approx([0, -1], abs=1e-8)


def test_callbacks_are_told_every_step():
    counts = dict.fromkeys(("step", "accept_step", "reject_step"), 0)

    class Field(torch.nn.Module):
        def forward(self, t, y):
            return kepler(t, y)

    func, stats = Field(), Stats()
    for name in counts:
        setattr(func, f"callback_{name}", lambda t, y, dt, name=name: counts.update({name: counts[name] + 1}))
    pyode.odeint(func, kepler_start(0.7), tensor(0, 10), 1e-6, 1e-6, "adams", {"stats": stats})
    assert list(counts.values()) == [stats.n_steps, stats.n_accepted, stats.n_rejected]
