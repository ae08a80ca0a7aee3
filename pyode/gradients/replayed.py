"""Steps of a solve taken again in plain torch, under whatever transforms of torch.func are under way.

No decision depends on a number any more, so vmap, grad and jvp may lie around each other in any order. What is
differentiated is what direct mode differentiates: steps are of constant sizes and move with the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops.contract import Layout
from .._ops.reference import Interpolant, interpolate_at, stage_combine
from .._ops.reference.sums import per_sample, widened
from ..methods import Tableau
from ..state import Form, Func


@dataclass(eq=False)
class Again:
    """A step to be taken again; numbers are 0-dim, or [B] where the state has samples.

    Attributes:
        dt: float64, 0 for a sample that stands still.
        times: of the evaluations after the first, that at the step's end last.
        opening: that of the first; None where it is the last one of the step before.
        on_jump: whether the step ends where a discontinuity has it end.
        outputs: for each output that it passes, by its index: which samples do, and where in the step.
        polynomial: the dense output.
    """

    dt: Tensor
    times: list[Tensor]
    opening: Tensor | None
    on_jump: Tensor | None
    outputs: dict[int, tuple[Tensor, Tensor]]
    polynomial: Interpolant | None


def replay(
    func: Func, form: Form, tableau: Tableau, steps: list[Again], y0: Any, t: Tensor, left: list[Tensor] | None
) -> Any:
    """The user's states at all output times, [T, ...].

    Args:
        func: of times, 0-dim or [B], and the user's states.
        form, y0: of those.
        t: the output times, [T] or [T, B].
        left: for each output the samples that have not reached it, which have their last state there.
    """
    y = form.pack(y0)
    layout = Layout(form.samples, form.segments[-1], form.segments, y.dtype, y.device)
    real = layout.real_dtype
    start = t[0] - t[0].detach()  # 0: how far the steps have moved
    outputs = [y] * len(t)
    k: Tensor | None = None

    def evaluate(t: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        return form.pack(func(t.to(real) + moved.to(real), form.unpack(y))).to(y.dtype)

    def beside(x: Tensor) -> Tensor:
        return per_sample(x, layout, widened(y))

    for step in steps:
        jumping = torch.zeros_like(step.dt) if step.on_jump is None else step.on_jump.to(step.dt)
        dt = step.dt - jumping * start
        if step.opening is not None or k is None:
            assert step.opening is not None
            k = evaluate(step.opening, start, y)
        ks = [k]
        for row, c, time in zip(tableau.rows, tableau.abscissae, step.times[: len(tableau.weights) - 1]):
            ks.append(evaluate(time, (1 - c * jumping) * start, stage_combine(layout, row, y, ks, dt)))
        y1 = stage_combine(layout, tableau.weights, y, ks, dt)
        k = evaluate(step.times[-1], (1 - jumping) * start, y1)
        for i, (there, position) in step.outputs.items():
            assert step.polynomial is not None
            elapsed = position * step.dt + (t[i] - t[i].detach()) - start
            x = elapsed / torch.where(step.dt == 0, 1.0, dt)
            state = interpolate_at(step.polynomial, beside(x), y, [*ks, k], beside(dt))
            outputs[i] = torch.where(beside(there) != 0, state, outputs[i])
        y = y1
        if step.on_jump is not None:
            start = torch.where(step.on_jump, torch.zeros_like(start), start)
    if left is not None:
        outputs = [torch.where(beside(behind) != 0, y, state) for behind, state in zip(left, outputs)]
    return form.unpack(torch.stack(outputs), (len(outputs),))
