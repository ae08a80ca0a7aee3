"""What holds for every method: closed forms and events, forward and backward in time, of every kind of state."""

from __future__ import annotations

import math

import pytest
import torch
from problems import TURN, ClosedForm, constant, sine, tensor, turning
from torch import nn

import pyode
from pyode.methods import IMPLICIT, METHODS

METHOD = pytest.mark.parametrize("method", METHODS)
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
INTERFACES = pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])

exponential = ClosedForm("exponential", lambda t, y: y, lambda t: math.exp(t) * tensor(1.0, -2.0), 1.0, 4.0)
PROBLEMS = (constant, sine, turning, exponential)
KINDS = ("float32", "float64", "complex64", "a tuple")


class AsModule(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, t, y):
        return tuple(self.f(t, part) for part in y) if isinstance(y, tuple) else self.f(t, y)


def solver(method: str, step: float = 0.05, **options) -> dict:
    """A method with steps small enough and tolerances in reach."""
    if method == "scipy_solver":
        return {"method": method, "options": {"solver": "DOP853"}}  # which takes complex states too
    if not METHODS[method].adaptive:
        options["step_size"] = 2 * step if method in IMPLICIT and METHODS[method].order >= 4 else step
        if method == "explicit_adams":
            options["max_order"] = 5  # of order 11 it is stable for tiny steps only
        # At the default tolerances the iteration of implicit_adams does not converge, nor does float32 reach them.
        return {"method": method, "options": options, "rtol": 1e-5, "atol": 1e-6}
    if METHODS[method].order <= 3:  # slow at tight tolerances
        return {"method": method, "rtol": 1e-5, "atol": 1e-6}
    # dopri8's outputs between its steps are of order 4, as torchdiffeq's: its steps have to be shorter for them.
    return {
        "method": method,
        "rtol": 1e-6,
        "atol": 1e-8,
        **({"options": {"max_step": 0.5}} if method == "dopri8" else {}),
    }


def accuracy(method: str) -> float:
    """Of the solutions below, relative to their size: some step's error times the number of steps."""
    if method in ("scipy_solver", "adams") or METHODS[method].order >= 4:
        return 3e-5
    return {1: 0.1, 2: 6e-3, 3: 1e-3}[METHODS[method].order]


@METHOD
@BACKWARD
@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_of_every_kind_of_state(kind, method, backward):
    t = torch.linspace(1, 4, 7, dtype=torch.float64)
    t = t.flip(0) if backward else t
    for problem in PROBLEMS if kind == "float64" else (sine, turning):  # one driven by time, one of several numbers
        exact = problem.at(t)
        if kind == "complex64" and problem is turning:
            exact = exact * (1 + 0.5j)
        y0 = exact[0] if kind == "a tuple" else exact[0].to(getattr(torch, kind))
        y = pyode.odeint(AsModule(problem.f), (y0, y0) if kind == "a tuple" else y0, t, **solver(method))
        for part in y if kind == "a tuple" else [y]:
            assert part.dtype == y0.dtype
            error = float((part.to(exact.dtype if exact.is_complex() else part.dtype) - exact).abs().max())
            # float32: a hundred steps' roundings
            bound = accuracy(method) + (0 if y0.dtype == torch.float64 else 2e-5)
            assert error < bound * float(exact.abs().max()), (problem.name, error)


@METHOD
@BACKWARD
@INTERFACES
def test_both_interfaces_have_the_same_values(interface, method, backward):
    t = torch.linspace(1, 2, 4, dtype=torch.float64)
    t = t.flip(0) if backward else t
    y0 = turning.solution(float(t[0])).requires_grad_()
    module = AsModule(turning.f)
    with torch.no_grad():
        expected = pyode.odeint(module, y0, t, **solver(method))
    y = getattr(pyode, interface)(module, y0, t, **solver(method))
    # Steps that carry a graph may be computed in another order.
    assert torch.allclose(y.detach(), expected, rtol=1e-12, atol=1e-13)
    assert y.requires_grad == (method != "scipy_solver" or interface == "odeint_adjoint")
    if y.requires_grad:
        (gradient,) = torch.autograd.grad(y[-1].sum(), y0)
        exact = torch.linalg.matrix_exp((t[-1] - t[0]) * TURN).T @ torch.ones(5, dtype=torch.float64)
        assert torch.allclose(gradient, exact, rtol=0, atol=10 * accuracy(method))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "scipy_solver"])
