"""Operators on each number, most of them one formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph import Graph, Node, Value
from .table import OPERATORS, operator

FORMULAS = {
    "abs": "abs({0})",
    "neg": "-({0})",
    "mul": "{0} * {1}",
    "reciprocal": "1 / ({0})",
    "sqrt": "sqrt({0})",
    "rsqrt": "1 / sqrt({0})",
    "exp": "exp({0})",
    "exp2": "exp2({0})",
    "expm1": "expm1({0})",
    "log": "log({0})",
    "log2": "log2({0})",
    "log10": "log10({0})",
    "log1p": "log1p({0})",
    "sin": "sin({0})",
    "cos": "cos({0})",
    "tan": "tan({0})",
    "asin": "asin({0})",
    "acos": "acos({0})",
    "atan": "atan({0})",
    "sinh": "sinh({0})",
    "cosh": "cosh({0})",
    "tanh": "tanh({0})",
    "asinh": "asinh({0})",
    "acosh": "acosh({0})",
    "atanh": "atanh({0})",
    "erf": "erf({0})",
    "erfc": "erfc({0})",
    "sigmoid": "sigmoid({0})",
    "floor": "floor({0})",
    "ceil": "ceil({0})",
    "trunc": "trunc({0})",
    "round": "round({0})",
    "atan2": "atan2({0}, {1})",
    "hypot": "hypot({0}, {1})",
    "fmod": "fmod({0}, {1})",
    "remainder": "remainder({0}, {1})",
    "copysign": "copysign({0}, {1})",
    "fmax": "select<{R}>(({0} >= {1}) | ({1} != {1}), {0}, {1})",
    "fmin": "select<{R}>(({0} <= {1}) | ({1} != {1}), {0}, {1})",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "sign": "sign({0})",
}
MASKS = {
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "isnan": "{0} != {0}",
    "isinf": "abs({0}) == std::numeric_limits<T>::infinity()",
}
LOGIC = {"bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}", "bitwise_not": "{0} == 0"}
LOGIC |= {f"logical_{name[8:]}": formula for name, formula in LOGIC.items()}


def _formula(text: str, mask: bool) -> Callable[..., Node]:
    def made(graph: Graph, *args: Value, **_: Any) -> Node:
        return graph.map(text, *map(graph.truth if text in LOGIC.values() else graph.number, args), mask=mask)

    return made


OPERATORS |= {name: _formula(text, False) for name, text in FORMULAS.items()}
OPERATORS |= {name: _formula(text, True) for name, text in (MASKS | LOGIC).items()}


def scaled(graph: Graph, x: Value, factor: float) -> Node:
    """A factor times x."""
    return graph.number(x) if factor == 1 else graph.map("{0} * {1}", graph.number(x), factor)


@operator
def op_add(graph: Graph, a: Value, b: Value, alpha: float = 1) -> Node:  # noqa: D103
    return graph.map("{0} + {1}", graph.number(a), scaled(graph, b, alpha))


@operator
def op_sub(graph: Graph, a: Value, b: Value, alpha: float = 1) -> Node:  # noqa: D103
    return graph.map("{0} - {1}", graph.number(a), scaled(graph, b, alpha))


@operator
def op_rsub(graph: Graph, a: Value, b: Value, alpha: float = 1) -> Node:  # noqa: D103
    return op_sub(graph, b, a, alpha)


@operator
def op_div(graph: Graph, a: Value, b: Value, rounding_mode: str | None = None) -> Node:  # noqa: D103
    if rounding_mode == "floor":
        return graph.map("floor_divide({0}, {1})", graph.number(a), graph.number(b))
    quotient = graph.map("{0} / {1}", graph.number(a), graph.number(b))
    return quotient if rounding_mode is None else graph.map("trunc({0})", quotient)


@operator
def op_pow(graph: Graph, a: Value, b: Value) -> Node:  # noqa: D103
    base = graph.number(a)
    if isinstance(b, Node) or abs(b) > 8 or b not in (0.5, int(b)):
        return graph.map("pow({0}, {1})", base, graph.number(b))
    if b == 0.5:
        return graph.map("sqrt({0})", base)
    if b == 0:
        return graph.expand(graph.literal(1.0), base.sizes(), base.rows)
    power = base
    for bit in f"{abs(int(b)):b}"[1:]:
        power = graph.map("{0} * {0}", power)
        if bit == "1":
            power = graph.map("{0} * {1}", power, base)
    return power if b > 0 else graph.map("1 / {0}", power)


@operator
def op_where(graph: Graph, mask: Node, a: Value, b: Value) -> Node:  # noqa: D103
    return graph.map("select<{R}>({0}, {1}, {2})", mask, graph.number(a), graph.number(b))


@operator
def op_clamp(graph: Graph, x: Node, min: Value | None = None, max: Value | None = None) -> Node:  # noqa: D103
    low, high = min, max
    if low is not None:
        x = graph.map("maximum({0}, {1})", x, low)
    return x if high is None else graph.map("minimum({0}, {1})", x, high)


OPERATORS |= {
    "clamp_min": lambda graph, x, low: op_clamp(graph, x, low),
    "clamp_max": lambda graph, x, high: op_clamp(graph, x, None, high),
    "relu": lambda graph, x: op_clamp(graph, x, 0.0),
    "hardtanh": lambda graph, x, low=-1.0, high=1.0: op_clamp(graph, x, low, high),
}


@operator
def op_leaky_relu(graph: Graph, x: Node, slope: float = 0.01) -> Node:  # noqa: D103
    return graph.map("select<{R}>({0} > 0, {0}, {0} * {1})", x, slope)


@operator
def op_elu(graph: Graph, x: Node, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Node:  # noqa: D103
    return graph.map("select<{R}>({0} > 0, {0} * {2}, expm1({0} * {3}) * {1})", x, alpha * scale, scale, input_scale)


@operator
def op_gelu(graph: Graph, x: Node, approximate: str = "none") -> Node:  # noqa: D103
    if approximate == "none":
        return graph.map("{0} * T(0.5) * (1 + erf({0} * T(0.70710678118654752440)))", x)
    inner = graph.map("T(0.79788456080286535588) * ({0} + T(0.044715) * {0} * {0} * {0})", x)
    return graph.map("T(0.5) * {0} * (1 + tanh({1}))", x, inner)


@operator
def op__to_copy(graph: Graph, x: Node, dtype: torch.dtype | None = None, **_: Any) -> Node:  # noqa: D103
    if dtype == torch.bool:
        return x if x.mask else graph.map("{0} != 0", x, mask=True)
    return x if dtype is None else graph.number(x)
