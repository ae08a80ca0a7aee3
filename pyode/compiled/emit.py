"""From a graph's nodes to statements of C++.

Rows lie in blocks, a vector for each number of a row. Every node becomes an array, `v7[5]`, with one statement for each
of few numbers and a loop for many.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from .graph import Index, Node, Place, contiguous, in_order

UNROLLED = 16  # so many statements at most for one node; from then on, a loop
UNROLLED_CALLS = 3  # of functions such as tanh, each some 30 instructions
MOST_LANE_SUMS = 1024  # numbers of a sum over rows that is kept for every lane
_CALL = re.compile(r"\b(?!select|maximum|minimum|indicator|abs|sqrt|sign|floor|ceil|trunc|round|T\b)[a-z_0-9]+\(")


def _number(value: str) -> str:
    """A number, given in hexadecimal, in C++."""
    x = float.fromhex(value)
    if math.isnan(x):
        return "std::numeric_limits<T>::quiet_NaN()"
    if math.isinf(x):
        return ("-" if x < 0 else "") + "std::numeric_limits<T>::infinity()"
    return f"T({x!r})"


def flat(strides: Index, offset: int, at: Sequence[str | int]) -> str:
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


def without_ones(shape: Index, *strides: Index) -> tuple[Index, ...]:
    """Shape and strides without axes of one entry."""
    kept = [i for i, size in enumerate(shape) if size != 1]
    return tuple(tuple(x[i] for i in kept) for x in (shape, *strides))


@dataclass(eq=False)
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


@dataclass(eq=False)
class Code:
    """The statements of one function.

    Attributes:
        place: how often it is called.
        lines: the statements.
        inputs: the numbers of those closed-over tensors that it reads.
        operations: on numbers, or vectors of them.
        local_numbers: how many numbers lie on the stack.
    """

    place: Place
    lines: list[str] = field(default_factory=list)
    inputs: set[int] = field(default_factory=set)
    operations: int = 0
    local_numbers: int = 0

    @property
    def scalar(self) -> str:
        """The type of a number."""
        return "V" if self.place.differs else "T"

    def add(self, text: str, depth: int = 0) -> None:
        """A statement, within so many loops."""
        self.lines.append("  " * (depth + 2) + text)

    def loops(self, shape: Index, calls: int = 0) -> Iterator[tuple[list[str | int], int]]:
        """Multi-indices to write statements for, and their depth: all, or one within loops."""
        if math.prod(shape) <= (UNROLLED_CALLS if calls else UNROLLED):
            for at in product(*map(range, shape)):
                yield list(at), 0
            return
        for depth, size in enumerate(shape):
            self.add(f"for (int i{depth} = 0; i{depth} < {size}; ++i{depth})", depth)
        yield [f"i{depth}" for depth in range(len(shape))], len(shape)

    def body(self) -> str:
        """The statements, behind the pointers that they use."""
        pointers = [f"    const T* const p{i} = static_cast<const T*>(inputs[{i}]);" for i in sorted(self.inputs)]
        return "\n".join([*pointers, *self.lines])


class Statements:
    """The functions that compute some nodes, and all that these are computed from.

    A vector-Jacobian product has two functions for rows, func itself and what goes back. What the latter needs of the
    former is kept between them, or computed again where that is cheap or there is no room.

    Args:
        outputs: what func returns.
        others: of a vector-Jacobian product: what goes back, to the state and to inputs.
        starts: where the parts of the state begin, and where the last one ends.
        rows: whether there are several rows, side by side in vectors.
        most_kept: so many numbers of a row may be kept.

    Attributes:
        code: the functions, by how often they are called.
        members: declarations of what outlives them: nodes that are computed once a solve, once a stage, and for each
            row if they are kept.
        constants: definitions.
        sums, totals, collected: sums over rows: declarations for a part of the rows, for all, and how to get there.
        kept_numbers: of a row.
        stage_numbers: that are computed once a stage.
    """

    def __init__(
        self, outputs: Sequence[Node], others: Sequence[Node], starts: Sequence[int], rows: bool, most_kept: int = 0
    ) -> None:
        self._starts, self._rows = starts, rows
        self.code = {place: Code(place) for place in Place}
        self.members = {place: list[str]() for place in (Place.SOLVE, Place.STAGE, Place.ROW)}
        self.constants: list[str] = []
        self.sums: list[str] = []
        self.totals: list[str] = []
        self.collected: list[str] = []
        self._names: dict[int, str] = {}
        self.stage_numbers = 0
        nodes = in_order([*outputs, *others])
        kept, again = _shared(nodes)
        self.kept_numbers = sum(node.numel for node in kept)
        if self.kept_numbers > most_kept:
            again = [x for x in in_order([*kept, *again]) if x.place is Place.ROW]
            self.kept_numbers, kept = 0, []
        self._kept, repeated = set(map(id, kept)), set(map(id, again))
        forwards = set(map(id, in_order([*outputs, *kept])))
        self._inlined = self._to_inline(nodes, [*outputs, *others])
        for node in nodes:
            if node.kind in ("view", "literal", "time", "state", "input") or id(node) in self._inlined:
                continue
            if node.place is not Place.ROW or id(node) in forwards:
                self._emit(node, self.code[Place.BACK if node.kind == "total" else node.place])
            if id(node) in repeated:
                self._emit(node, self.code[Place.BACK])

    def sum_of(self, total: Node) -> str:
        """The name, in the sums of a part of the rows, of what a sum over all rows is the sum of."""
        return self._names[id(total)].removeprefix("totals.")

    def _to_inline(self, nodes: list[Node], outputs: Sequence[Node]) -> set[int]:
        """The ids of maps that are part of the one map that uses them."""
        uses = Counter(id(x.base) for node in nodes for x in node.inputs if node.kind != "view")
        uses.update(id(out.base) for out in outputs)
        return {
            id(x.base)
            for node in nodes
            if node.kind == "map"
            for x in node.inputs
            if x.base.kind == "map" and uses[id(x.base)] == 1 and x.place == node.place and _same_order(x, node)
        } - self._kept

    def _state(self, base: Node) -> tuple[str, int]:
        """Where a part of the state lies, or of the vector that is multiplied with the Jacobian."""
        n = len(self._starts) - 1
        return ("y", self._starts[base.detail]) if base.detail < n else ("g", self._starts[base.detail - n])

    def read(self, x: Node, at: Sequence[str | int], code: Code, spread: bool | None = None) -> str:
        """An expression for a number of a node; `at` is its index without axes of one entry.

        Where it is to `spread`, as by default for rows, what does not differ between them is put into every lane.
        """
        base = x.base
        _, strides = without_ones(x.shape, x.layout[0])
        if id(base) in self._inlined:
            return f"({self._formula(base, at, code)})"
        if base.kind == "literal":
            text = str(base.detail).lower() if base.mask else _number(base.detail)
        elif base.kind == "time":
            text = "t"
        else:
            pointer, offset = self._memory(base, code)
            text = f"{pointer}[{flat(strides, x.layout[1] + offset, at)}]"
        if (code.place.differs if spread is None else spread) and not base.place.differs:
            return f"spread_mask<V>({text})" if base.mask else f"broadcast<V>({text})"
        return text

    def _memory(self, base: Node, code: Code) -> tuple[str, int]:
        """Where a node begins: a pointer and a number of numbers."""
        if base.kind == "state":
            return self._state(base)
        if base.kind == "input":
            code.inputs.add(base.detail)
            return f"p{base.detail}", 0
        return self._names[id(base)], 0

    def _formula(self, node: Node, at: Sequence[str | int], code: Code) -> str:
        """A map's formula for one number."""
        operands = [self.read(x, at, code) for x in node.inputs]
        return str(node.detail).format(*operands, R=code.scalar)

    def _declare(self, node: Node, code: Code) -> str:
        """Makes room for a node; returns its name."""
        number = self._names.get(id(node), f"v{len(self._names)}")
        differs, n = node.place.differs, max(node.numel, 1)
        scalar = ("mask_t<V>" if differs else "bool") if node.mask else "V" if differs else "T"
        declaration = f"{scalar} {number}[{n}];"
        if node.kind == "constant":
            numbers = ", ".join(map(_number, node.detail))
            self.constants.append(f"  static constexpr T {number}[] = {{{numbers}}};")
            self._names[id(node)] = number
        elif node.place is Place.TOTAL:
            self.totals.append(f"    {declaration}")
            self._names[id(node)] = f"totals.{number}"
        elif node.place in (Place.SOLVE, Place.STAGE):
            self.members[node.place].append(f"    {declaration}")
            self.stage_numbers += node.numel if node.place is Place.STAGE else 0
            self._names[id(node)] = f"{'fixed' if node.place is Place.SOLVE else 'timed'}.{number}"
        elif id(node) in self._kept:
            self.members[Place.ROW].append(f"    {declaration}")
            self._names[id(node)] = f"kept.{number}"
        else:
            code.local_numbers += node.numel
            code.add(declaration)
            self._names[id(node)] = number
        return self._names[id(node)]

    def _emit(self, node: Node, code: Code) -> None:
        name = self._declare(node, code)
        if node.kind != "constant":
            getattr(self, f"_emit_{node.kind}")(node, name, code)

    def _emit_map(self, node: Node, name: str, code: Code) -> None:
        (shape,) = without_ones(node.shape)
        text = self._formula(node, ["0"] * len(shape), code)
        calls = len(_CALL.findall(text))
        code.operations += (20 * calls + 1 + text.count("*") + text.count("+")) * node.numel
        for at, depth in code.loops(shape, calls):
            code.add(f"{name}[{flat(contiguous(shape), 0, at)}] = {self._formula(node, at, code)};", depth)

    def _emit_gather(self, node: Node, name: str, code: Code) -> None:
        table: list[tuple[int, int]] = list(node.detail)
        code.operations += len(table)
        i = 0
        while i < len(table):
            k, start = table[i]
            n = 1
            while i + n < len(table) and table[i + n] == (k, start + n):
                n += 1
            if n <= UNROLLED:
                n = 1
                code.add(f"{name}[{i}] = {self._element(node.inputs[k], start, code)};")
            else:
                code.add(f"for (int i = 0; i < {n}; ++i)")
                code.add(f"{name}[{i} + i] = {self._element(node.inputs[k], f'{start} + i', code)};", 1)
            i += n

    def _element(self, base: Node, at: str | int, code: Code) -> str:
        """A number of a base node, by its place in memory."""
        view = Node("view", (base,), ((1,), 0), (base.numel + 1,), base.rows, base.place, base.mask)
        return self.read(view, [at], code)

    def _emit_reduce(self, node: Node, name: str, code: Code) -> None:
        formula, axes = node.detail
        (x,) = node.inputs
        code.operations += x.numel
        kept = [i for i in range(len(x.shape)) if i not in axes]
        shape, sizes = tuple(x.shape[i] for i in kept), tuple(x.shape[i] for i in axes)
        few = math.prod(sizes) <= UNROLLED
        for at, depth in code.loops(shape, 0 if few else 1):

            def read(inner: Sequence[str | int], outer: Sequence[str | int] = at) -> str:
                index = dict(zip([*kept, *axes], [*outer, *inner]))
                return self._element(x.base, flat(*x.layout, [index[i] for i in range(len(x.shape))]), code)

            target = f"{name}[{flat(contiguous(shape), 0, at)}]"
            first, *others = product(*map(range, sizes)) if few else [(0,) * len(sizes)]
            text = read(first)
            for inner in others:
                text = formula.format(f"({text})", read(inner))
            if few:
                code.add(f"{target} = {text};", depth)
                continue
            steps = [f"(r / {math.prod(sizes[i + 1 :])} % {size})" for i, size in enumerate(sizes)]
            code.add("{", depth)
            code.add(f"{code.scalar} sum = {text};", depth + 1)
            code.add(
                f"for (int r = 1; r < {math.prod(sizes)}; ++r) sum = {formula.format('sum', read(steps))};", depth + 1
            )
            code.add(f"{target} = sum;", depth + 1)
            code.add("}", depth)

    def _emit_contract(self, node: Node, name: str, code: Code) -> None:
        n, i, j, k = node.detail
        code.operations += 2 * n * i * j * k
        a, b = (self._matrix(x, code) for x in node.inputs)
        if j == 1 and i > 1:  # the longer axis is the one that is cut into blocks
            a, b, i, j = b.transposed(), a.transposed(), j, i
        code.add(f"contract<{n}, {i}, {j}, {k}>({a.text}, {b.text}, {name});")

    def _emit_total(self, node: Node, name: str, code: Code) -> None:
        number, n = self.sum_of(node), max(node.numel, 1)
        code.operations += 2 * n
        lanes = (
            len(node.inputs) == 1
            or n <= MOST_LANE_SUMS
            or not self._rows
            or not all(x.place.differs for x in node.inputs)
        )
        self.sums.append(f"    {'V' if lanes else 'T'} {number}[{n}];")
        self.collected.append(
            f"    collect_sums<{n}>(parts, n, step, [](const Sums& s) {{ return s.{number}; }}, {name});"
        )
        if len(node.inputs) == 1:
            (x,) = node.inputs
            (shape,) = without_ones(x.shape)
            for at, depth in code.loops(shape):
                code.add(f"sums.{number}[{flat(contiguous(shape), 0, at)}] += {self.read(x, at, code)};", depth)
            return
        a, b = (self._matrix(x, code) for x in node.inputs)
        sizes = ", ".join(map(str, node.detail))
        function = "add_outer" if lanes else "add_outer_of_lanes"
        code.add(f"{function}<{sizes}>({a.text}, {b.text}, sums.{number});")

    def _matrix(self, x: Node, code: Code) -> _Matrix:
        """A factor of a matrix product."""
        strides, offset = x.layout
        if x.rows is not None:
            strides = (*strides[: x.rows], 0, *strides[x.rows :])
        base = x.base
        if base.kind in ("literal", "time"):
            name, differs = f"q{len(code.lines)}", base.place.differs
            code.add(f"const {'V' if differs else 'T'} {name} = {self.read(x, [], code, spread=differs)};")
            return _Matrix(f"&{name}", strides)
        pointer, start = self._memory(base, code)
        return _Matrix(f"{pointer} + {offset + start}", strides)


def _same_order(x: Node, node: Node) -> bool:
    """Whether a map's operand is another map, number by number."""
    shape, strides = without_ones(x.shape, x.layout[0])
    (base,) = without_ones(x.base.shape)
    return x.layout[1] == 0 and shape == base and strides == without_ones(shape, contiguous(shape))[1]


def _is_cheap(node: Node) -> bool:
    """Whether to compute a node again costs no more than to keep it."""
    formula = str(node.detail)
    slow = "/" in formula or "sqrt" in formula or _CALL.search(formula)
    return node.kind == "gather" or (node.kind == "map" and not slow)


def _shared(nodes: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """Of the nodes of each row those that what goes back needs: to be kept, and to be computed again from these."""
    kept: dict[int, Node] = {}
    again: dict[int, Node] = {}

    def visit(node: Node) -> None:
        if node.place is not Place.ROW or node.kind in ("time", "state") or id(node) in kept or id(node) in again:
            return
        (again if _is_cheap(node) else kept)[id(node)] = node
        if id(node) in again:
            for x in node.inputs:
                visit(x.base)

    for node in nodes:
        if node.place is Place.BACK or node.kind == "total":
            for x in node.inputs:
                visit(x.base)
    return list(kept.values()), list(again.values())
