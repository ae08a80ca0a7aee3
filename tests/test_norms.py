"""The scaled error norm: against its twin and against its definition; segments, tolerances, nan and inf."""

from __future__ import annotations

import itertools
import math

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
    norm_for,
    numbers,
    operands,
)
from hypothesis import given
from torch import Tensor

from pyode._ops import native
from pyode._ops.contract import Phase

SHAPES = [
    *((1, size) for size in (0, 1, 3, 15, 16, 17, 255, 257, 4095, 4097, 70001)),
    (2, 17), (2, 35001), (7, 0), (7, 1), (7, 63), (300, 1), (300, 3),
]  # fmt: skip
RTOL, ATOL = 1e-2, 1e-3
NAMES = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__.rsplit(".")[-1])


def definition(weights, y0, y1, ks, dt, rtol, atol) -> Tensor:
    """The root mean square of |dt sum_j w_j k_j| / (atol + rtol max(|y0|, |y1|)), in float64, [B]."""
    wide = torch.complex128 if y0.is_complex() else torch.float64
    error = dt[:, None] * sum(w * k.to(wide) for w, k in zip(weights, ks) if w)
    ratio = error.abs() / (atol + rtol * torch.maximum(y0.to(wide).abs(), y1.to(wide).abs()))
    return ratio.square().mean(1).sqrt()


def allowed(y0: Tensor, ks: list[Tensor], dt: Tensor, atol: float) -> float:
    """Every ratio is right to some roundings of the largest term of its error, before cancellation."""
    if not y0.numel():
        return 0.0
    largest = float(dt.abs().max()) * sum(abs(w) * float(k.abs().max()) for w, k in zip(WEIGHTS, ks))
    return 20 * arithmetic_roundoff(y0.dtype) * largest / atol


@NAMES
@pytest.mark.parametrize(("samples", "size"), SHAPES)
def test_a_norm_is_what_its_definition_says(ops, samples, size, dtype, device):
    y0, ks, dt = operands(samples, size, dtype, device)
    y1 = numbers(samples, size, dtype=dtype, device=device, seed=50)
    actual = norm_for(ops, layout_for(ops, y0, samples), WEIGHTS, y0, y1, ks, dt, RTOL, ATOL)
    expected = definition(WEIGHTS, y0, y1, ks, dt, RTOL, ATOL).cpu() if size else torch.zeros(samples)
    assert actual.dtype == torch.float64
    assert torch.allclose(actual, expected.double(), rtol=0, atol=allowed(y0, ks, dt, ATOL))


@given(st.integers(0, 60), st.integers(1, 5), st.sampled_from(tuple(ROUNDOFF)), st.floats(0, 0.5), st.floats(1e-3, 1))
def test_a_norm_is_its_twins_for_any_size_and_tolerance(size, samples, dtype, rtol, atol):
    y0, ks, dt = operands(samples, size, dtype, "cpu")
    y1 = numbers(samples, size, dtype=dtype, seed=50)
    actual, expected = (
        norm_for(ops, layout_for(ops, y0, samples), WEIGHTS, y0, y1, ks, dt, rtol, atol) for ops in BACKENDS
    )
    assert torch.allclose(actual, expected.double(), rtol=0, atol=allowed(y0, ks, dt, atol))


@NAMES
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("segments", [(0, 5, 5, 20, 33), (0, 0, 33), (0, 16, 33, 33), (0, 1, 2, 33)])
def test_the_norm_is_the_largest_of_its_segments(ops, samples, segments, dtype, device):
    y0, ks, dt = operands(samples, 33, dtype, device)
    y1 = numbers(samples, 33, dtype=dtype, device=device, seed=50)
    layout = layout_for(ops, y0, samples, segments)
    whole = norm_for(ops, layout, WEIGHTS, y0, y1, ks, dt, RTOL, ATOL)
    parts = [
        definition(WEIGHTS, y0[:, a:b], y1[:, a:b], [k[:, a:b] for k in ks], dt, RTOL, ATOL).cpu()
        for a, b in itertools.pairwise(segments)
        if b > a
    ]
    assert torch.allclose(whole, torch.stack(parts).amax(0), rtol=0, atol=allowed(y0, ks, dt, ATOL))


@NAMES
@pytest.mark.parametrize("which", ["rtol", "atol", "both"])
def test_a_tolerance_for_every_number(ops, which, dtype, device):
    y0, ks, dt = operands(1, 300, dtype, device)
    y1 = numbers(1, 300, dtype=dtype, device=device, seed=50)
    each = {
        "rtol": torch.linspace(0.01, 0.1, 300, dtype=torch.float64, device=device),
        "atol": torch.logspace(-3, 0, 300, dtype=torch.float64, device=device),
    }
    rtol, atol = (each[name] if which in (name, "both") else value for name, value in (("rtol", RTOL), ("atol", ATOL)))
    expected = definition(WEIGHTS, y0, y1, ks, dt, rtol, atol).cpu()

    def as_the_op_takes_it(tolerance):  # for complex states once for each half of a number
        if isinstance(tolerance, Tensor) and dtype.is_complex:
            return tolerance.unsqueeze(-1).expand(300, 2).contiguous()
        return tolerance

    layout = layout_for(ops, y0)
    actual = norm_for(ops, layout, WEIGHTS, y0, y1, ks, dt, as_the_op_takes_it(rtol), as_the_op_takes_it(atol))
    assert torch.allclose(actual, expected, rtol=0, atol=allowed(y0, ks, dt, ATOL))


