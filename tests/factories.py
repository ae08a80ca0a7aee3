"""How tests make pyode's internal objects: the one place to change when a private constructor does."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyode import methods
from pyode._ops import native, reference
from pyode._ops.contract import Grid, Phase, Policy
from pyode._ops.memory import storage_uses
from pyode.control import check_times
from pyode.state import Dynamics, Form
from pyode.stepping.adaptive import AdaptiveLoop

BACKENDS = (native, reference)
WEIGHTS = (0.25, 0.0, -1.5, 3.0, 0.0, 0.125)  # of a stage; two of its derivatives are not needed
ROUNDOFF = {
    torch.float32: 2**-24,
    torch.float64: 2**-53,
    torch.complex64: 2**-24,
    torch.complex128: 2**-53,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def inspector_by_attributes() -> native.Inspector:
    """One that looks at tensors as it has to where torch is older than DLPack's exchange API."""
    return native.Inspector(Tensor, None, storage_uses, torch.empty(1, device="cpu"))


def arithmetic_roundoff(dtype: torch.dtype) -> float:
    """The unit roundoff of the type in which states of this dtype are computed."""
    return 2**-53 if dtype in (torch.float64, torch.complex128) else 2**-24


def numbers(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """The same ones on every device."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    wide = dtype if dtype.is_complex else torch.float64
    return torch.randn(*shape, dtype=wide, generator=generator).to(dtype).to(device)


def operands(
    samples: int, size: int, dtype: torch.dtype, device: torch.device | str, n: int = len(WEIGHTS)
) -> tuple[Tensor, list[Tensor], Tensor]:
    """y, n derivatives, and steps of both signs, one of them 0 if there are several."""
    y, *ks = (numbers(samples, size, dtype=dtype, device=device, seed=seed) for seed in range(n + 1))
    dt = 0.1 * torch.arange(1, samples + 1, dtype=torch.float64).mul(0.7).cos()
    if samples > 1:
        dt[samples // 2] = 0
    return y, ks, dt.to(device)


def layout_for(ops: ModuleType, y: Tensor, samples: int = 1, segments: Sequence[int] | None = None) -> Any:
    """The layout of a state of `samples` samples."""
    size = y.numel() // samples if samples else 0
    return ops.Layout(samples, size, tuple(segments or (0, size)), y.dtype, y.device)


def controller_for(
    ops: ModuleType,
    layout: Any,
    times: Sequence[float] | Tensor,
    policy: Policy | None = None,
    abscissae: tuple[float, ...] = (0.5, 1.0),
    step_t: Sequence[float] = (),
    jump_t: Sequence[float] = (),
) -> Any:
    """A controller for one layout; times [T] or [T, B], step_t and jump_t in time's direction."""

    def on_device(values: Any) -> Tensor | None:
        values = torch.as_tensor(values, dtype=torch.float64)
        return values.to(layout.device) if len(values) else None

    grid = Grid(on_device(times), on_device(step_t), on_device(jump_t))
    return ops.Controller([layout], policy or Policy(5.0), grid, abscissae)


def steps_for(layout: Any, values: Sequence[float] | Tensor) -> Tensor:
    """A dt for every sample, as the ops take it."""
    return torch.as_tensor(values, dtype=torch.float64).reshape(layout.samples).to(layout.device)


def norm_for(
    ops: ModuleType,
    layout: Any,
    weights: tuple[float, ...],
    y0: Tensor,
    y1: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> Tensor:
    """The norm of the scaled error of every sample, [B]: a first step's controller keeps it as the slope."""
    controller = controller_for(ops, layout, (0.0, 1.0))
    controller.error_norm(weights, y0, y1, ks, dt, rtol, atol, layout.n_segments)
    controller.run(Phase.TRY_FIRST)
    return controller.field("slope").cpu().clone()


def loop_for(
    func: Any,
    y0: Tensor,
    t: Tensor,
    samples: int = 1,
    method: str = "dopri5",
    rtol: float = 1e-6,
    atol: float = 1e-8,
    ops: ModuleType = native,
    grid: Grid | None = None,
    **policy: Any,
) -> AdaptiveLoop:
    """An adaptive loop with a step-size controller for each of `samples` samples."""
    tableau = methods.find(method)
    times = check_times(t)
    return AdaptiveLoop(
        Dynamics(func, Form(y0), y0),
        tableau,
        layout_for(ops, y0, samples),
        rtol,
        atol,
        Policy(order=float(tableau.order), **policy),
        grid or Grid(torch.tensor(times.values, dtype=torch.float64, device=y0.device)),
        times,
    )
