"""From a user's func to a graph of ATen operators, without freezing anything into it that may change.

func is run once on fake tensors, which have shapes and no values. What depends on a value is therefore noticed, and the
number of rows is a symbol. Tensors that func has closed over (parameters, buffers, others) are found by what it does
with them, and are the graph's inputs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import set_detect_anomaly
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..errors import CompileError

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_READS = (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage)
_ASKS = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
# Operators that only move numbers are kept, where torch would compute with indices or masks.
_KEPT = ("select_scatter", "slice_scatter", "roll", "flip", "stack", "unbind", "split", "repeat")
# And some are taken apart that torch keeps.
_TAKEN_APART = (torch.ops.aten.native_batch_norm, torch.ops.aten.addmv)
# Derivatives of these can't be traced.
_UNTRACEABLE = (torch.ops.aten.softshrink, torch.ops.aten.hardshrink, torch.ops.aten._weight_norm_interface)
_WRITTEN = {"placeholder": "its input", "get_attr": "a tensor that it has closed over"}
_EXAMPLE_ROWS = 8  # instead of a single one, which torch takes for a special case


@cache
def _decompositions() -> dict[Any, Any]:
    """Torch's own formulas for what is composed of simpler operators."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    table: Any = core_aten_decompositions()
    kept = {op: formula for op, formula in table.items() if op.name().split("::")[1].split(".")[0] not in _KEPT}
    return kept | get_decompositions(_TAKEN_APART) | _first_decompositions()


@cache
def _first_decompositions() -> dict[Any, Any]:
    """Of what has to be taken apart before derivatives are formed."""
    from torch._decomp import get_decompositions

    ours = {torch.ops.aten.constant_pad_nd.default: _pad, torch.ops.aten.copy.default: _copy}
    return get_decompositions(_UNTRACEABLE) | ours


def _pad(x: Tensor, pads: list[int], value: float = 0) -> Tensor:
    """Padding as concatenation; torch's own looks at the number of rows."""
    for i, (before, behind) in enumerate(zip(pads[::2], pads[1::2])):
        axis, size = x.dim() - 1 - i, x.shape[-1 - i]
        if before or behind:
            x = x.narrow(axis, max(-before, 0), size + min(before, 0) + min(behind, 0))
        fillers = [x.new_full((*x.shape[:axis], max(n, 0), *x.shape[axis + 1 :]), value) for n in (before, behind)]
        x = (
            torch.cat([part for part in (fillers[0], x, fillers[1]) if part.shape[axis]], axis)
            if before or behind
            else x
        )
    return x


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What is written into a tensor; torch's own has no derivative."""
    return source.to(to.dtype).expand(to.shape).clone()


def user_line() -> str:
    """Where in the user's code we are."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith((*_LIBRARIES, "<")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "func"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the line of every operator, and refuses those whose results can't be had from the arguments alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line, name = user_line(), func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
            raise CompileError(f"a tensor's value is read at {line}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CompileError(f"{name} draws random numbers at {line}")
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write and not isinstance(value, FakeTensor):
                raise CompileError(f"{name} writes into a tensor that func has closed over at {line}")
        out = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled():  # func has switched it off: what it computes here is a constant to derivatives
            out = tree_map_only(Tensor, torch.Tensor.detach, out)
        _note_line(line)
        return out


def _note_line(line: str | None) -> None:
    """Gives the last nodes of the graph that is being traced their line."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    for node in reversed(mode.tracer.graph.nodes) if mode is not None and line is not None else ():
        if "line" in node.meta:
            break
        node.meta["line"] = line


def is_made_by_func(place: Node) -> bool:
    """Whether a graph's tensor was made by func itself, from Python's numbers."""
    return all(getattr(user.target, "__name__", "").startswith("lift_fresh") for user in place.users)


class _Again(Interpreter):
    """A graph as a function to be traced again, whose nodes keep their lines."""

    _closed_over: dict[Any, Tensor] | None = None

    def functional(self) -> Callable[..., Any]:
        """The same without writes; closed-over tensors are arguments, so that none is left in what they alone give."""
        closed_over, wrapped = self.closed_over(), torch.func.functionalize(self.run_with)
        return lambda *args: wrapped(closed_over, *args)

    def closed_over(self) -> dict[Any, Tensor]:
        """The tensors that func has closed over, by their names in the graph."""
        places = [n for n in self.graph.nodes if n.op == "get_attr" and not is_made_by_func(n)]
        return {n.target: self.fetch_attr(n.target) for n in places}

    def run_with(self, closed_over: dict[Any, Tensor], *args: Tensor) -> Any:
        """What the graph returns with others in the places of closed-over tensors."""
        self._closed_over = closed_over
        return self.run(*args)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        known = (self._closed_over or {}).get(target)
        return super().get_attr(target, args, kwargs) if known is None else known

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        _note_line(n.meta.get("line"))
        return out


