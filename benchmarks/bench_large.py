"""Large states and a cheap f: the memory that pyode's ops move, against a plain copy with the same threads.

Bytes are counted by what an op has to read and write, each array once: a stage sum of n terms reads y and n
derivatives and writes one state. What the solver adds to f is the time of a solve less that of f's evaluations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyode
from pyode.methods import TABLEAUS

from .timing import Contender, interleaved, repeated

TITLE = "Large states (10 million float32 numbers, dopri5, dy/dt = -y): memory traffic"
COLUMNS = {
    "what": "what",
    "gigabytes": "moved [GB]",
    "milliseconds": "time [ms]",
    "rate": "rate [GB/s]",
    "of_copy": "of copy_",
}
NUMBERS = 10_000_000
METHOD = TABLEAUS["dopri5"]
STEPS, STEP_SIZE = 8, 0.01  # small enough for every step to be accepted
EVALUATIONS = 1 + STEPS * len(METHOD.rows)


def decay(t: Tensor, y: Tensor) -> Tensor:
    """A derivative that is cheap to compute."""
    return -y


def solve(y0: Tensor, **options: Any) -> Tensor:
    """STEPS steps of one size; [2, n]."""
    t = torch.tensor([0.0, (STEPS - 0.5) * STEP_SIZE], dtype=torch.float64, device=y0.device)
    options |= {"first_step": STEP_SIZE, "max_step": STEP_SIZE}
    with torch.no_grad():
        return pyode.odeint(decay, y0, t, rtol=1e-3, atol=1e-3, options=options)


def arrays_moved(on_device: bool = False) -> int:
    """How many states the ops of `solve` read or write.

    A loop on the device keeps its memory: the start is copied in and the outputs out, and at a step's end the state and
    its derivative are copied to where the next step begins.
    """

    def terms(weights: tuple[float, ...]) -> int:
        return sum(w != 0 for w in weights)

    stages = sum(2 + terms(row) for row in METHOD.rows)
    norm = 2 + terms(METHOD.error_weights)
    first_norms = 1 + 2  # of y0; of f(t0, y0), relative to y0
    output = 2 + 2 + sum(map(any, METHOD.interpolant))  # y0 is copied, the last row interpolated
    copies = 2 + 2 * 2 + 4 * STEPS if on_device else 0
    return first_norms + STEPS * (stages + norm) + output + copies


def contenders(y0: Tensor, **options: Any) -> dict[str, Contender]:
    """A solve, its evaluations of f, and two kinds of copy."""
    target = torch.empty_like(y0)
    return {
        "solve": lambda: solve(y0, **options),
        "f": repeated(decay, EVALUATIONS, y0[:1], y0),
        "copy": lambda: target.copy_(y0),
        "clone": y0.clone,
    }


def check(y0: Tensor) -> None:
    """The steps are those that were counted on, and lead to the solution."""
    stats = pyode.Stats()
    end = solve(y0, stats=stats)[1]
    assert stats == pyode.Stats(EVALUATIONS, STEPS, 0)
    exact = y0 * torch.tensor(-(STEPS - 0.5) * STEP_SIZE, device=y0.device).exp()
    torch.testing.assert_close(end, exact, rtol=1e-5, atol=1e-6)


def traffic(name: str, arrays: int, seconds: float, copy_rate: float, numbers: int = NUMBERS) -> dict[str, Any]:
    """A row."""
    gigabytes = 4e-9 * numbers * arrays
    rate = gigabytes / seconds
    return {
        "what": name,
        "gigabytes": gigabytes,
        "milliseconds": 1e3 * seconds,
        "rate": rate,
        "of_copy": rate / copy_rate,
    }


def measure(seconds: float = 20.0) -> list[dict[str, Any]]:
    """A row for the solver's ops and one for each kind of copy."""
    y0 = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    check(y0)
    times = interleaved(contenders(y0), rounds=9, seconds=seconds, warm_up=1)
    copy_rate = 8e-9 * NUMBERS / times["copy"]
    return [
        traffic("the solver's ops", arrays_moved(), times["solve"] - times["f"], copy_rate),
        traffic("copy_ to memory in use", 2, times["copy"], copy_rate),
        traffic("clone, to fresh memory", 2, times["clone"], copy_rate),
    ]


@pytest.mark.parametrize("name", ["solve", "f", "copy", "clone"])
def test_large(benchmark: Any, name: str) -> None:
    benchmark.group = "10 million numbers"
    y0 = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    check(y0)
    benchmark.pedantic(contenders(y0)[name], rounds=5, warmup_rounds=1)
