"""The continuous adjoint behind a solve of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..gradients.backsolve_samples import Found, SampleArriving, SampleBacksolve, SampleBacksolveConfig
from ..gradients.samples import SampleAdjoint, SolvedSamples
from ..problem import Problem
from ..state import Func
from ..stepping.running_rows import RunningRows
from .batch import Samples


def with_adjoint(
    odeint: Callable[..., Any],
    config: SampleBacksolveConfig,
    problem: Problem,
    samples: Samples,
    t: Tensor,
    ys: Tensor,
    reached: Tensor,
    last_dt: Tensor,
    end: tuple[Tensor, Tensor] | None,
    params: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The states at the output times, [T, B, D], and where samples ended early, [B, D], with gradients to the rest.

    Args:
        odeint: records the backward solve, where gradients of gradients are wanted.
        config: of the backward solve.
        problem, samples, t: of the forward solve, which kept no graph.
        ys, reached: [T, B, D] its states, and [T, B] which of them were reached.
        last_dt: [B] its last steps.
        end: [B] and [B, D], times and states at which samples ended early, nan where they did not; None if none did.
        params: the tensors whose gradients are wanted, beside those of y0 and t.
    """
    quiet = replace(problem, y0=problem.y0.detach())

    def flat(f: Func) -> Func:
        return samples.func(replace(quiet, func=f))

    def compacted() -> tuple[RunningRows, Func]:
        rows = RunningRows(problem.func, problem.form)
        return rows, flat(rows)

    func = flat(problem.func)

    def backsolve(arriving: SampleArriving) -> Found:
        found = None
        if config.options.get("device_loop"):
            from ..device_backsolve_samples import backsolve_samples_on_device  # only those who ask wait for its import

            found = backsolve_samples_on_device(quiet, flat, config, arriving)
        elif problem.compiled is not None:
            from ..compiled.backsolve import backsolve_samples_compiled  # as those who compile do

            found = backsolve_samples_compiled(problem.compiled, problem.form, config, arriving)
        if found is None:
            found = SampleBacksolve(func, config, arriving, compacted if config.compact else None).solve()
        return found

    end_t, end_y = end or (samples.t0 * torch.nan, torch.full_like(samples.y0, torch.nan))
    solved = SolvedSamples(
        problem.func, func, config, problem.form.segments, samples.times_of(t),
        reached.to(samples.clock), ys, end_t, end_y, last_dt.to(samples.clock), odeint,
        backsolve,
    )  # fmt: skip
    states: tuple[Tensor, Tensor] = SampleAdjoint.apply(solved, t, samples.y0, *params)  # type: ignore[no-untyped-call]
    return states
