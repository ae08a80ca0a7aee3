"""Every registered table: its order conditions, its observed order, its dense output."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from itertools import zip_longest

import pytest
from problems import growth, rigid_body, tensor
from trees import Stages, decimal, trees

import pyode
from pyode import methods
from pyode.methods import TABLEAUS, Tableau
from pyode.methods.tableau import exact

ALL = pytest.mark.parametrize("name", TABLEAUS)
ADAPTIVE = pytest.mark.parametrize("name", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])

# Published as rational approximations to 18 digits, or decimals of 16 to 40; all others are exact rationals.
APPROXIMATE = {"dopri8": Decimal("1e-15"), "tsit5": Decimal("1e-15")}
EXACT = Decimal("1e-50")  # the conditions are evaluated with 60 digits
VIOLATED = Decimal("1e-6")  # a condition of a higher order is missed by far more than any rounding

# Of the solution between a step's ends. bosh3's quartic is torchdiffeq's, whose middle is f at the middle times half a
# step from the start; a better one would not agree with torchdiffeq's results.
DENSE_ORDER = {
    "dopri8": 4, "dopri5": 4, "tsit5": 4, "bosh3": 1, "fehlberg2": 2, "adaptive_heun": 2,
    "euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 3,
}  # fmt: skip


def difference(p: tuple[Fraction, ...], q: tuple[Fraction, ...]) -> list[Decimal]:
    return [decimal(x - y) for x, y in zip_longest(p, q, fillvalue=Fraction(0))]


def test_there_are_as_many_rooted_trees_as_the_literature_has():
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]  # Hairer I, table II.2.1


@ALL
def test_the_solution_has_exactly_the_order_that_is_claimed(name):
    tableau, stages = TABLEAUS[name], Stages(TABLEAUS[name])
    weights = [decimal(x) for x in tableau.b]
    for order in range(1, tableau.order + 1):
        assert stages.worst(weights, order) <= APPROXIMATE.get(name, EXACT), order
    assert stages.worst(weights, tableau.order + 1) > VIOLATED


@ADAPTIVE
def test_the_embedded_solution_is_one_order_lower(name):
    tableau, stages = TABLEAUS[name], Stages(TABLEAUS[name])
    weights = difference(tableau.b, tableau.error)
    for order in range(1, tableau.order):
        assert stages.worst(weights, order) <= APPROXIMATE.get(name, EXACT), order
    assert stages.worst(weights, tableau.order) > VIOLATED


@ALL
def test_dense_output_has_its_order(name):
    stages = Stages(TABLEAUS[name])
    coefficients = [[decimal(x) for x in row] for row in TABLEAUS[name].interpolant]
    order = 1
    # Coefficients are float64 numbers of size up to 100, tsit5's are published with 16 digits.
    while stages.worst_dense(coefficients, order) < Decimal("1e-13"):
        order += 1
    assert order - 1 == DENSE_ORDER[name]


@ALL
def test_dense_output_meets_both_ends_with_their_slopes(name):
    tableau = TABLEAUS[name]
    slope_at_start = [row[0] for row in tableau.interpolant]
    slope_at_end = [sum((p + 1) * c for p, c in enumerate(row)) for row in tableau.interpolant]
    n = len(tableau.interpolant)
    rounding = 1e-12  # of sums of numbers up to 100; tsit5's are published with 16 digits
    assert slope_at_start == pytest.approx([1.0] + [0.0] * (n - 1), abs=rounding)
    assert slope_at_end == pytest.approx([0.0] * (n - 1) + [1.0], abs=rounding)
    assert [sum(row) for row in tableau.interpolant] == pytest.approx(tableau.end, abs=rounding)
    assert tableau.end[: len(tableau.weights)] == tableau.weights
    assert not any(tableau.end[len(tableau.weights) :])


@ALL
def test_rows_sum_to_the_abscissae(name):
    tableau = TABLEAUS[name]
    for row, c in zip(tableau.a, tableau.c):
        assert abs(sum(row) - c) < Fraction(1, 10**15)
    assert len(tableau.rows) == len(tableau.abscissae)
    assert all(sum(row) == pytest.approx(c, abs=1e-12) for row, c in zip(tableau.rows, tableau.abscissae))


@ADAPTIVE
def test_the_last_evaluation_of_a_step_is_at_its_end(name):
    tableau = TABLEAUS[name]
    assert tableau.rows[-1] == tableau.weights  # to the bit: its input is y1 itself
    assert tableau.abscissae[-1] == 1.0
    assert len(tableau.error_weights) <= len(tableau.rows) + 1
    assert len(tableau.interpolant) == len(tableau.rows) + 1


def test_first_same_as_last_is_derived():
    derived = {name: tableau.first_same_as_last for name, tableau in TABLEAUS.items() if tableau.adaptive}
    assert derived == {
        "dopri8": True, "dopri5": True, "tsit5": True, "bosh3": True, "fehlberg2": False, "adaptive_heun": False,
    }  # fmt: skip


@ADAPTIVE
def test_a_step_costs_its_evaluations_and_no_more(name):
    tableau, seen = TABLEAUS[name], []

    def f(t, y):
        seen.append(float(t))
        return -y

    pyode.odeint(f, tensor(1.0), tensor(0.0, 4.0), method=name, options=forced(1.0))
    assert len(seen) == 1 + 4 * len(tableau.rows)  # f(t0, y0) and then f(t1, y1) serves the next step


def test_dopri5s_error_weights_are_two_thirds_of_dormand_and_princes():
    own = exact("71/57600", 0, "-71/16695", "71/1920", "-17253/339200", "22/525", "-1/40")  # SciPy's, negated
    ratios = {e / -d if d else None for e, d in zip(TABLEAUS["dopri5"].error, own)}
    assert ratios - {None} == {Fraction(-2, 3)} or ratios - {None} == {Fraction(2, 3)}


def forced(size: float) -> dict[str, float]:
    """Options with which every step is accepted and of this size."""
    return {"first_step": size, "min_step": size, "max_step": size}


def errors(name: str, problem, steps: list[int]) -> list[float]:
    """At the end of the interval, with so many steps of one size."""
    found = []
    for n in steps:
        if TABLEAUS[name].adaptive:
            t, options = problem.times(2), forced((problem.t1 - problem.t0) / n)
        else:
            t, options = problem.times(n + 1), {}
        y = pyode.odeint(problem.f, problem.y0, t, method=name, options=options)[-1]
        found.append(float((y - problem.solution(problem.t1)).abs().max()))
    return found


# Steps small enough for the leading error term to rule, large enough for the error to stay 100 times above rounding.
STEPS = {1: 512, 2: 128, 3: 128, 4: 128, 5: 32, 8: 8}


@ALL
@pytest.mark.parametrize("problem", [growth, rigid_body], ids=lambda problem: problem.name)
def test_the_observed_order_is_the_tableaus(name, problem):
    order = TABLEAUS[name].order
    n = STEPS[order]
    ladder = errors(name, problem, [n, 2 * n, 4 * n])
    assert math.log2(ladder[0] / ladder[-1]) / 2 == pytest.approx(order, abs=0.3), ladder


@ADAPTIVE
def test_the_error_estimate_shrinks_as_the_local_error_of_the_embedded_solution(name):
    tableau, estimates = TABLEAUS[name], []
    for size in (0.2, 0.1, 0.05):
        ks = [rigid_body.f(tensor(0.0), rigid_body.y0)]
        for row in tableau.rows:
            ks.append(rigid_body.f(tensor(0.0), rigid_body.y0 + size * sum(w * k for w, k in zip(row, ks))))
        estimates.append(float((size * sum(w * k for w, k in zip(tableau.error_weights, ks))).norm()))
    assert math.log2(estimates[0] / estimates[-1]) / 2 == pytest.approx(tableau.order, abs=0.3)


def test_no_method_is_the_default_one():
    assert methods.find(None) is TABLEAUS["dopri5"]


@pytest.mark.parametrize(("wrong", "right"), [("dopri", "dopri"), ("tsit", "tsit5"), ("adaptiv_heun", "adaptive_heun")])
def test_an_unknown_method_is_told_the_closest_name(wrong, right):
    with pytest.raises(ValueError, match=f"did you mean '{right}") as error:
        methods.find(wrong)
    assert all(name in str(error.value) for name in TABLEAUS)


def test_an_inconsistent_table_is_refused():
    def table(**wrong):
        right = {"a": (exact("1/2"),), "b": exact(0, 1), "c": exact("1/2"), "error": None}
        return Tableau(name="mine", order=2, source="", **{**right, **wrong})

    assert table().order == 2
    for wrong in (
        {"a": (exact("1/2", 0),)},
        {"a": ()},
        {"c": exact("1/3")},
        {"b": exact("1/2", "1/3")},
        {"error": exact(1, 0)},
    ):
        with pytest.raises(ValueError, match="mine"):
            table(**wrong)


@ADAPTIVE
def test_outputs_inside_a_step_have_the_order_of_dense_output(name):
    # Both ends of a single step are y0 and y1, so only the interpolant is seen: its error shrinks as h^(order + 1).
    order = DENSE_ORDER[name]
    found = []
    for size in (0.2, 0.1, 0.05):
        t = growth.t0 + size * tensor(0.0, 0.3, 0.7, 1.0)
        y = pyode.odeint(growth.f, growth.y0, t, method=name, options=forced(size))
        found.append(float((y - growth.at(t))[1:3].abs().max()))
    assert math.log2(found[0] / found[-1]) / 2 >= order + 1 - 0.3, found
