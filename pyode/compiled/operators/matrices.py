"""Products of matrices."""

from __future__ import annotations

from ..graph import Graph, Node
from .elementwise import scaled
from .reductions import op_sum
from .table import OPERATORS, operator


def _matrices(graph: Graph, x: Node) -> Node:
    """[i, j] as [1, i, j]."""
    return graph.rearrange(lambda m: m.unsqueeze(0), x, rows=None if x.rows is None else x.rows + 1)


@operator
def op_bmm(graph: Graph, a: Node, b: Node) -> Node:  # noqa: D103
    return graph.contract(a, b)


@operator
def op_mm(graph: Graph, a: Node, b: Node) -> Node:  # noqa: D103
    out = graph.contract(_matrices(graph, a), _matrices(graph, b))
    return graph.rearrange(lambda m: m.squeeze(0), out, rows=None if out.rows is None else out.rows - 1)


@operator
def op_addmm(graph: Graph, c: Node, a: Node, b: Node, beta: float = 1, alpha: float = 1) -> Node:  # noqa: D103
    return graph.map("{0} + {1}", scaled(graph, op_mm(graph, a, b), alpha), scaled(graph, c, beta))


@operator
def op_baddbmm(graph: Graph, c: Node, a: Node, b: Node, beta: float = 1, alpha: float = 1) -> Node:  # noqa: D103
    return graph.map("{0} + {1}", scaled(graph, op_bmm(graph, a, b), alpha), scaled(graph, c, beta))


@operator
def op_mv(graph: Graph, a: Node, b: Node) -> Node:  # noqa: D103
    column = graph.rearrange(lambda v: v.unsqueeze(-1), b, rows=b.rows)
    out = op_mm(graph, a, column)
    return graph.rearrange(lambda m: m.squeeze(-1), out, rows=out.rows)


@operator
def op_dot(graph: Graph, a: Node, b: Node) -> Node:  # noqa: D103
    return op_sum(graph, graph.map("{0} * {1}", a, b))


OPERATORS["vdot"] = op_dot
