"""Sums, means, norms and the like, and what is normalised by them."""

from __future__ import annotations

import math
from typing import Any

from ..graph import PRODUCT, SUM, Graph, Node
from .elementwise import op_pow
from .table import operator


@operator
def op_sum(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False, **_: Any) -> Node:  # noqa: D103
    return graph.reduce(SUM, x, axes or (), keepdim)


@operator
def op_prod(graph: Graph, x: Node, axis: Any = None, keepdim: bool = False, **_: Any) -> Node:  # noqa: D103
    return graph.reduce("{0} * {1}", x, () if axis is None else (axis,), keepdim)


@operator
def op_amax(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False) -> Node:  # noqa: D103
    return graph.reduce("maximum({0}, {1})", x, axes, keepdim)


@operator
def op_amin(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False) -> Node:  # noqa: D103
    return graph.reduce("minimum({0}, {1})", x, axes, keepdim)


@operator
def op_any(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False) -> Node:  # noqa: D103
    axes = (axes,) if isinstance(axes, int) else axes
    return graph.truth(graph.reduce("maximum({0}, {1})", graph.truth(x), axes or (), keepdim))


def _count(x: Node, axes: Any) -> int:
    sizes = x.sizes()
    return math.prod(sizes[axis] for axis in axes) if axes else math.prod(sizes)


@operator
def op_mean(graph: Graph, x: Node, axes: Any = (), keepdim: bool = False, **_: Any) -> Node:  # noqa: D103
    total = op_sum(graph, x, axes, keepdim)
    return graph.map("{0} / {1}", total, _count(x, axes))


@operator
def op_var(  # noqa: D103
    graph: Graph, x: Node, axes: Any = (), correction: float | None = None, keepdim: bool = False
) -> Node:
    deviation = graph.map("{0} - {1}", x, op_mean(graph, x, axes, True))
    squares = op_sum(graph, graph.map("{0} * {0}", deviation), axes, keepdim)
    return graph.map("{0} / {1}", squares, max(_count(x, axes) - (1 if correction is None else correction), 0))


@operator
def op_var_mean(graph: Graph, x: Node, *args: Any, **options: Any) -> list[Node]:  # noqa: D103
    axes, keepdim = args[0] if args else (), options.get("keepdim", False)
    return [op_var(graph, x, *args, **options), op_mean(graph, x, axes or (), keepdim)]


@operator
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


@operator
def op__softmax(graph: Graph, x: Node, axis: int, _half: bool = False) -> Node:  # noqa: D103
    power = graph.map("exp({0} - {1})", x, op_amax(graph, x, (axis,), True))
    return graph.map("{0} / {1}", power, op_sum(graph, power, (axis,), True))


@operator
def op__log_softmax(graph: Graph, x: Node, axis: int, _half: bool = False) -> Node:  # noqa: D103
    shifted = graph.map("{0} - {1}", x, op_amax(graph, x, (axis,), True))
    total = op_sum(graph, graph.map("exp({0})", shifted), (axis,), True)
    return graph.map("{0} - log({1})", shifted, total)


@operator
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


@operator
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
