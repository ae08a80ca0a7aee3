"""What each ATen operator is in terms of the graph's few kinds of nodes: a table.

Most operators are one formula for each number, and a line here; a new one needs no more. Those that only move numbers
need their name. Formulas are C++ on numbers or vectors of them, with the functions of csrc/core/vector_math.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CompileError
from .graph import PRODUCT, SUM, Graph, Node, Value

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
MOVES = frozenset([
    "_unsafe_view", "alias", "cat", "clone", "copy", "detach", "diagonal", "diagonal_scatter", "expand", "flip",
    "index", "index_select", "lift_fresh_copy", "movedim", "permute", "repeat", "reshape", "roll", "select",
    "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "squeeze_", "stack", "t",
    "t_", "transpose", "transpose_", "unbind", "unfold", "unsqueeze", "unsqueeze_", "view",
])  # fmt: skip
FILLED = ("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full")
SIZED = (  # have sizes among their arguments
    "view", "_unsafe_view", "reshape", "expand", "repeat", "full", "zeros", "ones", "new_full", "new_zeros", "new_ones",
    "empty", "new_empty", "empty_permuted", "empty_strided", "new_empty_strided", "native_group_norm",
)  # fmt: skip
# May have whole numbers as results, which are exact in the state's dtype: counts of truth values, places, signs.
COUNTS = ("sum", "cumsum", "max", "min", "where", "add", "sub", "mul", "neg")

OPERATORS: dict[str, Callable[..., Any]] = {}
Operator = TypeVar("Operator", bound=Callable[..., Any])


def _operator(function: Operator) -> Operator:
    """Adds a function of the graph and an operator's arguments to the table, under its own name."""
    OPERATORS[function.__name__.removeprefix("op_")] = function
    return function


def _formula(text: str, mask: bool) -> Callable[..., Node]:
    def made(graph: Graph, *args: Value, **_: Any) -> Node:
        return graph.map(text, *map(graph.truth if text in LOGIC.values() else graph.number, args), mask=mask)

    return made


OPERATORS |= {name: _formula(text, False) for name, text in FORMULAS.items()}
OPERATORS |= {name: _formula(text, True) for name, text in (MASKS | LOGIC).items()}


def _scaled(graph: Graph, x: Value, factor: float) -> Node:
    return graph.number(x) if factor == 1 else graph.map("{0} * {1}", graph.number(x), factor)


@_operator
def op_add(graph: Graph, a: Value, b: Value, alpha: float = 1) -> Node:  # noqa: D103
    return graph.map("{0} + {1}", graph.number(a), _scaled(graph, b, alpha))


@_operator
def op_sub(graph: Graph, a: Value, b: Value, alpha: float = 1) -> Node:  # noqa: D103
    return graph.map("{0} - {1}", graph.number(a), _scaled(graph, b, alpha))


@_operator
def op_rsub(graph: Graph, a: Value, b: Value, alpha: float = 1) -> Node:  # noqa: D103
    return op_sub(graph, b, a, alpha)


@_operator
def op_div(graph: Graph, a: Value, b: Value, rounding_mode: str | None = None) -> Node:  # noqa: D103
    if rounding_mode == "floor":
        return graph.map("floor_divide({0}, {1})", graph.number(a), graph.number(b))
    quotient = graph.map("{0} / {1}", graph.number(a), graph.number(b))
    return quotient if rounding_mode is None else graph.map("trunc({0})", quotient)


@_operator
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


@_operator
def op_where(graph: Graph, mask: Node, a: Value, b: Value) -> Node:  # noqa: D103
    return graph.map("select<{R}>({0}, {1}, {2})", mask, graph.number(a), graph.number(b))


@_operator
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


@_operator
def op_leaky_relu(graph: Graph, x: Node, slope: float = 0.01) -> Node:  # noqa: D103
    return graph.map("select<{R}>({0} > 0, {0}, {0} * {1})", x, slope)


