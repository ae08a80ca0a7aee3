"""How many kernels a step launches. For the plugin beside this file; test_budget.py counts them on a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

import pyode
from pyode._ops import native
from pyode.methods import TABLEAUS

pytestmark = pytest.mark.skipif(native.build_info()["cuda"] != "on the host", reason="for the CUDA kernels on the host")

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]


def launches(n: int, method: str, outputs: int, shape=(5,), again: int = 0, **options) -> int:
    """Of a solve of n steps in [0, 1] with equal step sizes, the first or a later one."""
    count = ctypes.c_int64.in_dll(ctypes.CDLL(native._C.__file__), "cuda_on_host_launches")
    adaptive = {"first_step": 1 / n, "step_t": [i / n for i in range(1, n)], "ifactor": 1.0}
    options |= adaptive if method in ADAPTIVE else {}
    func, y0, t = (lambda t, y: -y), torch.ones(shape), torch.linspace(0, 1, outputs)
    for _ in range(1 + again):
        before = count.value
        with torch.no_grad():
            pyode.odeint(func, y0, t, 0.1, 0.1, method, options)
    return count.value - before


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("at_every_step", [False, True])
def test_of_a_step_are_its_stages_and_two_and_one_for_outputs(method, at_every_step):
    few, many = (launches(n, method, n + 1 if at_every_step else 2) for n in (8, 16))
    assert many - few == 8 * (len(TABLEAUS[method].rows) + 2 + at_every_step)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize(
    ("shape", "control", "ends"),
    [
        ((5,), "joint", 1),
        ((1024,), "joint", 1),
        ((1025,), "joint", 2),
        ((3, 20), "per_sample", 1),
        ((3, 5), "per_sample", 2),
    ],
)
def test_of_a_step_by_the_devices_loop_are_its_stages_and_one_where_a_block_has_all_of_a_sample(
    method, shape, control, ends
):
    # These many steps fill a whole number of turns.
    few, many = (launches(n, method, 2, shape, again=1, control=control, device_loop=True) for n in (8, 16))
    assert many - few == 8 * (len(TABLEAUS[method].rows) - 1 + ends)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
def test_of_a_step_of_fixed_size_are_its_sums(method):
    few, many = (launches(n, method, n + 1) for n in (8, 16))
    assert many - few == 8 * (len(TABLEAUS[method].rows) + 2)