class _Reads(TorchFunctionMode):
    """Refuses to hand out the memory of a tensor, whose values may change, and to tell whether a gradient is wanted.

    Solves with and without gradients have one graph; and who asks may have hooks to set, which it does not call.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise CompileError(f"Tensor.{func.__name__} is called at {user_line()}")
        if func == _ASKS and not sys._getframe(1).f_code.co_filename.startswith(_LIBRARIES):
            raise CompileError(f"a tensor's requires_grad is read at {user_line()}")
        return func(*args, **(kwargs or {}))


def trace(
    func: Callable[..., Any],
    shapes: list[torch.Size],
    is_tuple: bool,
    dtype: torch.dtype,
    rows: bool,
    own_times: bool = False,
) -> GraphModule:
    """The graph of func(t, *parts): placeholders for t and the parts of the state, and what is returned as a list.

    Args:
        func: the user's.
        shapes: of the parts of the state.
        is_tuple: whether func takes and returns a tuple.
        dtype: of the state.
        rows: whether the parts' first axis is a symbol, so that the graph serves any number of rows.
        own_times: whether t has one number for each row.

    Raises:
        CompileError: func does something that a graph can't stand for.
        Exception: whatever func raises.
    """

    def call(t: Tensor, *parts: Tensor) -> list[Tensor]:
        with torch.enable_grad(), _Watch(), _Reads():  # type: ignore[no-untyped-call]
            out = func(t, parts if is_tuple else parts[0])
            return [torch.clone(part) for part in (out if is_tuple else (out,))]

    with torch.no_grad():
        graph = _graph_of(call, shapes, dtype, rows, own_times)
        if _has_writes(graph):
            graph = _without_writes(graph, shapes, dtype, rows, own_times)
    for node in graph.graph.nodes:
        if _writes(node.target) and node.args[0].op in _WRITTEN:
            raise CompileError(f"func writes into {_WRITTEN[node.args[0].op]}")
    return graph


def taken_apart(
    traced: GraphModule, shapes: list[torch.Size], dtype: torch.dtype, rows: bool, own_times: bool = False
) -> GraphModule:
    """A graph with the formulas of what is composed of simpler operators, and without writes.

    It is not what derivatives are made of: where a formula chooses between two, one of them may be inf.
    """
    with torch.no_grad():
        traced = _without_writes(traced, shapes, dtype, rows, own_times, _decompositions())
        if _has_writes(traced):  # torch's own formulas may write into tensors that they have made
            traced = _without_writes(traced, shapes, dtype, rows, own_times, _decompositions())
        return traced


def _without_writes(traced: GraphModule, *form: Any) -> GraphModule:
    """A graph without writes into what it computes; form: `_graph_of`'s other arguments."""
    graph = _graph_of(_Again(traced).functional(), *form)
    graph.meta["conditions"] |= traced.meta["conditions"]
    return graph


def _has_writes(graph: GraphModule) -> bool:
    return any(_writes(node.target) for node in graph.graph.nodes)


def _writes(operator: Any) -> bool:
    return isinstance(operator, torch._ops.OpOverload) and operator._schema.is_mutable


