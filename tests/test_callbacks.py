"""Callbacks: the same calls as torchdiffeq's, forwards and in the adjoint's backward solve."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchdiffeq
from problems import tensor, van_der_pol
from torch import nn

import pyode
from pyode import Stats

SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
INTERFACES = pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
NAMES = ("callback_step", "callback_accept_step", "callback_reject_step")
ADJOINT_NAMES = tuple(name + "_adjoint" for name in NAMES)
Y0 = tensor(2.0, 0.0)


class Recording(nn.Module):
    """Van der Pol's oscillator, which notes what its callbacks are given."""

    names = NAMES

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.calls: list = []
        for name in self.names:
            setattr(self, name, lambda t0, y0, dt, name=name: self.calls.append((name, t0, y0, dt)))

    def forward(self, t, y):
        return van_der_pol(t, y, self.mu)


class RecordingAdjoint(Recording):
    names = ADJOINT_NAMES


class OfTuples(Recording):
    """The same with position and velocity apart."""

    def forward(self, t, y):
        return tuple(super().forward(t, torch.stack(y)).unbind())


def compare(ours: list, theirs: list, tolerance: float = 1e-7) -> None:
    """Names, kinds and numbers of all calls."""
    assert [call[0] for call in ours] == [call[0] for call in theirs]
    assert ours
    for (name, *values), (_, *expected) in zip(ours, theirs):
        for x, y in zip(values, expected):
            assert isinstance(x, tuple) == isinstance(y, tuple)
            for a, b in zip(x, y) if isinstance(x, tuple) else [(x, y)]:
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
                assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), name


OPTIONS = {
    "dopri5": {},
    "bosh3": {},
    "dopri8": {"first_step": 0.05},
    "rk4": {"step_size": 0.03},
    "euler": {"step_size": 0.03},
    "explicit_adams": {"step_size": 0.03, "max_order": 4},
}


@SIGNS
@INTERFACES
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("kind", [Recording, OfTuples])
@pytest.mark.filterwarnings("ignore:Solver '.*' does not support callbacks:UserWarning")
def test_calls_are_torchdiffeqs(kind, method, interface, sign):
    t, found = sign * torch.linspace(0, 4 if method in ("dopri5", "bosh3") else 1.5, 4, dtype=torch.float64), []
    for module in (pyode, torchdiffeq):
        func, y0 = kind(), Y0 if kind is Recording else tuple(Y0.unbind())
        getattr(module, interface)(func, y0, t, rtol=1e-4, atol=1e-6, method=method, options=OPTIONS[method])
        found.append(func.calls)
    compare(*found, tolerance=1e-3 if method == "dopri8" else 1e-7)
    if method in ("dopri5", "bosh3"):
        assert {name for name, *_ in found[0]} == set(NAMES)  # some steps were rejected


@pytest.mark.parametrize("options", [
    {"step_t": tensor(0.3, 0.8)}, {"jump_t": tensor(0.3, 0.8)}, {"max_step": 0.05}, {"first_step": 2.0},
    {"min_step": 0.1, "first_step": 0.01},
], ids=str)  # fmt: skip
def test_sizes_are_those_before_and_after_an_option_has_cut_them(options):
    found = []
    for module in (pyode, torchdiffeq):
        func = Recording()
        module.odeint(func, Y0, tensor(0.0, 0.5, 1.5), rtol=1e-4, atol=1e-6, options=options)
        found.append(func.calls)
    compare(*found)


@pytest.mark.parametrize("time", [torch.float32, torch.float64])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.filterwarnings("ignore:Solver '.*' does not support callbacks:UserWarning")
def test_times_are_of_torchdiffeqs_dtypes(method, state, time):
    seen = []
    for module in (pyode, torchdiffeq):
        func, t = Recording().to(state), torch.linspace(0, 0.2, 3, dtype=time)
        module.odeint(func, Y0.to(state), t, rtol=1e-2, atol=1e-2, method=method)
        seen.append({(t0.dtype, t0.shape, y0.dtype, dt.dtype, dt.shape) for _, t0, y0, dt in func.calls})
    assert seen[0] == seen[1]


