"""The compiler's operators against torch: each on random numbers, many in one compiled func."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyode

UNARY = {
    "abs": torch.abs,
    "neg": torch.neg,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "atan": torch.atan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "asinh": torch.asinh,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "softsign": F.softsign,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,
    "frac": torch.frac,
    "sign": torch.sign,
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp_min": lambda x: x.clamp(min=0.1),
    "clamp_max": lambda x: x.clamp(max=0.1),
    "pow 2": lambda x: x**2,
    "pow 3": lambda x: x**3,
    "pow 7": lambda x: x**7,
    "pow -2": lambda x: x**-2,
    "pow 0": lambda x: x**0,
    "where": lambda x: torch.where(x > 0.2, x, 3 * x),
    "mask": lambda x: (x > 0) * x + (x < -1).to(x.dtype),
    "logic": lambda x: ((x > -1) & ~(x > 1) | (x > 2)) * x,
    "sinc": torch.sinc,
    "heaviside": lambda x: (x >= 0).to(x.dtype),
    "nan_to_num": lambda x: torch.nan_to_num(x / x),
    "remainder": lambda x: x % 0.7,
    "fmod": lambda x: torch.fmod(x, 0.7),
    "floor_divide": lambda x: x // 0.7,
    "isnan": lambda x: torch.isnan(x) * x.exp(),
    "literal": lambda x: 1 - x / 3 + 2 * x,
    "rsub": lambda x: torch.rsub(x, 2.0, alpha=3.0),
    "add alpha": lambda x: torch.add(x, x, alpha=0.5),
}
POSITIVE = {
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "pow 0.5": lambda x: x**0.5,
    "pow 1.7": lambda x: x**1.7,
    "base": lambda x: 1.7**x,
    "acosh": lambda x: torch.acosh(1 + x),
    "atanh": lambda x: torch.atanh(x / 4),
    "asin": lambda x: torch.asin(x / 4),
    "acos": lambda x: torch.acos(x / 4),
}
BINARY = {
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "pow": lambda x, y: x.abs() ** y,
    "fmax": torch.maximum,
    "eq": lambda x, y: (x == y) * x,
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=0.3),
    "ne": lambda x, y: (x != y) * y,
    "le": lambda x, y: (x <= y) * y,
}

W = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6).sin()
ROW = {
    "sum": lambda y: y.sum(-1, keepdim=True),
    "mean": lambda y: y - y.mean(1, keepdim=True),
    "prod": lambda y: y.prod(-1).unsqueeze(1),
    "amax": lambda y: y.amax(1, keepdim=True),
    "amin": lambda y: y.amin(1, keepdim=True),
    "var": lambda y: y.var(1, keepdim=True),
    "std": lambda y: y.std(1, keepdim=True),
    "norm": lambda y: y / y.norm(dim=1, keepdim=True),
    "norm 1": lambda y: y.norm(1, dim=1, keepdim=True),
    "norm inf": lambda y: torch.linalg.vector_norm(y, math.inf, 1, keepdim=True),
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: y.log_softmax(-1),
    "logsumexp": lambda y: y.logsumexp(-1, keepdim=True),
    "layer_norm": lambda y: F.layer_norm(y, (5,), y.new_ones(5), None),
    "normalize": lambda y: F.normalize(y, dim=1),
    "flip": lambda y: y.flip(1),
    "roll": lambda y: y.roll(2, 1),
    "index": lambda y: y[:, [3, 0, 0]],
    "slice": lambda y: y[:, 1::2],
    "ellipsis": lambda y: y[..., -1:],
    "chunk": lambda y: torch.cat(y.split([2, 3], 1)[::-1], 1),
    "repeat": lambda y: y.repeat(1, 2),
    "pad": lambda y: F.pad(y, (1, 2), value=0.5),
    "expand": lambda y: y[:, :1].expand(-1, 4),
    "tile": lambda y: torch.tile(y, (1, 2)),
    "matrix": lambda y: y @ W.to(y),
    "linear": lambda y: F.linear(y, W.T.to(y), W[0, :6].to(y)),
    "mv": lambda y: (y @ W[:, 0].to(y)).unsqueeze(1),
    "left": lambda y: (W.T.to(y) @ y.T).T,
    "einsum": lambda y: torch.einsum("bi,ij->bj", y, W.to(y)),
    "outer": lambda y: torch.einsum("bi,bj->bij", y, y).reshape(-1, 25),
    "quadratic": lambda y: torch.einsum("bi,ij,bj->b", y, W[:, :5].to(y), y)[:, None],
    "bmm": lambda y: torch.bmm(y.reshape(-1, 1, 5), y.reshape(-1, 5, 1)).reshape(-1, 1),
    "per row matrix": lambda y: (y.unsqueeze(2) * y.unsqueeze(1) @ y.unsqueeze(2)).squeeze(2),
    "dot": lambda y: (y * y).sum(1, keepdim=True),
    "stack": lambda y: torch.stack([y[:, 0], -y[:, 1]], 1),
    "zeros": lambda y: torch.zeros_like(y) + torch.ones(5).to(y),
    "where": lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
    "cumulative": lambda y: y @ torch.ones(5, 5).tril().to(y),
    "cross": lambda y: torch.linalg.cross(y[:, :3], y[:, 2:], dim=-1),
    "eye": lambda y: y @ torch.eye(5).to(y),
    "three axes": lambda y: (y.reshape(-1, 1, 5) * W[:2, :5].to(y).reshape(1, 2, 5)).transpose(1, 2).sum(2),
    "unbind": lambda y: torch.stack(y.unbind(1), 1),
    "masked": lambda y: y.masked_fill(y > 0, 0.25),
}


def once(f, y: Tensor) -> Tensor:
    """y + f(y), by one step of Euler's method."""
    return pyode.odeint(f, y, torch.tensor([0.0, 1.0], dtype=y.dtype), method="euler")


