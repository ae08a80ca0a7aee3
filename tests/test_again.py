"""Loops that are used again: nothing of one solve is left in the next, and nothing is kept alive."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from factories import inspector_by_attributes
from torch import nn

import pyode
from pyode import again, state
from pyode.again import Idle, idle

T = torch.tensor([0.0, 0.5, 1.0])
Y0 = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


@pytest.fixture(autouse=True, params=[True, False], ids=["by DLPack", "by attributes"])
def _none_idle(request, monkeypatch):
    """No loops, and tensors looked at as torch's age has it."""
    if not request.param:
        by_attributes = inspector_by_attributes()
        monkeypatch.setattr(state, "inspector", by_attributes)
        monkeypatch.setattr(again, "kinds", again.kinds_by(by_attributes))
    monkeypatch.setattr(idle, "loops", Idle().loops)


def decay(t, y):
    return -y * (1 + t)


def growth(t, y):
    return 0.3 * y + t


def afresh(f, y0, t, *arguments):
    idle.loops.clear()
    return pyode.odeint(f, y0, t, *arguments)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "method", ["dopri5", "dopri8", "bosh3", "euler", "rk4", "explicit_adams", "implicit_adams", "trapezoid"]
)
def test_a_second_solve_has_the_bits_of_a_first(grad, method):
    with torch.set_grad_enabled(grad):
        first = [afresh(f, y0, T, 1e-5, 1e-7, method) for f, y0 in ((growth, 2 * Y0), (decay, Y0), (growth, Y0))]
        idle.loops.clear()
        then = [pyode.odeint(f, y0, T, 1e-5, 1e-7, method) for f, y0 in ((growth, 2 * Y0), (decay, Y0), (growth, Y0))]
    assert all(torch.equal(a, b) for a, b in zip(first, then))


