"""Events: where they are, and the gradients of their time and state."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq
from problems import leaf, line, tensor
from torch import nn

import pyode
from pyode import Stats

SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
INTERFACES = pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SOLVES: dict[str, dict] = {
    "dopri5": {"method": "dopri5", **TIGHT},
    "dopri8": {"method": "dopri8", **TIGHT, "options": {"first_step": 0.05, "max_step": 0.1}},
    "rk4 linear": {"method": "rk4", "atol": 1e-10, "options": {"step_size": 0.07}},
    "rk4 cubic": {"method": "rk4", "atol": 1e-10, "options": {"step_size": 0.07, "interp": "cubic"}},
    "euler linear": {"method": "euler", "atol": 1e-10, "options": {"step_size": 0.07}},
    "midpoint cubic": {"method": "midpoint", "atol": 1e-10, "options": {"step_size": 0.07, "interp": "cubic"}},
    "implicit_adams cubic": {
        "method": "implicit_adams", "rtol": 1e-3, "atol": 1e-10, "options": {"step_size": 0.07, "interp": "cubic"},
    },
    "adams": {"method": "adams", "rtol": 1e-9, "atol": 1e-11},
    "explicit_adams linear": {"method": "explicit_adams", **TIGHT, "options": {"step_size": 0.07}},
}  # fmt: skip
Y0 = tensor(1.0, 0.5)
WEIGHTS = tensor(0.3, -1.1)  # of the state at the event in a loss


class Oscillator(nn.Module):
    """A damped and driven one."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, t, y):
        x, v = y
        return torch.stack([v, -self.rate * x - 0.1 * v + 0.2 * torch.cos(t)])


class Level(nn.Module):
    """Where the state, moved with time, falls to a level of its own."""

    def __init__(self, level: float = -0.2) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level, dtype=torch.float64))

    def forward(self, t, y):
        return y[0] + 0.05 * t - self.level


def solved_until_event(module, interface: str, solve: dict, sign: float = 1.0, event_fn=None, level=-0.2):
    """The event's time and state, and the gradients of a loss on both to y0, t0, the field and the event function."""
    func, event_fn = Oscillator(), event_fn or Level(level)
    y0, t0 = leaf(Y0), leaf(torch.tensor(0.3, dtype=torch.float64))
    kwargs = {"event_fn": event_fn, "odeint_interface": getattr(module, interface), **solve}
    time, states = module.odeint_event(func, y0, t0, reverse_time=sign < 0, **kwargs)
    loss = 2 * time + (WEIGHTS * states[-1]).sum() + states[0].sum()
    loss.backward()
    return time, states, [y0.grad, t0.grad, func.rate.grad], [p.grad for p in event_fn.parameters()]


@SIGNS
@INTERFACES
@pytest.mark.parametrize("name", [name for name in SOLVES if name != "adams"])  # which torchdiffeq no longer has
def test_time_state_and_gradients_are_torchdiffeqs(name, interface, sign):
    ours, theirs = (solved_until_event(module, interface, SOLVES[name], sign) for module in (pyode, torchdiffeq))
    assert (ours[0].shape, ours[0].dtype, ours[1].shape) == (theirs[0].shape, theirs[0].dtype, theirs[1].shape)
    # Both locate the time to atol; dopri8's first steps have noise, see test_parity.py.
    assert torch.allclose(ours[0], theirs[0], rtol=0, atol=3e-9 if name == "dopri8" else 4e-10)
    assert torch.allclose(ours[1], theirs[1], rtol=0, atol=3e-8 if name == "dopri8" else 1e-9)
    for gradient, expected, what in zip(ours[2], theirs[2], ("y0", "t0", "rate")):
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6), what


@SIGNS
@INTERFACES
@pytest.mark.parametrize("name", ["dopri5", "dopri8", "rk4 cubic", "implicit_adams cubic", "tsit5", "adams"])
def test_gradients_are_the_finite_differences(name, interface, sign):
    solve = SOLVES.get(name, {"method": name, "rtol": 1e-9, "atol": 1e-11})
    if "options" in solve and "step_size" in solve["options"]:
        solve = {**solve, "options": {**solve["options"], "step_size": 0.02}}

    def loss(x0: float, v0: float, t0: float, rate: float, level: float) -> float:
        func, event_fn = Oscillator(), Level(level)
        with torch.no_grad():
            func.rate.fill_(rate)
            kwargs = {"event_fn": event_fn, "reverse_time": sign < 0, **solve, "atol": 1e-12}
            time, states = pyode.odeint_event(func, tensor(x0, v0), tensor(t0), **kwargs)
        return float(2 * time + (WEIGHTS * states[-1]).sum() + states[0].sum())

    _, _, gradients, of_event = solved_until_event(pyode, interface, solve, sign)
    found = torch.cat([g.reshape(-1) for g in (*gradients, *of_event)])
    at, step = [1.0, 0.5, 0.3, 1.3, -0.2], 1e-4
    for i, gradient in enumerate(found):
        up, down = ([x + (d if i == j else 0) for j, x in enumerate(at)] for d in (step, -step))
        # The difference's own error: step^2, and 1e-9 / step of the solve's.
        assert float(gradient) == pytest.approx((loss(*up) - loss(*down)) / (2 * step), rel=1e-4, abs=1e-4)


