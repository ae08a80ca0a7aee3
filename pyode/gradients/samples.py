"""The adjoint of a solve sample by sample, as a node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops.batched import one_by_one
from ..circumstances import Circumstances
from ..state import Func
from .backsolve_samples import Found, SampleArriving, SampleBacksolveConfig
from .twice import backsolve_samples_with_graph


@dataclass(eq=False)
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
        odeint: records a graph, for gradients of gradients.
        backsolve: carries out the backward solve.
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
    odeint: Callable[..., Any]
    backsolve: Callable[[SampleArriving], Found]


class SampleAdjoint(torch.autograd.Function):
    """From t, y0 [B, D] and the parameters to ys [T, B, D] and end_y [B, D]."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, solved: SolvedSamples, t: Tensor, y0: Tensor, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.solved = solved
        ctx.circumstances = Circumstances(solved.written, y0.device, params)
        ys, end_y = solved.ys.detach(), solved.end_y.detach()  # others, as what the node holds must not lead to it
        ctx.save_for_backward(t, ys, end_y, *params)
        return ys, end_y

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # noqa: D102
        solved: SolvedSamples = ctx.solved
        t, solved_ys, end_y, *params = ctx.saved_tensors
        t_wanted = ctx.needs_input_grad[1]
        ended = solved.end_t.isfinite()
        last, samples = solved.reached.sum(0) - 1, torch.arange(len(ended), device=ended.device)
        end_t = torch.where(ended, solved.end_t, solved.times[last, samples])
        device = solved.ys.device
        ended, last, samples = ended.to(device), last.to(device), samples.to(device)
        end_y = torch.where(ended[:, None], end_y, solved_ys[last, samples])
        # Outputs that were not reached are put to the end, where nothing arrives from them.
        reached = solved.reached.unsqueeze(-1).to(device)
        given = solved.times
        if t_wanted and torch.is_grad_enabled():
            given = (t if t.dim() == 2 else t[:, None]).to(given).expand_as(given)
        times = torch.cat([torch.where(solved.reached, given, end_t), end_t[None]])
        ys = torch.cat([torch.where(reached, solved_ys, end_y), end_y[None]])
        arriving = torch.where(reached, gradients[0], 0.0), torch.where(ended[:, None], gradients[1], 0.0)[None]
        gradient, params = torch.cat(arriving), tuple(params)
        with ctx.circumstances.again():
            if torch.is_grad_enabled():
                found = backsolve_samples_with_graph(
                    solved.odeint, ctx.circumstances, solved.func, times, solved.config, ys, gradient, solved.segments,
                    params,
                )  # fmt: skip
            else:
                found = solved.backsolve(
                    SampleArriving(times, ys, gradient, -solved.last_dt, solved.segments, params, t_wanted)
                )
        y0_gradient, time_gradients, param_gradients = found
        t_gradient = None
        if t_wanted:
            # A sample that has no way to go, all of whose times are one, stays at its start.
            moves = solved.times[0] != solved.times[-1]
            by_time = torch.where(solved.reached & moves, time_gradients[:-1], 0.0)
            t_gradient = (by_time if t.dim() == 2 else by_time.sum(1)).to(t)
        return (None, t_gradient, y0_gradient, *param_gradients)