@pytest.mark.parametrize("change", [
    {"y0": Y0.double()}, {"y0": Y0[:1]}, {"t": T * 2}, {"t": T[:2]}, {"t": T.flip(0)}, {"rtol": 1e-3}, {"atol": 1e-3},
    {"method": "tsit5"},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_a_solve_that_differs_is_one_of_its_own(change):
    arguments = {"y0": Y0, "t": T, "rtol": 1e-6, "atol": 1e-8, "method": "dopri5"}
    pyode.odeint(decay, **arguments)
    assert torch.equal(pyode.odeint(decay, **arguments | change), afresh(decay, *(arguments | change).values()))


@pytest.mark.parametrize("change", [
    {"t": torch.stack([T, 2 * T], 1)[:, 0]}, {"t": torch.view_as_complex(torch.stack([T, -T], 1)).conj().imag},
    {"y0": Y0.mT.contiguous().mT}, {"y0": torch.view_as_complex(torch.stack([Y0, -Y0], -1)).conj().imag},
], ids=["strided times", "negated times", "transposed start", "negated start"])  # fmt: skip
def test_views_are_what_they_show(change):
    arguments = {"y0": Y0, "t": T, "rtol": 1e-6, "atol": 1e-8}
    expected = afresh(decay, *arguments.values())
    for given in (arguments, arguments | change, arguments):
        assert torch.equal(pyode.odeint(decay, **given), expected)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_times_that_are_changed_in_place_are_seen(method):
    t = T.double().clone()
    y0, last = Y0.double(), (1e-7, 1e-9, method)
    pyode.odeint(decay, y0, t, *last)
    t.mul_(2)
    changed = pyode.odeint(decay, y0, t, *last)
    t.div_(2)
    assert torch.equal(changed, afresh(decay, y0, 2 * T.double(), *last))
    assert torch.equal(pyode.odeint(decay, y0, t, *last), afresh(decay, y0, T.double(), *last))


def test_wrong_arguments_are_still_errors():
    pyode.odeint(decay, Y0, T)
    with pytest.raises(pyode.InvalidType, match="func"):
        pyode.odeint(3, Y0, T)
    with pytest.raises(pyode.DynamicsError):
        pyode.odeint(lambda t, y: y[0], Y0, T)
    assert torch.equal(pyode.odeint(decay, Y0, T), afresh(decay, Y0, T))


@pytest.mark.parametrize(
    "meddle", [lambda t: t.requires_grad_(), lambda t: t.add_(0.25)], ids=["requires_grad_", "add_"]
)
def test_what_func_does_to_its_times_is_forgotten(meddle):
    def meddling(t, y):
        meddle(t)
        return -y

    seen = []

    def seeing(t, y):
        seen.append((float(t), t.requires_grad))
        return -y

    with torch.no_grad():
        pyode.odeint(meddling, Y0, T.clone())
        for _ in range(3):
            pyode.odeint(meddling, Y0, T)
            pyode.odeint(seeing, Y0, T)
            assert seen[0] == (0.0, False)
            assert not any(requires_grad for _, requires_grad in seen)
            seen.clear()


@pytest.mark.parametrize("written", [False, True], ids=["new", "written"])
def test_a_func_that_returns_one_buffer_or_writes_into_its_start_is_noticed_again(written):
    y0 = Y0.clone()
    if written:
        y0.mul_(1)
    buffer = torch.empty_like(Y0)
    with torch.no_grad():
        expected = afresh(lambda t, y: 0.5 * y, Y0, T)
        pyode.odeint(decay, y0, T)
        assert torch.equal(pyode.odeint(lambda t, y: torch.mul(y, 0.5, out=buffer), y0, T), expected)
        with pytest.raises(pyode.DynamicsError, match="wrote into"):
            pyode.odeint(lambda t, y: y.mul_(-1), y0, T)


def test_evaluations_are_counted_each_solve():
    counts = []
    for options in (None, {}, {"stats": pyode.Stats()}):
        n = 0

        def f(t, y):
            nonlocal n
            n += 1
            return -y

        with torch.no_grad():
            pyode.odeint(f, Y0, T, options=options)
        counts.append(n if not options else options["stats"].n_f_evals)
    assert len(set(counts)) == 1


def test_callbacks_are_called():
    def f(t, y):
        return -y

    pyode.odeint(f, Y0, T)
    called = []
    f.callback_step = lambda t, y, dt: called.append(float(t))
    pyode.odeint(f, Y0, T)
    assert called


def test_a_func_may_solve_the_same_kind_of_problem():
    def outer(t, y):
        return pyode.odeint(decay, y, T)[-1] * 0.1

    def alone(t, y):
        return afresh(decay, y, T)[-1] * 0.1

    pyode.odeint(decay, Y0, T)
    assert torch.equal(pyode.odeint(outer, Y0, T), afresh(alone, Y0, T))


def test_after_an_exception_in_func_the_next_solve_is_right():
    def f(t, y):
        if float(t) > 0.5:
            raise KeyError("mine")
        return -y

    pyode.odeint(decay, Y0, T)
    with pytest.raises(KeyError):
        pyode.odeint(f, Y0, T)
    assert torch.equal(pyode.odeint(decay, Y0, T), afresh(decay, Y0, T))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "euler", "implicit_adams", "trapezoid"])
def test_func_start_and_result_are_not_kept_alive(grad, method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, t, y):
            return self.linear(y)

    with torch.set_grad_enabled(grad):
        for _ in range(2):
            net, y0 = Net(), Y0.clone()
            y = pyode.odeint(net, y0, T, method=method)
    kept = [weakref.ref(x) for x in (net, y0, y)]
    del net, y0, y
    gc.collect()
    assert [x() for x in kept] == [None] * 3


def test_each_thread_has_its_own():
    wrong = []

    def many(f):
        expected = pyode.odeint(f, Y0, T)
        wrong.extend(1 for _ in range(50) if not torch.equal(pyode.odeint(f, Y0, T), expected))

    threads = [threading.Thread(target=many, args=(f,)) for f in (decay, growth, decay)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_few_are_kept():
    for n in range(2, 40):
        pyode.odeint(decay, Y0, torch.linspace(0, 1, n))
    assert len(idle.loops) == Idle.MOST
