"""Rows in blocks: every width of a row, every number of rows beside the blocks' borders, in and out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyode
from pyode.compiled.build import compiler

# Rows of 2 to 8 numbers are put together in registers, all others number by number.
WIDTHS = (1, 2, 3, 4, 5, 8, 9)
TIMES = torch.linspace(0, 1, 5, dtype=torch.float64)


def oscillators(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each number of a row pulled by its left neighbour, the first by time; rows are alone."""
    return tuple(torch.cat([t.expand(x.shape[0], 1), x[:, :-1]], 1) - x * x * x for x in y)


@pytest.fixture(scope="module")
def compiled() -> pyode.compiled.dynamics.CompiledDynamics:
    return pyode.compile(oscillators, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 8, 16, 17, 32, 33, 48, 250])
def test_every_number_comes_out_at_its_place(compiled: object, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    y0 = tuple(torch.randn(rows, n, generator=generator, dtype=dtype) for n in WIDTHS)
    found = pyode.odeint(compiled, y0, TIMES.to(dtype), rtol=1e-4, atol=1e-5)
    expected = pyode.odeint(oscillators, y0, TIMES.to(dtype), rtol=1e-4, atol=1e-5)
    for ours, eager in zip(found, expected):
        # The same steps, some tens of them, each within some ulp.
        torch.testing.assert_close(ours, eager, rtol=1e3 * torch.finfo(dtype).eps, atol=1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rows", [15, 16, 17, 40, 100, 250])
def test_a_short_f_takes_the_same_steps_however_many_blocks_go_together(rows: int) -> None:
    def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack([v, 5 * (1 - x * x) * v - x], -1)

    y0 = torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    counts, states = [], []
    for func in (pyode.compile(van_der_pol, strict=True), van_der_pol):
        stats = pyode.Stats()
        states.append(pyode.odeint(func, y0, TIMES, rtol=1e-6, atol=1e-8, options={"stats": stats}))
        counts.append((stats.n_accepted, stats.n_rejected, stats.n_f_evals))
    assert counts[0] == counts[1]
    torch.testing.assert_close(states[0], states[1], rtol=1e-11, atol=1e-11)


def test_an_output_at_a_steps_end_is_the_state_there() -> None:
    """Dense output at x = 1 is the step's end itself: the same bits with and without the output."""
    f = pyode.compile(lambda t, y: torch.stack([y[:, 1], -y[:, 0]], 1), strict=True)
    y0 = torch.tensor([[1.0, 0.5]], dtype=torch.float64).repeat(40, 1)
    stops = torch.tensor([0.25, 0.5], dtype=torch.float64)
    alone, among = (
        pyode.odeint(f, y0, torch.tensor(times, dtype=torch.float64), options={"step_t": stops})
        for times in ([0.0, 1.0], [0.0, 0.25, 0.5, 1.0])
    )
    assert torch.equal(alone[-1], among[-1])
    half = pyode.odeint(f, y0, torch.tensor([0.0, 0.5], dtype=torch.float64), options={"step_t": stops})
    assert torch.equal(half[-1], among[2])


def test_threads_that_share_a_solve_hear_of_an_interrupt_without_a_data_race(tmp_path: Path) -> None:
    def run(source: Path) -> subprocess.CompletedProcess[str] | None:
        """As ThreadSanitizer sees it; None if it can't be built."""
        command = [*compiler()[0], "-std=c++17", "-O1", "-fsanitize=thread", "-DPYODE_LEVEL=native", str(source)]
        built = subprocess.run([*command, "-o", tmp_path / source.stem], capture_output=True, check=False)
        if built.returncode != 0:
            return None
        return subprocess.run([tmp_path / source.stem], capture_output=True, text=True, check=False)

    nothing = tmp_path / "nothing.cpp"
    nothing.write_text("int main() {}")
    alone = run(nothing)
    if alone is None or alone.returncode != 0:
        pytest.skip("ThreadSanitizer does not run here")
    done = run(Path(__file__).parent / "cpp" / "interruption_test.cpp")
    assert done is not None
    assert done.returncode == 0, done.stderr