def test_their_number_is_that_of_the_steps():
    stats, func = Stats(), Recording()
    pyode.odeint(func, Y0, tensor(0.0, 8.0), rtol=1e-4, atol=1e-6, options={"stats": stats})
    count = Counter(name for name, *_ in func.calls)
    assert count["callback_accept_step"] == stats.n_accepted
    assert count["callback_reject_step"] == stats.n_rejected > 3
    assert count["callback_step"] == stats.n_steps


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "explicit_adams"])
@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.filterwarnings("ignore:Solver '.*' does not support callbacks:UserWarning")
def test_of_the_backward_solve_they_are_given_the_adjoint_state(method, tuples, time):
    found = []
    for module, restart in ((pyode, {"restart": True}), (torchdiffeq, {})):
        func = RecordingAdjoint()
        if tuples:
            func.forward = lambda t, y, f=func: tuple(RecordingAdjoint.forward(f, t, torch.stack(y)).unbind())
        y0 = tuple(Y0.unbind()) if tuples else Y0.clone().requires_grad_()
        t = torch.linspace(0, 1, 3, dtype=torch.float64, requires_grad=time)
        options = OPTIONS[method]
        y = module.odeint_adjoint(
            func, y0, t, rtol=1e-4, atol=1e-6, method=method, options=options, adjoint_options={**options, **restart}
        )
        assert not func.calls
        (sum(part.sum() for part in y) if tuples else y.square().sum()).backward()
        found.append(func.calls)
    compare(*found, tolerance=1e-6)
    assert all(isinstance(y0, tuple) and len(y0) == 4 for _, _, y0, _ in found[0])


def test_with_both_kinds_each_solve_calls_its_own():
    class Both(Recording):
        names = NAMES + ADJOINT_NAMES

    func = Both()
    y = pyode.odeint_adjoint(func, Y0, tensor(0.0, 0.5, 1.0))
    assert {name for name, *_ in func.calls} <= set(NAMES)
    forward = len(func.calls)
    y.sum().backward()
    assert {name for name, *_ in func.calls[forward:]} <= set(ADJOINT_NAMES)
    assert len(func.calls) > forward


@pytest.mark.parametrize("method", ["rk4", "euler", "explicit_adams", "implicit_adams"])
def test_what_a_method_does_not_call_is_named_in_a_warning(method):
    for module in (pyode, torchdiffeq):
        with pytest.warns(UserWarning, match=f"Solver '{method}' does not support callbacks") as caught:
            module.odeint(Recording(), Y0, tensor(0.0, 0.1), method=method)
        (message,) = [str(warning.message) for warning in caught if "callbacks" in str(warning.message)]
        for name in NAMES:
            assert (name in message) == (name != "callback_step")


def test_scipys_solvers_call_none():
    for module in (pyode, torchdiffeq):
        func = Recording()
        with torch.no_grad(), pytest.warns(UserWarning, match="does not support callbacks") as caught:
            module.odeint(func, Y0, tensor(0.0, 0.1), method="scipy_solver")
        assert any(all(name in str(warning.message) for name in NAMES) for warning in caught)
        assert not func.calls


def test_callbacks_that_are_supported_warn_of_nothing():
    class Step:
        def __init__(self):
            self.n = 0

        def callback_step(self, t0, y0, dt):
            self.n += 1

        def __call__(self, t, y):
            return -y

    for method in ("dopri5", "rk4"):  # warnings are errors here
        func = Step()
        pyode.odeint(func, Y0, tensor(0.0, 0.1, 0.2), method=method)
        assert func.n >= 2


def test_they_may_be_a_functions_attributes_a_classs_or_an_instances():
    seen = []

    def func(t, y):
        return -y

    func.callback_step = lambda t0, y0, dt: seen.append("function")

    class OnClass(nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step(self, t0, y0, dt):
            assert self.training
            seen.append("class")

    on_instance = nn.Linear(2, 2)
    on_instance.forward = lambda t, y: -y
    on_instance.callback_step = lambda t0, y0, dt: seen.append("instance")
    for f in (func, OnClass(), on_instance):
        pyode.odeint(f, Y0, tensor(0.0, 0.1), method="euler")
    assert seen == ["function", "class", "instance"]


@SIGNS
def test_up_to_an_event_they_are_called_for_every_step(sign):
    found = []
    for module in (pyode, torchdiffeq):
        func = Recording()
        module.odeint(func, Y0, sign * tensor(0.0, 1.0), rtol=1e-4, atol=1e-6, event_fn=lambda t, y: y[0] - 0.5)
        found.append(func.calls)
    compare(*found)


def test_an_exception_in_one_passes_through():
    class Stop(Exception):
        pass

    def stop(t0, y0, dt):
        raise Stop

    for name in NAMES:
        func = Recording()
        setattr(func, name, stop)
        with pytest.raises(Stop):
            pyode.odeint(func, Y0, tensor(0.0, 8.0), rtol=1e-4, atol=1e-6)


def test_the_solution_is_the_same_with_and_without_them():
    with torch.no_grad():
        plain = pyode.odeint(van_der_pol, Y0, tensor(0.0, 1.0, 2.0))
    func = Recording()
    func.mu.data.fill_(1.0)
    with torch.no_grad():
        assert torch.equal(pyode.odeint(func, Y0, tensor(0.0, 1.0, 2.0)), plain)