@INTERFACES
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "adaptive_heun"])
def test_exponential_decay_to_a_level(method, interface):
    # y = y0 exp(-k (t - t0)) = c at t = t0 + log(y0 / c) / k.
    y0, t0, k, c = (leaf(tensor(x)) for x in (2.0, 0.5, 0.7, 0.3))
    tolerance = 1e-6 if method == "adaptive_heun" else 1e-9
    extra = {"adjoint_params": (k,)} if interface == "odeint_adjoint" else {}
    time, states = pyode.odeint_event(
        lambda t, y: -k * y, y0, t0, event_fn=lambda t, y: y - c, rtol=tolerance, atol=tolerance, method=method,
        odeint_interface=getattr(pyode, interface), **extra,
    )  # fmt: skip
    span = math.log(2 / 0.3) / 0.7
    assert float(time.detach()) == pytest.approx(0.5 + span, abs=1e3 * tolerance)
    assert torch.allclose(states[:, 0], tensor(2.0, 0.3), atol=1e2 * tolerance)
    exact = {y0: 1 / (0.7 * 2), t0: 1.0, k: -span / 0.7, c: -1 / (0.7 * 0.3)}
    for x, found in zip(exact, torch.autograd.grad(time, list(exact), retain_graph=True)):
        assert float(found) == pytest.approx(exact[x], rel=1e4 * tolerance)
    # The state at the event is c, whatever the rest.
    for x, found in zip(exact, torch.autograd.grad(states[-1].sum(), list(exact), allow_unused=True)):
        assert float(found) == pytest.approx(float(x is c), abs=1e4 * tolerance)


def test_bouncing_ball_with_gradients_through_all_bounces():
    # Each bounce at v = -sqrt(v0^2 + 2 g h0) times what is left of it; the flight after it takes 2 v / g.
    g, h0 = 9.81, 3.0
    height, kept = leaf(tensor(h0)), leaf(tensor(0.8))

    def fall(t, y):
        return torch.stack([y[1], -g + 0 * y[0]])

    t, y, times = tensor(0.0)[0], torch.cat([height, tensor(0.0)]), []
    for _ in range(4):
        t, states = pyode.odeint_event(
            fall, y, t, event_fn=lambda t, y: y[0], options={"skip_initial_event": True}, atol=1e-12
        )
        y = torch.cat([tensor(0.0), -kept * states[-1, 1:]])
        times.append(t)

    def exact(h, k):
        first = math.sqrt(2 * h / g)
        return [first + 2 * first * sum(k**i for i in range(1, n + 1)) for n in range(4)]

    assert torch.allclose(torch.stack(times).detach(), tensor(*exact(h0, 0.8)), atol=1e-10)
    found = torch.autograd.grad(times[-1], (height, kept))
    for gradient, (up, down) in zip(found, (((3.001, 0.8), (2.999, 0.8)), ((3.0, 0.801), (3.0, 0.799)))):
        assert float(gradient) == pytest.approx((exact(*up)[-1] - exact(*down)[-1]) / 2e-3, rel=1e-5)


