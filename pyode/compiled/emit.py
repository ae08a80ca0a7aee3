"""From a graph to C++: the dynamics as a struct around which csrc/compiled has the solver's loops.

Rows lie in blocks, a vector for each number of a row. Every node becomes an array, `v7[5]`, with one statement for each
of few numbers and a loop for many. What does not differ from row to row is computed once a solve (`fixed`) or once a
stage (`timed`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch

from .graph import Index, Node, Place, contiguous, in_order

UNROLLED = 16  # so many statements at most for one node; from then on, a loop
UNROLLED_CALLS = 3  # of functions such as tanh, each some 30 instructions
MOST_LANE_SUMS = 1024  # numbers of a sum over rows that is kept for every lane
_CALL = re.compile(r"\b(?!select|maximum|minimum|indicator|abs|sqrt|sign|floor|ceil|trunc|round|T\b)[a-z_0-9]+\(")
_SCALARS = {torch.float32: "float", torch.float64: "double"}


def _number(value: str) -> str:
    """A number, given in hexadecimal, in C++."""
    x = float.fromhex(value)
    if math.isnan(x):
        return "std::numeric_limits<T>::quiet_NaN()"
    if math.isinf(x):
        return ("-" if x < 0 else "") + "std::numeric_limits<T>::infinity()"
    return f"T({x!r})"


def _flat(strides: Index, offset: int, at: Sequence[str | int]) -> str:
    """The place in memory of a multi-index of numbers and loop variables."""
    constant, terms = offset, []
    for stride, i in zip(strides, at):
        if isinstance(i, int):
            constant += stride * i
        elif stride == 1:
            terms.append(i)
        elif stride:
            terms.append(f"{i} * {stride}")
    if constant or not terms:
        terms.append(str(constant))
    return " + ".join(terms)


def _without_ones(shape: Index, *strides: Index) -> tuple[Index, ...]:
    """Shape and strides without axes of one entry."""
    kept = [i for i, size in enumerate(shape) if size != 1]
    return tuple(tuple(x[i] for i in kept) for x in (shape, *strides))


@dataclass
class _Matrix:
    """Where a factor lies, and its three strides."""

    pointer: str
    strides: Index

    @property
    def text(self) -> str:
        return f"{self.pointer}, {{{', '.join(map(str, self.strides))}}}"

    def transposed(self) -> _Matrix:
        n, i, j = self.strides
        return _Matrix(self.pointer, (n, j, i))


@dataclass
class _Code:
    """Statements of one function."""

    lines: list[str] = field(default_factory=list)

    def add(self, text: str, depth: int = 0) -> None:
        self.lines.append("  " * (depth + 2) + text)


class Dynamics:
    """The C++ of func's graph, or of its vector-Jacobian product's.

    Args:
        outputs: a node for each part of the state.
        dtype: of the state.
        rows: whether there are several rows, side by side in vectors.
        gradients: of a vector-Jacobian product: those of inputs.
        own_times: whether every row has a time of its own.

    Attributes:
        source: the struct.
        local_numbers: how many numbers of a row lie on the stack while `rows` is at work.
    """

    def __init__(
        self,
        outputs: Sequence[Node],
        dtype: torch.dtype,
        rows: bool,
        gradients: Sequence[Node] | None = None,
        own_times: bool = False,
    ) -> None:
        self._gradients, self._own_times = gradients, own_times
        self.widths = [out.numel for out in outputs]
        self._starts = [sum(self.widths[:i]) for i in range(len(outputs) + 1)]
        self._names: dict[int, str] = {}
        self._code = {place: _Code() for place in Place}
        self._members = {Place.SOLVE: list[str](), Place.STAGE: list[str]()}
        self._constants: list[str] = []
        self._operations = 0
        self.local_numbers = 0
        self._inputs = {place: set[int]() for place in Place}
        nodes = in_order([*outputs, *(gradients or ())])
        self._rows = rows
        self._sums: list[str] = []
        self._totals: list[str] = []
        self._collected: list[str] = []
        uses = Counter(id(x.base) for node in nodes for x in node.inputs if node.kind != "view")
        uses.update(id(out.base) for out in [*outputs, *(gradients or ())])
        self._inlined = {
            id(x.base)
            for node in nodes
            if node.kind == "map"
            for x in node.inputs
            if x.base.kind == "map" and uses[id(x.base)] == 1 and self._same_order(x, node) and x.place == node.place
        }
        for node in nodes:
            if node.kind not in ("view", "literal", "time", "state", "input") and id(node) not in self._inlined:
                self._emit(node)
        self._write(outputs)
        self.source = self._struct(_SCALARS[dtype], rows)

    @staticmethod
    def _same_order(x: Node, node: Node) -> bool:
        """Whether a map's operand is another map, number by number."""
        shape, strides = _without_ones(x.shape, x.layout[0])
        (base,) = _without_ones(x.base.shape)
        return x.layout[1] == 0 and shape == base and strides == _without_ones(shape, contiguous(shape))[1]

    def _state(self, base: Node) -> tuple[str, int]:
        """Where a part of the state lies, or of the vector that is multiplied with the Jacobian."""
        n = len(self.widths)
        return ("y", self._starts[base.detail]) if base.detail < n else ("g", self._starts[base.detail - n])

    def _name(self, node: Node) -> str:
        """The array in which a node lies."""
        return self._names[id(node)]

    def _read(self, x: Node, at: Sequence[str | int], place: Place) -> str:
        """An expression for a number of a node, to be used at a place; `at` is its index without axes of one entry."""
        base = x.base
        _, strides = _without_ones(x.shape, x.layout[0])
        if id(base) in self._inlined:
            return f"({self._formula(base, at)})"
        if base.kind == "literal":
            text = str(base.detail).lower() if base.mask else _number(base.detail)
        elif base.kind == "time":
            text = "t"
        elif base.kind == "state":
            name, start = self._state(base)
            text = f"{name}[{_flat(strides, x.layout[1] + start, at)}]"
        elif base.kind == "input":
            self._inputs[place].add(base.detail)
            text = f"p{base.detail}[{_flat(strides, x.layout[1], at)}]"
        else:
            text = f"{self._name(base)}[{_flat(strides, x.layout[1], at)}]"
        if place is Place.ROW and base.place < Place.ROW:
            return f"spread_mask<V>({text})" if base.mask else f"broadcast<V>({text})"
        return text

    def _formula(self, node: Node, at: Sequence[str | int]) -> str:
        """A map's formula for one number."""
        operands = [self._read(x, at, node.place) for x in node.inputs]
        return str(node.detail).format(*operands, R="V" if node.place is Place.ROW else "T")

    def _declare(self, node: Node) -> str:
        """Makes room for a node; returns its name."""
        number = f"v{len(self._names)}"
        if node.kind == "constant":
            numbers = ", ".join(map(_number, node.detail))
            self._constants.append(f"  static constexpr T {number}[] = {{{numbers}}};")
            self._names[id(node)] = number
        elif node.kind == "total":
            self._names[id(node)] = f"totals.{number}"
        elif node.place in (Place.ROW, Place.TOTAL):
            scalar, vector = ("bool", "mask_t<V>") if node.mask else ("T", "V")
            self.local_numbers += node.numel if node.place is Place.ROW else 0
            self._code[node.place].add(
                f"{vector if node.place is Place.ROW else scalar} {number}[{max(node.numel, 1)}];"
            )
            self._names[id(node)] = number
        else:
            self._members[node.place].append(f"    {'bool' if node.mask else 'T'} {number}[{max(node.numel, 1)}];")
            self._names[id(node)] = f"{'fixed' if node.place is Place.SOLVE else 'timed'}.{number}"
        return self._names[id(node)]

    def _emit(self, node: Node) -> None:
        name = self._declare(node)
        if node.kind != "constant":
            getattr(self, f"_emit_{node.kind}")(node, name, self._code[node.place])

    def _loops(self, shape: Index, calls: int, code: _Code) -> Iterator[tuple[list[str | int], int]]:
        """Multi-indices to write statements for, and their depth: all, or one within loops."""
        if math.prod(shape) <= (UNROLLED_CALLS if calls else UNROLLED):
            for at in product(*map(range, shape)):
                yield list(at), 0
            return
        for depth, size in enumerate(shape):
            code.add(f"for (int i{depth} = 0; i{depth} < {size}; ++i{depth})", depth)
        yield [f"i{depth}" for depth in range(len(shape))], len(shape)

    def _emit_map(self, node: Node, name: str, code: _Code) -> None:
        (shape,) = _without_ones(node.shape)
        text = self._formula(node, ["0"] * len(shape))
        calls = len(_CALL.findall(text))
        self._count(node, (20 * calls + 1 + text.count("*") + text.count("+")) * node.numel)
        for at, depth in self._loops(shape, calls, code):
            code.add(f"{name}[{_flat(contiguous(shape), 0, at)}] = {self._formula(node, at)};", depth)

    def _emit_gather(self, node: Node, name: str, code: _Code) -> None:
        table: list[tuple[int, int]] = list(node.detail)
        self._count(node, len(table))
        i = 0
        while i < len(table):
            k, start = table[i]
            n = 1
            while i + n < len(table) and table[i + n] == (k, start + n):
                n += 1
            if n <= UNROLLED:
                n = 1
                code.add(f"{name}[{i}] = {self._element(node.inputs[k], start, node.place)};")
            else:
                code.add(f"for (int i = 0; i < {n}; ++i)")
                code.add(f"{name}[{i} + i] = {self._element(node.inputs[k], f'{start} + i', node.place)};", 1)
            i += n

    def _element(self, base: Node, at: str | int, place: Place) -> str:
        """A number of a base node, by its place in memory."""
        flat = Node("view", (base,), ((1,), 0), (base.numel + 1,), base.rows, base.place, base.mask)
        return self._read(flat, [at], place)

    def _emit_reduce(self, node: Node, name: str, code: _Code) -> None:
        formula, axes = node.detail
        (x,) = node.inputs
        self._count(node, x.numel)
        kept = [i for i in range(len(x.shape)) if i not in axes]
        shape, sizes = tuple(x.shape[i] for i in kept), tuple(x.shape[i] for i in axes)
        few = math.prod(sizes) <= UNROLLED
        scalar = "V" if node.place is Place.ROW else "T"
        for at, depth in self._loops(shape, 0 if few else 1, code):

            def read(inner: Sequence[str | int], outer: Sequence[str | int] = at) -> str:
                index = dict(zip([*kept, *axes], [*outer, *inner]))
                place = _flat(*x.layout, [index[i] for i in range(len(x.shape))])
                return self._element(x.base, place, node.place)

            target = f"{name}[{_flat(contiguous(shape), 0, at)}]"
            first, *others = product(*map(range, sizes)) if few else [(0,) * len(sizes)]
            text = read(first)
            for inner in others:
                text = formula.format(f"({text})", read(inner))
            if few:
                code.add(f"{target} = {text};", depth)
                continue
            steps = [f"(r / {math.prod(sizes[i + 1 :])} % {size})" for i, size in enumerate(sizes)]
            code.add("{", depth)
            code.add(f"{scalar} sum = {text};", depth + 1)
            code.add(
                f"for (int r = 1; r < {math.prod(sizes)}; ++r) sum = {formula.format('sum', read(steps))};", depth + 1
            )
            code.add(f"{target} = sum;", depth + 1)
            code.add("}", depth)

    def _emit_contract(self, node: Node, name: str, code: _Code) -> None:
        n, i, j, k = node.detail
        self._count(node, 2 * n * i * j * k)
        a, b = (self._matrix(x, node.place) for x in node.inputs)
        if j == 1 and i > 1:  # the longer axis is the one that is cut into blocks
            a, b, i, j = b.transposed(), a.transposed(), j, i
        arguments = f"{a.text}, {b.text}"
        code.add(f"contract<{n}, {i}, {j}, {k}>({arguments}, {name});")

    def _emit_total(self, node: Node, name: str, _: _Code) -> None:
        code, number = self._code[Place.ROW], name.removeprefix("totals.")
        n = max(node.numel, 1)
        self._operations += 2 * n
        lanes = (
            len(node.inputs) == 1
            or n <= MOST_LANE_SUMS
            or not self._rows
            or any(x.place < Place.ROW for x in node.inputs)
        )
        self._sums.append(f"    {'V' if lanes else 'T'} {number}[{n}];")
        self._totals.append(f"    T {number}[{n}];")
        self._collected.append(
            f"    for (int i = 0; i < {n}; ++i) {{\n      T& total = totals.{number}[i] = 0;\n"
            f"      for (int64_t p = 0; p < n; ++p) total += over_lanes(parts[p * step].{number}[i]);\n    }}"
        )
        if len(node.inputs) == 1:
            (x,) = node.inputs
            (shape,) = _without_ones(x.shape)
            for at, depth in self._loops(shape, 0, code):
                code.add(f"sums.{number}[{_flat(contiguous(shape), 0, at)}] += {self._read(x, at, Place.ROW)};", depth)
            return
        a, b = (self._matrix(x, Place.ROW) for x in node.inputs)
        sizes = ", ".join(map(str, node.detail))
        function = "add_outer" if lanes else "add_outer_of_lanes"
        code.add(f"{function}<{sizes}>({a.text}, {b.text}, sums.{number});")

    def _matrix(self, x: Node, place: Place) -> _Matrix:
        """A factor of a matrix product."""
        strides, offset = x.layout
        if x.rows is not None:
            strides = (*strides[: x.rows], 0, *strides[x.rows :])
        base = x.base
        if base.kind in ("literal", "time"):
            name = f"q{len(self._code[place].lines)}"
            scalar = "V" if base.place is Place.ROW else "T"
            self._code[place].add(f"const {scalar} {name} = {self._read(x, [], base.place)};")
            return _Matrix(f"&{name}", strides)
        if base.kind == "state":
            name, start = self._state(base)
            return _Matrix(f"{name} + {offset + start}", strides)
        if base.kind == "input":
            self._inputs[place].add(base.detail)
            return _Matrix(f"p{base.detail} + {offset}", strides)
        return _Matrix(f"{self._name(base)} + {offset}", strides)

    def _count(self, node: Node, operations: int) -> None:
        if node.place is Place.ROW:
            self._operations += operations

    def _write(self, outputs: Sequence[Node]) -> None:
        code = self._code[Place.ROW]
        for out, start in zip(outputs, self._starts):
            (shape,) = _without_ones(out.shape)
            for at, depth in self._loops(shape, 0, code):
                code.add(f"k[{_flat(contiguous(shape), start, at)}] = {self._read(out, at, Place.ROW)};", depth)

        finish = self._code[Place.TOTAL]
        for i, x in enumerate(self._gradients or ()):
            (shape,) = _without_ones(x.shape)
            finish.add(f"T* const to{i} = static_cast<T*>(gradients[{i}]);")
            for at, depth in self._loops(shape, 0, finish):
                finish.add(f"to{i}[{_flat(contiguous(shape), 0, at)}] = {self._read(x, at, Place.TOTAL)};", depth)

    def _body(self, place: Place) -> str:
        pointers = [
            f"    const T* const p{i} = static_cast<const T*>(inputs[{i}]);" for i in sorted(self._inputs[place])
        ]
        return "\n".join([*pointers, *self._code[place].lines])

    def _struct(self, scalar: str, rows: bool) -> str:
        segments = ", ".join(map(str, self._starts))
        fixed, timed = ("\n".join(self._members[place]) for place in (Place.SOLVE, Place.STAGE))
        constants = "".join(line + "\n" for line in self._constants)
        adjoint = self._gradients is not None
        vector, time = " const V* __restrict__ g," if adjoint else "", "V" if self._own_times else "T"
        return f"""struct {"Adjoint" if adjoint else "Dynamics"} {{
  using T = {scalar};
  using V = {"Vector<T, kRegister>" if rows else "T"};
  static constexpr int size = {self._starts[-1]};
  static constexpr int n_segments = {len(self.widths)};
  static constexpr int segments[] = {{{segments}}};
  static constexpr int64_t operations = {self._operations};
{constants}
  struct Fixed {{
{fixed}
  }};
  struct Timed {{
{timed}
  }};
{self._struct_of_sums() if adjoint else ""}
  // Once a solve.
  static void prepare([[maybe_unused]] const void* const* inputs, [[maybe_unused]] Fixed& fixed) {{
{self._body(Place.SOLVE)}
  }}

  // Once a stage.
  static void at([[maybe_unused]] T t, [[maybe_unused]] const void* const* inputs,
                 [[maybe_unused]] const Fixed& fixed, [[maybe_unused]] Timed& timed) {{
{self._body(Place.STAGE)}
  }}

  // For every row: {"k = g df/dy, and sums += g df/dp" if adjoint else "k = f(t, y)"}.
  static void rows([[maybe_unused]] {time} t, [[maybe_unused]] const V* __restrict__ y,{vector}
                   V* __restrict__ k, [[maybe_unused]] const void* const* inputs, [[maybe_unused]] const Fixed& fixed,
                   [[maybe_unused]] const Timed& timed{", [[maybe_unused]] Sums& sums" if adjoint else ""}) {{
{self._body(Place.ROW)}
  }}
}};
"""

    def _struct_of_sums(self) -> str:
        sums, totals, collected = ("\n".join(x) for x in (self._sums, self._totals, self._collected))
        sizes = [x.numel for x in self._gradients or ()]
        return f"""
  struct Sums {{
{sums}
  }};
  struct Totals {{
{totals}
  }};

  static constexpr int n_gradients = {len(sizes)}, gradient_sizes[] = {{{", ".join(map(str, sizes or [0]))}}};

  // The sums over all rows, from those of n parts, `step` apart.
  static void collect([[maybe_unused]] const Sums* parts, [[maybe_unused]] int64_t n,
                      [[maybe_unused]] Totals& totals, [[maybe_unused]] int64_t step = 1) {{
{collected}
  }}

  // The inputs' gradients.
  static void finish([[maybe_unused]] const void* const* inputs, [[maybe_unused]] const Fixed& fixed,
                     [[maybe_unused]] const Totals& totals, [[maybe_unused]] void* const* gradients) {{
{self._body(Place.TOTAL)}
  }}
"""