def columns(names: dict, of) -> object:
    """A func whose i-th column is the i-th function of the i-th one."""

    def f(t, y):
        return torch.stack([of(function, y, i) for i, function in enumerate(names.values())], 1)

    return f


def assert_same(f, y: Tensor, ulps: float = 16) -> None:
    ours, torchs = once(pyode.compile(f, strict=True), y), once(f, y)
    scale = torch.maximum(torchs.abs(), y.abs()).clamp(min=1)
    wrong = ((ours - torchs).abs() > ulps * torch.finfo(y.dtype).eps * scale).nonzero()
    assert ours.shape == torchs.shape
    assert len(wrong) == 0, (wrong[0], ours[tuple(wrong[0])], torchs[tuple(wrong[0])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestAgainstTorch:
    def test_functions_of_one_number(self, dtype):
        y = torch.randn(37, len(UNARY), dtype=dtype)
        assert_same(columns(UNARY, lambda f, y, i: f(y[:, i])), y, 64)

    def test_functions_of_a_positive_number(self, dtype):
        y = torch.rand(37, len(POSITIVE), dtype=dtype) * 3 + 1e-3
        assert_same(columns(POSITIVE, lambda f, y, i: f(y[:, i])), y, 64)

    def test_functions_of_two_numbers(self, dtype):
        y = torch.randn(37, len(BINARY), dtype=dtype) + 0.1
        assert_same(columns(BINARY, lambda f, y, i: f(y[:, i], y[:, i - 1])), y, 64)

    def test_operators_within_a_row(self, dtype):
        def f(t, y):
            return torch.cat([function(y[:, :5]) for function in ROW.values()], 1) * 0.5

        width = sum(function(torch.ones(2, 5)).shape[1] for function in ROW.values())
        assert_same(lambda t, y: f(t, y), torch.randn(21, width, dtype=dtype), 256)


def test_special_values_pass_as_in_torch():
    inf, nan = math.inf, math.nan
    y = torch.tensor([[inf, -inf, nan, 0.0, -0.0, 1e-42, 3e38, -3e38]]).T.repeat(1, 12)

    def f(t, y):
        c = y.unbind(1)
        functions = torch.tanh, torch.sigmoid, torch.relu, torch.sign, torch.exp, F.elu, torch.abs
        rest = [
            c[7].clamp(-1, 1),
            torch.maximum(c[8], c[8] * 0),
            torch.where(c[9] > 0, c[9], -c[9]),
            c[10] ** 2,
            c[11] * 0,
        ]
        return torch.stack([g(x) for g, x in zip(functions, c)] + rest, 1)

    solved = [once(g, y)[1] for g in (pyode.compile(f, strict=True), f)]
    torch.testing.assert_close(*solved, equal_nan=True, rtol=1e-6, atol=0)
