"""The graph of compiled dynamics: few kinds of nodes, each of the shape that it has within one row.

A node that has rows knows which axis of torch's tensor they are. No operator may mix them; that is proved here, one by
one, by trying an operator on the indices of a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..errors import CompileError

Index = tuple[int, ...]
SUM, PRODUCT, QUOTIENT = "{0} + {1}", "{0} * {1}", "{0} / {1}"
BEHIND_TIME = "takes a sum over rows at every stage, for parameters behind a network of time"
ROWS = 3  # on so many rows is tried whether an operator mixes them


class Place(IntEnum):
    """How often a node has to be computed."""

    SOLVE = 0  # once a solve: of the inputs alone
    STAGE = 1  # once a stage: of time
    ROW = 2  # for every row
    BACK = 3  # for every row, of the vector that is multiplied with the Jacobian
    TOTAL = 4  # once, of sums over all rows: gradients of inputs

    @property
    def differs(self) -> bool:
        """Whether it is another value for every row."""
        return self in (Place.ROW, Place.BACK)


@dataclass(frozen=True, eq=False)
class Node:
    """A value.

    Attributes:
        kind: "input", "time", "state", "literal", "constant"; "view" (the same memory in another order), "gather"
            (numbers of several nodes, moved), "map" (a formula for each number), "reduce", "contract" (matrices),
            "total" (a sum over all rows, of numbers or of outer products).
        inputs: what it is computed from. A view's is never a view.
        detail: what is to be known beside: a view's strides and offset, a map's formula, ...
        shape: within one row.
        rows: the axis of torch's tensor along which rows lie; None if it has none.
        place: how often it is computed.
        mask: whether it consists of truth values.
    """

    kind: str
    inputs: tuple[Node, ...]
    detail: Any
    shape: Index
    rows: int | None
    place: Place
    mask: bool = False

    @property
    def numel(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)

    def sizes(self, rows: int = ROWS) -> Index:
        """Torch's shape, for so many rows."""
        return self.shape if self.rows is None else (*self.shape[: self.rows], rows, *self.shape[self.rows :])

    @property
    def base(self) -> Node:
        """The node whose memory is read."""
        return self.inputs[0] if self.kind == "view" else self

    @property
    def layout(self) -> tuple[Index, int]:
        """Strides and offset of what is read of the base's memory."""
        return self.detail if self.kind == "view" else (contiguous(self.shape), 0)


Value = Node | float | bool


