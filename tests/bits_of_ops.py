"""Prints the SIMD level in use and a digest of what every op computes: run by test_bits.py in a process of its own."""

from __future__ import annotations

import hashlib
import sys

import torch
from factories import ROUNDOFF, WEIGHTS, controller_for, layout_for, norm_for, numbers, operands
from torch import Tensor

from pyode._ops import native
from pyode._ops.contract import Phase
from pyode.methods import TABLEAUS

# Below and above what a SIMD register, a block, a chunk and a part of a norm hold, and enough for several threads.
SHAPES = [(1, 1), (1, 17), (1, 257), (1, 4097), (1, 70001), (7, 63), (300, 3), (300, 257)]


def results(samples: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Of every op whose loop exists once for each SIMD level."""
    tableau = TABLEAUS["dopri5"]
    y, ks, dt = operands(samples, size, dtype, "cpu", len(tableau.interpolant))
    layout = layout_for(native, y, samples)
    found = [native.stage_combine(layout, weights, y, ks, dt) for weights in (WEIGHTS, tableau.weights, (0.5,))]
    found += [out for out in native.stage_vjp(layout, WEIGHTS, y, dt) if out is not None]
    y1 = numbers(samples, size, dtype=dtype, seed=50)
    found.append(norm_for(native, layout, tableau.error_weights, y, y1, ks, dt, 1e-2, 1e-3))
    controller = controller_for(native, layout, (0.0, 0.03, 0.1))
    controller.run(Phase.GIVEN_FIRST, 0.1)
    controller.error_norm((0.0,), y, y, ks, controller.dt, 0.0, 1.0)
    controller.run(Phase.JUDGE)
    out = torch.zeros(3, *y.shape, dtype=dtype)
    native.interpolate(layout, native.Interpolant(tableau.interpolant, tableau.end), controller, y, ks, out)
    return [*found, out]


def digest() -> str:
    """Of the bits of all results."""
    total = hashlib.sha256()
    for samples, size in SHAPES:
        for dtype in ROUNDOFF:
            for result in results(samples, size, dtype):
                total.update(torch.view_as_real(result).numpy().tobytes() if result.is_complex() else bytes_of(result))
    return total.hexdigest()


def bytes_of(x: Tensor) -> bytes:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy().tobytes()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(native._C.simd_level(), digest())
