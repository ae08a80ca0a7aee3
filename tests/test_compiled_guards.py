"""What compiled dynamics read anew at every solve, and what has them traced again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
import torch
from fields import Field
from problems import tensor
from torch import nn

import pyode


def strict(f):
    return pyode.compile(f, strict=True)


FACTOR = 1.0


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2).double()

    def forward(self, t, y):
        return self.net(y)


class TestWhatIsReadAnew:
    y0, t = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), tensor(0.0, 1.0)

    def check(self, f, g=None, dtype=torch.float64):
        y0, t = self.y0.to(dtype), self.t.to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(*(pyode.odeint(h, y0, t, method="midpoint") for h in (f, g or f.func)))

    def test_parameters_changed_in_place_need_no_new_trace(self):
        f = strict(Linear())
        self.check(f)
        library = f._distinct[0].library
        with torch.no_grad():
            f.func.net.weight.mul_(2)
        f.func.net.bias.data = torch.randn(2, dtype=torch.float64)
        self.check(f)
        assert f._distinct[0].library is library

    def test_parameters_replaced(self):
        f = strict(Field())
        self.check(f)
        f.func.rate = nn.Parameter(f.func.rate.detach() + 1)
        self.check(f)
        f.func.matrix = f.func.matrix  # the same one
        self.check(f)

    def test_a_module_moved_to_another_dtype(self):
        net = nn.Linear(2, 2).double()
        f = strict(lambda t, y: net(y))
        self.check(f)
        net.float()
        self.check(f, dtype=torch.float32)
        net.double()
        self.check(f)

    def test_plain_attributes_training_flags_and_closures(self):
        class Scaled(nn.Module):
            scale = 1.0

            def forward(self, t, y):
                return y * (self.scale if self.training else -self.scale)

        module = Scaled()
        f = strict(module)
        self.check(f)
        module.scale = 0.5
        self.check(f)
        module.eval()
        self.check(f)
        factor, tensors = 1.0, [torch.ones(2, dtype=torch.float64)]

        def closure(t, y):
            return factor * y * tensors[0]

        g = strict(closure)
        self.check(g)
        factor = 2.0
        self.check(g)
        tensors[0] = -tensors[0]
        self.check(g)
        tensors[0].mul_(3)
        self.check(g)

    def test_slots_keyword_defaults_and_queues(self):
        @dataclass(slots=True)
        class Scaled:
            scale: float
            factor: torch.Tensor

            def __call__(self, t, y):
                return self.scale * self.factor * y

        scaled = Scaled(1.0, torch.ones(2, dtype=torch.float64))
        f = strict(scaled)
        self.check(f, scaled)
        scaled.scale = 0.5
        self.check(f, scaled)
        scaled.factor = -scaled.factor
        self.check(f, scaled)

        queue, linear = deque([1.0]), Linear()

        def with_default(t, y, *, module=linear):
            return module(t, y) * queue[0]

        g = strict(with_default)
        self.check(g)
        queue[0] = 2.0
        self.check(g)
        linear.net.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        self.check(g)

    def test_a_functions_defaults_and_code_replaced(self):
        def scaled(t, y, rate=torch.tensor(1.0, dtype=torch.float64), *, sign=1.0):  # noqa: B008
            return sign * rate * y

        f = strict(scaled)
        self.check(f)
        scaled.__defaults__ = (torch.tensor(1.0, dtype=torch.float64),)  # equal, but read at another place
        scaled.__defaults__[0].mul_(2)
        self.check(f)
        scaled.__kwdefaults__ = {"sign": -1.0}
        self.check(f)
        scaled.__code__ = (lambda t, y, rate, *, sign: rate - y).__code__
        self.check(f)

    def test_global_variables_are_not(self, monkeypatch):
        f = strict(lambda t, y: FACTOR * y)
        before = pyode.odeint(f, self.y0, self.t, method="euler")
        monkeypatch.setitem(globals(), "FACTOR", 2.0)
        assert torch.equal(pyode.odeint(f, self.y0, self.t, method="euler"), before)

    def test_times_written_in_place(self):
        f, t = strict(lambda t, y: -y), tensor(0.0, 1.0)
        first = pyode.odeint(f, self.y0, t)
        t[1] = 2.0
        assert not torch.equal(first, pyode.odeint(f, self.y0, t))


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_inference_mode(control):
    f, y0 = Linear(), torch.rand(5, 2, dtype=torch.float64)
    compiled = strict(f)
    with torch.inference_mode():
        for t in (tensor(0.0, 1.0), tensor(0.0, 0.3)):
            for _ in range(2):
                t *= 0.5
                found = [pyode.solve_ivp(g, y0, t, control=control).ys for g in (compiled, f)]
                torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