@BACKWARD
@INTERFACES
def test_an_event_and_the_gradients_of_its_time_and_state(interface, method, backward):
    # x = a cos t falls to c at arccos(c / a), both ways from 0.
    sign, c = -1.0 if backward else 1.0, 0.3
    a, t0 = tensor(1.1).requires_grad_(), torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    turn = AsModule(lambda t, y: torch.stack([y[1], -y[0]]))
    kwargs = solver(method, 0.02, interp="cubic")
    time, states = pyode.odeint_event(
        turn, torch.cat([a, tensor(0.0)]), t0, event_fn=lambda t, y: y[0] - c, reverse_time=backward,
        odeint_interface=getattr(pyode, interface), **kwargs,
    )  # fmt: skip
    angle, bound = math.acos(c / 1.1), 2 * accuracy(method)
    assert float(time.detach()) == pytest.approx(sign * angle, abs=bound)
    exact = tensor(c, -sign * 1.1 * math.sin(angle))
    assert torch.allclose(states[-1].detach(), exact, atol=bound)
    of_a, of_t0 = torch.autograd.grad(time, (a, t0), retain_graph=True)
    slope = sign * c / (1.1**2 * math.sin(angle))
    assert float(of_a) == pytest.approx(slope, abs=5 * bound)
    assert float(of_t0) == pytest.approx(1.0, abs=5 * bound)
    # The state at the event stays on the circle: v = -sqrt(a^2 - c^2).
    (of_a,) = torch.autograd.grad(states[-1, 1], a)
    assert float(of_a) == pytest.approx(-sign * 1.1 / (1.1 * math.sin(angle)), abs=5 * bound)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "scipy_solver"])
def test_an_event_is_located_to_atol_in_the_methods_own_solution(method):
    kwargs = {**solver(method, 0.1), "atol": 1e-7}
    kwargs["options"] = {**kwargs.get("options", {}), "stats": pyode.Stats()}
    for start in (0.0, 0.37, 2.9):
        t = tensor(start, start + 1)
        _, states = pyode.odeint(
            lambda t, y: torch.cos(t).expand(1), tensor(math.sin(start)), t, event_fn=lambda t, y: y - 0.5, **kwargs
        )  # fmt: skip
        # A change of time by atol changes the state by no more than that.
        assert float((states[-1] - 0.5).abs()) <= 1e-7


@pytest.mark.parametrize("method", [name for name in METHODS if name != "scipy_solver"])
@INTERFACES
def test_callbacks_are_called_at_every_step_there_and_back(method, interface):
    calls = {"forward": [], "backward": []}
    func, y0 = AsModule(turning.f), turning.solution(1.0).requires_grad_()
    func.callback_step = lambda t0, y0, dt: calls["forward"].append((float(t0), float(dt), y0))
    func.callback_step_adjoint = lambda t0, y0, dt: calls["backward"].append((float(t0), float(dt), y0))
    kwargs = solver(method)
    y = getattr(pyode, interface)(func, y0, tensor(1.0, 1.5, 2.0), **kwargs)
    assert calls["forward"]
    assert all(t0 >= 1 and dt > 0 and y.shape == (5,) for t0, dt, y in calls["forward"])
    y.sum().backward()
    assert bool(calls["backward"]) == (interface == "odeint_adjoint")
    assert all(1 < t0 <= 2 and len(y) == 3 for t0, dt, y in calls["backward"])  # t, y, adj_y, and no parameters
    if not METHODS[method].adaptive:
        n = round(1 / kwargs["options"]["step_size"])
        assert len(calls["forward"]) == n
        assert len(calls["backward"]) in (0, n)


@METHOD
@pytest.mark.parametrize("grad", [False, True])
def test_parts_without_numbers_change_nothing(method, grad):
    t, nothing, kwargs = torch.linspace(0, 1, 11), torch.empty(0), solver(method, 0.1)

    def decay(t, y):
        return tuple(-part for part in y)

    with torch.set_grad_enabled(grad):
        (alone,) = pyode.odeint(decay, (torch.ones(1),), t, **kwargs)
        *parts, among = pyode.odeint(decay, (*[nothing] * 40, torch.ones(1)), t, **kwargs)  # more parts than numbers
        assert pyode.odeint(lambda t, y: -y, nothing, t, **kwargs).shape == (11, 0)
    assert torch.equal(among, alone)
    assert all(part.shape == (11, 0) for part in parts)


@METHOD
@pytest.mark.parametrize("grad", [False, True])
def test_at_a_single_time_the_solution_is_its_start(method, grad):
    y0, t = tensor(1.0, -2.0), tensor(0.3)
    with torch.set_grad_enabled(grad):
        assert torch.equal(pyode.odeint(lambda t, y: -y, y0, t, **solver(method)), y0[None])
        kwargs = solver(method)
        solution = pyode.solve_ivp(lambda t, y: -y, y0, t, control="joint", throw=False, **kwargs)
    assert solution.success
    assert torch.equal(solution.ys, y0[None])
    assert solution.stats.n_steps.tolist() == [0]


def test_all_of_torchdiffeqs_are_there_by_their_names_and_adams_of_2018():
    adaptive = "dopri8 dopri5 tsit5 bosh3 fehlberg2 adaptive_heun adams"
    fixed = "euler midpoint heun2 heun3 rk4 explicit_adams implicit_adams fixed_adams"
    implicit = "implicit_euler implicit_midpoint trapezoid radauIIA3 gl4 radauIIA5 gl6 sdirk2 trbdf2"
    assert set(METHODS) == {*adaptive.split(), *fixed.split(), *implicit.split(), "scipy_solver"}
    assert set(IMPLICIT) == set(implicit.split())
    assert {name for name, method in METHODS.items() if method.adaptive} == {*adaptive.split(), "scipy_solver"}
