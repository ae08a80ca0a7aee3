"""The dynamics as a C++ struct, around which csrc/compiled has the solver's loops.

What does not differ from row to row is computed once a solve (`fixed`) or once a stage (`timed`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .emit import Statements, flat, without_ones
from .graph import Node, Place, contiguous

MOST_KEPT = 1 << 19  # bytes for what the evaluations of a step keep for their way back, half of a second-level cache
REGISTER = 64  # bytes, at most: a number of a block of rows
_SCALARS = {torch.float32: "float", torch.float64: "double"}


class Dynamics:
    """The C++ of func's graph, with or without its vector-Jacobian product.

    Args:
        outputs: what func returns: a node for each part of the state.
        dtype: of the state.
        rows: whether there are several rows, side by side in vectors.
        own_times: whether every row has a time of its own.
        pulled, gradients: of a vector-Jacobian product: what it is to the parts of the state, and to inputs.
        time: whether the last of these is that to time.
        evaluations: of a step; each may keep something for its way back.

    Attributes:
        source: the struct.
        has_way_back: whether it has the vector-Jacobian product.
        local_bytes: of the stack, while a block of rows takes a step, beside the solver's own.
    """

    def __init__(
        self,
        outputs: Sequence[Node],
        dtype: torch.dtype,
        rows: bool,
        own_times: bool = False,
        pulled: Sequence[Node] | None = None,
        gradients: Sequence[Node] = (),
        time: bool = False,
        evaluations: int = 1,
    ) -> None:
        self.widths = [out.numel for out in outputs]
        self._starts = [sum(self.widths[:i]) for i in range(len(outputs) + 1)]
        others = [*(pulled or ()), *gradients]
        register = REGISTER if rows else dtype.itemsize
        most_kept = MOST_KEPT // (evaluations * register)
        statements = Statements(outputs, others, self._starts, rows, most_kept)
        self._statements, self._gradients, self.has_way_back = statements, gradients, pulled is not None
        self._time, self._has_time = "V" if own_times else "T", time
        self._store(outputs, "k", Place.ROW)
        self._store(pulled or (), "to", Place.BACK)
        self._store_gradients()
        codes = [statements.code[place] for place in (Place.ROW, Place.BACK)]
        local_numbers = evaluations * statements.kept_numbers + sum(code.local_numbers for code in codes)
        self.local_bytes = local_numbers * register + evaluations * statements.stage_numbers * dtype.itemsize
        self._operations = sum(code.operations for code in codes)
        self.source = self._struct(_SCALARS[dtype], rows)

    def _store(self, nodes: Sequence[Node], name: str, place: Place) -> None:
        code = self._statements.code[place]
        for node, start in zip(nodes, self._starts):
            (shape,) = without_ones(node.shape)
            for at, depth in code.loops(shape):
                number = self._statements.read(node, at, code)
                code.add(f"{name}[{flat(contiguous(shape), start, at)}] = {number};", depth)

    def _store_gradients(self) -> None:
        code = self._statements.code[Place.TOTAL]
        for i, node in enumerate(self._gradients):
            (shape,) = without_ones(node.shape)
            code.add(f"T* const to{i} = static_cast<T*>(gradients[{i}]);")
            for at, depth in code.loops(shape):
                number = self._statements.read(node, at, code)
                code.add(f"to{i}[{flat(contiguous(shape), 0, at)}] = {number};", depth)

    def _body(self, place: Place) -> str:
        return self._statements.code[place].body()

    def _members(self, name: str, place: Place) -> str:
        members = "".join(line + "\n" for line in self._statements.members[place])
        return f"  struct {name} {{\n{members}  }};"

    def _struct(self, scalar: str, rows: bool) -> str:
        constants = "".join(line + "\n" for line in self._statements.constants)
        return f"""struct Dynamics {{
  using T = {scalar};
  using V = {"Vector<T, kRegister>" if rows else "T"};
  static constexpr int size = {self._starts[-1]};
  static constexpr int n_segments = {len(self.widths)};
  static constexpr int segments[] = {{{", ".join(map(str, self._starts))}}};
  static constexpr int64_t operations = {self._operations};
  static constexpr bool has_way_back = {str(self.has_way_back).lower()};  // else solves note nothing
{constants}
{self._members("Fixed", Place.SOLVE)}
{self._members("Timed", Place.STAGE)}
{self._members("Kept", Place.ROW)}

  // Once a solve.
  static void prepare([[maybe_unused]] const void* const* inputs, [[maybe_unused]] Fixed& fixed) {{
{self._body(Place.SOLVE)}
  }}

  // Once a stage.
  static void at([[maybe_unused]] T t, [[maybe_unused]] const void* const* inputs,
                 [[maybe_unused]] const Fixed& fixed, [[maybe_unused]] Timed& timed) {{
{self._body(Place.STAGE)}
  }}

  // For every row: k = f(t, y){", and what is kept for the way back" if self.has_way_back else ""}.
  static void rows([[maybe_unused]] {self._time} t, [[maybe_unused]] const V* __restrict__ y, V* __restrict__ k,
                   [[maybe_unused]] const void* const* inputs, [[maybe_unused]] const Fixed& fixed,
                   [[maybe_unused]] const Timed& timed, [[maybe_unused]] Kept& __restrict__ kept) {{
{self._body(Place.ROW)}
  }}
{self._way_back() if self.has_way_back else ""}}};
"""

    def _way_back(self) -> str:
        statements = self._statements
        sums, totals, collected = ("\n".join(x) for x in (statements.sums, statements.totals, statements.collected))
        sizes = [x.numel for x in self._gradients]
        of_time = ""
        if self._has_time:
            name = statements.sum_of(self._gradients[-1])
            of_time = f"\n  static V& time(Sums& sums) {{ return sums.{name}[0]; }}  // g df/dt is added there"
        return f"""
  struct Sums {{
{sums}
  }};
  struct Totals {{
{totals}
  }};
  static constexpr bool has_time = {str(self._has_time).lower()};{of_time}

  // And back: to = g df/dy, and sums += g df/dp.
  static void back([[maybe_unused]] {self._time} t, [[maybe_unused]] const V* __restrict__ y,
                   [[maybe_unused]] const V* __restrict__ g, V* __restrict__ to,
                   [[maybe_unused]] const void* const* inputs, [[maybe_unused]] const Fixed& fixed,
                   [[maybe_unused]] const Timed& timed, [[maybe_unused]] const Kept& kept,
                   [[maybe_unused]] Sums& sums) {{
{self._body(Place.BACK)}
  }}

  static constexpr int n_gradients = {len(sizes)}, gradient_sizes[] = {{{", ".join(map(str, sizes or [0]))}}};

  // The sums over all rows, from those of n parts, `step` apart.
  static void collect([[maybe_unused]] const Sums* parts, [[maybe_unused]] int64_t n,
                      [[maybe_unused]] Totals& totals, [[maybe_unused]] int64_t step = 1) {{
{collected}
  }}

  // The inputs' gradients.
  static void finish([[maybe_unused]] const void* const* inputs, [[maybe_unused]] const Fixed& fixed,
                     [[maybe_unused]] Totals& totals, [[maybe_unused]] void* const* gradients) {{
{self._body(Place.TOTAL)}
  }}
"""
