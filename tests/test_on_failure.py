"""options={"on_failure": "return"}: the last good state, repeated, with a warning; and its gradients."""

from __future__ import annotations

import gc
import math
import re
import weakref

import pytest
import torch
from problems import tensor
from torch import nn

import pyode
from pyode import InvalidValue, SolveError, Stats, Status
from pyode.methods import IMPLICIT

RETURN = {"on_failure": "return"}
INTERFACES = pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])


class BlowUp(nn.Module):
    """y' = rate y^2, which is y0 / (1 - rate y0 t): for rate = y0 = 1 it ends at t = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, t, y):
        return self.rate * y * y


class Broken(BlowUp):
    """Not a number from t = 0.5 on."""

    def forward(self, t, y):
        return torch.where(t.abs() < 0.5, self.rate, math.nan) * y


class NeverFinite(BlowUp):
    def forward(self, t, y):
        return math.nan * self.rate * y


class Unsolvable(BlowUp):
    """The same, with a derivative everywhere."""

    def forward(self, t, y):
        return torch.where(t.abs() < 0.5, self.rate * y, math.nan * y.detach())


class Decay(BlowUp):
    def forward(self, t, y):
        return -self.rate * y


FAILURES = {
    "blow-up": (BlowUp, {}, {Status.STEP_TOO_SMALL, Status.NON_FINITE}),
    "not finite": (Broken, {}, {Status.NON_FINITE}),
    "not finite, adams": (Broken, {"method": "adams"}, {Status.NON_FINITE}),
    "not finite at the start": (NeverFinite, {}, {Status.NON_FINITE}),
    "too many steps": (BlowUp, {"options": {"max_num_steps": 8}}, {Status.TOO_MANY_STEPS}),
    "no steps at all": (BlowUp, {"options": {"max_num_steps": 0}}, {Status.TOO_MANY_STEPS}),
    **{f"not finite, {method}": (
        Unsolvable, {"method": method}, {Status.NON_FINITE}
    ) for method in IMPLICIT},
    **{f"not finite, {solver}": (
        Unsolvable, {"method": "scipy_solver", "options": {"solver": solver}}, {Status.NON_FINITE}
    ) for solver in ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")},
    "step too small": (Decay, {"rtol": 0.0, "atol": 1e-300}, {Status.STEP_TOO_SMALL}),
}  # fmt: skip


def solve_both_ways(name: str, interface: str, t, y0=None):
    """The error that is raised, and what is returned instead with the text of the warning."""
    kind, kwargs, _ = FAILURES[name]
    y0 = tensor(1.0, 0.5) if y0 is None else y0
    with pytest.raises(SolveError) as caught:
        getattr(pyode, interface)(kind(), y0, t, **kwargs)
    options = {**kwargs.get("options", {}), **RETURN}
    with pytest.warns(UserWarning, match="last state stands for the rest") as warned:
        y = getattr(pyode, interface)(kind(), y0, t, **{**kwargs, "options": options})
    (message,) = [str(warning.message) for warning in warned]
    return caught.value, y, message


@INTERFACES
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_last_good_state_is_repeated_with_a_warning_that_says_what_the_error_says(name, interface, gradients):
    t = torch.linspace(0, 2, 21, dtype=torch.float64)
    error, y, message = solve_both_ways(name, interface, t, tensor(1.0, 0.5).requires_grad_(gradients))
    assert error.status in FAILURES[name][2]
    assert str(error) in message
    assert y.shape == (21, 2)
    assert y.isfinite().all()
    good = int((t <= error.t).sum())
    assert 1 <= good < 21
    # Up to the failure nothing is different; behind it, all is that at the failure's time.
    kind, kwargs, _ = FAILURES[name]
    if good > 1:
        expected = getattr(pyode, interface)(kind(), tensor(1.0, 0.5), t[:good], **kwargs)
        # SciPy's last step is another one if the solve ends earlier.
        rtol = 1e-6 if kwargs.get("method") == "scipy_solver" else 1e-12
        assert torch.allclose(y[:good], expected, rtol=rtol)
    assert torch.equal(y[good:], y[good : good + 1].expand(21 - good, 2))
    if kind is BlowUp and 0 < error.t < 0.999:
        assert torch.allclose(y[-1], tensor(1 / (1 - error.t), 0.5 / (1 - 0.5 * error.t)), rtol=1e-5)


def test_backwards_in_time():
    t = -torch.linspace(0, 2, 21, dtype=torch.float64)
    with pytest.warns(UserWarning, match="t = -0.[45]"):
        y = pyode.odeint(Broken(), tensor(1.0), t, options=RETURN)
    assert torch.allclose(y[:5, 0], torch.exp(t[:5]), rtol=1e-6)
    assert torch.equal(y[6:], y[6:7].expand(15, 1))
    assert float(y[-1].detach()) == pytest.approx(math.exp(-0.5), rel=1e-3)


def test_of_tuples():
    def func(t, y):
        return y[0] ** 2, -y[1]

    with pytest.warns(UserWarning, match="last state"):
        a, b = pyode.odeint(func, (tensor(1.0), torch.ones(2, 2)), tensor(0.0, 0.5, 2.0, 3.0), options=RETURN)
    assert torch.equal(a[2], a[3])
    assert torch.equal(b[2], b[3])
    assert torch.allclose(b[2], torch.full((2, 2), math.exp(-1), dtype=torch.float64), rtol=1e-2)


@pytest.mark.filterwarnings("ignore:the solve failed:UserWarning")
def test_a_state_of_one_number_stays_one():
    for method in ("dopri5", "adams"):
        t = tensor(0.0, 1.0, 2.0).requires_grad_()
        y = pyode.odeint(Broken(), torch.tensor(1.0, dtype=torch.float64), t, method=method, options=RETURN)
        assert y.shape == (3,)


def test_nothing_is_warned_of_a_solve_that_succeeds():
    y = pyode.odeint(BlowUp(), tensor(1.0), tensor(0.0, 0.5), options=RETURN)
    assert float(y[-1].detach()) == pytest.approx(2.0)


def test_counts_are_added_all_the_same():
    stats = Stats()
    with pytest.warns(UserWarning, match="max_num_steps"):
        pyode.odeint(BlowUp(), tensor(1.0), tensor(0.0, 2.0), options={**RETURN, "stats": stats, "max_num_steps": 8})
    assert stats.n_steps == 8


def test_only_two_words_are_known():
    for wrong in ("ignore", None, True):
        with pytest.raises(InvalidValue, match=re.escape("options['on_failure'] must be 'raise' or 'return'")):
            pyode.odeint(BlowUp(), tensor(1.0), tensor(0.0, 0.5), options={"on_failure": wrong})
    assert pyode.odeint(BlowUp(), tensor(1.0), tensor(0.0, 0.5), options={"on_failure": "raise"}).shape == (2, 1)


@INTERFACES
@pytest.mark.parametrize("name", ["too many steps", "not finite", "not finite, adams"])
@pytest.mark.filterwarnings("ignore:the solve failed:UserWarning")
def test_gradients_are_those_of_the_state_where_it_failed(name, interface):
    # Of y(t1) with t1 the failure's time, however many times it is repeated.
    kind, kwargs, _ = FAILURES[name]
    t = torch.linspace(0, 2, 11, dtype=torch.float64)
    weights = torch.linspace(1, 2, 11, dtype=torch.float64)[:, None]
    end = solve_both_ways(name, interface, t)[0].t
    good = int((t <= end).sum())

    def gradients(solve, t, weights, **kwargs):
        func, y0, t = kind(), tensor(1.0, 0.5).requires_grad_(), t.clone().requires_grad_()
        (weights * solve(func, y0, t, **kwargs)).sum().backward()
        return [y0.grad, func.rate.grad, t.grad]

    kwargs = {**kwargs, "options": {**kwargs.get("options", {}), **RETURN}}
    if interface == "odeint_adjoint":
        kwargs["adjoint_options"] = {}  # max_num_steps is not for the backward solve
    found = gradients(getattr(pyode, interface), t, weights, **kwargs)
    # The same by a solve that ends just there.
    times = torch.cat([t[:good], tensor(end - 1e-9)]) if end > t[good - 1] else t[:good]
    folded = torch.cat([weights[: len(times) - 1], weights[len(times) - 1 :].sum(0, keepdim=True)])
    expected = gradients(pyode.odeint, times, folded, rtol=1e-10, atol=1e-10)
    for ours, exact in zip(found[:2], expected):
        assert torch.allclose(ours, exact, rtol=1e-5)
    assert torch.allclose(found[2][1:good], expected[2][1:good], rtol=1e-4)
    assert torch.equal(found[2][good:], torch.zeros(11 - good, dtype=torch.float64))
    assert float(found[2][0]) == pytest.approx(float(expected[2][0]), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"step_size": 0.07}], ids=["at an output", "between outputs"])
@pytest.mark.filterwarnings("ignore:the solve failed:UserWarning")
def test_all_ways_to_the_gradient_of_a_repeated_state_agree(options):
    found = []
    for gradient in ("direct", "checkpoint", "adjoint"):
        func, y0 = Unsolvable(), tensor(1.0, 0.5).requires_grad_()
        t = torch.linspace(0, 1, 21, dtype=torch.float64, requires_grad=True)
        y = pyode.odeint(
            func, y0, t, method="radauIIA5", options={**RETURN, "interp": "cubic", "gradient": gradient, **options}
        )
        assert torch.equal(y[-1], y[-2])
        weights = torch.arange(21.0).double()[:, None]
        found.append(torch.autograd.grad((weights * y).sum(), (y0, func.rate, t)))
        # The last output that was reached moves with its time, those behind it do not.
        of_times = (weights * func.rate * y).sum(1)
        assert torch.allclose(found[-1][2][1:10], of_times[1:10], rtol=1e-4)  # the interpolant's error
        assert not found[-1][2][10:].any()
    for others in found[1:]:
        for gradient, expected in zip(others, found[0]):
            assert torch.allclose(gradient, expected, rtol=1e-5)  # the steps' error


@pytest.mark.parametrize("name", ["not finite at the start", "no steps at all"])
@pytest.mark.filterwarnings("ignore:the solve failed:UserWarning")
@INTERFACES
def test_a_failure_at_the_start_returns_the_start(name, interface):
    kind, kwargs, _ = FAILURES[name]
    y0, t = tensor(1.0, 0.5).requires_grad_(), tensor(0.0, 1.0, 2.0).requires_grad_()
    options = {**kwargs.get("options", {}), **RETURN}
    y = getattr(pyode, interface)(kind(), y0, t, options=options)
    assert torch.equal(y, y0.expand(3, 2))
    y.sum().backward()
    assert torch.equal(y0.grad, 3 * torch.ones_like(y0))


def test_a_backward_solve_that_fails_still_raises():
    func, y0 = BlowUp(), tensor(1.0).requires_grad_()
    y = pyode.odeint_adjoint(func, y0, tensor(0.0, 0.5), adjoint_options={"max_num_steps": 2})
    with pytest.raises(SolveError):
        y.sum().backward()
    # Its gradients would be silently wrong: on_failure is the forward solve's alone.
    y = pyode.odeint_adjoint(func, y0, tensor(0.0, 0.5), options=RETURN, adjoint_options={"max_num_steps": 2, **RETURN})
    with pytest.raises(SolveError):
        y.sum().backward()


@pytest.mark.parametrize("solve", [{}, {"method": "rk4"}], ids=["dopri5", "rk4"])
@INTERFACES
def test_with_an_event_the_state_at_the_failure_and_its_time(solve, interface):
    # The event would be at the time of the blow-up.
    y0, options = tensor(1.0).requires_grad_(), {**RETURN, "event_t_max": 0.9}
    options |= {"step_size": 0.01} if solve else {}
    with pytest.warns(UserWarning, match="no event"):
        time, y = getattr(pyode, interface)(
            BlowUp(), y0, tensor(0.0, 1.0), event_fn=lambda t, y: y - 1e3, options=options, **solve
        )
    assert float(time.detach()) == 0.9
    assert torch.allclose(y[:, 0], tensor(1.0, 10.0), rtol=1e-4)
    (gradient,) = torch.autograd.grad(y[1].sum(), y0)
    assert float(gradient) == pytest.approx(100.0, rel=1e-3)  # y0 / (1 - y0 t), by y0: 1 / (1 - y0 t)^2


@pytest.mark.parametrize(
    "solve", [{}, {"method": "adams"}, {"method": "radauIIA5", "options": {"step_size": 0.003}}], ids=str
)
@INTERFACES
def test_with_an_event_a_solve_that_fails_before_it(interface, solve):
    def run(**options):
        return getattr(pyode, interface)(
            Unsolvable(), tensor(1.0), tensor(0.0, 1.0), event_fn=lambda t, y: y - 5,
            **{**solve, "options": {**solve.get("options", {}), **options}},
        )  # fmt: skip

    with pytest.warns(UserWarning, match=r"at t = 0\.(49|5)"):
        time, y = run(**RETURN)
    assert float(time.detach()) == pytest.approx(0.5, abs=5e-3)  # two steps of fixed size
    assert torch.allclose(y[1], torch.exp(time), rtol=1e-5)
    with pytest.raises(SolveError) as caught:
        run()
    assert caught.value.status is Status.NON_FINITE


SMALL = {"options": {"step_size": 0.1}}
FAILING = {
    "odeint": lambda f, y: pyode.odeint(f, y, tensor(0.0, 2.0)),
    "adams": lambda f, y: pyode.odeint(f, y, tensor(0.0, 2.0), method="adams"),
    "trbdf2": lambda f, y: pyode.odeint(f, y, tensor(0.0, 2.0), method="trbdf2", **SMALL),
    "scipy": lambda f, y: pyode.odeint(f, y, tensor(0.0, 2.0), method="scipy_solver"),
    "checkpoint": lambda f, y: pyode.odeint(f, y, tensor(0.0, 2.0), options={"gradient": "checkpoint"}),
    "adjoint": lambda f, y: pyode.odeint_adjoint(f, y, tensor(0.0, 2.0)),
    "solve_ivp": lambda f, y: pyode.solve_ivp(f, y, tensor(0.0, 2.0)),
    "no event": lambda f, y: pyode.odeint_event(
        f, y.nan_to_num(), 0.0, event_fn=lambda t, y: y + 9, method="rk4",
        options={**SMALL["options"], "event_t_max": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("solve", FAILING.values(), ids=FAILING)
def test_a_solve_that_has_failed_is_gone_with_its_error(solve):
    # At once: a cycle of the error and a frame that knows it would keep all until Python looks for cycles.
    gc.collect()
    gc.disable()
    try:
        func, y0 = BlowUp(), tensor(math.nan)
        alive = [weakref.ref(func), weakref.ref(y0)]
        with pytest.raises(SolveError) as caught:
            solve(func, y0)
        del func, y0, caught
        assert [x() for x in alive] == [None, None]
    finally:
        gc.enable()
