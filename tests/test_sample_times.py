"""The times of samples: their own ends, directions and padding; func is never evaluated outside of them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from ensembles import counts, decay, oscillators, van_der_pol
from hypothesis import given

import pyode
from pyode import solve_ivp
from pyode.methods import TABLEAUS

METHODS = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
Y0 = torch.tensor([[1.0], [2.0], [-3.0]], dtype=F64)


@given(
    spans=st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3) | st.just(0.0), min_size=1, max_size=6),
    n=st.integers(2, 6),
    size=st.sampled_from([1, 2, 3, 7, 64, 129]),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, F64, torch.complex64]),
    time=st.sampled_from([torch.float32, F64]),
    grad=st.booleans(),
)
def test_samples_have_times_ends_and_directions_of_their_own(spans, n, size, padding, dtype, time, grad):
    B = len(spans)
    t = torch.linspace(0, 1, n, dtype=time)[:, None] * torch.tensor(spans, dtype=time) + torch.arange(B) * 0.25
    if t[1:-1].numel() and not ((t.diff(dim=0) * (t[-1] - t[0])).gt(0) | (t[0] == t[-1])).all():
        return  # rounding made two times one
    t = torch.cat([t, t[-1:].expand(padding, B)])
    y0 = torch.arange(1, B + 1).to(dtype)[:, None].expand(B, size).contiguous()
    with torch.set_grad_enabled(grad):
        solution = solve_ivp(decay, y0, t, rtol=1e-5, atol=1e-7)
        exact = y0.detach() * torch.exp(t[:1] - t)[..., None]
        assert solution.success
        assert torch.allclose(solution.ys, exact.to(dtype), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        for b in range(B):
            alone = solve_ivp(decay, y0[b : b + 1], t[:, b : b + 1], rtol=1e-5, atol=1e-7)
            assert torch.equal(alone.ys[:, 0], solution.ys[:, b])


def test_shared_times_are_those_of_every_sample():
    y0 = oscillators(3)
    shared, own = (solve_ivp(van_der_pol, y0, t) for t in (T, T[:, None].expand(5, 3)))
    assert torch.equal(shared.ys, own.ys)
    assert shared.ts.shape == (5,)
    assert own.ts.shape == (5, 3)


@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_a_single_time_is_the_start(control):
    solution = solve_ivp(decay, Y0, T[:1], control=control, dense_output=True)
    assert torch.equal(solution.ys, Y0[None])
    assert solution.success
    assert not solution.stats.n_steps.any()
    assert torch.equal(solution.interpolant(0.0), Y0)


@given(
    start=st.floats(-1e3, 1e3),
    ulps=st.integers(1, 10**9),
    sign=st.sampled_from([1, -1]),
    dtype=st.sampled_from([torch.float32, F64]),
    method=st.sampled_from(METHODS),
    control=st.sampled_from(["per_sample", "joint"]),
)
def test_func_is_never_evaluated_outside_the_times(start, ulps, sign, dtype, method, control):
    t0 = torch.tensor(start, dtype=dtype)
    t1 = t0
    for _ in range(min(ulps, 3)):  # one to three of them, or a longer way
        t1 = torch.nextafter(t1, t1 + sign)
    if ulps > 3:
        t1 = t0 + sign * ulps * 1e-8
    if t0 == t1:
        return
    seen = []

    def f(t, y):
        seen.append(t.clone())
        return torch.cos(t).reshape(-1, 1) * y

    y0 = torch.ones(2, 1, dtype=dtype)
    solution = solve_ivp(f, y0, torch.stack([t0, t1]), method=method, control=control)
    times = torch.stack(seen)
    assert solution.success
    assert bool(((times >= min(t0, t1)) & (times <= max(t0, t1))).all())


def test_func_is_not_evaluated_outside_of_a_samples_own_times():
    ends = torch.tensor([0.1, 1.0, -2.0], dtype=F64)
    seen = []

    def f(t, y):
        seen.append(t.clone())
        return -y

    solve_ivp(f, Y0, torch.stack([torch.zeros(3, dtype=F64), ends]))
    times = torch.stack(seen)
    assert bool(((times >= ends.clamp(max=0)) & (times <= ends.clamp(min=0))).all())


@pytest.mark.parametrize("stops", ["step_t", "jump_t"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_prescribed_times_are_met_by_samples_of_all_directions(stops, backend):
    def f(t, y):
        return -y * torch.where(t < 0.5, 1.0, 2.0)[:, None] * torch.where(t < 1.5, 1.0, 2.0)[:, None]

    t = torch.tensor([[0.0, 2.0, 0.7, 0.0], [2.0, 0.0, 2.0, 0.5]], dtype=F64)
    y0 = torch.ones(4, 1, dtype=F64)
    options = {stops: [1.5, 0.5]}
    with pyode.backend(backend), torch.no_grad():
        together = solve_ivp(f, y0, t, options=options, rtol=1e-8, atol=1e-10)
        exponents = torch.tensor([0.5 + 2 + 2, -4.5, 1.6 + 2, 0.5], dtype=F64)
        assert torch.allclose(together.ys[-1, :, 0], torch.exp(-exponents), rtol=1e-5)
        if stops == "jump_t":
            assert together.stats.n_rejected.sum() <= 4  # nobody stumbles over a discontinuity
        for b in range(4):
            alone = solve_ivp(f, y0[:1], t[:, b], options=options, rtol=1e-8, atol=1e-10)
            assert torch.equal(alone.ys[:, 0], together.ys[:, b])
            assert torch.equal(counts(alone)[:, 0], counts(together)[:, b])
