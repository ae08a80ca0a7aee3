"""The same bits: for every SIMD level, for 1 and 2 threads, from run to run; and 16-bit rounding as torch's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bits_of_ops import digest, results
from factories import layout_for, steps_for

import pyode
from pyode._ops import native

HERE = Path(__file__).parent
LEVELS = ("generic", "avx2", "avx512")


def run_with_level(level: str | None) -> tuple[str, str]:
    """The level that was used and the digest, from a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYODE_SIMD"}
    package = Path(pyode.__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(package), environment.get("PYTHONPATH", "")])
    if level is not None:
        environment["PYODE_SIMD"] = level
    command = [sys.executable, str(HERE / "bits_of_ops.py"), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    used, bits = done.stdout.split()
    return used, bits


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one SIMD level only")
def test_every_simd_level_computes_the_same_bits():
    here = digest()
    used = {}
    for level in LEVELS:
        name, bits = run_with_level(level)
        used[level] = name
        assert bits == here, f"{name} differs from {native._C.simd_level()}"
    best = native._C.simd_level() if "PYODE_SIMD" not in os.environ else run_with_level(None)[0]
    assert used["generic"] == "generic"
    # A machine that can't do what was asked for takes the next best.
    assert used["avx512"] == best
    assert used["avx2"] == min(best, "avx2", key=LEVELS.index)


@pytest.mark.parametrize(("samples", "size"), [(1, 70001), (1, 130_001), (300, 257), (30000, 3)])
def test_one_thread_and_two_compute_the_same_bits(samples, size, dtype):
    torch.set_num_threads(1)
    alone = results(samples, size, dtype)
    torch.set_num_threads(2)
    for _ in range(2):
        assert all(map(torch.equal, results(samples, size, dtype), alone))


def solve(n: int, device: torch.device, dtype: torch.dtype = torch.float32, pause: float = 0.0) -> torch.Tensor:
    """A nonlinear problem of n numbers, whose func also waits for some seconds."""

    def f(t, y):
        time.sleep(pause)
        return torch.cos(y + t) - 0.1 * y

    y0 = torch.linspace(-1, 1, n, device=device, dtype=dtype)
    t = torch.linspace(0, 2, 4, device=device)
    with torch.no_grad():
        return pyode.odeint(f, y0, t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [3, 100_000])
def test_a_solve_has_the_same_bits_from_run_to_run(n, device):
    first = solve(n, device)
    assert all(torch.equal(solve(n, device), first) for _ in range(3))


@pytest.mark.parametrize(("n", "pause"), [(100_000, 0), (20_000, 2e-4)])  # the fewer are shared if func takes long
def test_a_solve_has_the_same_bits_for_one_thread_and_two(n, pause):
    torch.set_num_threads(1)
    one = solve(n, torch.device("cpu"), pause=pause)
    torch.set_num_threads(2)
    assert torch.equal(solve(n, torch.device("cpu"), pause=pause), one)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_stage_sums_have_the_same_bits_on_cpu_and_gpu(dtype):
    from factories import WEIGHTS, operands

    for samples, size in ((1, 257), (300, 3), (1, 70001)):
        on = {}
        for device in ("cpu", "cuda"):
            y, ks, dt = operands(samples, size, dtype, device)
            on[device] = native.stage_combine(layout_for(native, y, samples), WEIGHTS, y, ks, dt).cpu()
        assert torch.equal(on["cpu"], on["cuda"])


def every(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All 65536 numbers of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)


def assert_same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(actual[finite].view(torch.int16), expected[finite].view(torch.int16))


# Exact powers of two, which lead into the subnormals and to ties; and factors that leave no bit alone.
@pytest.mark.parametrize("factor", [1.0, -1.0, 2.0**-3, 2.0**-9, 2.0**-10, 2.0**-20, 2.0**7, 1 / 3, 1.0009765625, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_numbers_are_read_and_rounded_as_torch_does(dtype, factor, device):
    k = every(dtype, device)
    y = torch.full_like(k, -0.0)  # the one number that changes nothing
    layout = layout_for(native, k)
    out = native.stage_combine(layout, (factor,), y, [k], steps_for(layout, [1.0]))
    assert_same_numbers(out, (factor * k.float() + y.float()).to(dtype))


@pytest.mark.parametrize("shift", [1, 77, 1024, 4711, 30000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_16_bit_numbers_are_rounded_as_torch_does(dtype, shift, device):
    y, layout = every(dtype, device), layout_for(native, every(dtype, device))
    k = y.roll(shift)
    out = native.stage_combine(layout, (1.0,), y, [k], steps_for(layout, [1.0]))
    assert_same_numbers(out, (y.float() + k.float()).to(dtype))
