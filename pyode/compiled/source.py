"""The whole file that is compiled: dynamics, method, and the functions that Python calls."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods import Tableau
from .struct import Dynamics


def _table(name: str, rows: Sequence[Sequence[float]], width: int) -> str:
    lines = (", ".join(map(repr, [*row, *[0.0] * (width - len(row))])) for row in rows)
    return f"  static constexpr double {name}[{len(rows)}][{width}] = {{{', '.join(f'{{{line}}}' for line in lines)}}};"


def _row(name: str, numbers: Sequence[float]) -> str:
    return f"  static constexpr double {name}[{len(numbers)}] = {{{', '.join(map(repr, numbers))}}};"


def method_source(tableau: Tableau) -> str:
    """The C++ of a tableau."""
    n = len(tableau.rows) + 1
    if tableau.adaptive:
        degree = max(map(len, tableau.interpolant))
        lines = [
            f"  static constexpr int evaluations = {n}, degree = {degree};",
            _table("a", tableau.rows, n),
            _row("c", tableau.abscissae),
            _row("error", [*tableau.error_weights, *[0.0] * (n - len(tableau.error_weights))]),
            _table("interpolant", tableau.interpolant, degree),
            _row("end", tableau.end),
            "  static double output_weight(const CompiledSolve&, int j, double x) {",
            "    return x == 1 ? end[j] : interpolant_weight(interpolant[j], degree, x);",
            "  }",
            "  static double output_slope(const CompiledSolve&, int j, double x) {",
            "    return interpolant_slope(interpolant[j], degree, x);",
            "  }",
            "  template <class T>",
            "  static T stage_time(const CompiledSolve&, const TapeStep& step, int64_t, int j, T) {",
            "    Sample s = {};",
            "    s.t = step.t0, s.dt = step.dt, s.t1 = step.t1;",
            "    return pyode::stage_time<T>(s, c[j - 1]);",
            "  }",
        ]
    else:
        b = tableau.weights
        cubic = [((j == 0) * 1.0, 3 * w - 2 * (j == 0), (j == 0) - 2 * w) for j, w in enumerate(b)]
        lines = [
            f"  static constexpr int evaluations = {n + 1}, degree = 3;  // f at the step's end included",
            _table("a", [*tableau.rows, b], n + 1),
            _row("c", [*tableau.abscissae, 1.0]),
            _table("cubic", [*cubic, (0.0, -1.0, 1.0)], 3),
            "  static constexpr double end(int j) { return j + 1 < evaluations ? a[evaluations - 2][j] : 0; }",
            "  static double output_weight(const CompiledSolve& solve, int j, double x) {",
            "    return x == 1 ? end(j) : solve.cubic ? interpolant_weight(cubic[j], degree, x) : end(j) * x;",
            "  }",
            "  static double output_slope(const CompiledSolve& solve, int j, double x) {",
            "    return solve.cubic ? interpolant_slope(cubic[j], degree, x) : end(j);",
            "  }",
            "  template <class T>",
            "  static T stage_time(const CompiledSolve& solve, const TapeStep&, int64_t n, int j, T) {",
            "    return static_cast<const T*>(solve.stage_times)[n * evaluations + j];",
            "  }",
        ]
    return "struct Method {\n" + "\n".join(lines) + "\n};\n"


def solver_source(dynamics: Dynamics, tableau: Tableau, per_sample: bool = False) -> str:
    """A whole file: dynamics, method, and what Python calls; with a way back, the gradient too."""
    solve, header = ("AdaptiveSolve", "adaptive.h") if tableau.adaptive else ("FixedGridSolve", "fixed_grid.h")
    undoing, undoing_header = "Reversal", "reversal.h"
    if per_sample:
        solve, header, undoing, undoing_header = "SampleSolve", "samples.h", "SampleReversal", "sample_reversal.h"
    headers, solvers, functions = [header], f"using Solver = {solve}<Dynamics, Method>;\n", _functions("Solver", "")
    if dynamics.has_way_back:
        headers.append(undoing_header)
        solvers += f"using Undoing = {undoing}<Dynamics, Method>;\n"
        functions += _functions("Undoing", "reversal_")
    return _file(headers, [dynamics.source, method_source(tableau), solvers], functions)


def backsolve_source(dynamics: Dynamics, tableau: Tableau, alone: Dynamics | None = None) -> str:
    """A whole file with the backward solve of the continuous adjoint.

    Args:
        dynamics: with a way back to the state and to all that the solve has integrals of.
        tableau: the method.
        alone: with a way back to the state only, for rows with steps of their own: they have integrals beside them.
    """
    if alone is None:
        headers, parts = ["adaptive.h", "integrals.h"], [dynamics.source]
        solver = "AdaptiveSolve<Augmented<Dynamics>, Method, AdjointIntegrals<Dynamics, Method>>"
    else:
        headers, parts = ["sample_integrals.h"], [f"namespace integrals {{\n{dynamics.source}}}\n", alone.source]
        solver = "SampleSolve<Augmented<Dynamics>, Method, SampleAdjoint<integrals::Dynamics, Method>>"
    parts += [method_source(tableau), f"using Solver = {solver};\n"]
    return _file(headers, parts, _functions("Solver", ""))


def _file(headers: Sequence[str], parts: Sequence[str], functions: str) -> str:
    includes = "\n".join(f'#include "compiled/{name}"' for name in ("contract.h", "functions.h", *headers))
    body = "\n".join(parts)
    return f"""// Written by pyode.compile. Rows lie in blocks, a vector V for each number of a row.
{includes}

namespace pyode {{
inline namespace PYODE_LEVEL {{
namespace compiled {{
namespace {{

{body}
}}  // namespace
}}  // namespace compiled
}}  // namespace PYODE_LEVEL
}}  // namespace pyode

#define PYODE_EXPORT extern "C" __attribute__((visibility("default")))
PYODE_EXPORT int64_t arguments_size() {{ return sizeof(pyode::CompiledSolve); }}
PYODE_EXPORT int64_t record() {{
  return sizeof(pyode::compiled::Evaluations<pyode::compiled::Dynamics, pyode::compiled::Method>);
}}
PYODE_EXPORT int64_t lanes() {{ return pyode::lanes<pyode::compiled::Dynamics::V>; }}
{functions}"""


def _functions(solver: str, prefix: str) -> str:
    return f"""PYODE_EXPORT int64_t {prefix}workspace(pyode::CompiledSolve* solve) {{
  return pyode::compiled::workspace<pyode::compiled::{solver}>(*solve);
}}
PYODE_EXPORT void {prefix}solve(pyode::CompiledSolve* solve) {{
  pyode::compiled::run<pyode::compiled::{solver}>(*solve);
}}
"""
