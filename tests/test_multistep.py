"""Adams methods of fixed step size: their weights, their order, and torchdiffeq's results."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest
import torch
import torchdiffeq
from fields import Y0 as FIELD_Y0
from fields import Field, assert_close, loss_of
from problems import growth, tensor, van_der_pol
from torch import Tensor
from torch.autograd import gradcheck

import pyode
from pyode import InvalidValue, Stats
from pyode.methods.multistep import HIGHEST_ORDER, bashforth, moulton

METHODS = pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
Y0 = tensor(1.2, 0.3)
LOOSE = {"rtol": 1e-3, "atol": 1e-4}  # the functional iteration converges


class Counting:
    def __init__(self, f) -> None:
        self.f, self.times = f, []

    def __call__(self, t, y):
        self.times.append(float(t))
        return self.f(t, y)


class TestWeights:
    def test_known_ones(self):
        # Hairer, Norsett, Wanner I, III.1, (1.6) and (1.9).
        assert bashforth(1) == (1.0,)
        assert bashforth(4) == (55 / 24, -59 / 24, 37 / 24, -9 / 24)
        assert moulton(1) == (1.0,)
        assert moulton(2) == (0.5, 0.5)
        assert moulton(4) == (9 / 24, 19 / 24, -5 / 24, 1 / 24)
        assert moulton(5) == (251 / 720, 646 / 720, -264 / 720, 106 / 720, -19 / 720)

    @pytest.mark.parametrize("n", range(1, HIGHEST_ORDER + 1))
    @pytest.mark.parametrize(("weights", "newest"), [(bashforth, 0), (moulton, 1)])
    def test_polynomials_below_their_order_are_integrated_exactly(self, weights, newest, n):
        row = weights(n)
        assert len(row) == n
        size = float(sum(abs(w) * n ** (n - 1) for w in row))
        for power in range(n):
            integral = sum(Fraction(w) * Fraction(newest - j) ** power for j, w in enumerate(row))
            # The weights are rounded once.
            assert abs(float(integral - Fraction(1, power + 1))) <= 2**-52 * size
        following = sum(Fraction(w) * Fraction(newest - j) ** n for j, w in enumerate(row))
        assert abs(float(following - Fraction(1, n + 1))) > 1e-3

    @pytest.mark.parametrize("n", range(1, HIGHEST_ORDER + 1))
    def test_they_are_torchdiffeqs(self, n):
        from torchdiffeq._impl import fixed_adams

        if n > 1:  # its first has the divisor 11 for 11
            assert torch.allclose(tensor(*bashforth(n)), fixed_adams._BASHFORTH_DIVISOR[n], rtol=1e-15, atol=0)
            assert torch.allclose(tensor(*moulton(n)), fixed_adams._MOULTON_DIVISOR[n], rtol=1e-15, atol=0)


OPTIONS = {
    "nothing": {},
    "step_size": {"step_size": 0.03},
    "max_order 4": {"max_order": 4},
    "max_order 5": {"max_order": 5, "step_size": 0.03},
    "max_order 7": {"max_order": 7},
    "max_iters": {"max_iters": 2},
    "perturb": {"perturb": True, "step_size": 0.03},
    "cubic": {"interp": "cubic", "step_size": 0.031},
    "linear": {"interp": "linear", "step_size": 0.031},
    "grid": {"grid_constructor": lambda f, y, t: torch.linspace(float(t[0]), float(t[-1]), 30, dtype=torch.float64)},
}


def both(f, y0, t, **kwargs):
    """Results of both, and the times at which func was evaluated."""
    found = []
    for module in (pyode, torchdiffeq):
        func = Counting(f)
        found.append((module.odeint(func, y0, t, **kwargs), func.times))
    return found


@METHODS
@SIGNS
@pytest.mark.parametrize("name", OPTIONS)
def test_results_and_evaluations_are_torchdiffeqs(method, sign, name):
    t = sign * torch.linspace(0, 1, 24, dtype=torch.float64)
    options = OPTIONS[name]
    (ours, our_times), (theirs, their_times) = both(van_der_pol, Y0, t, method=method, options=options, **LOOSE)
    if name == "cubic":  # theirs evaluates a step's end again for every output, also for one that lies there
        assert len(our_times) < len(their_times)
    else:
        assert torch.allclose(tensor(*our_times), tensor(*their_times), rtol=1e-14, atol=1e-15)
    # Equal but for roundings, which the explicit method's instability at high order amplifies.
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@METHODS
@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-7])
def test_tolerances_decide_on_iterations_as_torchdiffeqs(method, rtol):
    t, counts = torch.linspace(0, 2, 30, dtype=torch.float64), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tolerance in (rtol, torch.full((2,), rtol, dtype=torch.float64)):
            (ours, a), (theirs, b) = both(van_der_pol, Y0, t, method=method, rtol=tolerance, atol=rtol / 10)
            assert len(a) == len(b)
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
            counts.append(len(a))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("wrong", [
    {"options": {}, "rtol": 1e-12, "atol": 1e-14}, {"options": {"max_iters": 1}, "rtol": 1e-6, "atol": 1e-6}
])  # fmt: skip
def test_an_iteration_that_does_not_converge_warns_and_lowers_the_order(wrong):
    found = []
    for module in (pyode, torchdiffeq):
        func = Counting(van_der_pol)
        with pytest.warns(UserWarning, match=r"Functional iteration did not converge\. Solution may be incorrect\."):
            y = module.odeint(func, Y0, torch.linspace(0, 1, 9, dtype=torch.float64), method="implicit_adams", **wrong)
        found.append((y, len(func.times)))
    assert found[0][1] == found[1][1]
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-11)


@METHODS
@pytest.mark.parametrize("max_order", [2, 3])
def test_below_order_4_they_are_rk4_and_say_so(method, max_order):
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    for module in (pyode, torchdiffeq):
        with pytest.warns(UserWarning, match="max_order is below 4, so the solver reduces to `rk4`"):
            y = module.odeint(van_der_pol, Y0, t, method=method, options={"max_order": max_order})
        assert torch.allclose(y, pyode.odeint(van_der_pol, Y0, t, method="rk4"), rtol=1e-14)


def test_an_implicit_method_may_be_made_explicit():
    t = torch.linspace(0, 1, 12, dtype=torch.float64)
    (ours, a), (theirs, b) = both(van_der_pol, Y0, t, method="implicit_adams", options={"implicit": False}, **LOOSE)
    assert torch.allclose(ours, theirs, rtol=1e-10)
    assert len(a) == len(b)
    with torch.no_grad():
        explicit = pyode.odeint(van_der_pol, Y0, t, method="explicit_adams", **LOOSE)
    assert torch.allclose(ours, explicit, rtol=1e-14)


def test_options_out_of_range():
    t = tensor(0.0, 1.0)
    for module in (pyode, torchdiffeq):
        with pytest.raises(AssertionError, match="max_order"):
            module.odeint(van_der_pol, Y0, t, method="implicit_adams", options={"max_order": 13})
    for option in ({"max_order": 0}, {"max_iters": 0}):
        with pytest.raises(InvalidValue, match=next(iter(option))):
            pyode.odeint(van_der_pol, Y0, t, method="implicit_adams", options=option)


@pytest.mark.parametrize(("method", "max_order", "order"), [
    ("explicit_adams", 4, 3), ("explicit_adams", 5, 4), ("implicit_adams", 4, 4), ("implicit_adams", 5, 5),
])  # fmt: skip
def test_the_observed_order(method, max_order, order):
    # max_order is the corrector's: the explicit method's is one less, as in torchdiffeq. Started by rk4, of order 4.
    errors = []
    for n in (40, 80):
        options = {"step_size": 2.5 / n, "max_order": max_order, "max_iters": 30}
        y = pyode.odeint(growth.f, growth.y0, tensor(0.0, 2.5), 1e-13, 1e-14, method, options)
        errors.append(float((y[-1] - growth.at(tensor(2.5))[0]).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order - 0.35


def test_a_polynomial_of_degree_below_the_order_is_exact():
    # y' = 11 t^10, from twelve derivatives on: the first steps, rk4's, are not.
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    for method, degree in (("explicit_adams", 10), ("implicit_adams", 11)):
        y = pyode.odeint(lambda t, y, d=degree: d * t ** (d - 1) + 0 * y, tensor(0.0), t, method=method)[:, 0]
        increments, exact = y[20:] - y[15], t[20:] ** degree - t[15] ** degree
        assert torch.allclose(increments, exact, rtol=0, atol=1e-12)


@METHODS
@pytest.mark.parametrize("options", [{}, {"step_size": 0.11, "interp": "cubic"}], ids=["on the grid", "between"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_the_finite_differences(method, options, backend):
    def solve(y0, rate, t):
        # A loose tolerance: one iteration, whatever the inputs.
        with pyode.backend(backend):
            return pyode.odeint(
                lambda t, y: rate * torch.sin(y) * (1 + t * t), y0, t, 1e6, 1e6, method=method, options=options
            )

    t = torch.linspace(0, 0.8, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (Y0, tensor(0.7), t)]
    if options:  # the grid from step_size ends at t[-1]; moving that changes the last step, as it does here
        assert gradcheck(lambda y0, rate: solve(y0, rate, t), inputs[:2], rtol=1e-6, atol=1e-8)
    else:
        assert gradcheck(solve, inputs, rtol=1e-6, atol=1e-8)


@METHODS
@SIGNS
def test_direct_gradients_are_torchdiffeqs(method, sign):
    found = []
    for module in (pyode, torchdiffeq):
        field, y0 = Field(), FIELD_Y0.clone().requires_grad_()
        t = (sign * torch.linspace(0, 1, 14, dtype=torch.float64)).requires_grad_()
        loss_of(module.odeint(field, y0, t, method=method, **LOOSE)).backward()
        found.append([y0.grad, t.grad, *(p.grad for p in field.trained())])
    assert_close(*found, 1e-9)


@METHODS
@SIGNS
@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("extra", [{}, {"adjoint_options": {"norm": "seminorm"}}, {"options": {"step_size": 0.02}}],
                         ids=str)  # fmt: skip
def test_adjoint_gradients_are_torchdiffeqs(method, sign, time, extra):
    found, calls = [], []
    for module in (pyode, torchdiffeq):
        field, y0 = Field(), FIELD_Y0.clone().requires_grad_()
        t = (sign * torch.linspace(0, 0.5, 4, dtype=torch.float64)).requires_grad_(time)
        loss_of(module.odeint_adjoint(field, y0, t, method=method, **LOOSE, **extra)).backward()
        found.append([y0.grad, *([t.grad] if time else []), *(p.grad for p in field.trained()), field.unused.grad])
        calls.append(field.calls)
    assert_close(*found, 1e-9)
    assert calls[0] == calls[1]


def test_the_adjoint_converges_to_the_direct_gradient():
    found = []
    for solve in (pyode.odeint, pyode.odeint_adjoint):
        field, y0 = Field(), FIELD_Y0.clone().requires_grad_()
        t = torch.linspace(0, 1, 3, dtype=torch.float64)
        loss_of(solve(field, y0, t, method="implicit_adams", options={"step_size": 0.01}, **LOOSE)).backward()
        found.append([y0.grad, *(p.grad for p in field.trained())])
    assert_close(*found, 1e-5)


@METHODS
@SIGNS
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_tuples(method, sign, interp):
    parts = (torch.tensor([[0.5, 0.2]], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))

    def func(t, y):
        return y[1] * torch.cos(y[0]), -y[0].sum() + torch.sin(t)

    t = sign * torch.linspace(0, 1, 7, dtype=torch.float64)
    for tolerances in (LOOSE, {"rtol": (1e-3, 1e-4), "atol": (1e-4, 1e-6)}):
        kwargs = {"method": method, "options": {"step_size": 0.05, "interp": interp}, **tolerances}
        (ours, a), (theirs, b) = both(func, parts, t, **kwargs)
        for x, y in zip(ours, theirs):
            assert torch.allclose(x, y, rtol=1e-10, atol=1e-10)
        assert len(a) == len(b) or interp == "cubic"


@METHODS
def test_complex_states(method):
    y0, t = torch.tensor([1 + 1j, 0.3 - 2j]), torch.linspace(0, 1, 21, dtype=torch.float64)
    y0 = y0.to(torch.complex128)
    y = pyode.odeint(lambda t, y: 1j * y, y0, t, method=method, options={"max_order": 5}, rtol=1e-6, atol=1e-6)
    exact = torch.exp(1j * t)[:, None] * y0
    assert torch.allclose(y, exact, rtol=1e-4)
    y0.requires_grad_()
    y = pyode.odeint(lambda t, y: 1j * y, y0, t, method=method, options={"max_order": 5}, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(y[-1].real.sum(), y0)
    assert torch.allclose(gradient, exact[-1].conj() / y0.detach().conj(), rtol=1e-4)


@METHODS
def test_in_float32_it_is_torchdiffeqs_to_rounding(method):
    t = torch.linspace(0, 1, 12)
    (ours, a), (theirs, b) = both(van_der_pol, Y0.float(), t, method=method, options={"max_order": 10}, **LOOSE)
    assert ours.dtype == torch.float32
    assert len(a) == len(b)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_in_float32_rounding_does_not_grow_by_default(method, dtype):
    t = torch.linspace(0, 4, 401)
    exact = torch.exp(1j * t.double())
    y0 = torch.tensor([1.0, 0.0]) if dtype == torch.float32 else torch.tensor([1.0 + 0j])

    def turn(t, y):
        return 1j * y if y.is_complex() else torch.stack([-y[1], y[0]])

    def error(**options) -> float:
        with torch.no_grad():
            y = pyode.odeint(turn, y0, t, rtol=1e-5, atol=1e-5, method=method, options=options)
        return float((y[:, 0].real - exact.real).abs().max())

    assert error() < 1e-4  # 400 steps, each of a few roundings, times what order 9 makes of them
    if method == "explicit_adams":  # order 11, torchdiffeq's default
        assert error(max_order=12) > 1


@METHODS
def test_both_backends_agree(method):
    t = torch.linspace(0, 1, 12, dtype=torch.float64)
    results = []
    for backend in ("auto", "reference"):
        with pyode.backend(backend), torch.no_grad():
            results.append(pyode.odeint(van_der_pol, Y0, t, method=method, **LOOSE))
    assert torch.allclose(*results, rtol=1e-12)


def test_the_number_of_iterations_is_the_same_for_a_state_of_many_numbers():
    # Convergence is judged by the largest number, not their mean: one slow one among many.
    y0 = torch.zeros(1000, dtype=torch.float64)
    y0[17] = 2.0
    t = torch.linspace(0, 1, 12, dtype=torch.float64)
    (ours, a), (theirs, b) = both(lambda t, y: torch.sin(3 * y), y0, t, method="implicit_adams", rtol=1e-3, atol=1e-5)
    assert len(a) == len(b)
    assert torch.allclose(ours, theirs, rtol=1e-12)


@METHODS
def test_counts(method):
    stats, func = Stats(), Counting(van_der_pol)
    pyode.odeint(func, Y0, torch.linspace(0, 1, 12, dtype=torch.float64), method=method, options={"stats": stats},
                 **LOOSE)  # fmt: skip
    assert stats.n_f_evals == len(func.times)
    assert (stats.n_accepted, stats.n_rejected) == (11, 0)
    if method == "explicit_adams":
        # Two steps of rk4, then one evaluation a step.
        assert stats.n_f_evals == 2 * 4 + 9


def test_a_func_that_returns_the_same_tensor_again_and_again():
    # Derivatives are kept from step to step: they must not be overwritten.
    out = torch.empty_like(Y0)

    def func(t, y):
        return torch.mul(y, -1.0, out=out)

    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    for method in ("explicit_adams", "implicit_adams"):
        with torch.no_grad():
            y = pyode.odeint(func, Y0, t, method=method, options={"max_order": 5}, **LOOSE)
        assert torch.allclose(y, torch.exp(-t)[:, None] * Y0, rtol=1e-5)


def test_steps_of_different_sizes_are_taken_as_torchdiffeq_takes_them():
    # The weights are those of equal steps; a grid that is not is the user's business, in both.
    t: Tensor = tensor(0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.9)
    (ours, _), (theirs, _) = both(van_der_pol, Y0, t, method="explicit_adams")
    assert torch.allclose(ours, theirs, rtol=1e-12)
