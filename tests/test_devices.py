"""Devices other than the CPU and CUDA: the twin's ops work on them, and need no float64 there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyode.methods import METHODS

ROOT = Path(__file__).parents[1]
CASES = {
    "odeint": [name for name in METHODS if name != "fixed_adams"],
    "odeint_adjoint": [name for name in METHODS if name not in ("fixed_adams", "scipy_solver")],
    "odeint_event": [name for name in METHODS if name not in ("fixed_adams", "scipy_solver")],
    "odeint_dense": [name for name in METHODS if name not in ("fixed_adams", "scipy_solver")],
    "options": ["dopri5", "adams"],
}


@pytest.mark.parametrize("interface", CASES)
def test_a_device_without_float64(interface):
    cases = [f"{method} by {interface}" for method in CASES[interface]]
    command = [sys.executable, "-m", "tests.without_float64", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
