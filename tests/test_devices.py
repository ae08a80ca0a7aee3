"""Devices other than the CPU and CUDA: the twin's ops work on them, and need no float64 there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest

from pyode.methods import IMPLICIT, METHODS, TABLEAUS

ROOT = Path(__file__).parents[1]
SOLVABLE = [name for name in METHODS if name not in ("fixed_adams", "scipy_solver")]


def by(interface: str, methods: Iterable[str]) -> list[str]:
    return [f"{method} by {interface}" for method in methods]


SAMPLES = by("per_sample", ["dopri5"])
for how in product(("joint", "per_sample"), ("direct", "adjoint", "checkpoint"), ("", " events")):
    SAMPLES += by("solve_ivp {} {}{}".format(*how), ["dopri5"])
# Each in a process of its own, which takes long enough to begin.
GROUPS = {
    "odeint": [
        *by("odeint", [*SOLVABLE, "scipy_solver"]), *by("options", ["dopri5", "adams"]),
        *by("checkpoint", [*TABLEAUS, *IMPLICIT]),
    ],
    "odeint_adjoint": by("odeint_adjoint", SOLVABLE),
    "odeint_event, odeint_dense": by("odeint_event", SOLVABLE) + by("odeint_dense", SOLVABLE),
    "samples": SAMPLES,
}  # fmt: skip


def check(*arguments: str) -> None:
    command = [sys.executable, "-m", "tests.without_float64", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("group", GROUPS)
def test_a_device_without_float64(group):
    check(*GROUPS[group])


def test_the_twin_where_times_are_on_the_device_as_on_cuda():
    check("--like-cuda", *SAMPLES)
