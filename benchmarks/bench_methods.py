"""Every explicit method on two cases: pyode, torchdiffeq, f alone, evaluated as often, and direct gradients."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

import pyode

from .cases import Case, cases
from .timing import Contender, interleaved, repeated

TITLE = "Explicit methods (float32; of fixed size 100 steps, others at rtol 1e-5, atol 1e-7)"
COLUMNS = {
    "case": "case",
    "method": "method",
    "torchdiffeq_evaluations": "evaluations of f, torchdiffeq",
    "pyode_evaluations": "pyode",
    "torchdiffeq_to_f": "torchdiffeq / its f only",
    "pyode_to_f": "pyode / its f only",
    "speedup": "pyode vs torchdiffeq",
    "gradient_speedup": "with the direct gradient",
}
CASES = ("spiral20x2", "big256x64")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "dopri8")
# tsit5 is not on PyPI; the others evaluate f(t1, y1) where torchdiffeq takes the last stage for it.
OTHERWISE = ("adaptive_heun", "fehlberg2", "tsit5")
# Of order 11, torchdiffeq's default, it is unstable at these steps in float32: the results could not be compared.
OPTIONS = {"explicit_adams": {"max_order": 10}}


def case_of(name: str, method: str) -> Case:
    """A case; for methods that do not choose their steps with an output after each of 100."""
    case = cases()[name]
    if method in FIXED:
        case.t = torch.linspace(0, float(case.t[-1]), 101)
    return case


def evaluations(case: Case, method: str, odeint: Any) -> int | None:
    """How many of f a solve takes; None if there is no such method."""
    there = odeint is pyode.odeint or method != "tsit5"
    return case.count_evaluations(odeint, method=method, options=OPTIONS.get(method)) if there else None


def gradient(case: Case, odeint: Any, method: str) -> list[Tensor]:
    """Of mean(y**2) with respect to y0 and f's parameters, through the steps."""
    with torch.enable_grad():
        start = case.y0.detach().requires_grad_()
        ys = Case(case.name, case.f, start, case.t).solve(odeint, method=method, options=OPTIONS.get(method))
        return list(torch.autograd.grad(ys.square().mean(), [start, *case.parameters]))


def contenders(name: str, method: str) -> dict[str, Contender]:
    """Those that are timed."""
    case = case_of(name, method)
    all_contenders: dict[str, Contender] = {}
    for solver, odeint in (("pyode", pyode.odeint), ("torchdiffeq", torchdiffeq.odeint)):
        n = evaluations(case, method, odeint)
        if n is not None:
            all_contenders[solver] = partial(case.solve, odeint, method=method, options=OPTIONS.get(method))
            all_contenders[f"{solver}'s f only"] = repeated(case.f, n, case.t[0], case.y0)
            all_contenders[f"{solver}'s gradient"] = partial(gradient, case, odeint, method)
    return all_contenders


def check(name: str, method: str) -> None:
    """Both solvers agree: to float32 rounding, or where they take other steps, to their tolerance."""
    case, options = case_of(name, method), OPTIONS.get(method)
    ours = case.solve(pyode.odeint, method=method, options=options)
    theirs = case.solve(torchdiffeq.odeint, method="dopri5" if method == "tsit5" else method, options=options)
    # Outputs within dopri8's long steps differ as its dense output is accurate.
    close = 1e-5 if method not in (*OTHERWISE, "dopri8") else 5e-4
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < close
    if method not in OTHERWISE:
        assert evaluations(case, method, pyode.odeint) == evaluations(case, method, torchdiffeq.odeint)


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for every case and method."""
    rows = []
    with torch.no_grad():
        for name, method in product(CASES, (*FIXED, *ADAPTIVE)):
            check(name, method)
            case = case_of(name, method)
            times = interleaved(contenders(name, method), 50, seconds, warm_up=1)
            theirs, gradients = times.get("torchdiffeq"), times.get("torchdiffeq's gradient")
            rows.append(
                {
                    "case": name,
                    "method": method,
                    "torchdiffeq_evaluations": evaluations(case, method, torchdiffeq.odeint),
                    "pyode_evaluations": evaluations(case, method, pyode.odeint),
                    "torchdiffeq_ms": theirs and 1e3 * theirs,
                    "pyode_ms": 1e3 * times["pyode"],
                    "torchdiffeq_to_f": theirs and theirs / times["torchdiffeq's f only"],
                    "pyode_to_f": times["pyode"] / times["pyode's f only"],
                    "speedup": theirs and theirs / times["pyode"],
                    "gradient_speedup": gradients and gradients / times["pyode's gradient"],
                }
            )
    return rows


SOLVERS = ("torchdiffeq", "pyode")


@pytest.mark.parametrize("contender", [f"{s}{of}" for s in SOLVERS for of in ("", "'s f only", "'s gradient")])
@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
@pytest.mark.parametrize("name", CASES)
def test_methods(benchmark: Any, name: str, method: str, contender: str) -> None:
    benchmark.group = f"{name}, {method}"
    with torch.no_grad():
        check(name, method)
        if contender not in contenders(name, method):
            pytest.skip("torchdiffeq of PyPI has no tsit5")
        benchmark(contenders(name, method)[contender])