@NAMES
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [1, 257, 9000])
def test_a_nan_or_inf_in_a_derivative_reaches_the_norm_of_its_sample_only(ops, value, size, dtype, device):
    for place in {0, size // 2, size - 1}:
        y0, ks, dt = operands(3, size, dtype, device)
        dt[:] = 0.1
        layout = layout_for(ops, y0, 3)
        clean = norm_for(ops, layout, WEIGHTS, y0, y0, ks, dt, RTOL, ATOL)
        ks[2][1, place] = value
        norm = norm_for(ops, layout, WEIGHTS, y0, y0, ks, dt, RTOL, ATOL)
        assert not math.isfinite(norm[1])
        assert torch.equal(norm[[0, 2]], clean[[0, 2]])


@NAMES
def test_a_nan_in_one_segment_outweighs_every_other(ops, device):
    for segment in range(3):
        y0 = torch.zeros(1, 6, device=device, dtype=torch.float64)
        k = torch.tensor([[1e3, 1.0, 1.0, 1.0, 1.0, 1e3]], device=device, dtype=torch.float64)
        k[0, 2 * segment] = math.nan
        layout, one = layout_for(ops, y0, 1, (0, 2, 4, 6)), torch.ones(1, dtype=torch.float64, device=device)
        assert norm_for(ops, layout, (1.0,), y0, y0, [k], one, 0.0, 1.0).isnan().all()


@NAMES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_unused_derivative_has_no_part_in_the_norm(ops, value, dtype, device):
    y0, ks, dt = operands(2, 17, dtype, device)
    layout = layout_for(ops, y0, 2)
    clean = norm_for(ops, layout, WEIGHTS, y0, y0, ks, dt, RTOL, ATOL)
    ks[1], ks[4] = torch.full_like(y0, value), torch.full_like(y0, value)
    assert torch.equal(norm_for(ops, layout, WEIGHTS, y0, y0, ks, dt, RTOL, ATOL), clean)


@NAMES
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("error", [0.0, 1.0])
def test_a_state_that_has_become_inf_or_nan_is_no_acceptable_one(ops, value, error, device):
    # error / (atol + rtol inf) would be 0, and the step accepted.
    y0 = torch.ones(1, 5, device=device)
    y1, k = y0.clone(), torch.full_like(y0, error)
    y1[0, 3] = value
    one = torch.ones(1, dtype=torch.float64, device=device)
    assert not norm_for(ops, layout_for(ops, y0), (1.0,), y0, y1, [k], one, RTOL, ATOL).isfinite().any()


@NAMES
def test_no_error_is_within_any_tolerance(ops, device):
    y = torch.zeros(1, 3, device=device)
    one = torch.ones(1, dtype=torch.float64, device=device)
    assert norm_for(ops, layout_for(ops, y), (1.0,), y, y, [y], one, 0.0, 0.0) == 0
    k = torch.tensor([[0.0, 0.0, 1e-30]], device=device)
    assert norm_for(ops, layout_for(ops, y), (1.0,), y, y, [k], one, 0.0, 0.0) == math.inf


@pytest.mark.parametrize(("scale", "dtype"), [(1e30, torch.float32), (1e-30, torch.float32), (1e150, torch.float64)])
def test_squares_neither_overflow_nor_vanish(scale, dtype, device):
    y = torch.zeros(1, 100, dtype=dtype, device=device)
    k = scale * numbers(1, 100, dtype=dtype, device=device)
    one = torch.ones(1, dtype=torch.float64, device=device)
    actual = norm_for(native, layout_for(native, y), (1.0,), y, y, [k], one, 0.0, 1.0)
    assert torch.allclose(actual, k.double().cpu().square().mean().sqrt(), rtol=1e-6)  # k and the error are float32


@NAMES
def test_further_quantities_have_a_share_in_the_norm(ops, device):
    state, more = torch.zeros(1, 4, dtype=torch.float64, device=device), torch.zeros(3, device=device)
    layouts = [layout_for(ops, state), layout_for(ops, more)]
    for shares, expected in (((2.0, 3.0), 3.0), ((5.0, 3.0), 5.0)):
        controller = ops.Controller(layouts, *_policy_and_grid(device), (1.0,))
        one = torch.ones(1, dtype=torch.float64, device=device)
        for slot, (layout, y, share) in enumerate(zip(layouts, (state, more), shares)):
            controller.error_norm((share,), y, y, [torch.ones_like(y)], one, 0.0, 1.0, 2 + slot, layout)
        controller.run(Phase.TRY_FIRST)
        assert float(controller.field("slope")) == pytest.approx(expected, rel=1e-15)


def _policy_and_grid(device):
    from pyode._ops.contract import Grid, Policy

    return Policy(5.0), Grid(torch.tensor([0.0, 1.0], dtype=torch.float64, device=device))


@NAMES
def test_a_norm_that_someone_else_has_computed_counts_as_it_is(ops, device):
    y = torch.zeros(1, 4, device=device)
    for value in (0.25, 1.0, 1e200, math.inf, math.nan):
        for given_as in (float, torch.tensor):
            controller = controller_for(ops, layout_for(ops, y), (0.0, 1.0))
            controller.put_norm(given_as(value) if given_as is float else torch.tensor(value, dtype=torch.float64), 1)
            controller.run(Phase.TRY_FIRST)
            slope = float(controller.field("slope"))
            # Squares of numbers above 1e154 overflow: infinitely wrong is as wrong.
            assert slope == value or math.isnan(value) or (value > 1e154 and slope == math.inf)
            assert math.isnan(slope) == math.isnan(value)
