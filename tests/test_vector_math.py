"""Vector mathematics (csrc/core/vector_math.h): within 2 ulp, the same bits for every width and instruction set.

PYODE_EXHAUSTIVE=1 takes every float32 there is: hours instead of seconds.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyode._ops import native

SOURCE = Path(__file__).parent / "cpp" / "vector_math_test.cpp"
STRIDE = "1" if os.environ.get("PYODE_EXHAUSTIVE") == "1" else "997"
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
ARCHITECTURES = {"generic": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}


def available() -> list[str]:
    """The SIMD levels that this machine can run."""
    names = list(ARCHITECTURES)
    return names[: names.index(native.build_info()["simd"]) + 1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What the program says, compiled for each SIMD level."""

    def run(level: str) -> subprocess.CompletedProcess[str]:
        program = tmp_path_factory.mktemp(level) / "vector_math_test"
        x86 = platform.machine() in ("x86_64", "AMD64")
        target = [f"-march={ARCHITECTURES[level]}"] if x86 else []
        built = subprocess.run(
            [COMPILER, *FLAGS, *WARNINGS, *target, SOURCE, "-o", program], capture_output=True, text=True
        )
        assert built.returncode == 0, built.stderr
        bits = [] if level == available()[-1] else ["", "bits"]  # errors are those of the same bits
        return subprocess.run([program, STRIDE, *bits], capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(available(), pool.map(run, available())))


pytestmark = pytest.mark.skipif(COMPILER is None or not SOURCE.exists(), reason="needs a C++ compiler and the sources")


def test_every_function_is_within_its_bound_for_every_width(reports):
    for level, report in reports.items():
        assert report.returncode == 0, f"{level}:\n{report.stdout}{report.stderr}"


def test_every_instruction_set_gives_the_same_bits(reports):
    results = {
        level: re.findall(r"(\w+) +(float\d+) .* digest (\w+)", report.stdout) for level, report in reports.items()
    }
    assert results["generic"]
    for level in reports:
        assert results[level] == results["generic"], level
