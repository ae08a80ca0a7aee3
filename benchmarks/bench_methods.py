"""Every explicit method on spiral20x2, without gradients: pyode, torchdiffeq, and f alone, evaluated as often."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchdiffeq

import pyode

from .cases import Case, cases
from .timing import Contender, interleaved, repeated

TITLE = "Explicit methods (spiral20x2, float32, no gradients; of fixed size 100 steps, others at rtol 1e-5, atol 1e-7)"
COLUMNS = {
    "method": "method",
    "torchdiffeq_evaluations": "evaluations of f, torchdiffeq",
    "pyode_evaluations": "pyode",
    "torchdiffeq_to_f": "torchdiffeq / its f only",
    "pyode_to_f": "pyode / its f only",
    "speedup": "pyode vs torchdiffeq",
}
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "dopri8")
# tsit5 is not on PyPI; the others evaluate f(t1, y1) where torchdiffeq takes the last stage for it.
OTHERWISE = ("adaptive_heun", "fehlberg2", "tsit5")
# Of order 11, torchdiffeq's default, it is unstable at these steps in float32: the results could not be compared.
OPTIONS = {"explicit_adams": {"max_order": 10}}


def case_of(method: str) -> Case:
    """spiral20x2, for methods that do not choose their steps with an output after each of 100."""
    case = cases()["spiral20x2"]
    if method in FIXED:
        case.t = torch.linspace(0, 2, 101)
    return case


def evaluations(method: str, odeint: Any) -> int | None:
    """How many of f a solve takes; None if there is no such method."""
    there = odeint is pyode.odeint or method != "tsit5"
    return case_of(method).count_evaluations(odeint, method=method, options=OPTIONS.get(method)) if there else None


def contenders(method: str) -> dict[str, Contender]:
    """Those that are timed."""
    case = case_of(method)
    all_contenders: dict[str, Contender] = {}
    for name, odeint in (("pyode", pyode.odeint), ("torchdiffeq", torchdiffeq.odeint)):
        n = evaluations(method, odeint)
        if n is not None:
            all_contenders[name] = partial(case.solve, odeint, method=method, options=OPTIONS.get(method))
            all_contenders[f"{name}'s f only"] = repeated(case.f, n, case.t[0], case.y0)
    return all_contenders


def check(method: str) -> None:
    """Both solvers agree: to float32 rounding, or where they take other steps, to their tolerance."""
    case, options = case_of(method), OPTIONS.get(method)
    ours = case.solve(pyode.odeint, method=method, options=options)
    theirs = case.solve(torchdiffeq.odeint, method="dopri5" if method == "tsit5" else method, options=options)
    # Outputs within dopri8's long steps differ as its dense output is accurate.
    close = 1e-5 if method not in (*OTHERWISE, "dopri8") else 5e-4
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < close
    if method not in OTHERWISE:
        assert evaluations(method, pyode.odeint) == evaluations(method, torchdiffeq.odeint)


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every method."""
    rows = []
    with torch.no_grad():
        for method in (*FIXED, *ADAPTIVE):
            check(method)
            times = interleaved(contenders(method), rounds=50, seconds=seconds)
            theirs = times.get("torchdiffeq")
            rows.append(
                {
                    "method": method,
                    "torchdiffeq_evaluations": evaluations(method, torchdiffeq.odeint),
                    "pyode_evaluations": evaluations(method, pyode.odeint),
                    "torchdiffeq_ms": theirs and 1e3 * theirs,
                    "pyode_ms": 1e3 * times["pyode"],
                    "torchdiffeq_to_f": theirs and theirs / times["torchdiffeq's f only"],
                    "pyode_to_f": times["pyode"] / times["pyode's f only"],
                    "speedup": theirs and theirs / times["pyode"],
                }
            )
    return rows


@pytest.mark.parametrize("solver", ["torchdiffeq", "pyode", "torchdiffeq's f only", "pyode's f only"])
@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_methods(benchmark: Any, method: str, solver: str) -> None:
    benchmark.group = method
    with torch.no_grad():
        check(method)
        if solver not in contenders(method):
            pytest.skip("torchdiffeq of PyPI has no tsit5")
        benchmark(contenders(method)[solver])
