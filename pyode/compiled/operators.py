"""What each ATen operator is in terms of the graph's few kinds of nodes: a table.

Most operators are one formula for each number, and a line here; a new one needs no more. Those that only move numbers
need their name. Formulas are C++ on numbers or vectors of them, with the functions of csrc/core/vector_math.h.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as TracedNode

from ..errors import CompileError
from .graph import ROWS, SUM, Graph, Node, Place, Value

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
}
LOGIC = {"bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}", "bitwise_not": "{0} == 0"}
LOGIC |= {f"logical_{name[8:]}": formula for name, formula in LOGIC.items()}
MOVES = frozenset(
    "view _unsafe_view reshape permute t transpose expand slice select squeeze unsqueeze alias detach clone unbind split "
    "split_with_sizes flip roll repeat unfold diagonal cat stack select_scatter slice_scatter index_select index "
    "lift_fresh_copy movedim squeeze_ unsqueeze_ transpose_ t_ copy".split()
)

OPERATORS: dict[str, Callable[..., Node]] = {}


def _operator(function: Callable[..., Node]) -> Callable[..., Node]:
    """Adds a function of the graph and an operator's arguments to the table, under its own name."""
    OPERATORS[function.__name__.removeprefix("op_")] = function
    return function


def _formula(text: str, mask: bool) -> Callable[..., Node]:
    def made(graph: Graph, *args: Value, **_: Any) -> Node:
        return graph.map(text, *(args if text in LOGIC.values() else map(graph.number, args)), mask=mask)

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
    quotient = graph.map("{0} / {1}", graph.number(a), graph.number(b))
    return quotient if rounding_mode is None else graph.map(f"{rounding_mode}({{0}})", quotient)


@_operator
def op_remainder(graph: Graph, a: Value, b: Value) -> Node:  # noqa: D103
    return graph.map("{0} - floor({0} / {1}) * {1}", a, b)


@_operator
def op_pow(graph: Graph, a: Value, b: Value) -> Node:  # noqa: D103
    base = graph.number(a)
    if isinstance(b, Node) or abs(b) > 8 or b not in (0.5, int(b)):
        return graph.map("pow({0}, {1})", base, graph.number(b))
    if b == 0.5:
        return graph.map("sqrt({0})", base)
    if b == 0:
        return graph.map("1 + 0 * {0}", base)
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
def op_linalg_vector_norm(  # noqa: D103
    graph: Graph, x: Node, p: float = 2, axes: Any = (), keepdim: bool = False, **_: Any
) -> Node:
    size = graph.map("abs({0})", x)
    if math.isinf(p):
        return (op_amax if p > 0 else op_amin)(graph, size, axes or (), keepdim)
    if p == 1:
        return op_sum(graph, size, axes, keepdim)
    if p != 2:
        raise CompileError(f"takes a norm of order {p:g}")
    return graph.map("sqrt({0})", op_sum(graph, graph.map("{0} * {0}", x), axes, keepdim))


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


