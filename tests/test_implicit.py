"""Implicit Runge-Kutta methods: tables, stage equations with factors and with GMRES, gradients, the adjoint."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import torch
from implicit_field import L_STABLE, METHODS, Y0, A, f, stability, uneven
from problems import tensor
from torch import Tensor, nn

import pyode
from pyode import SolveError, Stats, Status
from pyode.methods import IMPLICIT

# ---- linear problems, whose steps are known in closed form ----


class Heat:
    """u' = u_xx on (0, 1), zero at both ends, by central differences; its steps by sine transforms."""

    def __init__(self, n: int) -> None:
        self.n = n
        x = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
        self.y0 = torch.exp(-200 * (x - 0.4) ** 2)
        self.rates = -4 * (n + 1) ** 2 * np.sin(np.pi * np.arange(1, n + 1) / (2 * (n + 1))) ** 2

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        padded = nn.functional.pad(y, (1, 1))
        return (padded[2:] - 2 * y + padded[:-2]) * (self.n + 1) ** 2

    def steps(self, method: str, dt: float, steps: int) -> Tensor:
        modes = scipy.fft.dst(self.y0.numpy(), type=1) * stability(method, dt * self.rates).real ** steps
        return torch.tensor(scipy.fft.idst(modes, type=1))


@METHODS
@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_a_step_of_the_heat_equation_is_the_stability_function(method, n, by):
    heat, dt = Heat(n), 100 / (n + 1) ** 2  # 400 times the fastest rate
    y = pyode.odeint(heat, heat.y0, dt * tensor(0, 1, 2, 3), method=method)
    assert float((y[-1] - heat.steps(method, dt, 3)).abs().max()) < 1e-9 * float(heat.y0.max())


@pytest.mark.parametrize("n", [300, 1000])
def test_larger_states_too(n, by):
    heat, dt = Heat(n), 100 / (n + 1) ** 2
    y = pyode.odeint(heat, heat.y0, dt * tensor(0, 1), method="sdirk2")
    assert float((y[-1] - heat.steps("sdirk2", dt, 1)).abs().max()) < 1e-9 * float(heat.y0.max())


@pytest.mark.parametrize("gradients", [False, True])
def test_trbdf2_steps_the_heat_equation_with_100_000_unknowns(gradients):
    heat, dt, stats = Heat(100_000), 1e-8, Stats()  # 200 times what an explicit method bears
    y0 = heat.y0.clone().requires_grad_(gradients)
    y = pyode.odeint(heat, y0, dt * tensor(0, 1, 2), method="trbdf2", options={"stats": stats})
    exact = heat.steps("trbdf2", dt, 2)
    assert float((y[-1].detach() - exact).abs().max()) < 1e-9
    assert 0 < stats.n_krylov / stats.n_accepted < 60
    if gradients:  # by the steps' transpose, which for a symmetric matrix are the steps
        (gradient,) = torch.autograd.grad((heat.y0 * y[-1]).sum(), y0)
        assert float((gradient - exact).abs().max()) < 1e-9


@METHODS
@pytest.mark.parametrize("sign", [1, -1])
def test_complex_states_turn_by_the_stability_function(method, sign, by):
    rate, dt = complex(-0.3, 5.0), sign * 0.2
    y = pyode.odeint(
        lambda t, y: rate * y, torch.tensor([1 + 2j, -1j]).to(torch.complex128), dt * tensor(0, 1, 2), method=method
    )
    assert np.allclose(y[-1], np.array([1 + 2j, -1j]) * stability(method, rate * dt) ** 2, rtol=1e-10)


# ---- stiff problems ----


