"""What is not compiled: one warning that names the reason, and the eager result; an error if strict."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import pyode


class TestRefusals:
    y0, t = torch.ones(3, 2), torch.tensor([0.0, 0.5])

    def check(self, f, reason: str) -> None:
        """One warning, the eager result, and an error if strict."""
        compiled = pyode.compile(f)
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match=reason) as caught:
            ours = pyode.odeint(compiled, self.y0, self.t)
        assert caught[0].filename == __file__
        torch.manual_seed(0)
        assert torch.equal(ours, pyode.odeint(f, self.y0, self.t))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyode.odeint(compiled, self.y0, self.t)
        with pytest.raises(pyode.CompileError, match=reason):
            pyode.odeint(pyode.compile(f, strict=True), self.y0, self.t)
        assert "not compiled" in str(compiled)

    def test_a_branch_on_a_value(self):
        self.check(lambda t, y: y if t < 0.25 else -y, r"value.*test_compiled_refusals.py:\d+")

    def test_a_conversion_to_a_number(self):
        w = torch.tensor(2.0)
        self.check(lambda t, y: y * float(w), r"value is read at .*test_compiled_refusals.py:\d+")
        self.check(lambda t, y: y * w.item(), "value is read")
        self.check(lambda t, y: y * w.tolist(), "tolist is called")
        self.check(lambda t, y: y * float(w.numpy()), "numpy is called")

    def test_random_numbers(self):
        self.check(lambda t, y: -y + 0 * torch.rand_like(y), "random numbers")
        self.check(lambda t, y: -y + 0 * nn.functional.dropout(y, 0.5), "random numbers")

    def test_writing_into_what_func_has_closed_over(self):
        calls = torch.zeros(1)

        def f(t, y):
            calls.add_(1)
            return -y

        self.check(f, "writes into a tensor")
        assert calls > 0

    def test_writing_into_the_state(self):
        for f in (lambda t, y: y.mul_(-1), lambda t, y: (y[:, 0].add_(1), -y)[1]):
            with pytest.raises(pyode.CompileError, match="func writes into its input"):
                pyode.odeint(pyode.compile(f, strict=True), self.y0, self.t)
            with (
                pytest.raises(pyode.DynamicsError, match="wrote into its input"),
                pytest.warns(UserWarning, match="func writes into its input"),
            ):
                pyode.odeint(pyode.compile(f), self.y0, self.t)

    def test_batch_norm_in_training(self):
        norm = nn.BatchNorm1d(2)
        self.check(lambda t, y: norm(y), r"add_ writes into a tensor that func has closed over at .*:\d+")
        f = pyode.compile(lambda t, y: nn.functional.batch_norm(y, None, None, training=True) - y)
        with pytest.warns(UserWarning, match="mixes rows"):
            ours = pyode.solve_ivp(f, self.y0, self.t, control="per_sample")
        assert torch.equal(ours.ys, pyode.solve_ivp(f.func, self.y0, self.t, control="per_sample").ys)

    def test_what_depends_on_whether_gradients_are_wanted(self):
        w = torch.tensor(0.5, requires_grad=True)

        def f(t, y):
            z = y * w
            if z.requires_grad:
                z.register_hook(lambda g: 2 * g)
            return -z

        with torch.no_grad():
            self.check(f, r"requires_grad is read at .*test_compiled_refusals.py:\d+")

    def test_an_unknown_operator(self):
        self.check(lambda t, y: torch.special.i0(y) * -1, "i0 at .*is not known")

    def test_complex_states(self):
        y0 = torch.ones(2, dtype=torch.complex64)
        with pytest.warns(UserWarning, match="complex64"):
            pyode.odeint(pyode.compile(lambda t, y: 1j * y), y0, self.t)

    def test_an_exception_of_the_users_passes_through(self):
        def f(t, y):
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"), pytest.warns(UserWarning, match="mine"):
            pyode.odeint(pyode.compile(f), self.y0, self.t)
