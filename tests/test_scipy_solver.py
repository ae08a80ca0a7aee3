"""scipy_solver: SciPy's methods behind odeint."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import torchdiffeq
from fields import Y0 as FIELD_Y0
from fields import Field, assert_close, loss_of
from problems import growth, linear, tensor, van_der_pol
from scipy.integrate import solve_ivp

import pyode
from pyode import InvalidValue, SolveError, Stats, Status

SOLVERS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
EVERY = pytest.mark.parametrize("solver", SOLVERS)
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
SCIPY = {"method": "scipy_solver"}


def scipys(solver: str, **more) -> dict:
    return {**SCIPY, "options": {"solver": solver, **more}}


@EVERY
@SIGNS
def test_every_solver_is_scipys_to_the_last_bit(solver, sign):
    t = sign * torch.linspace(0, 3, 7, dtype=torch.float64)
    y = pyode.odeint(van_der_pol, tensor(2.0, 0.0), t, 1e-6, 1e-8, **scipys(solver))

    def f(t, y):
        return van_der_pol(None, torch.tensor(y)).numpy()

    expected = solve_ivp(f, (0.0, sign * 3.0), np.array([2.0, 0.0]), solver, t.numpy(), rtol=1e-6, atol=1e-8)
    assert np.array_equal(y.numpy(), expected.y.T)


@EVERY
@pytest.mark.parametrize("problem", [growth, linear], ids=lambda problem: problem.name)
def test_closed_forms(solver, problem):
    t = problem.times()
    y = pyode.odeint(problem.f, problem.y0, t, 1e-7, 1e-9, **scipys(solver))
    assert torch.allclose(y, problem.at(t), rtol=1e-4, atol=1e-5)


@SIGNS
def test_without_a_name_it_is_lsoda_as_in_torchdiffeq(sign):
    t = sign * torch.linspace(0, 3, 7, dtype=torch.float64)
    found = [module.odeint(van_der_pol, tensor(2.0, 0.0), t, rtol=1e-6, atol=1e-8, **SCIPY)
             for module in (pyode, torchdiffeq)]  # fmt: skip
    assert torch.allclose(*found, rtol=1e-12)


@SIGNS
@EVERY
def test_tuples_of_any_shapes(solver, sign):
    parts = (torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))

    def func(t, y):
        assert (y[0].shape, y[1].shape, t.shape) == ((1, 2), (), ())
        return y[1] * torch.ones_like(y[0]), -y[0].sum()

    t = sign * torch.linspace(0, 1, 4, dtype=torch.float64)
    found = pyode.odeint(func, parts, t, 1e-8, 1e-9, **scipys(solver))
    for ours, exact in zip(found, pyode.odeint(func, parts, t)):
        assert ours.shape == exact.shape
        assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-6)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64, torch.complex128])
def test_dtypes(solver, dtype):
    y0 = torch.tensor([1.0, 0.5]).to(dtype) * (1 + 1j if dtype.is_complex else 1)
    rate, t = (1j if dtype.is_complex else -1.0), torch.linspace(0, 1, 5)
    seen = set()

    def func(t, y):
        seen.add((t.dtype, y.dtype))
        return rate * y

    if solver in ("Radau", "LSODA") and dtype.is_complex:
        with pytest.raises(InvalidValue, match=f"{solver} does not solve complex states"):
            pyode.odeint(func, y0, t, 1e-4, 1e-5, **scipys(solver))
        return
    y = pyode.odeint(func, y0, t, 1e-4, 1e-5, **scipys(solver))
    assert y.dtype == dtype
    assert torch.allclose(y, torch.exp(rate * t)[:, None].to(y) * y0, rtol=1e-2)
    assert seen == {(y0.real.dtype if dtype.is_complex else dtype, dtype)}


@EVERY
def test_tolerances_may_be_tensors(solver):
    t, y0 = tensor(0.0, 3.0), tensor(2.0, 0.0)
    atol = tensor(1e-3, 1e-7)
    y = pyode.odeint(van_der_pol, y0, t, torch.tensor(1e-4), atol, **scipys(solver))

    def f(t, y):
        return van_der_pol(None, torch.tensor(y)).numpy()

    rtol = float(torch.tensor(1e-4))
    expected = solve_ivp(f, (0.0, 3.0), np.array([2.0, 0.0]), solver, t.numpy(), rtol=rtol, atol=atol.numpy())
    assert np.allclose(y.numpy(), expected.y.T, rtol=1e-13)
    # For a tuple, one for each part.
    parts = pyode.odeint(
        lambda t, y: tuple(van_der_pol(t, torch.stack(y)).unbind()), (y0[0], y0[1]), t, rtol, (1e-3, 1e-7),
        **scipys(solver),
    )  # fmt: skip
    assert torch.allclose(torch.stack(parts, -1), y, rtol=1e-12)


@EVERY
def test_bounds_of_the_step_are_passed_on_to_those_that_have_them(solver):
    # Warnings are errors: SciPy's of an argument without effect, too.
    few, many = Stats(), Stats()
    options = {"solver": solver, "min_step": 0.0, "stats": few}
    pyode.odeint(growth.f, growth.y0, tensor(0.0, 2.0), 1e-3, 1e-3, **SCIPY, options=options)
    options = {"solver": solver, "max_step": 0.01, "stats": many}
    pyode.odeint(growth.f, growth.y0, tensor(0.0, 2.0), 1e-3, 1e-3, **SCIPY, options=options)
    assert many.n_f_evals > 190
    assert many.n_f_evals > 2 * few.n_f_evals
    times = []

    def func(t, y):
        times.append(float(t))
        return growth.f(t, y)

    pyode.odeint(func, growth.y0, tensor(0.0, 2.0), 1e-3, 1e-3, **scipys(solver, first_step=0.123))
    if solver.startswith("RK"):
        assert any(abs(t - 0.123) < 1e-12 for t in times)


@pytest.mark.parametrize("name", ["step_size", "safety", "step_t", "jump_t", "max_num_steps", "ifactor", "wrong"])
def test_options_without_effect_are_named_in_a_warning(name):
    for module in (pyode, torchdiffeq):
        with pytest.warns(UserWarning, match=f"Unexpected arguments .*{name}"):
            module.odeint(growth.f, growth.y0, tensor(0.0, 2.0), **SCIPY, options={name: tensor(1.0)})


def test_options_of_torchdiffeqs_that_it_takes_in_silence():
    options = {"norm": lambda e: e.abs().max(), "max_step": 0.5, "min_step": 1e-12}
    for module in (pyode, torchdiffeq):
        assert module.odeint(growth.f, growth.y0, tensor(0.0, 2.0), **SCIPY, options=options).shape == (2, 1)


def test_an_unknown_solver_is_an_error():
    with pytest.raises(InvalidValue, match=r"options\['solver'\] must be one of RK45.*, not 'RK54'"):
        pyode.odeint(growth.f, growth.y0, tensor(0.0, 2.0), **scipys("RK54"))


def test_without_scipy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(InvalidValue, match="pip install scipy"):
        pyode.odeint(growth.f, growth.y0, tensor(0.0, 2.0), **SCIPY)
    assert pyode.odeint(growth.f, growth.y0, tensor(0.0, 2.0)).shape == (2, 1)


@EVERY
def test_one_time_returns_the_start(solver):
    y = pyode.odeint(growth.f, growth.y0, tensor(1.0), **scipys(solver))
    assert torch.equal(y, growth.y0[None])


@EVERY
def test_steps_are_counted(solver):
    stats = Stats()
    pyode.odeint(growth.f, growth.y0, tensor(0.0, 2.0), 1e-3, 1e-3, **scipys(solver, max_step=0.1, stats=stats))
    assert 20 <= stats.n_accepted <= 45  # a first step, and as many as the largest step makes it; LSODA's start small
    assert stats.n_f_evals >= stats.n_accepted


@EVERY
def test_a_state_of_no_numbers(solver):
    y0 = torch.zeros(2, 0, dtype=torch.float64)
    assert pyode.odeint(growth.f, y0, tensor(0.0, 1.0, 2.0), **scipys(solver)).shape == (3, 2, 0)


@EVERY
def test_a_func_that_raises_an_error_of_scipys_kind(solver):
    for error in (ValueError("mine"), FloatingPointError("mine")):

        def func(t, y, error=error):
            if float(t) > 0.5:
                raise error
            return -y

        with pytest.raises(type(error), match="mine"):
            pyode.odeint(func, tensor(1.0), tensor(0.0, 2.0), **scipys(solver, on_failure="return"))


@pytest.mark.parametrize("solver", SOLVERS[:5])  # SciPy's LSODA does not give up
def test_a_failure(solver):
    def broken(t, y):
        return y * y  # from 1 it ends at t = 1

    t = tensor(0.0, 0.5, 0.9, 2.0, 3.0)
    with np.errstate(all="ignore"):
        with pytest.raises(SolveError) as caught:
            pyode.odeint(broken, tensor(1.0), t, **scipys(solver))
        assert caught.value.status in (Status.STEP_TOO_SMALL, Status.NON_FINITE)
        assert 0.9 <= caught.value.t <= 1.1
        with pytest.warns(UserWarning, match="last state stands for the rest"):
            y = pyode.odeint(broken, tensor(1.0), t, **scipys(solver, on_failure="return"))
    assert torch.allclose(y[:3, 0], tensor(1.0, 2.0, 10.0), rtol=1e-4)
    assert torch.equal(y[3:], y[3:4].expand(2, 1))
    assert y.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS[:3])
def test_a_func_that_is_not_finite_at_the_start(solver):
    with np.errstate(all="ignore"), pytest.warns(UserWarning, match="last state stands for the rest"):
        y = pyode.odeint(
            lambda t, y: math.nan * y, tensor(1.0, 2.0), tensor(0.0, 1.0, 2.0), **scipys(solver, on_failure="return")
        )
    assert torch.equal(y, tensor(1.0, 2.0).expand(3, 2))


@pytest.mark.parametrize("solver", SOLVERS[:3])
def test_a_start_that_is_not_finite(solver):
    with np.errstate(all="ignore"), pytest.raises(SolveError) as caught:
        pyode.odeint(lambda t, y: -y, tensor(1.0, math.nan), tensor(0.0, 1.0), **scipys(solver))
    assert caught.value.status is Status.NON_FINITE


def test_an_exception_of_func_passes_through():
    def func(t, y):
        raise KeyError("mine")

    for solver in SOLVERS:
        with pytest.raises(KeyError, match="mine"):
            pyode.odeint(func, tensor(1.0), tensor(0.0, 1.0), **scipys(solver))


def test_it_has_no_events_no_dense_output_and_no_direct_gradients():
    with pytest.raises(InvalidValue, match="finds no events"):
        pyode.odeint(growth.f, growth.y0, tensor(0.0, 1.0), **SCIPY, event_fn=lambda t, y: y - 2)
    with pytest.raises(InvalidValue, match="no dense output"):
        pyode.odeint_dense(growth.f, growth.y0, 0.0, 1.0, **SCIPY)
    y = pyode.odeint(growth.f, growth.y0.clone().requires_grad_(), tensor(0.0, 1.0), **SCIPY)
    assert not y.requires_grad  # as in torchdiffeq; odeint_adjoint has them


@pytest.mark.parametrize("solver", ["LSODA", "DOP853", "Radau"])
@SIGNS
@pytest.mark.parametrize("time", [False, True])
def test_adjoint_gradients(solver, sign, time):
    tight = {"rtol": 1e-8, "atol": 1e-9}
    found, states = [], []
    for solve, kwargs in ((pyode.odeint_adjoint, scipys(solver)), (pyode.odeint, {})):
        field, y0 = Field(), FIELD_Y0.clone().requires_grad_()
        t = (sign * tensor(0.0, 0.4, 1.3)).requires_grad_(time)
        states.append(solve(field, y0, t, **tight, **kwargs))
        loss_of(states[-1]).backward()
        found.append([y0.grad, *([t.grad] if time else []), *(p.grad for p in field.trained())])
        assert field.unused.grad is None or torch.equal(field.unused.grad, torch.zeros(3, dtype=torch.float64))
    assert_close(*found, 1e-5)


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("options", [{}, {"solver": "LSODA", "max_step": 0.2}], ids=str)
def test_adjoint_gradients_are_torchdiffeqs(time, options):
    found = []
    for module in (pyode, torchdiffeq):
        field, y0 = Field(), FIELD_Y0.clone().requires_grad_()
        t = tensor(0.0, 0.4, 1.3).requires_grad_(time)
        loss_of(module.odeint_adjoint(field, y0, t, rtol=1e-6, atol=1e-8, **SCIPY, options=options)).backward()
        found.append([y0.grad, *([t.grad] if time else []), *(p.grad for p in field.trained())])
    assert_close(*found, 1e-4)


def test_its_own_backward_method_may_be_another():
    found = []
    for kwargs in ({"method": "dopri5", "adjoint_method": "scipy_solver"}, {**SCIPY, "adjoint_method": "dopri5"}):
        field, y0 = Field(), FIELD_Y0.clone().requires_grad_()
        loss_of(pyode.odeint_adjoint(field, y0, tensor(0.0, 1.0), 1e-8, 1e-9, **kwargs)).backward()
        found.append([y0.grad, *(p.grad for p in field.trained())])
    assert_close(*found, 1e-5)


def test_counts_are_of_the_evaluations():
    stats, calls = Stats(), []

    def func(t, y):
        calls.append(t)
        return growth.f(t, y)

    pyode.odeint(func, growth.y0, tensor(0.0, 1.0), **scipys("RK45", stats=stats))
    assert stats.n_f_evals == len(calls) > 0
