"""The cases of the suites of parity and of gradients, compiled, against the same solved eagerly: steps and results.

Float64: the same steps, states within a few roundings of every step, amplified as the problem does; gradients likewise.
"""

from __future__ import annotations

import pytest
import torch
from fields import Y0, Field, T, assert_close, loss_of
from parity_cases import ADJOINTS, NOISE, OPTIONS, PARTS, PROBLEMS, TENSOR_TOLERANCES, TOLERANCES, coupled
from problems import tensor, van_der_pol
from torch import Tensor, nn
from torch.autograd import gradcheck

import pyode
from pyode.methods import TABLEAUS

METHODS = pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
ADAPTIVE = pytest.mark.parametrize("method", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
FORCED = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}  # so that moving an input moves no step


def strict(f):
    return pyode.compile(f, strict=True)


class Noted(nn.Module):
    """A func whose accepted steps are noted: start and size."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f, self.steps = f, []

    def forward(self, t, y):
        return self.f(t, y)

    def callback_accept_step(self, t0, y0, dt):
        self.steps.append((abs(float(t0)), abs(float(dt))))


def solved(f, y0, t, options=None, **arguments) -> tuple[object, pyode.Stats]:
    stats = pyode.Stats()
    return pyode.odeint(f, y0, t, options={**(options or {}), "stats": stats}, **arguments), stats


def steps_of(ys: Tensor) -> list[tuple[float, float]]:
    """The accepted steps of a compiled solve with gradients: start and size."""
    node = ys.grad_fn
    return [(abs(step.t0), abs(step.dt)) for step in node.lent.tape.steps[: node.solve.sample.n_accepted]]


@METHODS
@SIGNS
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_steps_are_accepted_and_rejected(method, sign, name):
    forward, y0, end = PROBLEMS[name]
    direction = tensor(sign)[0]  # a tensor: compiled once for both

    def f(t, y):
        return direction * forward(direction * t, y)

    t = sign * torch.linspace(1.0 if name == "sine" else 0.0, end, 8, dtype=torch.float64)
    compiled, y0 = strict(f), y0.clone().requires_grad_()
    # Of a method of order 8 the estimate in a tiny first step is nothing but rounding noise: begin with a sensible one.
    options = {"first_step": 0.05} if method == "dopri8" else {}
    for rtol in (1e-3, 1e-6):
        arguments = {"rtol": rtol, "atol": rtol / 100, "method": method, "options": options}
        noted = Noted(f)
        (ours, our_stats), (theirs, their_stats) = (solved(g, y0, t, **arguments) for g in (compiled, noted))
        assert our_stats == their_stats
        found, expected = (torch.tensor(steps, dtype=torch.float64) for steps in (steps_of(ours), noted.steps))
        assert torch.allclose(found, expected, rtol=NOISE[method], atol=NOISE[method] * abs(end))
        # That noise times the tolerance, as against torchdiffeq.
        limit = max(100 * rtol * NOISE[method], 1e-12) * float(theirs.detach().abs().max())
        assert torch.allclose(ours, theirs, rtol=0, atol=limit)


@METHODS
@SIGNS
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(method, sign, name):
    options = {key: sign * value if key in ("step_t", "jump_t") else value for key, value in OPTIONS[name].items()}
    if method == "dopri8":
        options.setdefault("first_step", 0.05)
    y0 = torch.tensor([[1.5, 0.5], [0.2, -1.0]], dtype=torch.float64)
    t = sign * torch.linspace(0, 2, 6, dtype=torch.float64)

    def f(t, y):
        return van_der_pol(t, y, 3.0) + torch.cos(5 * t)

    arguments = {"rtol": 1e-5, "atol": 1e-7, "method": method, "options": options}
    (ours, our_stats), (theirs, their_stats) = (solved(g, y0, t, **arguments) for g in (strict(f), f))
    assert our_stats == their_stats
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@METHODS
@pytest.mark.parametrize("name", TOLERANCES)
def test_tuples_with_every_kind_of_tolerance(method, name):
    arguments = {"method": method, "options": {"first_step": 0.05}}
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    for tolerances in ({"rtol": TOLERANCES[name], "atol": 1e-6}, {"rtol": 1e-5, "atol": TOLERANCES[name]}):
        (ours, our_stats), (theirs, their_stats) = (
            solved(g, PARTS, t, **arguments, **tolerances) for g in (strict(coupled), coupled)
        )
        assert our_stats == their_stats
        for a, b in zip(ours, theirs):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@METHODS
@pytest.mark.parametrize("tolerance", TENSOR_TOLERANCES)
def test_tensor_tolerances(method, tolerance):
    y0, t = torch.tensor([[1.5, 0.5], [0.2, -1.0]], dtype=torch.float64), tensor(0.0, 3.0)
    for which in ("rtol", "atol"):
        arguments = {"rtol": 1e-5, "atol": 1e-6, "method": method, "options": {"first_step": 0.05}, which: tolerance}
        (ours, our_stats), (theirs, their_stats) = (
            solved(g, y0, t, **arguments) for g in (strict(van_der_pol), van_der_pol)
        )
        assert our_stats == their_stats
        assert torch.allclose(ours, theirs, rtol=100 * NOISE[method] * 1e-3)


@pytest.mark.parametrize(("state", "time"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_times_and_states_of_different_dtypes(state, time):
    y0, t = tensor(2.0, 0.0).to(state), torch.linspace(0, 1, 4, dtype=time)
    arguments = {"rtol": 1e-5, "atol": 1e-5, "options": {"first_step": 0.1}}
    ours, theirs = (pyode.odeint(g, y0, t, **arguments) for g in (strict(van_der_pol), van_der_pol))
    assert ours.dtype == state
    assert torch.allclose(ours, theirs, atol=3e-5 if state == torch.float32 else 1e-11)


def field(matrix: Tensor):
    return lambda t, y: torch.sin(y @ matrix) * (1 + t * t)


def gradient_inputs() -> tuple[Tensor, Tensor]:
    return tuple(x.clone().requires_grad_() for x in (Y0, Field().matrix.detach()))


@ADAPTIVE
@SIGNS
def test_gradients_are_the_finite_differences(method, sign):
    y0, matrix = gradient_inputs()
    f = strict(field(matrix))

    def solve(y0, _):
        return pyode.odeint(f, y0, sign * T[:3], method=method, options=FORCED)

    assert gradcheck(solve, (y0, matrix), rtol=1e-6, atol=1e-7)


@METHODS
@SIGNS
@pytest.mark.parametrize("options", [{}, {"step_t": tensor(0.4)}, {"jump_t": tensor(0.4)}], ids=str)
def test_gradients_are_those_of_the_eager_solve(method, sign, options):
    options = {name: sign * value for name, value in options.items()} | {"first_step": 0.05}
    found, inputs = [], gradient_inputs()
    for make in (strict, lambda f: f):
        y = pyode.odeint(make(field(inputs[1])), inputs[0], sign * T, 1e-6, 1e-8, method, options)
        found.append(torch.autograd.grad(loss_of(y), inputs))
    # dopri8's step sizes carry more of the noise of its error estimate.
    assert_close(*found, 1e-6 if method == "dopri8" else 1e-10)


def test_gradients_of_tuples_and_of_some_inputs_only():
    start = tensor(1.0, 0.5), torch.tensor(0.3, dtype=torch.float64), tensor(0.7)
    for wanted in ((True, True, True), (True, False, False), (False, False, True), (False, True, False)):
        a, b, rate = (x.clone().requires_grad_(want) for x, want in zip(start, wanted))

        def f(t, y, rate=rate):
            return rate * y[1] * y[0], torch.cos(t) - y[0].sum()

        found = []
        for g in (strict(f), f):
            x, y = pyode.odeint(g, (a, b), T[:3], options=FORCED)
            found.append(torch.autograd.grad(loss_of(x) + loss_of(y), [x for x in (a, b, rate) if x.requires_grad]))
        assert_close(*found, 1e-12)


@SIGNS
def test_gradients_across_a_jump(sign):
    rate = tensor(0.7).requires_grad_()

    def f(t, y):
        return torch.where(sign * t < 0.5, 2 * rate, -5.0 * y)

    found = []
    for g in (strict(f), f):
        y = pyode.odeint(g, tensor(0.3), sign * tensor(0.0, 0.3, 1.0), options={"jump_t": sign * tensor(0.5)})
        found.append(torch.autograd.grad(loss_of(y), rate))
    assert_close(*found, 1e-10)


@pytest.mark.filterwarnings("ignore:An adjoint parameter was passed:UserWarning")
@pytest.mark.parametrize("name", ADJOINTS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_adjoints(name, method):
    found = []
    for make in (strict, lambda f: f):
        net, y0 = Field(), Y0.clone().requires_grad_()
        y = pyode.odeint_adjoint(make(net), y0, T, **{**ADJOINTS[name], "rtol": 1e-6, "atol": 1e-7, "method": method})
        loss_of(y).backward()
        found.append([y0.grad, *(p.grad for p in net.trained())])
    assert_close(*found, 1e-8)
