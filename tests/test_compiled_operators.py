"""The compiler's operators against torch: values and gradients on random and special numbers.

Many operators are in one compiled func, each in a column of its own.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
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
    "floor_divide": lambda x: x.detach() // 0.7,
    "isnan": lambda x: torch.isnan(x) * x.exp(),
    "literal": lambda x: 1 - x / 3 + 2 * x,
    "rsub": lambda x: torch.rsub(x, 2.0, alpha=3.0),
    "add alpha": lambda x: torch.add(x, x, alpha=0.5),
    "isinf": lambda x: torch.where(torch.isinf(x), 1.0, x),
    "isfinite": lambda x: torch.where(torch.isfinite(x), x, 3.0),
    "logical_and": lambda x: torch.logical_and(x, x > -1) * x,
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "remainder of a negative": lambda x: x % -0.7,
    "negative floor_divide": lambda x: x.detach() // -0.7,
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
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "copysign": torch.copysign,
    "logaddexp": torch.logaddexp,
    "xlogy": lambda x, y: torch.xlogy(x, y.abs()),
    "max": torch.max,
    "min": torch.min,
    "clip": lambda x, y: x.clip(y, y + 1),
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "floor_divide": lambda x, y: torch.floor_divide(x.detach(), y.detach()),
    "eq": lambda x, y: (x == y) * x,
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=0.3),
    "ne": lambda x, y: (x != y) * y,
    "le": lambda x, y: (x <= y) * y,
}

W = {
    dtype: torch.linspace(-1, 1, 30, dtype=dtype).reshape(5, 6).sin().requires_grad_()
    for dtype in (torch.float32, torch.float64)
}
NORM = {dtype: nn.BatchNorm1d(5, dtype=dtype).eval() for dtype in W}
for _norm in NORM.values():
    _norm.running_mean.fill_(0.3)
    _norm.running_var.fill_(1.7)


def _constructed(y: Tensor) -> Tensor:
    k = torch.zeros_like(y)
    k[:, 1] = y[:, 0] * 2
    k[:, 3:] -= y[:, 1:3]
    return k


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
    "matrix": lambda y: y @ W[y.dtype],
    "linear": lambda y: F.linear(y, W[y.dtype].T, W[y.dtype][0, :6]),
    "mv": lambda y: (y @ W[y.dtype][:, 0]).unsqueeze(1),
    "left": lambda y: (W[y.dtype].T @ y.T).T,
    "einsum": lambda y: torch.einsum("bi,ij->bj", y, W[y.dtype]),
    "outer": lambda y: torch.einsum("bi,bj->bij", y, y).reshape(-1, 25),
    "quadratic": lambda y: torch.einsum("bi,ij,bj->b", y, W[y.dtype][:, :5], y)[:, None],
    "bmm": lambda y: torch.bmm(y.reshape(-1, 1, 5), y.reshape(-1, 5, 1)).reshape(-1, 1),
    "per row matrix": lambda y: (y.unsqueeze(2) * y.unsqueeze(1) @ y.unsqueeze(2)).squeeze(2),
    "dot": lambda y: (y * y).sum(1, keepdim=True),
    "stack": lambda y: torch.stack([y[:, 0], -y[:, 1]], 1),
    "zeros": lambda y: torch.zeros_like(y) + torch.ones(5).to(y),
    "where": lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
    "cumulative": lambda y: y @ torch.ones(5, 5).tril().to(y),
    "cross": lambda y: torch.linalg.cross(y[:, :3], y[:, 2:], dim=-1),
    "eye": lambda y: y @ torch.eye(5).to(y),
    "three axes": lambda y: (y.reshape(-1, 1, 5) * W[y.dtype][:2, :5].reshape(1, 2, 5)).transpose(1, 2).sum(2),
    "unbind": lambda y: torch.stack(y.unbind(1), 1),
    "masked": lambda y: y.masked_fill(y > 0, 0.25),
    "max": lambda y: y.max(1, keepdim=True).values,
    "min": lambda y: y.min(1).values[:, None],
    "argmax": lambda y: y.max(1, keepdim=True).indices * y,
    "any": lambda y: (y > 1).any(1, keepdim=True) * y,
    "all": lambda y: (y > -1).all(1, keepdim=True) * y,
    "cumsum": lambda y: y.cumsum(1),
    "gather": lambda y: y.gather(1, y.min(1, keepdim=True).indices),
    "norm 3": lambda y: y.norm(3, dim=1, keepdim=True),
    "norm 0.5": lambda y: torch.linalg.vector_norm(y, 0.5, 1, keepdim=True),
    "var_mean": lambda y: torch.cat(torch.var_mean(y, 1, keepdim=True), 1),
    "batch_norm": lambda y: NORM[y.dtype](y),
    "group_norm": lambda y: F.group_norm(
        y[:, :4] + torch.tensor([0, 9, 0, 9]).to(y), 2, W[y.dtype][0, :4], W[y.dtype][1, :4]
    ),
    "rms_norm": lambda y: F.rms_norm(y, (5,)),
    "diff": lambda y: y.diff(dim=1),
    "trace": lambda y: y * W[y.dtype].trace(),
    "row of a parameter": lambda y: y * W[y.dtype][[0, 0, 1, 1, 1], :5].sum(1),
    "diagonal": lambda y: (y[:, :, None] * y[:, None]).diagonal(dim1=1, dim2=2),
    "constructed": _constructed,
}


SPECIAL = [math.inf, math.nan, 0.0, 1.0, 0.5, 2.5, 3.0, 1e-20, 0.7, 1.4, 88.0, 300.0, 1e4]


def specials(dtype: torch.dtype) -> Tensor:
    """Where functions end, bend or are not defined, with both signs."""
    limits = torch.finfo(dtype)
    positive = torch.tensor([*SPECIAL, limits.max, limits.smallest_normal / 8], dtype=dtype)
    return torch.cat([positive, -positive])


OF_ONE = UNARY | POSITIVE


def of_numbers(t: Tensor, y: Tensor) -> Tensor:
    """Each of OF_ONE of a column of its own, then each of BINARY of two behind all those."""
    n = len(OF_ONE)
    one, two = y[:, :n].unbind(1), y[:, n:].unbind(1)
    out = [g(x) for g, x in zip(OF_ONE.values(), one)]
    return torch.stack(out + [g(x, z) for g, x, z in zip(BINARY.values(), two[::2], two[1::2])], 1)


def inputs_of(pairs: Tensor, positive: Tensor) -> Tensor:
    """Everyone's columns, of pairs of numbers [B, 2], of whose first numbers UNARY are, and of positive ones [B, 1]."""
    parts = (pairs[:, :1], len(UNARY)), (positive, len(POSITIVE)), (pairs, len(BINARY))
    return torch.cat([part.repeat(1, n) for part, n in parts], 1)


