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
from .operators import MOVES, OPERATORS


class Lowering:
    """A traced graph turned into nodes.

    Args:
        traced: as `trace` made it.
        dtype: of the state; all numbers have it.
        rows: whether the state's first axis are its rows; otherwise all of it is one row.
        totals: whether sums over rows are allowed, and returned behind the parts.
        inputs: those known already, which keep their numbers.
        own_times: whether every row has a time of its own.

    Attributes:
        outputs: one for each part of the state.
        gradients: what is returned beside, of a vjp: sums over all rows.
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
    ) -> None:
        self.graph = Graph(totals)
        self.dtype, self.inputs = dtype, list[Tensor]() if inputs is None else inputs
        self._traced, self._values = traced, dict[TracedNode, Any]()
        self._symbol: Any = None
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        time = (0, Place.ROW) if own_times else (None, Place.STAGE)
        self._values[placeholders[0]] = self.graph.node("time", (), None, (), *time)
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
        value: Any = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return value
        args, kwargs = self._resolve(node.args), self._resolve(tuple(node.kwargs.items()))
        options = dict(kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]]
        name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
        many = isinstance(value, (tuple, list))
        found = list(value) if many else [value]
        nodes = _nodes_in(args)
        if not nodes and not many:
            return self._constant(node.target, args, options, value)
        if name in MOVES:
            return self._move(node.target, name, args, options, found, many)
        if name in ("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full"):
            number = 0.0 if "zeros" in name else 1.0 if "ones" in name else float(args[-1])
            sizes = tuple(self._for_rows(size) for size in value.shape)
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
