"""Devices other than the CPU and CUDA: the twin's ops work on them, and need no float64 there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyode.methods import IMPLICIT, METHODS, TABLEAUS

ROOT = Path(__file__).parents[1]
CASES = {
    "odeint": [name for name in METHODS if name != "fixed_adams"],
    "odeint_adjoint": [name for name in METHODS if name not in ("fixed_adams", "scipy_solver")],
    "odeint_event": [name for name in METHODS if name not in ("fixed_adams", "scipy_solver")],
    "odeint_dense": [name for name in METHODS if name not in ("fixed_adams", "scipy_solver")],
    "options": ["dopri5", "adams"],
    "checkpoint": [*TABLEAUS, *IMPLICIT],
    "per_sample": ["dopri5"],
    **{
        f"solve_ivp {control} {gradient}{events}": ["dopri5"]
        for control in ("joint", "per_sample")
        for gradient in ("direct", "adjoint", "checkpoint")
        for events in ("", " events")
    },
}
GROUPS = {name.partition(" ")[0]: [] for name in CASES}
for interface, methods in CASES.items():
    GROUPS[interface.partition(" ")[0]] += [f"{method} by {interface}" for method in methods]


def check(*arguments: str) -> None:
    command = [sys.executable, "-m", "tests.without_float64", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("group", GROUPS)
def test_a_device_without_float64(group):
    check(*GROUPS[group])


@pytest.mark.parametrize("group", ["per_sample", "solve_ivp"])
def test_the_twin_where_times_are_on_the_device_as_on_cuda(group):
    check("--like-cuda", *GROUPS[group])