def trace_vjp(
    traced: GraphModule,
    shapes: list[torch.Size],
    dtype: torch.dtype,
    rows: bool,
    wanted: list[Tensor],
    own_times: bool = False,
    time: bool = False,
) -> GraphModule:
    """The graph of func and its vector-Jacobian product: of t, the state's parts and as many of the vector's.

    Args:
        traced: func's graph, as `trace` makes it.
        shapes, dtype, rows, own_times: as `trace`'s.
        wanted: the closed-over tensors to which gradients are wanted.
        time: whether that to t is.

    Returns:
        A graph of a list: what func returns, then the gradient of every part, then of every tensor, at last of t.
    """

    again = _Again(traced)
    originals = again.closed_over()
    # One may have been computed from another: in their places are leaves, over the same memory.
    leaves = {id(x): x.detach() for x in originals.values()}
    asked = [leaves[id(x)].requires_grad_() for x in wanted]

    def pull_back(t: Tensor, *parts: Tensor) -> list[Tensor]:
        n = len(shapes)
        ys = [part.detach().requires_grad_() for part in parts[:n]]
        t = t.detach().requires_grad_(time)
        inputs = [*ys, *asked, *([t] if time else [])]
        returned = again.run_with({name: leaves[id(x)] for name, x in originals.items()}, t, *ys)
        pairs = [(out, g) for out, g in zip(returned, parts[n:]) if out.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if pairs:
            outs, vectors = zip(*pairs)
            found = torch.autograd.grad(outs, inputs, vectors, allow_unused=True)
        pulled = [torch.zeros_like(x) if g is None else torch.clone(g) for g, x in zip(found, inputs)]
        return [*map(torch.clone, returned), *pulled]

    with torch.enable_grad():
        graph = _graph_of(pull_back, shapes * 2, dtype, rows, own_times)
    for name, leaf in _Again(graph).closed_over().items():
        original = next((x for x in originals.values() if leaves[id(x)] is leaf), leaf)
        setattr(graph, name, original)
    return taken_apart(graph, shapes * 2, dtype, rows, own_times)


def _graph_of(
    call: Callable[..., Any],
    shapes: list[torch.Size],
    dtype: torch.dtype,
    rows: bool,
    own_times: bool,
    decompositions: dict[Any, Any] | None = None,
) -> GraphModule:
    """The graph of call(t, *parts)."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    table = _first_decompositions() if decompositions is None else decompositions
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    mode.cache_enabled = False  # for shapes with a symbol it takes longer than what it saves
    single = rows and shapes[0][0] == 1
    example = torch.empty((_EXAMPLE_ROWS, *shapes[0][1:]) if single else shapes[0], dtype=dtype, device="cpu")
    dynamic = [DimDynamic.DYNAMIC if rows and i == 0 else DimDynamic.STATIC for i in range(example.dim())]
    context: Any = StatelessSymbolicContext(dynamic)
    first = mode.from_tensor(example, source=ConstantSource("state"), symbolic_context=context)
    time: Tensor = mode.from_tensor(torch.tensor(0.0, dtype=dtype, device="cpu"))
    with mode:  # the other parts have as many rows
        if own_times:
            time = torch.empty(first.shape[0], dtype=dtype, device="cpu")
        parts = [
            torch.empty((first.shape[0], *shape[1:]) if rows else shape, dtype=dtype, device="cpu")
            for shape in shapes[1:]
        ]
    try:
        # einsum's search for the best order of its operands would depend on the number of rows; hooks on what is saved,
        # as torch.utils.checkpoint's, and anomaly mode want values.
        no_search, no_hooks = torch.backends.opt_einsum.flags(enabled=False), saved_tensors_hooks(_itself, _itself)
        with warnings.catch_warnings(), no_search, no_hooks, set_detect_anomaly(False):
            # Torch looks at the .grad of closed-over tensors that have a graph.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            graph: GraphModule = make_fx(call, table, tracing_mode="fake", _allow_non_fake_inputs=True)(
                time, first, *parts
            )
    except RuntimeError as error:
        if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
            raise CompileError(f"a tensor's value decides what is done at {_line_of(error)}") from error
        raise
    if env.replacements:
        raise CompileError("func depends on the number of rows")
    graph.graph.eliminate_dead_code()
    graph.meta["conditions"] = {guard.expr for guard in env.guards}
    return graph


def _itself(x: Tensor) -> Tensor:
    return x


def holds(condition: Any, rows: int) -> bool:
    """Whether a condition on the number of rows, under which a graph stands for func, is met; for 2 rows or more."""
    return bool(condition.subs(dict.fromkeys(condition.free_symbols, rows)))


def same_operators(graph: GraphModule, other: GraphModule) -> bool:
    """Whether two graphs call the same operators, but for slices of all there is: of a single row torch makes none."""
    mine, theirs = ([n.target for n in x.graph.nodes if not _takes_all(n)] for x in (graph, other))
    return mine == theirs


def _takes_all(node: Node) -> bool:
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    sliced, whole = (tuple(map(str, x.meta["val"].shape)) for x in (node, node.args[0]))  # type: ignore[union-attr]
    return sliced == whole


def _line_of(error: BaseException) -> str:
    """The last line of the user's that an exception has passed."""
    line, step = "func", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if not code.co_filename.startswith((*_LIBRARIES, "<")):
            line = f"{code.co_filename}:{step.tb_lineno}"
        step = step.tb_next
    return line
