"""A training step, forward and backward, of loss = mean(y**2): the three kinds of gradients, and how good they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

import pyode

from .cases import Case, cases
from .timing import Contender, interleaved

TITLE = "A training step (forward and backward, dopri5, float32, rtol 1e-5, atol 1e-7)"
COLUMNS = {
    "case": "case",
    "gradient": "gradient",
    "bare_ms": "f and its vjps only [ms]",
    "torchdiffeq_ms": "torchdiffeq [ms]",
    "pyode_ms": "pyode [ms]",
    "speedup": "pyode vs torchdiffeq",
    "torchdiffeq_error": "gradient error, torchdiffeq",
    "pyode_error": "gradient error, pyode",
}
CASES = ("spiral20x2", "big256x64")
SOLVERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "direct": {"torchdiffeq": torchdiffeq.odeint, "pyode": pyode.odeint},
    # Against torchdiffeq's direct gradient, which it equals.
    "checkpoint": {
        "torchdiffeq": torchdiffeq.odeint,
        "pyode": partial(pyode.odeint, options={"gradient": "checkpoint"}),
    },
    "adjoint": {"torchdiffeq": torchdiffeq.odeint_adjoint, "pyode": pyode.odeint_adjoint},
}


def exact_gradient(case: Case) -> Tensor:
    """The same in float64 at tight tolerances."""
    return case.to(torch.float64).gradient(torchdiffeq.odeint, rtol=1e-10, atol=1e-12)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Of a gradient, in the Euclidean norm."""
    return float((value.double() - exact).norm() / exact.norm())


def bare(case: Case, kind: str) -> Contender:
    """f and vjps as often as torchdiffeq has them, without a solver."""
    t, y = case.t[0], case.y0.clone().requires_grad_()
    g = torch.ones_like(y)
    n = case.count_evaluations(torchdiffeq.odeint)
    # In the adjoint every evaluation of the backward solve is one of f with its vjp.
    m = count_backward(case) if kind == "adjoint" else n

    def run() -> None:
        if kind == "adjoint":
            with torch.no_grad():
                for _ in range(n):
                    case.f(t, case.y0)
        for _ in range(m):
            torch.autograd.grad(case.f(t, y), [y, *case.parameters], g)

    return run


def count_backward(case: Case) -> int:
    """Evaluations of f in torchdiffeq's backward solve."""
    forward = case.count_evaluations(torchdiffeq.odeint)
    calls = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    handle = case.f.register_forward_hook(count)
    case.gradient(torchdiffeq.odeint_adjoint)
    handle.remove()
    return calls - forward


def check(case: Case, kind: str) -> dict[str, float]:
    """Our gradient is as good as torchdiffeq's, but for rounding; returns the errors of both."""
    exact = exact_gradient(case)
    errors = {name: relative_error(case.gradient(solve), exact) for name, solve in SOLVERS[kind].items()}
    assert errors["pyode"] <= max(1.1 * errors["torchdiffeq"], 1e-6)
    return errors


def contenders(case: Case, kind: str) -> dict[str, Contender]:
    """Those that are timed."""
    steps = {name: (lambda solve=solve: case.gradients(solve)) for name, solve in SOLVERS[kind].items()}
    return {**steps, "bare": bare(case, kind)}


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for each case and kind of gradient."""
    rows = []
    for name in CASES:
        case = cases()[name]
        for kind in SOLVERS:
            errors = check(case, kind)
            times = interleaved(contenders(case, kind), seconds=seconds)
            rows.append(
                {
                    "case": name,
                    "gradient": kind,
                    "bare_ms": 1e3 * times["bare"],
                    "torchdiffeq_ms": 1e3 * times["torchdiffeq"],
                    "pyode_ms": 1e3 * times["pyode"],
                    "speedup": times["torchdiffeq"] / times["pyode"],
                    "torchdiffeq_error": errors["torchdiffeq"],
                    "pyode_error": errors["pyode"],
                }
            )
    return rows


@pytest.mark.parametrize("solver", ["torchdiffeq", "pyode", "bare"])
@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("name", CASES)
def test_training(benchmark: Any, name: str, kind: str, solver: str) -> None:
    benchmark.group = f"{name}, {kind}"
    case = cases()[name]
    check(case, kind)
    benchmark(contenders(case, kind)[solver])