@_operator
def op_elu(graph: Graph, x: Node, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Node:  # noqa: D103
    return graph.map("select<{R}>({0} > 0, {0} * {2}, expm1({0} * {3}) * {1})", x, alpha * scale, scale, input_scale)


@_operator
def op_gelu(graph: Graph, x: Node, approximate: str = "none") -> Node:  # noqa: D103
    if approximate == "none":
        return graph.map("{0} * T(0.5) * (1 + erf({0} * T(0.70710678118654752440)))", x)
    inner = graph.map("T(0.79788456080286535588) * ({0} + T(0.044715) * {0} * {0} * {0})", x)
    return graph.map("T(0.5) * {0} * (1 + tanh({1}))", x, inner)


@_operator
def op__to_copy(graph: Graph, x: Node, dtype: torch.dtype | None = None, **_: Any) -> Node:  # noqa: D103
    if dtype == torch.bool:
        return x if x.mask else graph.map("{0} != 0", x, mask=True)
    return x if dtype is None else graph.number(x)


@_operator
def op_sum(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False, **_: Any) -> Node:  # noqa: D103
    return graph.reduce(SUM, x, axes or (), keepdim)


@_operator
def op_prod(graph: Graph, x: Node, axis: Any = None, keepdim: bool = False, **_: Any) -> Node:  # noqa: D103
    return graph.reduce("{0} * {1}", x, () if axis is None else (axis,), keepdim)


@_operator
def op_amax(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False) -> Node:  # noqa: D103
    return graph.reduce("maximum({0}, {1})", x, axes, keepdim)


@_operator
def op_amin(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False) -> Node:  # noqa: D103
    return graph.reduce("minimum({0}, {1})", x, axes, keepdim)


@_operator
def op_any(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False) -> Node:  # noqa: D103
    axes = (axes,) if isinstance(axes, int) else axes
    return graph.truth(graph.reduce("maximum({0}, {1})", graph.truth(x), axes or (), keepdim))


def _positions(graph: Graph, x: Node, axis: int) -> Node:
    """0, 1, 2, ... along an axis."""
    sizes = [1] * len(x.sizes())
    sizes[axis] = x.sizes()[axis]
    return graph.constant(torch.arange(sizes[axis]).reshape(sizes))


def _extreme(formula: str) -> Callable[..., Any]:
    def made(graph: Graph, x: Node, axis: int | None = None, keepdim: bool = False) -> Any:
        """The extremes along an axis, and where the first of each stands."""
        if axis is None:
            return graph.reduce(formula, x, (), False)
        extreme, size = graph.reduce(formula, x, (axis,), True), float(x.sizes()[axis])
        at = _positions(graph, x, axis)
        here = graph.map("select<{R}>(({0} == {1}) | ({0} != {0}), {2}, {3})", x, extreme, at, size)
        place = graph.reduce("minimum({0}, {1})", here, (axis,), keepdim)
        return [extreme if keepdim else graph.reduce(formula, x, (axis,), False), place]

    return made


OPERATORS |= {"max": _extreme("maximum({0}, {1})"), "min": _extreme("minimum({0}, {1})")}


def _slices(graph: Graph, x: Node, axis: int) -> list[Node]:
    """A node's parts along an axis, of one entry each."""
    if x.rows == axis % len(x.sizes()):
        raise CompileError("mixes rows")
    return [graph.rearrange(lambda v, i=i: v.narrow(axis, i, 1), x, rows=x.rows) for i in range(x.sizes()[axis])]


def _joined(graph: Graph, parts: list[Node], axis: int) -> Node:
    return graph.rearrange(lambda *xs: torch.cat(xs, axis), *parts, rows=parts[0].rows)


@_operator
def op_gather(graph: Graph, x: Node, axis: int, index: Node, **_: Any) -> Node:  # noqa: D103
    at, zero = _positions(graph, x, axis), 0.0
    picked = [
        graph.reduce(SUM, graph.map("select<{R}>({0} == {1}, {2}, {3})", i, at, x, zero), (axis,), True)
        for i in _slices(graph, index, axis)
    ]
    return _joined(graph, picked, axis)


def _scatter(formula: str) -> Callable[..., Node]:
    def made(graph: Graph, x: Node, axis: int, index: Node, source: Value) -> Node:
        at, places = _positions(graph, x, axis), _slices(graph, index, axis)
        sources = _slices(graph, source, axis) if isinstance(source, Node) else [source] * len(places)
        for i, number in zip(places, sources):
            x = graph.map(f"select<{{R}}>({{0}} == {{1}}, {formula}, {{3}})", i, at, number, x)
        return x

    return made


OPERATORS |= {"scatter": _scatter("{2}"), "scatter_add": _scatter("{2} + {3}")}


@_operator
def op_index_put(graph: Graph, x: Node, indices: Any, values: Node, accumulate: bool = False) -> Node:  # noqa: D103
    if any(isinstance(index, Node) for index in indices):
        raise CompileError("takes indices from a tensor that may change")
    sizes = x.sizes()
    everywhere = torch.arange(math.prod(sizes)).reshape(sizes)
    targets = everywhere[tuple(slice(None) if index is None else index for index in indices)]
    rows = None if values.rows is None else targets.dim() - len(values.sizes()) + values.rows
    values = graph.expand(graph.number(values), tuple(targets.shape), rows)
    turns = _turns(targets)  # of several entries for one place each has its turn
    for turn in range(int(turns.max()) + 1 if turns.numel() else 0):

        def put(numbers: Tensor, ground: Tensor, chosen: Tensor = turns == turn) -> Tensor:
            out = ground.expand(sizes).clone().reshape(-1)
            out[targets[chosen]] = numbers[chosen]
            return out.reshape(sizes)

        part = graph.rearrange(put, values, graph.literal(0.0) if accumulate else x, rows=x.rows)
        x = graph.map(SUM, x, part) if accumulate else part
    return x


def _turns(targets: Tensor) -> Tensor:
    """How many entries before each are equal to it."""
    flat = targets.reshape(-1)
    order = flat.argsort(stable=True)
    _, counts = flat[order].unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    turns = torch.empty_like(flat)
    turns[order] = torch.cat([torch.arange(int(n)) for n in counts]) if len(flat) else flat
    return turns.reshape(targets.shape)


def _cumulative(formula: str) -> Callable[..., Node]:
    def made(graph: Graph, x: Node, axis: int, **_: Any) -> Node:
        if not x.sizes():
            return graph.number(x)
        found: list[Node] = []
        for part in _slices(graph, graph.number(x), axis):
            found.append(graph.map(formula, found[-1], part) if found else part)
        return _joined(graph, found, axis)

    return made


OPERATORS |= {"cumsum": _cumulative(SUM), "cumprod": _cumulative(PRODUCT)}


def _count(x: Node, axes: Any) -> int:
    sizes = x.sizes()
    return math.prod(sizes[axis] for axis in axes) if axes else math.prod(sizes)


@_operator
def op_mean(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False, **_: Any) -> Node:  # noqa: D103
    total = op_sum(graph, x, axes, keepdim)
    return graph.map("{0} / {1}", total, _count(x, axes))


@_operator
def op_var(  # noqa: D103
    graph: Graph, x: Node, axes: Any = (), correction: float | None = None, keepdim: bool = False
) -> Node:
    deviation = graph.map("{0} - {1}", x, op_mean(graph, x, axes, True))
    squares = op_sum(graph, graph.map("{0} * {0}", deviation), axes, keepdim)
    return graph.map("{0} / {1}", squares, max(_count(x, axes) - (1 if correction is None else correction), 0))


@_operator
def op_var_mean(graph: Graph, x: Node, *args: Any, **options: Any) -> list[Node]:  # noqa: D103
    axes, keepdim = args[0] if args else (), options.get("keepdim", False)
    return [op_var(graph, x, *args, **options), op_mean(graph, x, axes or (), keepdim)]


@_operator
def op_linalg_vector_norm(  # noqa: D103
    graph: Graph, x: Node, p: float = 2, axes: Any = (), keepdim: bool = False, **_: Any
) -> Node:
    size = graph.map("abs({0})", x)
    if math.isinf(p):
        return (op_amax if p > 0 else op_amin)(graph, size, axes or (), keepdim)
    if p == 1:
        return op_sum(graph, size, axes, keepdim)
    if p == 2:
        return graph.map("sqrt({0})", op_sum(graph, graph.map("{0} * {0}", x), axes, keepdim))
    if p == 0:
        return op_sum(graph, graph.truth(x), axes, keepdim)
    return op_pow(graph, op_sum(graph, op_pow(graph, size, p), axes, keepdim), 1 / p)


@_operator
def op__softmax(graph: Graph, x: Node, axis: int, _half: bool = False) -> Node:  # noqa: D103
    power = graph.map("exp({0} - {1})", x, op_amax(graph, x, (axis,), True))
    return graph.map("{0} / {1}", power, op_sum(graph, power, (axis,), True))


@_operator
def op__log_softmax(graph: Graph, x: Node, axis: int, _half: bool = False) -> Node:  # noqa: D103
    shifted = graph.map("{0} - {1}", x, op_amax(graph, x, (axis,), True))
    total = op_sum(graph, graph.map("exp({0})", shifted), (axis,), True)
    return graph.map("{0} - log({1})", shifted, total)


@_operator
def op_native_layer_norm(  # noqa: D103
    graph: Graph, x: Node, shape: Any, weight: Node | None, bias: Node | None, epsilon: float
) -> Any:
    axes = range(-len(shape), 0)
    mean = op_mean(graph, x, axes, True)
    variance = op_var(graph, x, axes, 0, True)
    scale = graph.map("1 / sqrt({0} + {1})", variance, epsilon)
    y = graph.map("({0} - {1}) * {2}", x, mean, scale)
    y = y if weight is None else graph.map("{0} * {1}", y, weight)
    return [y if bias is None else graph.map("{0} + {1}", y, bias), mean, scale]


@_operator
def op_native_group_norm(  # noqa: D103
    graph: Graph, x: Node, weight: Any, bias: Any, n: int, channels: int, size: int, groups: int, epsilon: float
) -> list[Node]:
    within = channels * size // groups
    parts = graph.reshape(x, (n, groups, within), x.rows)
    y, mean, scale = op_native_layer_norm(graph, parts, (within,), None, None, epsilon)
    y = graph.reshape(y, x.sizes(), x.rows)
    for formula, factor in ((PRODUCT, weight), (SUM, bias)):
        if factor is not None:
            y = graph.map(formula, y, graph.reshape(factor, (channels, *[1] * (len(x.sizes()) - 2)), factor.rows))
    return [y, graph.reshape(mean, (n, groups), x.rows), graph.reshape(scale, (n, groups), x.rows)]


def _matrices(graph: Graph, x: Node) -> Node:
    """[i, j] as [1, i, j]."""
    return graph.rearrange(lambda m: m.unsqueeze(0), x, rows=None if x.rows is None else x.rows + 1)


@_operator
def op_bmm(graph: Graph, a: Node, b: Node) -> Node:  # noqa: D103
    return graph.contract(a, b)


@_operator
def op_mm(graph: Graph, a: Node, b: Node) -> Node:  # noqa: D103
    out = graph.contract(_matrices(graph, a), _matrices(graph, b))
    return graph.rearrange(lambda m: m.squeeze(0), out, rows=None if out.rows is None else out.rows - 1)


@_operator
def op_addmm(graph: Graph, c: Node, a: Node, b: Node, beta: float = 1, alpha: float = 1) -> Node:  # noqa: D103
    return graph.map("{0} + {1}", _scaled(graph, op_mm(graph, a, b), alpha), _scaled(graph, c, beta))


@_operator
def op_baddbmm(graph: Graph, c: Node, a: Node, b: Node, beta: float = 1, alpha: float = 1) -> Node:  # noqa: D103
    return graph.map("{0} + {1}", _scaled(graph, op_bmm(graph, a, b), alpha), _scaled(graph, c, beta))


@_operator
def op_mv(graph: Graph, a: Node, b: Node) -> Node:  # noqa: D103
    column = graph.rearrange(lambda v: v.unsqueeze(-1), b, rows=b.rows)
    out = op_mm(graph, a, column)
    return graph.rearrange(lambda m: m.squeeze(-1), out, rows=out.rows)


@_operator
def op_dot(graph: Graph, a: Node, b: Node) -> Node:  # noqa: D103
    return op_sum(graph, graph.map("{0} * {1}", a, b))


OPERATORS["vdot"] = op_dot
