"""Operators that put numbers to places which are numbers themselves, and those that go along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import CompileError
from ..graph import PRODUCT, SUM, Graph, Node, Value
from .table import OPERATORS, operator


def _positions(graph: Graph, x: Node, axis: int) -> Node:
    """0, 1, 2, ... along an axis."""
    sizes = [1] * len(x.sizes())
    sizes[axis] = x.sizes()[axis]
    return graph.constant(torch.arange(sizes[axis], device="cpu").reshape(sizes))


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


@operator
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


@operator
def op_index_put(graph: Graph, x: Node, indices: Any, values: Node, accumulate: bool = False) -> Node:  # noqa: D103
    if any(isinstance(index, Node) for index in indices):
        raise CompileError("takes indices from a tensor that may change")
    sizes = x.sizes()
    everywhere = torch.arange(math.prod(sizes), device="cpu").reshape(sizes)
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
    turns[order] = torch.cat([torch.arange(int(n), device="cpu") for n in counts]) if len(flat) else flat
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
