"""Gradients of the times of compiled solves: those of the eager solve, and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fields import TIGHT, Y0, Field, T, assert_close, loss_of
from problems import kepler, kepler_start, tensor
from torch import Tensor, nn
from torch.autograd import grad, gradcheck

import pyode

FORCED = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}  # so that moving a time moves no step
SOLVERS = {
    "odeint": {},
    "jumps and stops": {"options": {"jump_t": tensor(0.2, 0.5), "step_t": tensor(0.9)}},
    "dopri8": {"method": "dopri8", "rtol": 1e-6, "atol": 1e-8, "options": {"first_step": 0.05}},
    "rk4": {"method": "rk4", "options": {"step_size": 0.15}},
    "cubics": {"method": "midpoint", "options": {"step_size": 0.15, "interp": "cubic", "perturb": True}},
    "adjoint": {"options": {"gradient": "adjoint"}},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "adjoint with jumps": {"adjoint_options": {"jump_t": tensor(0.2, 0.5)}, "options": {"jump_t": tensor(0.2, 0.5)}},
}


def strict(f):
    return pyode.compile(f, strict=True)


def mirrored(options: dict, sign: float) -> dict:
    """For time that runs the other way."""
    return {name: sign * x if isinstance(x, Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
@pytest.mark.parametrize("name", SOLVERS)
def test_they_are_native_and_those_of_the_eager_solve(name, sign):
    arguments = {**TIGHT, **SOLVERS[name]}
    arguments |= {key: mirrored(x, sign) for key, x in arguments.items() if key.endswith("options")}
    solve = pyode.odeint_adjoint if "adjoint_options" in arguments else pyode.odeint
    found = []
    for make in (strict, lambda f: f):
        field, y0, t = Field(), Y0.clone().requires_grad_(), (sign * T).requires_grad_()
        f, before = make(field), 0
        for _ in range(2):  # func is called once to be traced
            before = field.calls
            gradients = grad(loss_of(solve(f, y0, t, **arguments)), [y0, t, *field.trained()])
        assert (field.calls == before) == (make is strict)
        found.append(gradients)
    assert_close(*found, 1e-6 if name == "dopri8" else 1e-9)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_they_are_the_finite_differences(method):
    f = strict(Field())
    options = {"step_size": 0.25} if method == "rk4" else FORCED

    def solve(y0: Tensor, t: Tensor) -> Tensor:
        return pyode.odeint(f, y0, t, method=method, options=options)

    times = tensor(0.0, 0.4, 0.6, 1.3).requires_grad_()
    assert gradcheck(solve, (Y0.clone().requires_grad_(), times), rtol=1e-6, atol=1e-7)


def test_a_solve_that_fails_on_a_discontinuity_stands_still_there():
    options = {**FORCED, "max_num_steps": 2, "on_failure": "return", "jump_t": tensor(0.4)}

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(3 * t) * y - y**2

    for g in (strict(f), f):
        for gradient in ("direct", "checkpoint"):

            def solve(t: Tensor, g=g, gradient=gradient) -> Tensor:
                y0, how = torch.ones(3, 2).double(), {**options, "gradient": gradient}
                with pytest.warns(UserWarning, match="the solve failed"):
                    return pyode.odeint(g, y0, t, method="bosh3", options=how)

            assert gradcheck(solve, tensor(0.0, 0.3, 1.0).requires_grad_(), rtol=1e-6, atol=1e-7)


def hypernetwork() -> Callable[[Tensor, Tensor], Tensor]:
    """Weights that are a network of time: a gradient to time multiplies sums over rows with what each stage has."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 6)).double().requires_grad_(False)

    def f(t: Tensor, y: Tensor) -> Tensor:
        w = net(t.reshape(1, 1)).reshape(3, 2)
        return torch.tanh(y @ w[:2]) * w[2] - y * t**2

    return f


@pytest.mark.parametrize("rows", [1, 100, 1000])
@pytest.mark.parametrize("steps", [1000, 3])
def test_any_number_of_rows_and_outputs_not_reached(rows, steps):
    f = hypernetwork()
    y0, t, found = torch.randn(rows, 2).double(), tensor(0.0, 0.3, 1.0, 2.0), []
    for g in (strict(f), f):
        t = t.detach().requires_grad_()
        options = {"max_num_steps": steps, "on_failure": "return"}
        if steps == 3:
            with pytest.warns(UserWarning, match="the solve failed"):
                y = pyode.odeint(g, y0, t, 1e-6, 1e-8, options=options)
        else:
            y = pyode.odeint(g, y0, t, 1e-6, 1e-8, options=options)
        found.append(grad(loss_of(y), t))
    assert_close(*found, 1e-9)


@pytest.mark.parametrize("solve", [pyode.odeint, pyode.odeint_adjoint])
def test_a_state_that_is_one_row_and_a_field_without_time(solve):
    def driven(t: Tensor, y: Tensor) -> Tensor:
        return kepler(t, y) * torch.cos(t)

    arguments = {"adjoint_params": ()} if solve is pyode.odeint_adjoint else {}
    arguments |= {"method": "bosh3", "rtol": 1e-4, "atol": 1e-6}  # whose few stages are soon compiled
    for f, y0 in ((driven, kepler_start(0.3)), (lambda t, y: -(y**3), torch.ones(3, 2).double())):
        found = []
        for g in (strict(f), f):
            start, t = y0.clone().requires_grad_(), tensor(0.0, 1.0, 2.0).requires_grad_()
            found.append(grad(loss_of(solve(g, start, t, **arguments)), [start, t]))
        assert_close(*found, 1e-9)


def test_gradients_of_gradients_take_the_eager_path():
    f = hypernetwork()
    found = []
    for g in (strict(f), f):
        y0, t = torch.ones(3, 2).double().requires_grad_(), T.clone().requires_grad_()
        (first,) = grad(loss_of(pyode.odeint(g, y0, t)), t, create_graph=True)
        found.append(grad(first.square().sum(), [y0, t]))
    assert_close(*found, 1e-8)


def test_times_that_are_computed():
    f = hypernetwork()
    found = []
    for g in (strict(f), f):
        end = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
        t = torch.stack([0 * end, end, 2 * end])
        found.append(grad(loss_of(pyode.odeint(g, torch.ones(3, 2).double(), t)), end))
    assert_close(*found, 1e-9)


def test_the_same_bits_for_any_number_of_threads():
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
    f, y0, found = strict(lambda t, y: net(y * torch.cos(t))), torch.randn(1000, 8), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        t = torch.tensor([0.0, 0.4, 1.0], requires_grad=True)
        found.append(grad(pyode.odeint(f, y0, t, rtol=1e-4, atol=1e-5).square().sum(), t)[0])
    assert all(torch.equal(g, found[0]) for g in found)
