"""Every op against its twin in plain torch: values, shapes, dtypes, samples, what must not spread."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from factories import (
    BACKENDS,
    ROUNDOFF,
    WEIGHTS,
    arithmetic_roundoff,
    controller_for,
    layout_for,
    numbers,
    operands,
    steps_for,
)
from hypothesis import given
from torch import Tensor

from pyode._ops import native, reference
from pyode._ops.contract import Phase, Policy
from pyode.methods import TABLEAUS

# One number, less and more than a SIMD register of any width, across a block, a part of a norm, and several chunks.
SHAPES = [
    *((1, size) for size in (0, 1, 3, 15, 16, 17, 255, 257, 4097, 70001)),
    (2, 17), (2, 35001), (7, 0), (7, 1), (7, 63), (7, 64), (7, 4097), (300, 1), (300, 3), (300, 257),
]  # fmt: skip


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """Both have rounded `terms` operations on numbers of this magnitude, and the result to its dtype."""
    dtype = expected.dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    assert actual.dtype == dtype
    allowed = 2 * (terms + 2) * arithmetic_roundoff(dtype) * magnitude + 2 * ROUNDOFF[dtype] * expected.abs().double()
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0  # one unit in the last place of a subnormal
    assert bool(((actual.to(wide) - expected.to(wide)).abs() <= allowed + smallest).all())


def magnitude_of(y: Tensor, ks: list[Tensor], weights: tuple[float, ...], dt: Tensor) -> Tensor:
    return y.abs().double() + dt.abs()[:, None] * sum(abs(w) * k.abs().double() for w, k in zip(weights, ks))


@pytest.mark.parametrize("size", [0, 1, 17, 4097, 70001])
def test_a_state_over_minus_another_is_its_twins(size, dtype, device):
    f, (g, *_), _ = operands(1, size, dtype, device)
    like = torch.empty(2, *f.shape, dtype=dtype, device=device)
    actual, expected = (ops.opposites(layout_for(ops, f, 1), like)(f, g) for ops in BACKENDS)
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("samples", "size"), SHAPES)
def test_a_stage_sum_is_its_twins(samples, size, dtype, device):
    y, ks, dt = operands(samples, size, dtype, device)
    actual, expected = (ops.stage_combine(layout_for(ops, y, samples), WEIGHTS, y, ks, dt) for ops in BACKENDS)
    assert_close(actual, expected, magnitude_of(y, ks, WEIGHTS, dt), terms=4)


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=14),
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from(tuple(ROUNDOFF)),
)
def test_a_stage_sum_is_its_twins_for_any_weights_and_sizes(weights, size, samples, dtype):
    y, ks, dt = operands(samples, size, dtype, "cpu", len(weights))
    weights = tuple(weights)
    actual, expected = (ops.stage_combine(layout_for(ops, y, samples), weights, y, ks, dt) for ops in BACKENDS)
    assert_close(actual, expected, magnitude_of(y, ks, weights, dt), terms=len(weights))


@pytest.mark.parametrize("samples", [1, 3])
def test_a_stage_sum_is_a_chain_of_fused_multiply_adds_in_table_order(samples, device):
    # Exact rational arithmetic, rounded once for every operation: Fraction to float is correctly rounded.
    y, ks, _ = operands(samples, 17, torch.float64, device)
    dt = steps_for(layout_for(native, y, samples), [0.1 / (b + 1) for b in range(samples)])
    actual = native.stage_combine(layout_for(native, y, samples), WEIGHTS, y, ks, dt)

    def one(b: int, i: int) -> float:
        total = None
        for w, k in zip(WEIGHTS, ks):
            if w:
                product = Fraction(w) * Fraction(float(k[b, i]))
                total = float(product + Fraction(total or 0.0))
        return float(Fraction(float(dt[b])) * Fraction(total) + Fraction(float(y[b, i])))

    expected = [[one(b, i) for i in range(17)] for b in range(samples)]
    assert torch.equal(actual.cpu(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__.rsplit(".")[-1])
@pytest.mark.parametrize(("samples", "size"), [(1, 300), (7, 5), (300, 3), (3, 9000)])
def test_a_derivative_of_weight_zero_is_not_read(ops, samples, size, dtype, device):
    y, ks, dt = operands(samples, size, dtype, device)
    layout = layout_for(ops, y, samples)
    clean = ops.stage_combine(layout, WEIGHTS, y, ks, dt)
    for unused, value in ((1, math.inf), (4, math.nan)):
        ks[unused] = torch.full_like(y, value)
    assert torch.equal(ops.stage_combine(layout, WEIGHTS, y, ks, dt), clean)
    assert torch.equal(ops.stage_combine(layout, (0.0, 0.0), y, ks, dt), y)


@pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__.rsplit(".")[-1])
@pytest.mark.parametrize("size", [1, 17, 64, 5000])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_with_step_zero_stands_still_whatever_its_derivative(ops, size, value, dtype, device):
    y, ks, dt = operands(7, size, dtype, device)
    others = torch.arange(7, device=device) != 3
    layout = layout_for(ops, y, 7)
    clean = ops.stage_combine(layout, WEIGHTS, y, ks, dt)
    for k in ks:
        k[3] = value
    out = ops.stage_combine(layout, WEIGHTS, y, ks, dt)
    assert torch.equal(out[3], y[3])
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize(("samples", "size"), [(2, 257), (7, 17), (300, 1), (300, 257)])
def test_together_equals_apart(samples, size, dtype, device):
    y, ks, dt = operands(samples, size, dtype, device)
    together = native.stage_combine(layout_for(native, y, samples), WEIGHTS, y, ks, dt)
    for b in {0, samples // 2, samples - 1}:
        row = slice(b, b + 1)
        apart = native.stage_combine(layout_for(native, y[row]), WEIGHTS, y[row], [k[row] for k in ks], dt[row])
        assert torch.equal(together[row], apart)


@pytest.mark.parametrize(("samples", "size"), [(1, 0), (1, 1), (1, 257), (7, 17), (300, 3), (1, 70001)])
def test_stage_vjp_is_its_twins(samples, size, dtype, device):
    g, _, dt = operands(samples, size, dtype, device)
    actual, expected = (ops.stage_vjp(layout_for(ops, g, samples), WEIGHTS, g, dt) for ops in BACKENDS)
    assert [a is None for a in actual] == [w == 0 for w in WEIGHTS] == [e is None for e in expected]
    for a, e in zip(actual, expected):
        if e is not None:
            assert_close(a, e, e.abs().double(), terms=2)


@pytest.mark.parametrize(("samples", "size"), [(1, 257), (7, 17)])
def test_stage_vjp_is_the_transpose_of_the_stage_sum(samples, size, device):
    for dtype in (torch.float64, torch.complex128):
        y, ks, dt = operands(samples, size, dtype, device)
        layout = layout_for(native, y, samples)
        g = numbers(samples, size, dtype=dtype, device=device, seed=99)
        moved = native.stage_combine(layout, WEIGHTS, torch.zeros_like(y), ks, dt)
        pulled = native.stage_vjp(layout, WEIGHTS, g, dt)
        there = torch.sum(g.conj() * moved)
        back = sum(torch.sum(p.conj() * k) for p, k in zip(pulled, ks) if p is not None)
        assert torch.allclose(there, back, rtol=1e-12, atol=1e-12)  # sums of 257 numbers in float64


@pytest.mark.parametrize("samples", [1, 2, 300])
def test_select_rows_takes_each_row_from_its_side(samples, dtype, device):
    moved, stayed = (numbers(samples, 5, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    accepted = (torch.arange(samples, device=device) % 3 == 0).to(torch.int64)
    for ops in BACKENDS:
        out = ops.select_rows(layout_for(ops, moved, samples), moved, stayed, accepted)
        assert torch.equal(out, torch.where(accepted.bool()[:, None], moved, stayed))


def interpolated(ops, y: Tensor, ks: list[Tensor], times: Tensor, dt: Tensor, name: str = "dopri5") -> Tensor:
    """The outputs of one accepted step of sizes dt from time 0, [T, B, D]."""
    tableau, samples = TABLEAUS[name], len(y)
    layout = layout_for(ops, y, samples)
    policy = Policy(float(tableau.order), max_step=float(dt.abs().max()))
    controller = controller_for(ops, layout, times, policy)
    controller.run(Phase.GIVEN_FIRST, float(dt[0]))
    none = torch.zeros_like(y)
    controller.error_norm((1.0,), none, none, [none], controller.dt, 0.0, 1.0)
    controller.run(Phase.JUDGE)
    out = torch.zeros(len(times), *y.shape, dtype=y.dtype, device=y.device)
    interpolant = ops.Interpolant(tableau.interpolant, tableau.end)
    ops.interpolate(layout, interpolant, controller, y, ks, out)
    return out


@pytest.mark.parametrize("name", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("samples", "size"), [(1, 1), (1, 257), (1, 20000), (3, 17), (300, 2)])
def test_dense_output_is_its_twins(name, sign, samples, size, device):
    dtype, n = torch.float64, len(TABLEAUS[name].interpolant)
    y, ks, _ = operands(samples, size, dtype, device, n)
    inner = torch.tensor([0.0, 0.01, 0.03, 0.0999, 0.1, 5.0], dtype=torch.float64)
    times = sign * (inner if samples == 1 else inner[:, None] * torch.linspace(1, 1.001, samples)[None].double())
    dt = torch.full((samples,), 0.1 * sign, dtype=torch.float64)
    actual, expected = (interpolated(ops, y, ks, times, dt, name) for ops in BACKENDS)
    largest = max(abs(c) for row in TABLEAUS[name].interpolant for c in row)  # cancels in each weight
    magnitude = y.abs() + 0.1 * 4 * largest * sum(k.abs() for k in ks)
    for i in range(1, 5):
        assert_close(actual[i], expected[i], magnitude, terms=n + 8)
    assert not actual[5].any()  # not passed, not written


def test_an_output_inside_a_step_does_not_depend_on_its_dtype_but_for_rounding(dtype, device):
    y, ks, _ = operands(1, 33, dtype, device, 7)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    times, dt = torch.tensor([0.0, 0.03, 0.07, 5.0], dtype=torch.float64), torch.full((1,), 0.1, dtype=torch.float64)
    actual = interpolated(native, y, ks, times, dt)
    exact = interpolated(reference, y.to(wide), [k.to(wide) for k in ks], times, dt)
    magnitude = y.abs().double() + 0.1 * 100 * sum(k.abs().double() for k in ks)
    for i in (1, 2):
        assert_close(actual[i], exact[i].to(dtype), magnitude, terms=15)


@pytest.mark.parametrize("name", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
@pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__.rsplit(".")[-1])
def test_the_output_at_a_steps_end_is_the_step_to_the_bit(ops, name, device):
    tableau = TABLEAUS[name]
    for samples in (1, 3):
        y, ks, _ = operands(samples, 37, torch.float32, device, len(tableau.interpolant))
        dt = torch.full((samples,), 0.1, dtype=torch.float64, device=device)
        out = interpolated(ops, y, ks, torch.tensor([0.0, 0.05, 0.1], dtype=torch.float64), dt, name)
        end = ops.stage_combine(layout_for(ops, y, samples), tableau.weights, y, ks, dt)
        assert torch.equal(out[2], end)
        assert not torch.equal(out[1], end)
