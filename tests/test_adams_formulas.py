"""The formulas of the variable-coefficient Adams method: orders, constants, dense output."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import growth, tensor

from pyode.methods import METHODS
from pyode.methods.adams import GAMMA
from pyode.methods.multistep import bashforth, moulton

ADAMS = METHODS["adams"]
ORDERS = range(1, ADAMS.max_order + 1)


@st.composite
def unequal_steps(draw) -> tuple[int, tuple[float, ...]]:
    """An order, and as many ratios of step sizes as the next higher order needs; by up to 2 from step to step."""
    order = draw(st.integers(1, 8))
    factors = draw(st.lists(st.floats(0.5, 2.0), min_size=order, max_size=order))
    return order, tuple(float(r) for r in np.cumprod(factors))


def positions(ratios: tuple[float, ...]) -> np.ndarray:
    """Of the steps' ends, the latest first: this one's at 1, its start at 0."""
    return np.array([1.0, 0.0, *-np.cumsum(ratios)])


def power(s: np.ndarray, j: int, weights: tuple[float, ...], scale: float = 1.0) -> tuple[float, float]:
    """The weighted sum of s^j over the first of some positions, and the size of its rounding error."""
    terms = np.array(weights) * s[: len(weights)] ** j
    return float(terms.sum()), 1e-13 * float(np.abs(terms).sum()) + 1e-13 * scale


class TestFormulas:
    @pytest.mark.parametrize("order", ORDERS)
    def test_with_equal_steps_they_are_bashforths_and_moultons(self, order):
        formulas = ADAMS.formulas((1.0,) * (order - 1), order)
        assert formulas.predictor == pytest.approx(bashforth(order), rel=1e-9)
        assert formulas.corrector == pytest.approx(moulton(order + 1), rel=1e-9)
        assert formulas.constant == pytest.approx(1.0, rel=1e-9)

    @given(unequal_steps())
    def test_with_unequal_steps_they_integrate_polynomials_of_their_order(self, steps):
        order, ratios = steps
        formulas, s = ADAMS.formulas(ratios[: order - 1], order), positions(ratios)
        for j in range(order + 1):
            for weights, at, degree in ((formulas.predictor, s[1:], order - 1), (formulas.corrector, s, order)):
                value, rounding = power(at, j, weights)
                assert (abs(value - 1 / (j + 1)) < rounding) == (j <= degree)

    @given(unequal_steps())
    def test_the_error_estimates_are_those_of_equal_steps_for_each_order(self, steps):
        order, ratios = steps
        formulas, s = ADAMS.formulas(ratios, order), positions(ratios)
        estimates = {order + 1: formulas.higher, order: tuple(formulas.constant * w for w in formulas.error)}
        estimates |= dict(zip((order - 1, order - 2), formulas.lower))
        assert set(estimates) == {j for j in range(order - 2, order + 2) if j > 0}
        for k, weights in estimates.items():
            # gamma* h f^(k) of Moulton's method, for f = s^k; of lower powers nothing is left.
            for j in range(k + 1):
                value, rounding = power(s, j, weights)
                assert abs(value) == pytest.approx(GAMMA[k] * math.factorial(k) if j == k else 0, abs=10 * rounding)

    @given(unequal_steps(), st.floats(0, 1))
    def test_dense_output_integrates_polynomials_and_meets_both_ends(self, steps, x):
        order, ratios = steps
        formulas, s = ADAMS.formulas(ratios, order), positions(ratios)
        s = np.array([1.0, *s])  # f at the step's end, as predicted there, and before
        for j in range(order + 1):
            value, rounding = power(s, j, formulas.dense(x))
            assert value == pytest.approx(x ** (j + 1) / (j + 1), abs=rounding)
        assert formulas.dense(1.0) == (0.0, *formulas.corrector)
        assert formulas.dense(0.0) == (0.0,) * (order + 2)
        assert formulas.dense_at(torch.tensor(x, dtype=torch.float64)).tolist() == pytest.approx(
            formulas.dense(x), abs=1e-12 * max(map(abs, formulas.corrector))
        )

    @given(unequal_steps())
    def test_dense_output_has_fs_slope_at_both_ends(self, steps):
        order, ratios = steps
        x = tensor(1.0, 0.0)
        slopes = torch.autograd.functional.jacobian(ADAMS.formulas(ratios, order).dense_at, x).diagonal(0, 0, 2)
        expected = torch.zeros(order + 2, 2, dtype=torch.float64)
        expected[0, 0] = expected[2, 1] = 1.0
        assert torch.allclose(slopes, expected, atol=1e-9)

    def test_the_error_constants_are_the_literatures(self):
        # Hairer, Norsett, Wanner I, section III.1
        assert GAMMA[:7] == pytest.approx((1, 1 / 2, 1 / 12, 1 / 24, 19 / 720, 3 / 160, 863 / 60480), rel=1e-15)

    @pytest.mark.parametrize("order", [1, 2, 3, 4, 6, 8])
    def test_predict_evaluate_correct_evaluate_has_one_order_more_than_its_predictor(self, order):
        def error(n: int) -> float:
            times = np.linspace(0, growth.t1, n + 1)
            ys = [float(growth.solution(t)) for t in times[:order]]  # exact to begin with
            fs = [y * math.cos(t) for t, y in zip(times, ys)][::-1]
            y, h, worst, formulas = ys[-1], times[1], 0.0, ADAMS.formulas((1.0,) * (order - 1), order)
            for t in times[order - 1 : -1]:
                f = math.cos(t + h) * (y + h * np.dot(formulas.predictor, fs[:order]))
                y += h * np.dot(formulas.corrector, [f, *fs[:order]])
                fs.insert(0, y * math.cos(t + h))
                worst = max(worst, abs(y - float(growth.solution(t + h))))
            return worst

        n = {6: 64, 8: 48}.get(order, 128)  # the error of 2 n steps is far above rounding
        assert math.log2(error(n) / error(2 * n)) == pytest.approx(order + 1, abs=0.3)