@pytest.mark.parametrize("atol", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("shift", [0.0, 0.123456, 1000.0])
def test_the_time_is_located_to_atol(atol, shift):
    # The clock, whatever the solve: an event at a time.
    for at in (0.1, 1 / 3, 0.99, 7.0):
        time, _ = pyode.odeint(
            line, tensor(0.0), shift + tensor(0.0, 1.0), atol=atol, event_fn=lambda t, y, at=at: t - (shift + at)
        )
        assert float(time) == pytest.approx(shift + at, abs=max(atol, 2e-16 * (shift + 10)))


def test_a_tolerance_of_zero_locates_to_rounding():
    time, _ = pyode.odeint(line, tensor(1.0), tensor(0.0, 1.0), atol=0.0, event_fn=lambda t, y: y - 2)
    assert float(time) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_less_precision(dtype):
    y0, t0 = torch.tensor([1.0], dtype=dtype, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    time, states = pyode.odeint_event(lambda t, y: -y, y0, t0, event_fn=lambda t, y: y - 0.25, rtol=1e-4, atol=1e-5)
    assert (time.dtype, states.dtype) == (torch.float32, dtype)
    rounding = 1e-3 if dtype == torch.float32 else 3e-2
    assert float(time.detach()) == pytest.approx(math.log(4), abs=rounding)
    (time + 0 * states.sum()).backward()
    assert float(y0.grad) == pytest.approx(1.0, abs=rounding)
    assert float(t0.grad) == pytest.approx(1.0, abs=rounding)


@INTERFACES
def test_complex_states(interface):
    # y = y0 exp(i w t): its real part is zero at (pi / 2 - arg y0) / w.
    w = leaf(torch.tensor(0.7, dtype=torch.float64))
    y0 = leaf(torch.tensor([2.0 + 1.0j], dtype=torch.complex128))
    extra = {"adjoint_params": (w,)} if interface == "odeint_adjoint" else {}
    time, states = pyode.odeint_event(
        lambda t, y: 1j * w * y, y0, tensor(0.0), event_fn=lambda t, y: y.real, **TIGHT,
        odeint_interface=getattr(pyode, interface), **extra,
    )  # fmt: skip
    angle = math.atan2(1.0, 2.0)
    assert float(time.detach()) == pytest.approx((math.pi / 2 - angle) / 0.7, abs=1e-7)
    assert torch.allclose(states[-1], torch.tensor([1j * math.sqrt(5)], dtype=torch.complex128), atol=1e-7)
    of_y0, of_w = torch.autograd.grad(time, (y0, w), retain_graph=True)
    # d arg = (-b da + a db) / |y|^2
    assert torch.allclose(of_y0, torch.tensor([(1.0 - 2.0j) / 5 / 0.7], dtype=torch.complex128), atol=1e-6)
    assert float(of_w) == pytest.approx(-(math.pi / 2 - angle) / 0.49, rel=1e-6)


def test_counts_are_those_of_the_solve():
    stats, calls = Stats(), []

    def func(t, y):
        calls.append(t)
        return -y

    pyode.odeint(func, tensor(1.0), tensor(0.0, 1.0), options={"stats": stats}, event_fn=lambda t, y: y - 0.3)
    assert stats.n_f_evals == len(calls) == 2 + 6 * stats.n_steps


@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
def test_without_gradients_there_is_no_graph(interface):
    module = Oscillator()
    with torch.no_grad():
        time, states = pyode.odeint_event(
            module, leaf(Y0), tensor(0.0), event_fn=Level(), odeint_interface=getattr(pyode, interface)
        )
        assert not time.requires_grad
        assert not states.requires_grad
        with torch.enable_grad():
            again, _ = pyode.odeint_event(module, leaf(Y0), tensor(0.0), event_fn=Level())
        assert again.requires_grad
    assert float(again.detach()) == float(time)


def test_the_time_of_odeint_itself_carries_no_gradient():
    for odeint in (pyode.odeint, torchdiffeq.odeint):
        time, states = odeint(Oscillator(), leaf(Y0), leaf(tensor(0.0, 1.0)), event_fn=Level())
        assert not time.requires_grad
        assert states.requires_grad


def test_the_time_of_odeint_adjoint_has_a_gradient_of_zeros():
    for odeint_adjoint in (pyode.odeint_adjoint, torchdiffeq.odeint_adjoint):
        func, y0 = Oscillator(), leaf(Y0)
        time, states = odeint_adjoint(func, y0, tensor(0.0, 1.0), event_fn=Level())
        time.backward(retain_graph=True)
        assert torch.equal(y0.grad, torch.zeros_like(y0))
        assert float(func.rate.grad) == 0
        states[-1].sum().backward()
        assert bool((y0.grad != 0).all())
        assert float(func.rate.grad) != 0


@SIGNS
def test_behind_a_discontinuity_and_a_prescribed_step(sign):
    # y' = 1 until 0.5, 3 after it: y = 0.5 + 3 (t - 0.5) = 2 at t = 1.
    calls, seen = {}, []
    for name in ("jump_t", "step_t"):
        calls[name] = 0

        def func(t, y, name=name):
            calls[name] += 1
            seen.append(float(t))
            return sign * torch.where(sign * t < 0.5, 1.0, 3.0) * torch.ones_like(y)

        options = {name: sign * tensor(0.5), "first_step": 0.4}
        level = leaf(tensor(2.0))
        time, _ = pyode.odeint_event(
            func, tensor(0.0), tensor(0.0), reverse_time=sign < 0, options=options,
            event_fn=lambda t, y, level=level: y - level,
        )  # fmt: skip
        assert float(time.detach()) == pytest.approx(sign * 1.0, abs=2e-9 if name == "jump_t" else 1e-5)
        (gradient,) = torch.autograd.grad(time, level)
        assert float(gradient) == pytest.approx(sign / 3)
    assert calls["jump_t"] < calls["step_t"]


def test_bosh3_locates_events_as_accurately_as_it_steps():
    # torchdiffeq does not: its interpolant breaks off after the first order.
    errors = {}
    for module in (pyode, torchdiffeq):
        time, _ = module.odeint(
            lambda t, y: torch.stack([y[1], -y[0]]), tensor(1.0, 0.0), tensor(0.0, 1.0), method="bosh3",
            rtol=1e-6, atol=1e-8, event_fn=lambda t, y: y[0] - 0.5,
        )  # fmt: skip
        errors[module] = abs(float(time) - math.pi / 3)
    assert errors[pyode] < 2e-6
    assert errors[pyode] < 0.1 * errors[torchdiffeq]