@pytest.mark.parametrize("method", L_STABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l_stable_methods_forget_a_start_far_from_the_slow_solution(method, dtype, by):
    y = pyode.odeint(
        lambda t, y: -1000 * (y - torch.cos(t)),
        torch.zeros(1, dtype=dtype),
        tensor(0.0, 2.0),
        method=method,
        options={"step_size": 0.1},
    )
    assert abs(float(y[-1]) - math.cos(2)) < 1e-3


def robertson(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    slow, middle, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([middle - slow, slow - middle - fast, fast], -1)


@cache
def robertson_at_40() -> np.ndarray:
    def rhs(t, y):
        return robertson(None, torch.from_numpy(y)).numpy()

    return scipy.integrate.solve_ivp(rhs, (0, 40), [1.0, 0, 0], method="Radau", rtol=1e-10, atol=1e-14).y[:, -1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [20, 40])
def test_radau_solves_robertsons_problem_on_a_geometric_grid(dtype, steps, by):
    t = torch.cat([torch.zeros(1), torch.from_numpy(np.geomspace(1e-6, 40, steps))])
    with torch.no_grad():
        y = pyode.odeint(robertson, torch.tensor([1.0, 0, 0], dtype=dtype), t, method="radauIIA5")
    assert np.abs(y[-1].numpy() / robertson_at_40() - 1).max() < 1e-4


@METHODS
def test_newton_is_damped_where_full_steps_lead_away(method, by):
    # From 3 the first corrections overshoot by e^9.
    y = pyode.odeint(lambda t, y: -torch.exp(3 * y), tensor(3.0), tensor(0, 0.25), method=method)
    theirs = pyode.odeint(
        lambda t, y: -torch.exp(3 * y), tensor(3.0), tensor(0, 0.25), method=method, options={"newton_tol": 1e-14}
    )
    assert torch.allclose(y, theirs, rtol=1e-10)


# ---- where Broyden's method meets a singular matrix, and other corners ----


def grown(method: str, rate: float) -> float:
    """y(1) / y(0) of y' = rate y with steps of 0.25 and 0.75."""
    return float((stability(method, 0.25 * rate) * stability(method, 0.75 * rate)).real)


PLAIN = {  # func, and its y(1) by a method
    "zero": (lambda t, y: torch.zeros_like(y), lambda method: Y0),
    "constant": (lambda t, y: torch.full_like(y, 2.0), lambda method: Y0 + 2),
    "of time alone": (
        lambda t, y: (2 * t).expand(y.shape),
        lambda method: Y0 + (1 if IMPLICIT[method].order > 1 else 0.25 * 0.5 + 0.75 * 2),
    ),
    "decoupled": (lambda t, y: y * tensor(-1, 0), lambda method: Y0 * tensor(grown(method, -1), 1)),
    "at an equilibrium": (lambda t, y: (y - Y0) * y, lambda method: Y0),
    "the state itself": (lambda t, y: y, lambda method: Y0 * grown(method, 1)),
}


@METHODS
@pytest.mark.parametrize("name", PLAIN)
def test_plain_problems_are_no_special_case(method, name, by):
    func, solution = PLAIN[name]
    with torch.no_grad():
        y = pyode.odeint(func, Y0, tensor(0, 0.25, 1), method=method)
    assert torch.allclose(y[-1], solution(method), rtol=1e-12)


@METHODS
def test_a_func_without_a_derivative_is_iterated(method, by):
    with torch.no_grad():
        y = pyode.odeint(lambda t, y: f(t, y.detach()), Y0, uneven(), method=method, options={"newton_tol": 1e-10})
        assert torch.allclose(y, pyode.odeint(f, Y0, uneven(), method=method), rtol=1e-8)


class Opaque(torch.autograd.Function):
    """sin, with a backward pass through NumPy, which vmap can't enter."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(np.cos(x.numpy())) * torch.from_numpy(np.ones(g.numpy().shape))


def test_a_jacobian_is_made_row_by_row_where_it_can_not_be_made_at_once():
    y = pyode.odeint(lambda t, y: Opaque.apply(y @ A) * (1 + t), Y0, uneven(), method="radauIIA5")
    assert torch.allclose(y, pyode.odeint(f, Y0, uneven(), method="radauIIA5"), rtol=1e-11)


@METHODS
def test_a_solve_without_an_answer_says_so(method):
    with pytest.raises(SolveError, match="Newton's iteration") as failure:
        pyode.odeint(lambda t, y: 1 + 1e6 * y * y, tensor(1.0, 1.0), tensor(0, 0.25), method=method)
    assert (failure.value.status, failure.value.t, failure.value.dt) == (Status.NOT_CONVERGED, 0.0, 0.25)


@METHODS
@pytest.mark.parametrize("func", [
    lambda t, y: y / 0,
    lambda t, y: torch.where(t > 0, math.nan, -y),  # at the start it is finite
    lambda t, y: torch.where(t > 0, math.nan, -y.detach()),
], ids=["everywhere", "in the stages", "in the stages, without a derivative"])  # fmt: skip
def test_a_func_that_is_not_finite_is_told_apart(method, func):
    with pytest.raises(SolveError) as failure:
        pyode.odeint(func, tensor(1.0), tensor(0, 0.25), method=method)
    assert failure.value.status is Status.NON_FINITE


def test_a_gradient_that_is_not_finite_is_passed_on_as_by_explicit_methods(by):
    for method in ("rk4", "trbdf2"):
        y0 = Y0.clone().requires_grad_()
        pyode.odeint(f, y0, tensor(0, 0.1), method=method)[-1].backward(torch.full_like(Y0, math.nan))
        assert y0.grad.isnan().all()


def test_max_iters_bounds_the_iterations():
    stats = Stats()
    with pytest.raises(SolveError):
        pyode.odeint(f, Y0, tensor(0, 0.5), method="gl4", options={"max_iters": 1, "stats": stats})
    assert stats.n_newton == 1


def test_a_looser_tolerance_takes_fewer_iterations(by):
    counts, states = [], []
    for tolerance in (1e-3, 1e-12):
        stats = Stats()
        options = {"newton_tol": tolerance, "stats": stats}
        states.append(pyode.odeint(f, Y0, uneven(), method="gl6", options=options))
        counts.append(stats.n_newton)
    assert counts[0] < counts[1]
    assert 0 < float((states[0] - states[1]).abs().max()) < 1e-2


def test_options_are_checked():
    for name, value in (("max_iters", 0), ("newton_tol", -1.0)):
        with pytest.raises(ValueError, match=name):
            pyode.odeint(f, Y0, uneven(), method="gl4", options={name: value})
    with pytest.warns(UserWarning, match="Unexpected arguments"):
        pyode.odeint(f, Y0, uneven(), method="gl4", options={"max_iter": 5})
    with pytest.warns(UserWarning, match="Unexpected arguments"):
        pyode.odeint(f, Y0, uneven(), method="rk4", options={"max_iters": 5})


# ---- states, times, outputs ----


@METHODS
def test_a_tuple_is_solved_as_its_parts_in_one_tensor(method, by):
    def parts(t, s):
        y = torch.stack([s[0], s[1].view(2)])
        return tuple(k.view(part.shape) for k, part in zip(f(t, y), s))

    y = pyode.odeint(parts, (Y0[0], Y0[1].view(1, 2)), uneven(), method=method)
    assert torch.allclose(torch.cat([y[0], y[1][:, 0]], 1).view(-1, 2, 2), pyode.odeint(f, Y0, uneven(), method=method))


def test_a_tiny_part_of_a_tuple_is_solved_as_exactly_as_a_large_one(by):
    y0 = torch.tensor([1.0, 2.0])
    tiny = 1e-12
    y = pyode.odeint(
        lambda t, s: (torch.sin(s[0]), torch.sin(s[1] / tiny) * tiny), (y0, tiny * y0), uneven(), method="gl4"
    )
    assert torch.allclose(y[0], y[1] / tiny, rtol=1e-5)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_other_dtypes_agree_to_their_rounding(method, dtype, by):
    y = pyode.odeint(f, Y0.to(dtype), uneven(), method=method)
    rounding = 20 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    theirs = pyode.odeint(f, Y0.to(torch.complex128 if dtype.is_complex else torch.float64), uneven(), method=method)
    assert torch.allclose(y.to(theirs.dtype), theirs, rtol=rounding, atol=rounding)


@METHODS
def test_an_empty_state_stays_empty(method):
    assert pyode.odeint(lambda t, y: -y, torch.zeros(0, 3), uneven(), method=method).shape == (4, 0, 3)


@METHODS
def test_a_solve_in_inference_mode_is_the_same(method, by):
    expected = pyode.odeint(f, Y0, uneven(), method=method)
    assert not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(pyode.odeint(f, Y0 + 0, uneven(), method=method), expected)


@METHODS
@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("end", [0.25, -0.25])
def test_func_sees_the_start_of_every_step_exactly_or_its_neighbour(method, perturb, end):
    seen = set()

    def watch(t, y):
        seen.add(float(t))
        return f(t, y)

    pyode.odeint(watch, Y0, end * tensor(0, 1, 2), method=method, options={"perturb": perturb})
    grid = {0.0, end, 2 * end}
    starts = {math.nextafter(t, math.copysign(math.inf, end)) if perturb else t for t in (0.0, end)}
    assert starts <= seen
    assert not perturb or not grid & seen
    if IMPLICIT[method].abscissae[-1] == 1:
        assert (math.nextafter(2 * end, 0.0) if perturb else 2 * end) in seen


@METHODS
def test_cubic_output_has_the_order_of_a_cubic(method):
    errors = []
    for h in (0.2, 0.1):
        options = {"step_size": h, "interp": "cubic"}
        y = pyode.odeint(lambda t, y: y, tensor(1.0), tensor(0.0, h / 2, h), method=method, options=options)
        errors.append(abs(float(y[1]) - math.exp(h / 2)))
    assert errors[0] / errors[1] > 0.8 * 2.0 ** min(4, IMPLICIT[method].order + 1)


@METHODS
def test_every_evaluation_is_counted(method, by):
    calls, stats = [], Stats()

    def watch(t, y):
        calls.append(float(t))
        return f(t, y)

    options = {"step_size": 0.25, "interp": "cubic", "stats": stats}
    pyode.odeint(watch, Y0, tensor(0.0, 0.3, 0.9, 1.0), method=method, options=options)
    assert stats.n_f_evals == len(calls)
    assert (stats.n_accepted, stats.n_rejected) == (4, 0)
    assert 4 <= stats.n_newton < len(calls)
    assert (stats.n_krylov > 0) == (by == "gmres")