def within_rows(t: Tensor, y: Tensor) -> Tensor:
    """All of ROW, side by side, each of numbers of its own: y is [B, len(ROW), 5]."""
    return torch.cat([function(x) for function, x in zip(ROW.values(), y.unbind(1))], 1)


@cache
def compiled(f):
    """To a state of two parts, the second of which moves by f of the first; traced once for each dtype."""

    def two(t, parts):
        return torch.zeros_like(parts[0]), f(t, parts[0])

    return pyode.compile(two, strict=True)


def found(f, y: Tensor, trained: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """f(0, y) compiled and its gradients for random vectors, then torch's: a step of Euler's method from zeros."""
    t, expected = torch.tensor([0.0, 1.0], dtype=y.dtype), f(torch.tensor(0.0, dtype=y.dtype), y)
    start, vector = torch.zeros_like(expected).detach(), torch.randn_like(expected).detach()
    ours = pyode.odeint(compiled(f), (y, start), t, method="euler")[1][1]
    wanted = [y, *trained] if torch.is_grad_enabled() else []
    gradients = [torch.autograd.grad(x, wanted, vector) if wanted else () for x in (ours, expected)]
    return ours.detach(), gradients[0], expected.detach(), gradients[1]


def assert_close(ours: Tensor, torchs: Tensor, roundings: float, least: float = 0.0) -> None:
    """The same numbers, nan and inf among them, to some roundings of each, or of `least`."""
    limits = torch.finfo(ours.dtype)
    bound = roundings * limits.eps * torchs.abs().clamp(min=max(least, limits.tiny))
    wrong = ~((ours == torchs) | (ours.isnan() & torchs.isnan()) | ((ours - torchs).abs() <= bound))
    first = wrong.nonzero()[:1].tolist()
    assert not first, (first, ours[wrong][0], torchs[wrong][0], len(wrong.nonzero()))


def assert_columns_close(names: list[str], ours: Tensor, torchs: Tensor, *limits: float) -> None:
    for i, name in enumerate(names):
        try:
            assert_close(ours[:, i], torchs[:, i], *limits)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# Where functions have no derivative, and maxima are taken twice; and where a formula's other branch overflows.
BENDS = (-1.0, -0.5, 0.0, 0.2, 0.8, 1.0, 2.0, 100.0, -100.0)


@DTYPES
class TestAgainstTorch:
    """To 64 roundings of the value or of 1: a few of what goes in, times the functions' slopes."""

    def test_functions_of_numbers(self, dtype):
        bends = torch.tensor(BENDS, dtype=dtype)
        pairs = torch.cat([torch.randn(50, 2, dtype=dtype), torch.cartesian_prod(bends, bends)])
        y = inputs_of(pairs, torch.rand(len(pairs), 1, dtype=dtype) * 3 + 1e-3).requires_grad_()
        ours, our_gradients, torchs, gradients = found(of_numbers, y, [])
        assert_columns_close([*OF_ONE, *BINARY], ours, torchs, 64, 1.0)
        names = [*OF_ONE, *(name for name in BINARY for _ in range(2))]
        known = [i for i, name in enumerate(names) if name != "hardsigmoid"]  # torch has 1.0f / 6 in its derivative
        ours, torchs = our_gradients[0][:, known], gradients[0][:, known]
        assert_columns_close([names[i] for i in known], ours, torchs, 64, 1.0)

    def test_special_values_pass_as_in_torch(self, dtype):
        """To 64 roundings of the value itself, however small."""
        pairs = torch.cartesian_prod(specials(dtype), specials(dtype))
        with torch.no_grad():
            ours, _, expected, _ = found(of_numbers, inputs_of(pairs, pairs[:, :1]), [])
        assert_columns_close([*OF_ONE, *BINARY], ours, expected, 64)

    def test_operators_within_a_row(self, dtype):
        norm, y = NORM[dtype], torch.randn(21, 1, 5, dtype=dtype)
        y = torch.cat([y, y.round()]).repeat(1, len(ROW), 1).requires_grad_()
        ours, our_gradients, torchs, gradients = found(within_rows, y, [W[dtype], norm.weight, norm.bias])
        assert_close(ours, torchs, 256, 1.0)
        assert_columns_close(list(ROW), our_gradients[0], gradients[0], 256, 1.0)
        for a, b in zip(our_gradients[1:], gradients[1:]):  # sums over all rows
            assert_close(a, b, 256, b.abs().max().item())
