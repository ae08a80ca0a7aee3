"""The exact gradient of the steps taken, in the memory of one state a step, or of a given number of states.

The forward pass makes no graph, only a tape of the accepted steps. The backward pass undoes them from the last to the
first: an explicit step by the transposed tableau (explicit.py), an implicit one by taking it again with a graph
(retaken.py). Step sizes are constants, as in backpropagation through a recorded solve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._ops.batched import one_by_one
from ..circumstances import Circumstances
from ..errors import InvalidValue
from ..methods import Tableau
from ..stepping.recorder import Recorder
from ..stepping.tape import Tape
from .explicit import ExplicitReversal
from .partials import partial_derivatives
from .retaken import RetakenReversal
from .reversal import Forward, Recipe, Undone
from .survey import Survey


def checkpointed(
    solve: Callable[[Tape], Tensor], recipe: Recipe, t: Tensor, y0: Tensor, params: list[Tensor]
) -> Tensor:
    """Carries out a solve and returns its outputs, [T, *y0.shape], as one node of autograd's graph.

    Args:
        solve: does so without a graph, and notes its steps on the tape.
        recipe: see there.
        t: the output times.
        y0: the packed state at the start.
        params: what func depends on beside its arguments.
    """
    return _Checkpointed.apply(solve, recipe, t, y0, *params)  # type: ignore[no-any-return, no-untyped-call]


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, solve: Callable[[Tape], Tensor], recipe: Recipe, t: Tensor, y0: Tensor, *params: Tensor
    ) -> Tensor:
        record, n_stages = None, 0
        if isinstance(recipe.method, Tableau):
            # Hooks on saved tensors, as torch.utils.checkpoint's, have other plans with what is saved.
            hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
            room = 0 if hooked or not any(ctx.needs_input_grad) else recipe.graph_bytes
            survey, n_stages = Survey(params, recipe.warns), len(recipe.method.weights)
            record = partial(Recorder, time=ctx.needs_input_grad[2], room=room, survey=survey)
        tape = Tape(y0.detach(), recipe.checkpoints, record, n_stages, ctx.needs_input_grad[2])
        ys = solve(tape)
        ctx.recipe, ctx.steps, ctx.left, ctx.n_params = recipe, tape.steps, tape.left, len(params)
        ctx.last, ctx.undo = tape.last, tape.undo
        ctx.circumstances = Circumstances(recipe.func, y0.device, params)
        # Where they are few, a backward pass uses them up and makes others in their places; one after it makes all.
        first = 1 if recipe.checkpoints else len(tape.states)
        indices, states = list(tape.states), list(tape.states.values())
        ctx.kept, ctx.consumed = indices[:first], dict(zip(indices[first:], states[first:]))
        ctx.save_for_backward(t, *params, *states[:first], tape.end)
        return ys

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # Not once_differentiable, which only tells those who differentiate all the way back.
        if torch.is_grad_enabled():
            raise InvalidValue(
                "the gradient of a checkpointed solve can't be differentiated, for which create_graph=True prepares; "
                "leave it out, or take options={'gradient': 'direct'}"
            )
        t, *saved, end = ctx.saved_tensors
        states, ctx.consumed = {**dict(zip(ctx.kept, saved[ctx.n_params :])), **ctx.consumed}, {}
        _, _, time_wanted, y0_wanted, *wanted = ctx.needs_input_grad
        params = tuple(p for p, want in zip(saved, wanted) if want)
        (gradient,) = gradients
        kind = ExplicitReversal if isinstance(ctx.recipe.method, Tableau) else RetakenReversal
        forward = Forward(ctx.steps, end, ctx.left, gradient, params, y0_wanted, time_wanted)
        on_device = torch.cuda.device(gradient.device) if gradient.is_cuda else nullcontext()
        undone: Undone | None = None
        with on_device, ctx.circumstances.again(), torch.enable_grad():
            if ctx.undo is not None:
                undone = ctx.undo(ctx.recipe, states, t, forward)
            if undone is None:
                reversal = kind(ctx.recipe, forward, ctx.last)
                undone = *reversal.run(states), reversal.of_times(t) if time_wanted else None
            start, totals, times = undone
            found = iter(partial_derivatives(params, totals))
        return None, None, times, start if y0_wanted else None, *(next(found) if want else None for want in wanted)
