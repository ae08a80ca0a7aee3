"""Compiled solves in which every sample has steps of its own, against the eager ones."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from ensembles import blow_up, columns, counts, decay, nan_above, oscillators, van_der_pol
from fields import Driven, assert_close, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import tensor
from torch import Tensor, nn

import pyode
from pyode.methods import TABLEAUS

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
TIGHT = {"rtol": 1e-6, "atol": 1e-8}
compiled_van_der_pol = pyode.compile(van_der_pol, strict=True)


def strict(f):
    return pyode.compile(f, strict=True)


def assert_same(ours: pyode.Solution, theirs: pyode.Solution, tolerance: float = 1e-9) -> None:
    """The same steps and fates, and results but for rounding; sizes of steps have the noise of the error estimate."""
    assert torch.equal(counts(ours)[:3], counts(theirs)[:3])
    assert torch.equal(ours.status, theirs.status)
    torch.testing.assert_close(ours.ys, theirs.ys, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(ours.stats.last_dt, theirs.stats.last_dt, rtol=1e-3, atol=1e-6)


def check(y0: Tensor, t: Tensor, **arguments) -> pyode.Solution:
    ours, theirs = (pyode.solve_ivp(f, y0, t, **arguments) for f in (compiled_van_der_pol, van_der_pol))
    assert_same(ours, theirs)
    return ours


T = tensor(0.0, 0.3, 1.0, 2.0)
OPTIONS = {
    "PI": {"controller": "PI"},
    "PID": {"controller": "PID"},
    "H211b": {"controller": "H211b"},
    "I of another exponent": {"controller": (0.8,)},
    "a first step": {"first_step": 0.01},
    "bounds": {"options": {"min_step": 1e-3, "max_step": 0.05}},
    "constants": {"options": {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5}},
    "stops": {"options": {"step_t": tensor(0.1, 0.45, 2.0), "jump_t": tensor(0.3, 0.9, 1.7)}},
    "tolerances": {"rtol": torch.logspace(-6, -4, 3).double(), "atol": tensor(1e-6, 1e-8, 1e-7)},
    "too many steps": {"max_num_steps": 12, "throw": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_the_eager_solve(name):
    y0 = oscillators(37, stiffest=8.0)
    solution = check(y0, T, **OPTIONS[name])
    assert len(set(solution.stats.n_steps.tolist())) > 1
    if name == "too many steps":
        assert 0 < int((solution.status == pyode.Status.TOO_MANY_STEPS).sum()) < 37


@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_method(method):
    check(oscillators(21, stiffest=4.0), T, method=method, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1e-3, 1e-6]))
def test_any_batch_with_times_of_its_own(samples, n, seed, rtol):
    g = torch.Generator().manual_seed(seed)
    # Within the limit cycle, from outside of which the way back leads to infinity.
    y0 = torch.cat([torch.rand(samples, 2, generator=g) - 0.5, 3 * torch.rand(samples, 1, generator=g)], 1).double()
    steps = 0.05 + torch.rand(n, samples, generator=g, dtype=torch.float64)
    sign = torch.randint(0, 2, (samples,), generator=g) * 2.0 - 1
    lengths = torch.randint(0, n + 1, (samples,), generator=g)  # 0: all of its times are its start
    check(y0, columns(sign, lengths, 0.3 * steps), rtol=rtol)


def test_a_sample_has_the_same_bits_alone_and_in_a_crowd():
    y0 = oscillators(50, stiffest=20.0)
    t = T[:, None] * torch.linspace(0.1, 1, 50).double()
    crowd = pyode.solve_ivp(compiled_van_der_pol, y0, t)
    for b in (0, 7, 49):
        alone = pyode.solve_ivp(compiled_van_der_pol, y0[b : b + 1], t[:, b : b + 1])
        assert torch.equal(alone.ys[:, 0], crowd.ys[:, b])
        assert torch.equal(counts(alone)[:, 0], counts(crowd)[:, b])


def test_results_have_the_same_bits_for_any_number_of_threads():
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))
    f, y0, found = strict(lambda t, y: net(y) * torch.cos(t)[:, None]), torch.randn(500, 4), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        start = y0.clone().requires_grad_()
        solution = pyode.solve_ivp(f, start, torch.linspace(0, 2, 5))
        loss = solution.ys.square().sum()
        gradients = torch.autograd.grad(loss, [start, *net.parameters()])
        found.append(torch.cat([x.reshape(-1) for x in (solution.ys.detach(), *gradients)]))
    assert all(torch.equal(x, found[0]) for x in found)


def test_float32_agrees_to_its_accuracy():
    y0 = oscillators(40, torch.float32, stiffest=3.0)
    ours, theirs = (pyode.solve_ivp(f, y0, T.float(), rtol=1e-4) for f in (compiled_van_der_pol, van_der_pol))
    torch.testing.assert_close(ours.ys, theirs.ys, rtol=1e-4, atol=1e-4)


def test_odeint_has_it_too():
    y0, found = oscillators(20, stiffest=5.0), []
    for f in (compiled_van_der_pol, van_der_pol):
        stats = pyode.Stats()
        found.append(pyode.odeint(f, y0, T, **TIGHT, options={"control": "per_sample", "stats": stats}))
        found.append(stats)
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-9)
    assert found[1] == found[3]


def test_tuples_and_states_of_more_axes():
    def f(t, y):
        a, b = y
        return b.sum((1, 2))[:, None] - a, torch.sin(t)[:, None, None] * torch.tanh(b * a.unsqueeze(-1))

    y0 = torch.randn(19, 1).double(), torch.randn(19, 2, 2).double()
    ours, theirs = (pyode.solve_ivp(g, y0, T, rtol=1e-6) for g in (strict(f), f))
    assert torch.equal(counts(ours)[:3], counts(theirs)[:3])
    for a, b in zip(ours.ys, theirs.ys):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_solve_done_again_is_the_first_one():
    """What was checked once is not checked again, but noticed where it has changed."""
    f, y0, t = pyode.compile(van_der_pol, strict=True), oscillators(9, stiffest=3.0), T.clone()
    for arguments in ({}, {}, {"rtol": 1e-5}, {"controller": "PI"}, {"controller": "PI"}, {"max_num_steps": 10**6}):
        again, first = (pyode.solve_ivp(g, y0, t, **arguments) for g in (f, pyode.compile(van_der_pol)))
        assert torch.equal(again.ys, first.ys)
        assert torch.equal(counts(again), counts(first))
        assert again.event_t.isnan().all()
        assert again.event_y.shape == first.event_y.shape
    t[1] = 0.5
    for options in ({"control": "per_sample"}, {"control": "per_sample"}):
        ys = pyode.odeint(f, y0, t, options=options)
        assert torch.equal(ys, pyode.odeint(pyode.compile(van_der_pol), y0, t, options=options))
    torch.testing.assert_close(ys[1], pyode.odeint(f, y0, tensor(0.0, 0.5))[1], rtol=1e-5, atol=1e-5)
    g = strict(nan_above(2.0, lambda t, y: y))
    for _ in range(2):
        solution = pyode.solve_ivp(g, torch.tensor([[0.1], [1.0]]).double(), t, throw=False)
        assert solution.ys.isnan()[-1, :, 0].tolist() == [False, True]
        with pytest.raises(pyode.SolveError, match="sample 1"):
            pyode.solve_ivp(g, torch.tensor([[0.1], [1.0]]).double(), t)


class TestFailures:
    def test_concern_their_own_sample_only(self):
        f, y0 = nan_above(2.0, lambda t, y: y), torch.linspace(0.1, 1.9, 33).double()[:, None]
        ours, theirs = (pyode.solve_ivp(g, y0, T, throw=False) for g in (strict(f), f))
        failed = ours.status != pyode.Status.SUCCESS  # after how many steps is decided by rounding, at a discontinuity
        assert 0 < int(failed.sum()) < 33
        assert torch.equal(ours.status, theirs.status)
        assert torch.equal(counts(ours)[:3, ~failed], counts(theirs)[:3, ~failed])
        assert ours.ys[-1, failed].isnan().all()
        assert torch.equal(ours.ys[:, ~failed], pyode.solve_ivp(strict(f), y0[~failed], T).ys)

    def test_are_the_eager_solves(self):
        cases = (
            (blow_up, torch.tensor([[0.1], [1.0], [0.2]]).double(), {}),
            (lambda t, y: y / 0, torch.ones(2, 1).double(), {}),
            (lambda t, y: 1 - y, torch.zeros(2, 1).double(), {"atol": 0.0}),
            (decay, torch.ones(3, 1).double(), {"max_num_steps": 1}),
        )
        for f, y0, arguments in cases:
            errors = []
            for g in (strict(f), f):
                with pytest.raises(pyode.SolveError) as caught:
                    pyode.solve_ivp(g, y0, T, **arguments)
                errors.append(caught.value)
            ours, theirs = errors
            assert (ours.status, ours.n_steps) == (theirs.status, theirs.n_steps)
            assert ours.t == pytest.approx(theirs.t, rel=1e-9)

    def test_odeint_repeats_the_last_state(self):
        y0, found = torch.tensor([[0.1], [1.0]]).double(), []
        for f in (strict(blow_up), blow_up):
            options = {"control": "per_sample", "on_failure": "return"}
            with pytest.warns(UserWarning, match="the solve failed"):
                found.append(pyode.odeint(f, y0, T, rtol=1e-5, atol=1e-7, options=options))
        torch.testing.assert_close(*found, rtol=1e-6, atol=0)

    @pytest.mark.usefixtures("_optimised")
    @pytest.mark.parametrize("threads", [1, 2])
    def test_interrupts_stop_a_solve_of_which_one_sample_takes_long(self, threads, request):
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores the signal
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
        torch.set_num_threads(threads)
        f = strict(lambda t, y: torch.cos(1e6 * t)[:, None] * y)
        y0 = torch.ones(64, 1).double()
        for slow in (0, 63):  # on either thread
            ends = torch.full((64,), 1e-6).double()
            pyode.solve_ivp(f, y0, torch.stack([0 * ends, ends]))
            ends[slow] = 1e6
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            began = time.perf_counter()
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                pyode.solve_ivp(f, y0, torch.stack([0 * ends, ends]), max_num_steps=2**40)
            assert time.perf_counter() - began < 1.3


class TestWhatRunsEagerly:
    def test_rows_that_are_mixed(self):
        def f(t, y):
            return y - y.mean(0)

        y0 = torch.randn(5, 2).double()
        with pytest.warns(UserWarning, match="mixes rows"):
            ours = pyode.solve_ivp(pyode.compile(f), y0, T)
        assert_same(ours, pyode.solve_ivp(f, y0, T))

    def test_rows_too_wide_for_the_stack(self):
        y0 = torch.randn(2, 20_000)
        for control in ("per_sample", "joint"):
            with pytest.warns(UserWarning, match="the stack would overflow"):
                ours = pyode.odeint(pyode.compile(decay), y0, T.float(), options={"control": control})
            assert torch.equal(ours, pyode.odeint(decay, y0, T.float(), options={"control": control}))

    def test_events_and_dense_output(self):
        y0 = oscillators(3, stiffest=2.0)
        for arguments in ({"event_fn": lambda t, y: y[:, 0]}, {"dense_output": True}):
            check(y0, T, **arguments)


def gradients(compiled: bool, t: Tensor = T, samples: int = 21, time: bool = True, **arguments) -> list:
    """Of y0, t if wanted, and the parameters; func is called only to be traced, if compiled."""
    t = t.clone().requires_grad_(time)
    field, generator = Driven(), torch.Generator().manual_seed(3)
    y0 = torch.randn(samples, 2, generator=generator).double().requires_grad_()
    ys = pyode.solve_ivp(strict(field) if compiled else field, y0, t, **{**TIGHT, **arguments}).ys
    loss_of(ys.nan_to_num()).backward()
    assert (field.calls < 4) == compiled
    return [y0.grad, t.grad, *(p.grad for p in field.trained()), field.unused.grad]


class TestGradients:
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_every_method(self, method):
        arguments = {"method": method, "rtol": 1e-4, "time": False}
        # As far as sizes of steps agree, of which dopri8's error estimate has little to say.
        assert_close(gradients(True, **arguments), gradients(False, **arguments), 1e-8)

    @pytest.mark.parametrize("name", ["stops", "a first step", "too many steps", "H211b"])
    def test_options(self, name):
        arguments = {"max_num_steps": 14, "throw": False} if name == "too many steps" else OPTIONS[name]
        assert_close(gradients(True, **arguments), gradients(False, **arguments), 1e-9)

    def test_times_of_their_own(self):
        lengths = torch.arange(21) % 4
        t = columns((-1.0) ** torch.arange(21), lengths, 0.2 + torch.rand(3, 21).double())
        assert_close(gradients(True, t), gradients(False, t), 1e-9)

    def test_gradcheck(self):
        # Steps of one size, which no output ends: a finite difference changes none.
        field, y0 = Driven(), torch.randn(3, 2).double().requires_grad_()
        options = {"control": "per_sample", "first_step": 0.1, "min_step": 0.1, "max_step": 0.1}
        f, t = strict(field), tensor(0.0, 0.05, 0.12, 0.25)

        def solve(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
            return pyode.odeint(f, y0, t, options=options)

        for times in (t, t[:, None] * tensor(1.0, -1.5, 0.7)):
            assert torch.autograd.gradcheck(solve, (y0, times.requires_grad_(), *field.trained()))

    def test_a_longer_solve_finds_room(self):
        found = []
        for f in (strict(field := Driven()), field):
            for end in (0.1, 20.0):
                field.zero_grad()
                pyode.solve_ivp(f, torch.ones(40, 2).double(), tensor(0.0, end), **TIGHT).ys.square().sum().backward()
            found.append([p.grad.clone() for p in field.trained()])
        assert_close(*found, 1e-7)

    def test_gradients_of_gradients(self):
        found = []
        for f in (strict(Driven()), Driven()):
            y0 = torch.linspace(-1, 1, 6).double().reshape(3, 2).requires_grad_()
            ys = pyode.solve_ivp(f, y0, T, **TIGHT).ys
            (g,) = torch.autograd.grad(loss_of(ys), y0, create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), y0))
        assert_close(*found, 1e-8)