class Import:
    """A traced graph turned into nodes.

    Args:
        traced: as `trace` made it.
        dtype: of the state; all numbers have it.
        rows: whether the state's first axis are its rows; otherwise all of it is one row.
        totals: whether sums over rows are allowed, and returned behind the parts.
        inputs: those known already, which keep their numbers.

    Attributes:
        outputs: one for each part of the state.
        gradients: what is returned beside, of a vjp: sums over all rows.
        inputs: the tensors that func has closed over, by the number of their "input" nodes.
    """

    def __init__(self, traced: GraphModule, dtype: torch.dtype, rows: bool, totals: bool = False, inputs: list[Tensor] | None = None) -> None:
        self.graph = Graph(totals)
        self.dtype, self.inputs = dtype, list[Tensor]() if inputs is None else inputs
        self._traced, self._values = traced, dict[TracedNode, Any]()
        self._symbol: Any = None
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self._values[placeholders[0]] = self.graph.node("time", (), None, (), None, Place.STAGE)
        for i, node in enumerate(placeholders[1:]):
            sizes = node.meta["val"].shape
            if rows:
                self._symbol = sizes[0].node.expr
            shape = tuple(sizes[1:] if rows else sizes)
            self._values[node] = self.graph.node("state", (), i, shape, 0 if rows else None, Place.ROW)
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                self._values[node] = self._closed_over(node)
            elif node.op == "call_function":
                try:
                    self._values[node] = self._call(node)
                except CompileError as error:
                    name = getattr(node.target, "overloadpacket", node.target).__name__
                    raise CompileError(f"{name} at {node.meta.get('line', 'func')}: {error}") from error
        (returned,) = next(node for node in traced.graph.nodes if node.op == "output").args
        self.outputs, self.gradients = list[Node](), list[Node]()
        parts = placeholders[1 : 1 + (len(placeholders) - 1) // (2 if totals else 1)]
        for out, node in zip(returned, parts):
            state = self._values[node]
            if tuple(map(str, out.meta["val"].shape)) != tuple(map(str, node.meta["val"].shape)):
                raise CompileError("func does not return the state's shape")
            value = self.graph.number(self._node(self._values[out]))
            self.outputs.append(self.graph.expand(value, state.sizes(), state.rows))
        for out in returned[len(self.outputs) :] if totals else ():
            value = self.graph.number(self._node(self._values[out]))
            if value.place is Place.ROW:  # the only row
                value = self.graph.node("total", (value,), None, value.shape, None, Place.TOTAL)
            self.gradients.append(value)

    def _closed_over(self, node: TracedNode) -> Any:
        value = self._traced
        for name in str(node.target).split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        if all(getattr(user.target, "__name__", "").startswith("lift_fresh") for user in node.users):
            return value  # made by func itself, from Python's numbers
        if value.device.type != "cpu" or value.is_complex():
            raise CompileError(f"func uses a tensor of {value.dtype} on {value.device}; the state is of {self.dtype}")
        # One of another dtype is converted at every solve; where torch would compute in that dtype is noticed there.
        made = self._input(value)
        return self.graph.map("{0} != 0", made, mask=True) if value.dtype == torch.bool else made

    def _input(self, tensor: Tensor) -> Node:
        i = next((i for i, known in enumerate(self.inputs) if known is tensor), len(self.inputs))
        if i == len(self.inputs):
            self.inputs.append(tensor)
        return self.graph.node("input", (), i, tuple(tensor.shape), None, Place.SOLVE)

    def _rows_of(self, value: Any) -> int | None:
        """The axis of rows in a traced tensor's shape."""
        axes = [i for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
        if not axes:
            return None
        if len(axes) > 1 or value.shape[axes[0]].node.expr != self._symbol:
            raise CompileError("mixes rows")
        return axes[0]

    def _resolve(self, argument: Any) -> Any:
        """An argument with traced values replaced: tensors by nodes or constants, sizes by those for ROWS rows."""
        if isinstance(argument, TracedNode):
            value = argument.meta["val"]
            if isinstance(value, torch.SymInt):
                return int(value.node.expr.subs({self._symbol: ROWS}))
            return self._values[argument]
        if isinstance(argument, (list, tuple)):
            return type(argument)(map(self._resolve, argument))
        return argument

    def _node(self, value: Any) -> Any:
        """A constant tensor as a node."""
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 1:
            number = value.item()
            node = self.graph.literal(number if isinstance(number, bool) else float(number))
            return self.graph.expand(node, tuple(value.shape), None)
        if value.dtype == torch.bool:
            numbers = self._node(value.to(self.dtype))
            return self.graph.map("{0} != 0", numbers, mask=True)
        if value.numel() > 1024:
            return self._input(value.to(self.dtype))
        numbers = tuple(float(x).hex() for x in value.to(self.dtype).reshape(-1).tolist())
        return self.graph.node("constant", (), numbers, tuple(value.shape), None)

    def _call(self, node: TracedNode) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return value
        args, kwargs = self._resolve(node.args), self._resolve(tuple(node.kwargs.items()))
        options = dict(kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]]
        name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
        many = isinstance(value, (tuple, list))
        found = list(value) if many else [value]  # type: ignore[arg-type]
        nodes = _nodes_in(args)
        if not nodes and not many:
            return self._constant(node.target, args, options, value)
        if name in MOVES:
            return self._move(node.target, name, args, options, found, many)
        if name in ("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full"):
            number = 0.0 if "zeros" in name else 1.0 if "ones" in name else float(args[-1])
            sizes = tuple(int(s.node.expr.subs({self._symbol: ROWS})) if isinstance(s, torch.SymInt) else s for s in value.shape)  # type: ignore[union-attr]
            return self.graph.expand(self.graph.literal(number), sizes, self._rows_of(value))
        for item in found:
            if item is not None and item.dtype not in (self.dtype, torch.bool):
                raise CompileError(f"computes in {item.dtype}; the state is of {self.dtype}")
        if name not in OPERATORS:
            raise CompileError("is not known to the compiler")
        to_node = partial(_each, lambda x: self._node(x) if isinstance(x, Tensor) else x)
        return OPERATORS[name](self.graph, *to_node(args), **{key: to_node(x) for key, x in options.items()})

    def _constant(self, target: Any, args: Any, options: dict[str, Any], value: Any) -> Any:
        """What does not depend on the state, time or inputs, computed now; a node if it has rows."""
        out = target(*args, **options)
        rows = self._rows_of(value)
        if rows is None:
            return out
        first, *others = out.movedim(rows, 0).unbind()
        if not all(torch.equal(first, other) for other in others):
            raise CompileError("mixes rows")
        return self.graph.rearrange(
            lambda x: x.unsqueeze(rows).expand(out.shape), self._node(first), rows=rows
        )

    def _move(self, target: Any, name: str, args: Any, options: dict[str, Any], found: list[Any], many: bool) -> Any:
        options.pop("memory_format", None)
        constant = name in ("index", "index_select")
        if constant and len(_nodes_in(args)) > 1:
            raise CompileError("takes indices from a tensor that may change")
        filled = args if constant else _each(lambda x: self._node(x) if isinstance(x, Tensor) else x, args)
        nodes = _nodes_in(filled)
        outs = [
            self.graph.rearrange(
                lambda *xs, i=i: _item(target(*_fill(filled, iter(xs)), **options), i, many),
                *nodes,
                rows=self._rows_of(value),
            )
            for i, value in enumerate(found)
        ]
        return outs if many else outs[0]


def _each(change: Callable[[Any], Any], argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_each(change, x) for x in argument)
    return change(argument)


def _nodes_in(argument: Any) -> list[Node]:
    found: list[Node] = []
    _each(lambda x: found.append(x) if isinstance(x, Node) else None, argument)
    return found


def _fill(argument: Any, tensors: Any) -> Any:
    return _each(lambda x: next(tensors) if isinstance(x, Node) else x, argument)


def _item(out: Any, i: int, many: bool) -> Any:
    return out[i] if many else out
