"""From a traced graph of ATen operators to the few kinds of nodes of `graph.py`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as TracedNode

from ..errors import CompileError
from .graph import ROWS, Graph, Node, Place
from .operators import COUNTS, FILLED, MOVES, OPERATORS, SIZED
from .trace import is_made_by_func

MOST_CONSTANTS = 1024  # written out as numbers; more of them are an input


class Lowering:
    """A traced graph turned into nodes.

    Args:
        traced: as `trace` made it.
        dtype: of the state; all numbers have it.
        rows: whether the state's first axis are its rows; otherwise all of it is one row.
        totals: whether it is a vector-Jacobian product, as `trace_vjp` made it; then sums over rows are allowed.
        inputs: those known already, which keep their numbers.
        own_times: whether every row has a time of its own.
        beside: the graph of another vector-Jacobian product of the same func; the gradients are then formed row by row,
            and summed at last.

    Attributes:
        outputs: what func returns, for each part of the state.
        pulled, gradients: of a vector-Jacobian product: what it is to the parts of the state, and to inputs; the latter
            are sums over all rows.
        inputs: the tensors that func has closed over, by the number of their "input" nodes.
    """

    def __init__(
        self,
        traced: GraphModule,
        dtype: torch.dtype,
        rows: bool,
        totals: bool = False,
        inputs: list[Tensor] | None = None,
        own_times: bool = False,
        beside: Graph | None = None,
    ) -> None:
        self.graph = Graph(totals) if beside is None else beside
        self.graph.shares = beside is not None
        self.dtype, self.inputs = dtype, list[Tensor]() if inputs is None else inputs
        self._traced, self._values = traced, dict[TracedNode, Any]()
        self._symbol: Any = None
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        time = (0, Place.ROW) if own_times else (None, Place.STAGE)
        self._values[placeholders[0]] = self.graph.node("time", (), None, (), *time)
        n = (len(placeholders) - 1) // (2 if totals else 1)
        for i, node in enumerate(placeholders[1:]):
            sizes = node.meta["val"].shape
            if rows:
                self._symbol = sizes[0].node.expr
            shape, place = tuple(sizes[1:] if rows else sizes), Place.ROW if i < n else Place.BACK
            self._values[node] = self.graph.node("state", (), i, shape, 0 if rows else None, place)
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
        parts = placeholders[1 : 1 + n]
        self.outputs = [self._part(out, node) for out, node in zip(returned, parts)]
        self.pulled = [self._part(out, node) for out, node in zip(returned[n:], parts)] if totals else None
        self.gradients = list[Node]()
        for out in returned[2 * n :]:
            value = self.graph.number(self._node(self._values[out]))
            if value.place.differs or beside is not None:  # the only row's, or each row's
                value = self.graph.node("total", (value,), None, value.shape, None, Place.TOTAL)
            self.gradients.append(value)

    def _part(self, returned: TracedNode, part: TracedNode) -> Node:
        """What is returned for a part of the state."""
        if tuple(map(str, returned.meta["val"].shape)) != tuple(map(str, part.meta["val"].shape)):
            raise CompileError("func does not return the state's shape")
        value, state = self.graph.number(self._node(self._values[returned])), self._values[part]
        return self.graph.expand(value, state.sizes(), state.rows)

    def _closed_over(self, node: TracedNode) -> Any:
        value = self._traced
        for name in str(node.target).split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        if is_made_by_func(node):
            return value
        if value.device.type != "cpu" or value.is_complex():
            raise CompileError(f"func uses a tensor of {value.dtype} on {value.device}; the state is of {self.dtype}")
        # One of another dtype is converted at every solve; where torch would compute in that dtype is noticed there.
        made = self._input(value)
        return self.graph.truth(made) if value.dtype == torch.bool else made

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

    def _for_rows(self, size: Any) -> int:
        """A traced size, for ROWS rows."""
        return int(size.node.expr.subs({self._symbol: ROWS})) if isinstance(size, torch.SymInt) else int(size)

    def _resolve(self, argument: Any) -> Any:
        """An argument with traced values replaced: tensors by nodes or constants, sizes by those for ROWS rows."""
        if isinstance(argument, TracedNode):
            value = argument.meta["val"]
            if isinstance(value, torch.SymInt):
                return self._for_rows(value)
            return self._values[argument]
        if isinstance(argument, (list, tuple)):
            return type(argument)(map(self._resolve, argument))
        return argument

    def _counts_rows(self, name: str, traced: Any, args: Any) -> bool:
        """Whether the number of rows is among an operator's arguments, but as the end of a slice of all rows."""
        axis = {"slice": 1, "slice_scatter": 2}.get(name)
        if axis and isinstance(args[0], Node) and args[axis] == args[0].rows:
            return False
        if name in SIZED:  # a number that fills, and no size
            traced = traced[1:] if name == "full" else traced[2:] if name == "new_full" else ()
        found: list[Any] = []
        _each(lambda x: found.append(x) if isinstance(x, TracedNode) else None, traced)
        return any(isinstance(x.meta["val"], (torch.SymInt, torch.SymFloat)) for x in found)

    def _node(self, value: Any) -> Any:
        """A constant tensor as a node."""
        if not isinstance(value, Tensor):
            return value
        if value.numel() > MOST_CONSTANTS and value.dtype != torch.bool:
            return self._input(value.to(self.dtype))
        return self.graph.constant(value)

    def _call(self, node: TracedNode) -> Any:
        value: Any = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, int, float)):
            return value
        args, kwargs = self._resolve(node.args), self._resolve(tuple(node.kwargs.items()))
        options = dict(kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]]
        name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
        if self._counts_rows(name, node.args, args):
            raise CompileError("computes with the number of rows")
        many = isinstance(value, (tuple, list))
        found = list(value) if many else [value]
        nodes = _nodes_in(args)
        empty = name.startswith(("empty", "new_empty"))  # what is empty is written before it is read
        if not (nodes or many or empty):
            return self._constant(node.target, args, options, value)
        if name in MOVES:
            return self._move(node.target, name, args, options, found, many)
        if empty or name in FILLED:
            number = 1.0 if "ones" in name else float(args[-1]) if "full" in name else 0.0
            literal = self.graph.literal(bool(number) if value.dtype == torch.bool else number)
            sizes = tuple(self._for_rows(size) for size in value.shape)
            return self.graph.expand(literal, sizes, self._rows_of(value))
        for item in found:
            integer = item is not None and item.dtype == torch.int64 and name in COUNTS
            if item is not None and item.dtype not in (self.dtype, torch.bool) and not integer:
                raise CompileError(f"computes in {item.dtype}; the state is of {self.dtype}")
        if name not in OPERATORS:
            raise CompileError("is not known to the compiler")
        to_node = partial(_each, lambda x: self._node(x) if isinstance(x, Tensor) else x)
        if name == "index_put":  # whose indices are no values
            args = (to_node(args[0]), args[1], *to_node(args[2:]))
        else:
            args, options = to_node(args), {key: to_node(x) for key, x in options.items()}
        out = OPERATORS[name](self.graph, *args, **options)
        typed = [self._typed(x, item) for x, item in zip(out if many else [out], found)]
        return typed if many else typed[0]

    def _typed(self, node: Any, value: Any) -> Any:
        """A result as truth values where torch's is."""
        if node is None or value is None:
            return None
        return self.graph.truth(node) if value.dtype == torch.bool else self.graph.number(node)

    def _constant(self, target: Any, args: Any, options: dict[str, Any], value: Any) -> Any:
        """What does not depend on the state, time or inputs, computed now; a node if it has rows."""
        out = target(*args, **options)
        rows = self._rows_of(value)
        if rows is None:
            return out
        first, *others = out.movedim(rows, 0).unbind()
        if not all(torch.equal(first, other) for other in others):
            raise CompileError("mixes rows")
        return self.graph.rearrange(lambda x: x.unsqueeze(rows).expand(out.shape), self._node(first), rows=rows)

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