def contiguous(shape: Index) -> Index:
    """Strides of a contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _positions(shape: Index, strides: Index, offset: int) -> Tensor:
    """Where in memory the numbers of an array lie."""
    positions = torch.full(shape, offset, device="cpu")
    for axis, (size, stride) in enumerate(zip(shape, strides)):
        positions += (stride * torch.arange(size, device="cpu")).reshape(-1, *[1] * (len(shape) - 1 - axis))
    return positions


def _affine(indices: Tensor) -> tuple[Index, int] | None:
    """Strides and offset, if the indices are an affine function of the position."""
    if indices.numel() == 0:
        return (0,) * indices.dim(), 0
    offset = int(indices.reshape(-1)[0])
    strides = []
    for axis, size in enumerate(indices.shape):
        start = indices[(0,) * axis]
        strides.append(int(start[1].reshape(-1)[0]) - offset if size > 1 else 0)
    layout = tuple(strides), offset
    return layout if torch.equal(_positions(tuple(indices.shape), *layout), indices) else None


class Graph:
    """Makes nodes; the same one for the same computation.

    Args:
        totals: whether there may be sums over rows, as the gradients of inputs are.

    Attributes:
        shares: whether a row's share now stands for a sum over rows, which is taken of what is at last computed from
            it, and depends on it linearly: so it may be multiplied with what differs from stage to stage.
    """

    def __init__(self, totals: bool = False) -> None:
        self.totals, self.shares = totals, False
        self._nodes: dict[Hashable, Node] = {}

    def node(
        self,
        kind: str,
        inputs: Sequence[Node],
        detail: Any,
        shape: Sequence[int],
        rows: int | None,
        place: Place | None = None,
        mask: bool = False,
    ) -> Node:
        """The node, made if there is no such one yet."""
        places = {x.place for x in inputs}
        if Place.TOTAL in places and places & {Place.ROW, Place.BACK}:
            raise CompileError("mixes rows")
        if {Place.TOTAL, Place.STAGE} <= places:
            raise CompileError(BEHIND_TIME)
        if rows is not None and any(x.place.differs and x.rows is None for x in inputs):
            raise CompileError("mixes rows")
        place = max(places, default=Place.SOLVE) if place is None else place
        key = (kind, tuple(map(id, inputs)), detail, tuple(shape), rows, mask)
        if key not in self._nodes:
            self._nodes[key] = Node(kind, tuple(inputs), detail, tuple(shape), rows, place, mask)
        return self._nodes[key]

    def literal(self, value: float | bool) -> Node:
        """A number, or a truth value."""
        mask = isinstance(value, bool)
        return self.node("literal", (), value if mask else float(value).hex(), (), None, mask=mask)

    def constant(self, numbers: Tensor) -> Node:
        """Numbers or truth values that never change."""
        if numbers.numel() == 1:
            number = numbers.item()
            node = self.literal(number if isinstance(number, bool) else float(number))
            return self.expand(node, tuple(numbers.shape), None)
        if numbers.dtype == torch.bool:
            return self.truth(self.constant(numbers.double()))
        values = tuple(float(x).hex() for x in numbers.reshape(-1).tolist())
        return self.node("constant", (), values, tuple(numbers.shape), None)

    def rearrange(self, move: Callable[..., Any], *nodes: Node, rows: int | None) -> Node:
        """What an operator makes of nodes that only moves numbers.

        Args:
            move: the operator, on tensors.
            nodes: its arguments.
            rows: the axis of its result along which rows lie.

        Raises:
            CompileError: it mixes rows.
        """
        ends = [0]
        indices = []
        for node in nodes:
            indices.append(_positions(node.shape, *node.layout) + ends[-1])
            ends.append(ends[-1] + node.base.numel)
        step = ends[-1]
        for i, node in enumerate(nodes):
            if node.rows is not None:
                indices[i] = torch.stack([indices[i] + r * step for r in range(ROWS)], node.rows)
        out = move(*indices)
        if rows is None:
            if any(node.rows is not None for node in nodes):
                raise CompileError("mixes rows")
            return self._pick(nodes, ends, out, None)
        first, *others = out.movedim(rows, 0).unbind()
        moving = torch.cat([torch.full((node.base.numel,), node.rows is not None, device="cpu") for node in nodes])
        # In row r stands the number of the first row, r rows on.
        if len(others) != ROWS - 1 or bool((first >= step).any()):
            raise CompileError("mixes rows")
        for r, other in enumerate(others, 1):
            if not torch.equal(other, first + r * step * moving[first]):
                raise CompileError("mixes rows")
        return self._pick(nodes, ends, first, rows)

    def _pick(self, nodes: Sequence[Node], ends: list[int], indices: Tensor, rows: int | None) -> Node:
        """A view of one node, or numbers of several."""
        used = [i for i in range(len(nodes)) if bool(((indices >= ends[i]) & (indices < ends[i + 1])).any())]
        mask = nodes[0].mask
        shape = tuple(indices.shape)
        if len(used) <= 1:
            i = used[0] if used else 0
            base = nodes[i].base
            affine = _affine(indices - ends[i])
            if affine is not None:
                if affine == (contiguous(shape), 0) and shape == base.shape and rows == base.rows:
                    return base
                return self.node("view", (base,), affine, shape, rows, mask=mask)
        if any(node.mask != mask for node in nodes):
            raise CompileError("joins numbers and truth values")
        bases = [nodes[i].base for i in used]
        flat = indices.reshape(-1).tolist()
        table = []
        for index in flat:
            k = next(k for k, i in enumerate(used) if ends[i] <= index < ends[i + 1])
            table.append((k, index - ends[used[k]]))
        return self.node("gather", bases, tuple(table), shape, rows, mask=mask)

    def expand(self, node: Node, sizes: Index, rows: int | None) -> Node:
        """A node broadcast to torch's sizes, in which there are ROWS rows."""
        if node.sizes() == sizes and node.rows == rows:
            return node
        return self.rearrange(lambda x: x.expand(sizes), node, rows=rows)

    def reshape(self, node: Node, sizes: Sequence[int], rows: int | None) -> Node:
        """A node of other sizes, in which there are ROWS rows."""
        return self.rearrange(lambda x: x.reshape(tuple(sizes)), node, rows=rows)

    def broadcast(self, *nodes: Node) -> tuple[list[Node], int | None]:
        """The nodes broadcast against each other, and the axis of rows."""
        sizes = tuple(torch.broadcast_shapes(*(node.sizes() for node in nodes)))  # type: ignore[no-untyped-call]
        axes = {len(sizes) - len(node.sizes()) + node.rows for node in nodes if node.rows is not None}
        if len(axes) > 1:
            raise CompileError("mixes rows")
        rows = next(iter(axes), None)
        return [self.expand(node, sizes, rows) for node in nodes], rows

    def map(self, formula: str, *values: Value, mask: bool = False) -> Node:
        """A formula for each number; {0}, {1}, ... stand for the values', broadcast against each other."""
        nodes = [x if isinstance(x, Node) else self.literal(x) for x in values]
        if {Place.TOTAL, Place.STAGE} <= {x.place for x in nodes}:
            return self._scaled_total(formula, nodes)
        operands, rows = self.broadcast(*nodes)
        return self.node("map", operands, formula, operands[0].shape, rows, mask=mask)

    def number(self, value: Value) -> Node:
        """A mask as zeros and ones, a number as a node."""
        node = value if isinstance(value, Node) else self.literal(float(value))
        return self.map("indicator<{R}>({0})", node) if node.mask else node

    def truth(self, value: Value) -> Node:
        """A number as a mask: whether it is other than 0."""
        node = value if isinstance(value, Node) else self.literal(value)
        return node if node.mask else self.map("{0} != 0", node, mask=True)

    def reduce(self, formula: str, node: Node, axes: Sequence[int], keepdim: bool) -> Node:
        """A formula for two numbers, {0} and {1}, applied until one is left along the axes of torch's tensor."""
        dims = len(node.sizes())
        torch_axes = sorted({axis % dims for axis in axes} if axes and dims else set(range(dims)))
        if node.rows is not None and node.rows in torch_axes:
            return self._total(formula, node, [axis for axis in torch_axes if axis != node.rows], keepdim)
        within = tuple(a - (node.rows is not None and a > node.rows) for a in torch_axes)
        kept = [size for i, size in enumerate(node.shape) if i not in within]
        if math.prod(node.shape[i] for i in within) == 0:
            raise CompileError("reduces nothing")
        rows = None if node.rows is None else node.rows - sum(a < node.rows for a in torch_axes)
        out = self.node("reduce", (self.number(node),), (formula, within), kept, rows) if within else node
        if keepdim:
            sizes = [1 if i in torch_axes else size for i, size in enumerate(node.sizes())]
            out = self.reshape(out, sizes, node.rows)
        return out

    def _total(self, formula: str, node: Node, axes: Sequence[int], keepdim: bool) -> Node:
        """A sum over all rows, and within them over some axes."""
        if not self.totals or formula != SUM:
            raise CompileError("mixes rows")
        sizes = [1 if i in axes or i == node.rows else size for i, size in enumerate(node.sizes())]
        within = self.reduce(formula, node, axes, True) if axes else node
        total = self._over_rows(within)
        return self.reshape(
            total, sizes if keepdim else [s for i, s in enumerate(sizes) if i not in (*axes, node.rows)], None
        )

    def _over_rows(self, node: Node) -> Node:
        """The sum over all rows, or a row's share in it."""
        if self.shares:
            return self.node("view", (node.base,), node.layout, node.shape, None)
        return self.node("total", (node,), None, node.shape, None, Place.TOTAL)

    def _scaled_total(self, formula: str, nodes: list[Node]) -> Node:
        """A sum over all rows times what differs from stage to stage: the sum of the products."""
        i = [x.place for x in nodes].index(Place.TOTAL)
        total, factor, base = nodes[i], nodes[1 - i], nodes[i].base
        if (
            formula not in (PRODUCT, QUOTIENT)[: 2 - i]
            or base.kind != "total"
            or total.layout != (contiguous(total.shape), 0)
            or len(factor.shape) > len(total.shape)
        ):
            raise CompileError(BEHIND_TIME)
        if len(base.inputs) == 1:
            (x,) = base.inputs
            if x.rows is not None:
                axis, sizes = x.rows, (ROWS, *total.shape)
                x = self.rearrange(lambda v: v.movedim(axis, 0).reshape(sizes), x, rows=0)
            x = self.map(formula, x, factor)
            return self.node("total", (x,), None, x.shape, None, Place.TOTAL)
        if factor.numel != 1:
            raise CompileError(BEHIND_TIME)
        a, b = base.inputs
        a = self.map(formula, a, self.reshape(factor, (), None))
        return self.reshape(self.node("total", (a, b), base.detail, base.shape, None, Place.TOTAL), total.shape, None)

    def contract(self, a: Node, b: Node) -> Node:
        """Matrix products, [n, i, k] times [n, k, j]."""
        if self.totals and (a.rows, b.rows) == (2, 1):
            (n, i), (_, j) = a.shape, b.shape
            if self.shares:
                return self.node("contract", (self.number(a), self.number(b)), (n, i, j, 1), (n, i, j), None)
            return self.node("total", (self.number(a), self.number(b)), (n, i, j), (n, i, j), None, Place.TOTAL)
        if a.rows is not None and b.rows is not None and (a.rows, b.rows) != (0, 0):
            raise CompileError("mixes rows")
        if a.rows == 2 or b.rows == 1 or (None in (a.rows, b.rows) and 0 in (a.rows, b.rows)):
            raise CompileError("mixes rows")
        rows = b.rows if a.rows is None else a.rows
        # Within a row, the axis of rows has one entry.
        (n, i, k), (_, _, j) = a.sizes(1), b.sizes(1)
        if k == 0:
            raise CompileError("multiplies empty matrices")
        sizes = [n, i, j]
        if rows is not None:
            del sizes[rows]
        return self.node("contract", (self.number(a), self.number(b)), (n, i, j, k), sizes, rows)


def in_order(outputs: Sequence[Node]) -> list[Node]:
    """All nodes that the outputs need, each behind its inputs."""
    order: dict[int, Node] = {}

    def visit(node: Node) -> None:
        if id(node) not in order:
            for x in node.inputs:
                visit(x)
            order[id(node)] = node

    for output in outputs:
        visit(output)
    return list(order.values())
