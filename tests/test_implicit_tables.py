"""The tables of implicit methods: order conditions, stability, observed order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from implicit_field import L_STABLE, METHODS, stability
from problems import tensor
from trees import Stages, decimal

import pyode
from pyode.methods import IMPLICIT, ImplicitTableau
from pyode.methods.tableau import exact


class ImplicitStages(Stages):
    """The elementary weights of a full matrix."""

    def __init__(self, tableau: ImplicitTableau) -> None:
        self.rows = [[decimal(x) for x in row] for row in tableau.a]
        self._cache = {(): [decimal(1)] * len(self.rows)}


@METHODS
def test_the_solution_has_exactly_the_order_that_is_claimed(method):
    tableau = IMPLICIT[method]
    stages, weights = ImplicitStages(tableau), [decimal(x) for x in tableau.b]
    for order in range(1, tableau.order + 1):
        assert stages.worst(weights, order) < decimal(1e-35), order  # roots have 40 digits
    assert stages.worst(weights, tableau.order + 1) > decimal(1e-6)


@METHODS
def test_all_are_a_stable_and_the_stiffly_accurate_ones_l_stable(method):
    grid = np.concatenate([-np.logspace(-3, 6, 50), 1j * np.logspace(-3, 6, 50)])
    assert np.abs(stability(method, grid)).max() <= 1 + 1e-9
    at_infinity = abs(stability(method, -1e7))
    if method in L_STABLE:
        assert at_infinity < 1e-6
        assert IMPLICIT[method].rows[-1] == IMPLICIT[method].weights
    else:
        assert at_infinity == pytest.approx(1, abs=1e-5)


@METHODS
def test_the_observed_order_is_the_tables(method):
    y0 = tensor(1.0, 0.5, 2.0)
    errors = []
    for n in (6, 12):
        y = pyode.odeint(lambda t, y: -2 * t * y * y, y0, tensor(0, 1.5), method=method, options={"step_size": 1.5 / n})
        errors.append(float((y[-1] - 1 / (1 / y0 + 1.5**2)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(IMPLICIT[method].order, abs=0.3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": (exact("1/2"), exact("1/2", "1/2"))},
        {"a": (exact("1/2", 0), exact("1/2", 0))},
        {"c": exact("1/3", 1)},
        {"b": exact("1/2", "1/3")},
    ],
    ids=["not square", "explicit in the middle", "abscissae", "weights"],
)
def test_an_inconsistent_table_is_refused(wrong):
    right = {"a": (exact("1/2", 0), exact("1/2", "1/2")), "b": exact("1/2", "1/2"), "c": exact("1/2", 1)}
    assert ImplicitTableau(name="mine", order=1, source="", **right).blocks == ((0,), (1,))
    with pytest.raises(ValueError, match="mine"):
        ImplicitTableau(name="mine", order=1, source="", **{**right, **wrong})
