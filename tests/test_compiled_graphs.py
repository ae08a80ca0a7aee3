"""Random graphs of operators, compiled, against the same run eagerly: values and gradients, for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pyode
from pyode.compiled.entry import Entry
from pyode.methods import TABLEAUS

WIDTH, MOST = 3, 7  # of a state's row, and of what is computed from it
OF_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "exp": lambda x: torch.exp(-x.abs()),
    "log": lambda x: torch.log1p(x * x),
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.1),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "erf": torch.erf,
    "square": torch.square,
    "reciprocal": lambda x: 1 / (1 + x * x),
    "clamp": lambda x: x.clamp(-0.7, 1.1),
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], eps=0.1),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "max": lambda x: x.max(-1, keepdim=True).values,
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) + x,
    "cumsum": lambda x: x.cumsum(-1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "first": lambda x: x[:, :1],
    "rest": lambda x: x[:, 1:] if x.shape[1] > 1 else x,
    "every other": lambda x: x[:, ::2],
    "indexed": lambda x: x[:, [0, -1, 0]],
    "transposed": lambda x: x.unsqueeze(2).expand(-1, -1, 2).transpose(1, 2).reshape(-1, 2 * x.shape[1])[:, :MOST],
    "outer": lambda x: torch.einsum("bi,bj->bij", x[:, :2], x[:, :3]).flatten(1),
    "negative": lambda x: -x,
    "written": lambda x: _written(x),
}
OF_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / (1 + y.abs()),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where(x > y, 2 * x, y),
    "mask": lambda x, y: (x < 0.3) * y,
    "atan2": lambda x, y: torch.atan2(x, 1 + y * y),
    "pow": lambda x, y: (1 + x.abs()) ** torch.tanh(y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
}
BESIDE = {"cat": lambda x, y: torch.cat([x, y], 1)[:, :MOST], "dot": lambda x, y: x.sum(1, True) * y.sum(1, True)}


def _written(x: Tensor) -> Tensor:
    k = torch.zeros_like(x)
    k[:, 0] = x[:, -1]
    k[:, 1:] -= 0.5 * x[:, 1:]
    return k


@dataclass
class Line:
    """An operator on what the lines before it have computed, counted from the last."""

    operator: str
    operands: tuple[int, int]


class Program(nn.Module):
    """dy/dt by random operators, with parameters and time among what they take; bounded."""

    def __init__(self, lines: list[Line]) -> None:
        super().__init__()
        self.lines = lines
        self.matrix = nn.Parameter(torch.linspace(-1, 1, MOST * MOST).double().sin().reshape(MOST, MOST))
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.4, MOST).double())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        values = [torch.sin(3 * t) * y, self.bias[:2] * y[:, :2], y]
        for line in self.lines:
            x, z = (values[-1 - i % len(values)] for i in line.operands)
            if line.operator == "linear":
                n = x.shape[1]
                values.append(F.linear(x, self.matrix[:, :n], self.bias) / n)
            elif line.operator in OF_ONE:
                values.append(OF_ONE[line.operator](x))
            elif line.operator in BESIDE:
                values.append(BESIDE[line.operator](x, z))
            else:
                n = min(x.shape[1], z.shape[1])
                values.append(OF_TWO[line.operator](x[:, :n], z[:, :n] if z.shape[1] > 1 else z))
        out = sum(torch.tanh(value.mean(1, keepdim=True)) for value in values[-3:])
        return out - 0.5 * y

    def __repr__(self) -> str:
        return f"Program({self.lines})"


LINES = st.builds(
    Line,
    st.sampled_from(["linear", *OF_ONE, *OF_TWO, *BESIDE]),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
)


@given(st.lists(LINES, min_size=12, max_size=24), st.integers(1, 19))
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
def test_random_operators(lines, rows):
    """To 1e-11 of the largest: a few dozen operators lose some thousand roundings at the worst."""
    program = Program(lines)
    compiled = pyode.compile(program, strict=True)
    y0 = torch.linspace(-1.3, 1.7, rows * WIDTH, dtype=torch.float64).sin().reshape(rows, WIDTH).requires_grad_()
    t, found = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64), []
    for f in (compiled, program):
        ys = pyode.odeint(f, y0, t, method="midpoint")
        weights = torch.linspace(0.5, 1.5, ys.numel(), dtype=torch.float64).reshape(ys.shape)
        inputs = [y0, program.matrix, program.bias]
        gradients = torch.autograd.grad((ys * weights).sum(), inputs, allow_unused=True)
        found.append([ys.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients))])
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11 * max(1.0, float(theirs.abs().max())))
    assert compiled.source


def test_what_is_not_needed_is_left_out_and_what_is_constant_is_computed_at_once():
    def f(t: Tensor, y: Tensor) -> Tensor:
        torch.exp(y)
        return torch.tanh(y) * torch.tanh(y) + torch.sin(torch.tensor(0.5, dtype=torch.float64)) * y

    source = Entry(f, [torch.Size([4, 2])], False, torch.float64, TABLEAUS["euler"]).source
    assert source.count("tanh(") == 2  # for each of two numbers once
    assert "exp(" not in source
    assert "sin(" not in source
