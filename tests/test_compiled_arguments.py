"""Compiled dynamics with args, counters, copies; solve_ivp(compile=); "auto"."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from problems import tensor, van_der_pol
from torch import Tensor, nn

import pyode
from pyode.compiled import dynamics, entry
from pyode.compiled.dynamics import CompiledDynamics

T = tensor(0.0, 0.4, 1.0)
Y0 = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def strict(f):
    return pyode.compile(f, strict=True)


@pytest.fixture
def traces(monkeypatch) -> list[int]:
    """Grows by one at every trace."""
    found: list[int] = []
    original = entry.trace
    monkeypatch.setattr(entry, "trace", lambda *args: found.append(1) or original(*args))
    return found


class TestArgs:
    def f(self, t, y, scale, parts):
        return -scale * y * parts["rate"] + parts["shift"]

    def found(self, solve, f, scale, rate, shift) -> list[Tensor]:
        inputs = [x for x in (Y0.clone().requires_grad_(), scale, rate, shift) if isinstance(x, Tensor)]
        ys = solve(f, inputs[0], T, args=(scale, {"rate": rate, "shift": shift}), rtol=1e-8, atol=1e-10)
        ys = getattr(ys, "ys", ys)
        return [ys.detach(), *torch.autograd.grad(ys.square().sum(), [x for x in inputs if x.requires_grad])]

    @pytest.mark.parametrize("control", ["joint", "per_sample", "adjoint"])
    def test_tensors_are_inputs_with_gradients_and_all_else_is_part_of_the_code(self, control, traces):
        def solve(f, *args, **others):
            if control == "adjoint":
                return pyode.odeint_adjoint(f, *args, adjoint_params=(), **others)
            return pyode.solve_ivp(f, *args, control=control, **others)

        f, n = strict(self.f), []
        for scale in (0.5, 0.5, 0.7, tensor(0.7), tensor(1.1)):
            rate, shift = (torch.rand(2, dtype=torch.float64).requires_grad_() for _ in range(2))
            for ours, theirs in zip(*(self.found(solve, g, scale, rate, shift) for g in (f, self.f))):
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
            n.append(len(traces))
        assert n[0] == n[1] < n[2] < n[3] == n[4]

    def test_one_tensor_in_two_places(self):
        shared = tensor(0.3, 0.4).requires_grad_()
        for ours, theirs in zip(*(self.found(pyode.odeint, g, 1.0, shared, shared) for g in (strict(self.f), self.f))):
            torch.testing.assert_close(ours, theirs)
        closed = strict(lambda t, y, a: -y * a * shared)  # the same one in args
        found = []
        for g in (closed, closed.func):
            ys = pyode.odeint_adjoint(g, Y0, T, args=(shared,), adjoint_params=(shared,), rtol=1e-9, atol=1e-11)
            found.append(torch.autograd.grad(ys.sum(), shared)[0])
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)

    def test_zero_is_not_minus_zero_and_a_module_is_looked_into(self):
        f = strict(lambda t, y, x, net: math.copysign(1.0, x) * net(y))
        net = nn.Linear(2, 2).double()
        for x in (0.0, -0.0):
            for weight in (net.weight.detach() * 2, net.weight.detach()):
                net.weight = nn.Parameter(weight)
                with torch.no_grad():
                    ours, theirs = (pyode.odeint(g, Y0, T, args=(x, net), method="euler") for g in (f, f.func))
                torch.testing.assert_close(ours, theirs)

    def test_what_is_kept_for_args_is_bounded(self, monkeypatch):
        monkeypatch.setattr(dynamics, "MOST_KINDS_OF_ARGS", 2)
        f = strict(lambda t, y, x: -x * y)
        for x in (0.1, 0.2, 0.3, 0.1):
            torch.testing.assert_close(*(pyode.odeint(g, Y0, T, args=(x,), method="euler") for g in (f, f.func)))
        assert len(f._with_args) == 2


def test_an_eager_solve_of_the_same_kind_leaves_a_compiled_one_compiled():
    n = [0]

    def f(t, y):
        n[0] += 1
        return -y

    compiled = strict(f)
    for _ in range(2):
        pyode.odeint(compiled, Y0, T)
        pyode.odeint(f, Y0, T)
    pyode.odeint(compiled, 2 * Y0, T.clone())
    before = n[0]
    pyode.odeint(compiled, 2 * Y0, T.clone())
    assert n[0] == before


class TestCounters:
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.calls, self.sign = 0, [0], -1

        def forward(self, t, y):
            self.n += 1
            self.calls[0] += 1
            return self.sign * y

    def test_need_no_trace_when_they_are_set_anew(self, traces):
        f = strict(self.Counted())
        for i in range(4):
            f.func.n, f.func.calls[0] = i, 0
            pyode.odeint(f, Y0, T, method="euler")
        assert len(traces) == 1
        f.func.sign = 1
        ours, theirs = (pyode.odeint(g, Y0, t, method="euler") for g, t in ((f, T), (self.Counted(), -T)))
        torch.testing.assert_close(ours, theirs)
        assert len(traces) == 2

    def test_nor_do_variables_of_a_closure(self, traces):
        n = 0

        def f(t, y):
            nonlocal n
            n += 1
            return -y

        compiled = strict(f)
        for _ in range(3):
            n = 0
            pyode.odeint(compiled, Y0, T, method="euler")
        assert len(traces) == 1


def test_copies_and_pickles_trace_anew():
    net = strict(_Module())
    first = pyode.odeint(net, Y0, T, method="euler")
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other, CompiledDynamics)
        assert torch.equal(pyode.odeint(other, Y0, T, method="euler"), first)


class _Module(nn.Module):
    def forward(self, t, y):
        return -y


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_solve_ivp_compiles_its_func(control):
    n = [0]

    def f(t, y):
        n[0] += 1
        return van_der_pol(t, y)

    with torch.no_grad():
        theirs = pyode.solve_ivp(f, Y0, T, control=control)
        pyode.solve_ivp(f, Y0, T, control=control, compile=True)
        before = n[0]
        ours = pyode.solve_ivp(f, Y0, T, control=control, compile=True)
    assert n[0] == before
    torch.testing.assert_close(ours.ys, theirs.ys)
    for name in ("n_accepted", "n_rejected", "n_f_evals"):
        assert torch.equal(getattr(ours.stats, name), getattr(theirs.stats, name))
    assert torch.equal(ours.status, theirs.status)


def test_a_failure_is_told_as_by_the_eager_solve():
    found = []
    for f in (strict(lambda t, y: y**2), lambda t, y: y**2):
        found.append(pyode.solve_ivp(f, Y0.abs() + 1, 5 * T, control="joint", throw=False))
    ours, theirs = found
    assert torch.equal(ours.status, theirs.status)
    torch.testing.assert_close(ours.ys, theirs.ys, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", ["yes", 2, []])
def test_other_values_of_compile(value):
    with pytest.raises(pyode.InvalidValue, match="compile must be True, False or 'auto'"):
        pyode.odeint(van_der_pol, Y0, T, options={"compile": value})
    with pytest.raises(pyode.InvalidValue, match="compile must be True, False or 'auto'"):
        pyode.solve_ivp(van_der_pol, Y0, T, compile=value)
    with pytest.raises(pyode.InvalidValue, match="which for solve_ivp is the argument compile"):
        pyode.solve_ivp(van_der_pol, Y0, T, options={"compile": True})


class TestAuto:
    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("eager_is_faster", [False, True])
    def test_takes_the_faster_way(self, gradients, eager_is_faster, monkeypatch):
        tried = []

        def seconds(make, y0, wanted):
            loop = make(y0)
            loop.solve(y0)
            native = hasattr(loop, "inputs")
            tried.append((native, len(wanted)))
            return float(native is eager_is_faster)

        monkeypatch.setattr(dynamics, "_seconds", seconds)
        n = [0]

        def func(t, y):
            n[0] += 1
            return -y

        f, y0 = pyode.compile(func, auto=True), Y0.clone().requires_grad_(gradients)
        stats = pyode.Stats()
        for _ in range(3):
            pyode.odeint(f, y0, T, options={"stats": stats})
        assert tried == [(True, gradients), (False, gradients)]  # once, and with gradients if they are wanted
        before = n[0]
        pyode.odeint(f, y0, T)
        assert (n[0] > before) is eager_is_faster
        expected = pyode.Stats()
        for _ in range(3):
            pyode.odeint(func, Y0, T, options={"stats": expected})
        assert stats == expected  # what was tried is not counted
        assert ("eager" if eager_is_faster else "compiled") in repr(f).splitlines()[-1].rpartition(":")[2]

    def test_a_wide_network_and_a_small_one_are_measured(self):
        f = pyode.compile(lambda t, y: torch.tanh(y), auto=True)
        for y0 in (Y0, torch.randn(1000, 2, dtype=torch.float64)):
            torch.testing.assert_close(pyode.odeint(f, y0, T), pyode.odeint(f.func, y0, T))
            pyode.solve_ivp(f, y0, T)
        assert len(f.costs) == 4
        assert all(0 < seconds < 10 for pair in f.costs.values() for seconds in pair)

    def test_chooses_in_earnest(self):
        """Wide matrices across rows belong to a BLAS; a few numbers a row do not."""
        mixing, t = torch.randn(64, 64) / 8, T.float()
        for func, y0, expected in (
            (lambda t, y: torch.tanh(mixing @ y) @ mixing - y, torch.randn(64, 64), "eager"),
            (van_der_pol, torch.randn(20, 2), "compiled"),
        ):
            f = pyode.compile(func, auto=True)
            ours = pyode.odeint(f, y0, t, rtol=1e-5, atol=1e-7)
            ((native, eager),) = f.costs.values()
            assert min((native, "compiled"), (eager, "eager"))[1] == expected
            assert repr(f).endswith(f": {expected}")
            torch.testing.assert_close(ours, pyode.odeint(func, y0, t, rtol=1e-5, atol=1e-7), rtol=1e-4, atol=1e-4)

    def test_what_cannot_be_compiled_is_eager(self):
        f = pyode.compile(lambda t, y: y if y.sum() > 0 else -y, auto=True)
        with pytest.warns(UserWarning, match="runs eagerly"):
            pyode.odeint(f, Y0, T)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyode.odeint(f, Y0, T, options={"compile": "auto"})
