"""The adjoint of a solve sample by sample, as a node of autograd's graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..circumstances import Circumstances
from ..errors import InvalidValue
from ..state import Func
from .backsolve_samples import SampleBacksolve, SampleBacksolveConfig


@dataclass
class SolvedSamples:
    """A forward solve, done without a graph.

    Attributes:
        written: the user's func.
        func: the same, of times [B] and packed states [B, D].
        config: of the backward solve.
        segments: of the norm of a state.
        times: [T, B] float64, of the outputs; on the `clock_device`, as end_t and last_dt.
        reached: [T, B] bool, which of them were.
        ys: [T, B, D].
        end_t, end_y: [B] and [B, D] of each sample's event; nan where it had none.
        last_dt: [B] the size of each sample's last step.
    """

    written: Func
    func: Func
    config: SampleBacksolveConfig
    segments: tuple[int, ...]
    times: Tensor
    reached: Tensor
    ys: Tensor
    end_t: Tensor
    end_y: Tensor
    last_dt: Tensor


class SampleAdjoint(torch.autograd.Function):
    """From t, y0 [B, D] and the parameters to ys [T, B, D] and end_y [B, D]."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, solved: SolvedSamples, t: Tensor, y0: Tensor, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.solved = solved
        ctx.circumstances = Circumstances(solved.written, y0.device, params)
        ctx.save_for_backward(t, *params)
        return solved.ys.detach(), solved.end_y.detach()  # others, as what the node holds must not lead to it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # noqa: D102
        # Not once_differentiable, which only tells those who differentiate all the way back.
        if torch.is_grad_enabled():
            raise InvalidValue(
                "the adjoint gradient of samples can't be differentiated, for which create_graph=True prepares; leave "
                "it out, or take gradient 'direct', or odeint_adjoint with joint control"
            )
        solved: SolvedSamples = ctx.solved
        t, *params = ctx.saved_tensors
        ended = solved.end_t.isfinite()
        last, samples = solved.reached.sum(0) - 1, torch.arange(len(ended), device=ended.device)
        end_t = torch.where(ended, solved.end_t, solved.times[last, samples])
        device = solved.ys.device
        ended, last, samples = ended.to(device), last.to(device), samples.to(device)
        end_y = torch.where(ended[:, None], solved.end_y, solved.ys[last, samples])
        # Outputs that were not reached are put to the end, where nothing arrives from them.
        reached = solved.reached.unsqueeze(-1).to(device)
        times = torch.cat([torch.where(solved.reached, solved.times, end_t), end_t[None]])
        ys = torch.cat([torch.where(reached, solved.ys, end_y), end_y[None]])
        arriving = torch.where(reached, gradients[0], 0.0), torch.where(ended[:, None], gradients[1], 0.0)[None]
        backsolve = SampleBacksolve(
            solved.func, solved.config, times, ys, torch.cat(arriving), -solved.last_dt, solved.segments,
            tuple(params), ctx.needs_input_grad[1],
        )  # fmt: skip
        with ctx.circumstances.again():
            y0_gradient, time_gradients, param_gradients = backsolve.solve()
        t_gradient = None
        if ctx.needs_input_grad[1]:
            # A sample that has no way to go, all of whose times are one, stays at its start.
            moves = solved.times[0] != solved.times[-1]
            by_time = torch.where(solved.reached & moves, time_gradients[:-1], 0.0)
            t_gradient = (by_time if t.dim() == 2 else by_time.sum(1)).to(t)
        return (None, t_gradient, y0_gradient, *param_gradients)
