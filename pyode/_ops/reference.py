"""The ops in plain torch: the oracle of the tests, the pure-Python solver of the benchmarks, and the fallback for
tensors without memory of their own (functorch's wrappers, fake tensors) and for other devices.

Every function here has its twin of the same name in native.py. All of stage_combine and interpolate_at can be
differentiated, any number of times, with respect to everything.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import REAL_FIELDS, Flag, Grid, Layout, Phase, Policy, RightHandSide, largest, wide_dtype

__all__ = [
    "AdamsTable",
    "Controller",
    "GridSteps",
    "Interpolant",
    "Layout",
    "Table",
    "copy",
    "interpolate",
    "select_rows",
    "stage_combine",
    "stage_vjp",
    "stages",
    "take_steps",
]

_SUCCESS, _RUNNING, _STEP_TOO_SMALL, _TOO_MANY_STEPS, _NON_FINITE = range(5)


def supports(y: Tensor) -> bool:
    """Whatever torch can compute with."""
    return y.dtype.is_floating_point or y.dtype.is_complex


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _per_sample(dt: Tensor, layout: Layout, y: Tensor) -> Tensor | float:
    """dt so that it multiplies a state."""
    if layout.samples == 1:
        return dt.reshape(()) if dt.requires_grad else float(dt)
    return dt.to(y.device, y.real.dtype if y.is_complex() else y.dtype).reshape(-1, *[1] * (y.dim() - 1))


def weighted_sum(weights: tuple[float, ...], ks: list[Tensor]) -> Tensor | float:
    """sum_j w_j k_j over the weights that are not 0."""
    total: Tensor | None = None
    for w, k in zip(weights, ks):
        if w:
            k = _widened(k)
            total = w * k if total is None else torch.add(total, k, alpha=w)
    return 0.0 if total is None else total


def stage_combine(layout: Layout, weights: tuple[float, ...], y: Tensor, ks: list[Tensor], dt: Tensor) -> Tensor:
    """Returns y + dt sum_j w_j k_j; dt is [B]."""
    wide = _widened(y)
    step = _per_sample(dt, layout, wide)
    moved = wide + step * weighted_sum(weights, ks)
    if isinstance(step, Tensor) and layout.samples > 1:
        moved = torch.where(step == 0, wide, moved)
    return moved.to(y.dtype)


@dataclass(frozen=True)
class Table:
    """See native.Table."""

    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error_weights: tuple[float, ...]


def stages(
    layout: Layout,
    table: Table,
    y: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    times: tuple[Tensor, ...],
    dynamics: RightHandSide,
    combine: Callable[..., Tensor] = stage_combine,
) -> Tensor:
    """See native.stages; `combine` makes the stages' states."""
    state = y
    for j, t in enumerate(times):
        state = combine(layout, table.rows[j], y, ks, dt)
        ks[j + 1] = dynamics(t, state)
    return state


def take_steps(
    layout: Layout,
    table: Table,
    interpolant: Interpolant,
    y: Tensor,
    ks: list[Tensor],
    controller: Controller,
    dynamics: RightHandSide,
    rtol: float | Tensor,
    atol: float | Tensor,
    out: Tensor,
    t0: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """See native.take_steps; begins or takes one step, and writes no outputs but the first."""
    if t0 is not None:
        out[0], ks[0] = y, dynamics(t0, y)
        n = sum(part.n_segments for part in controller.layouts)
        controller.error_norm((1.0,), y, y, [y], controller.one, rtol, atol, 0)
        controller.error_norm((1.0,), y, y, [ks[0]], controller.one, rtol, atol, n)
        controller.run(Phase.TRY_FIRST)
        k = dynamics(controller.stage_times, stage_combine(layout, (1.0,), y, [ks[0]], controller.dt))
        controller.error_norm((1.0, -1.0), y, y, [k, ks[0]], controller.dt, rtol, atol, 0)
        return y, y, controller.run(Phase.CHOOSE_FIRST)
    dt = controller.dt
    y1 = stages(layout, table, y, ks, dt, controller.stage_times.unbind(), dynamics)
    controller.error_norm(table.error_weights, y, y1, ks, dt, rtol, atol)
    return y, y1, controller.run(Phase.JUDGE)


@dataclass(frozen=True)
class AdamsTable:
    """See native.AdamsTable."""

    predictors: tuple[tuple[float, ...], ...]
    correctors: tuple[tuple[float, ...], ...]
    max_iters: int


class GridSteps:
    """See native.GridSteps; `combine` makes the states."""

    CHUNK = 64  # steps whose times and sizes are taken apart together: a view for each on its own takes twice as long

    def __init__(
        self, layout: Layout, times: Tensor, sizes: Tensor, combine: Callable[..., Tensor] = stage_combine
    ) -> None:
        self.layout, self.combine = layout, combine
        self._chunks = times.split(self.CHUNK), sizes.split(self.CHUNK)  # type: ignore[no-untyped-call]
        self._chunk = -1
        self._times: list[tuple[Tensor, ...]] = []
        self._sizes: tuple[Tensor, ...] = ()

    def _step(self, n: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The times of step n's stages, each 0-dim, and its size, [1]."""
        chunk, i = divmod(n, self.CHUNK)
        if chunk != self._chunk:
            times, sizes = (chunks[chunk] for chunks in self._chunks)
            views, stages = times.reshape(-1).unbind(), times.shape[1]
            self._times = [views[j : j + stages] for j in range(0, len(views), stages)]
            self._sizes, self._chunk = sizes.unsqueeze(1).unbind(), chunk
        return self._times[i], self._sizes[i]

    def take(
        self,
        table: Table,
        y: Tensor,
        ks: list[Tensor],
        dynamics: RightHandSide,
        begin: int,
        end: int,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See native.GridSteps.take."""
        y1 = y
        for n in range(begin, end):
            if n > begin:
                y = y1
                if out is not None:
                    out[n] = y
            times, dt = self._step(n)
            ks[0] = dynamics(times[0], y)
            stages(self.layout, table, y, ks, dt, times[1:], dynamics, self.combine)
            y1 = self.combine(self.layout, table.weights, y, ks, dt)
        return y, y1

    def take_adams(
        self,
        table: AdamsTable,
        y: Tensor,
        ks: list[Tensor],
        m: int,
        dynamics: RightHandSide,
        begin: int,
        end: int,
        rtol: float | Tensor,
        atol: float | Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, int, int, bool]:
        """See native.GridSteps.take_adams; takes one."""
        layout, ((first, last), dt) = self.layout, self._step(begin)
        m = min(m + 1, len(table.predictors))
        ks[1 : m + 1] = [dynamics(first, y), *ks[1:m]]
        weights, solved, zero = table.predictors[m - 1], True, torch.zeros_like(y)
        if table.correctors:
            before, solved = stage_combine(layout, weights, zero, ks, dt).detach(), False
            for _ in range(table.max_iters):
                ks[0] = dynamics(last, self.combine(layout, weights, y, ks, dt))
                weights = table.correctors[m - 1]
                after = stage_combine(layout, weights, zero, ks, dt).detach()
                change = scaled_error(after - before, before, after, rtol, atol)
                solved, before = bool(change.numel() == 0 or change.abs().max() < 1), after
                if solved:
                    break
        return y, self.combine(layout, weights, y, ks, dt), m, begin, solved


def copy(layout: Layout, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Copies a state, to the beginning of `out` if given."""
    return y.clone() if out is None else out.view(-1, *y.shape)[0].copy_(y)


def stage_vjp(layout: Layout, weights: tuple[float, ...], g: Tensor, dt: Tensor) -> list[Tensor | None]:
    """Returns [dt w_j g for every j], None where w_j is 0."""
    wide = _widened(g)
    scaled = _per_sample(dt, layout, wide) * wide
    return [(w * scaled).to(g.dtype) if w else None for w in weights]


def select_rows(layout: Layout, moved: Tensor, stayed: Tensor, accepted: Tensor) -> Tensor:
    """Rows of `moved` where accepted, of `stayed` elsewhere."""
    chosen = accepted.bool().to(moved.device).reshape(-1, *[1] * (moved.dim() - 1))
    return torch.where(chosen, moved, stayed)


def scaled_error(error: Tensor, y0: Tensor, y1: Tensor, rtol: float | Tensor, atol: float | Tensor) -> Tensor:
    """error / (atol + rtol max(|y0|, |y1|)); 0 where there is no error, nan where the state is not finite."""
    if y0.is_complex():  # tolerances are given twice, for both members of a pair
        rtol, atol = (x[..., 0] if isinstance(x, Tensor) else x for x in (rtol, atol))
    size = torch.maximum(y0.abs(), y1.abs())
    tolerated = atol + rtol * size
    return torch.where(error == 0, error, error / tolerated) + (size - size)


def scaled_step_error(
    layout: Layout,
    weights: tuple[float, ...],
    y0: Tensor,
    y1: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> Tensor:
    """The scaled error of dt sum_j w_j k_j, of the state's shape."""
    wide = _widened(y0)
    error = torch.as_tensor(_per_sample(dt, layout, wide) * weighted_sum(weights, ks)).expand(wide.shape)
    return scaled_error(error, wide, _widened(y1), rtol, atol)


def mean_square_errors(
    layout: Layout,
    rows: Sequence[tuple[float, ...]],
    y0: Tensor,
    y1: Tensor,
    ks: list[Tensor],
    dt: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> list[float]:
    """See native.mean_square_errors."""
    with torch.no_grad():
        ratios = [scaled_step_error(layout, weights, y0, y1, ks, dt, rtol, atol) for weights in rows]
        return [largest([mean for (mean,) in _means(layout, ratio)]) for ratio in ratios]


def _means(layout: Layout, ratio: Tensor) -> list[list[float]]:
    """The mean squares over each segment, of every sample; 0 over an empty one."""
    flat = ratio.detach().abs().reshape(layout.samples, layout.size)
    flat = flat.to(wide_dtype(flat.device)).square()
    return [
        flat[:, begin:end].mean(1).tolist() if end > begin and layout.samples else [0.0] * layout.samples
        for begin, end in zip(layout.segments, layout.segments[1:])
    ]


_LEAST_ERROR = 1e-10  # as kLeastError


@dataclass
class Sample:
    """The step state of one sample; see csrc/core/controller.h for every field."""

    t: float
    dt: float = 0.0
    t1: float = 0.0
    t_prev: float = 0.0
    dt_prev: float = 0.0
    dt_whole: float = 0.0
    slope: float = 0.0
    error1: float = 1.0
    error2: float = 1.0
    size1: float = 0.0
    ratio1: float = 1.0
    status: int = _RUNNING
    accepted: int = 0
    output_begin: int = 1
    output_end: int = 1
    on_jump: int = 0
    non_finite: int = 0
    n_accepted: int = 0
    n_rejected: int = 0
    n_steps: int = 0
    rejected: int = 0


class _Times:
    """The prescribed times of one sample as lists of numbers, mirrored where time runs backwards."""

    def __init__(self, times: list[float], step_t: list[float], jump_t: list[float]) -> None:
        self.sign = -1.0 if times[-1] < times[0] else 1.0
        self.outputs = [self.sign * t for t in times]
        self.step_t = sorted(self.sign * t for t in step_t)
        self.jump_t = sorted(self.sign * t for t in jump_t)

    def start(self) -> Sample:
        """A sample at its start, which may be its first output times too, or all."""
        t, passed = self.sign * self.outputs[0], bisect_right(self.outputs, self.outputs[0])
        status = _RUNNING if passed < len(self.outputs) else _SUCCESS
        return Sample(t=t, t1=t, t_prev=t, output_begin=passed, output_end=passed, status=status)

    def next_stop(self, stops: list[float], t: float) -> float:
        i = bisect_right(stops, self.sign * t)
        return self.sign * stops[i] if i < len(stops) else self.sign * math.inf


def _power(x: float, y: float) -> float:
    return x**y if x > 0 else (math.inf if y < 0 else 0.0)


class Controller:
    """See native.Controller. The clock is on the host, in float64, whatever the state's device."""

    def __init__(self, layouts: list[Layout], policy: Policy, grid: Grid, abscissae: tuple[float, ...]) -> None:
        self.layouts, self.policy, self.abscissae = layouts, policy, abscissae
        state = layouts[0]
        times = grid.times.tolist()
        rows = [list(row) for row in zip(*times)] if grid.times.dim() == 2 else [times] * state.samples
        step_t = [] if grid.step_t is None else grid.step_t.tolist()
        jump_t = torch.empty(0) if grid.jump_t is None else grid.jump_t
        jumps = jump_t.T.tolist() if jump_t.dim() == 2 else [jump_t.tolist()] * state.samples
        self._times = [_Times(row, step_t, jump) for row, jump in zip(rows, jumps)]
        self._samples: list[Sample] = []
        self._means = [[0.0] * state.samples] * (2 * sum(layout.n_segments for layout in layouts))
        self.dt, self.one = (torch.full((state.samples,), v, dtype=torch.float64) for v in (0.0, 1.0))
        self.stage_times = torch.empty(0)

    def error_norm(
        self,
        weights: tuple[float, ...],
        y0: Tensor,
        y1: Tensor,
        ks: list[Tensor],
        dt: Tensor,
        rtol: float | Tensor,
        atol: float | Tensor,
        slot: int = 0,
        layout: Layout | None = None,
    ) -> None:
        """See native.Controller.error_norm."""
        layout = layout or self.layouts[0]
        ratio = scaled_step_error(layout, weights, y0, y1, ks, dt, rtol, atol)
        for i, mean in enumerate(_means(layout, ratio)):
            self._means[slot + i] = mean

    def put_norm(self, norm: Tensor | float, slot: int = 0) -> None:
        """See native.Controller.put_norm."""
        self._means[slot] = torch.as_tensor(norm).detach().to("cpu", torch.float64).square().reshape(-1).tolist()

    def finish(self, which: Tensor, status: int) -> None:
        """See native.Controller.finish."""
        for sample, one in zip(self._samples, which.tolist()):
            if one:
                sample.status, sample.dt = status, 0.0
        self.dt = torch.tensor([sample.dt for sample in self._samples], dtype=torch.float64)

    def field(self, name: str) -> Tensor:
        """See native.Controller.field; a copy."""
        dtype = torch.float64 if name in REAL_FIELDS else torch.int64
        return torch.tensor([getattr(sample, name) for sample in self._samples], dtype=dtype)

    def run(self, phase: Phase, first_step: float = 0.0, unseen: int = 0) -> int:
        """See native.Controller.run."""
        flags = Flag(0)
        first = len(self._means) // 2
        given = self.dt.tolist()  # for each sample, where first_step is nan
        if phase in (Phase.TRY_FIRST, Phase.GIVEN_FIRST):
            self._samples = [times.start() for times in self._times]
        for b, (sample, times) in enumerate(zip(self._samples, self._times)):
            norm, slope = (
                math.sqrt(largest([mean[b] for mean in means])) for means in (self._means[:first], self._means[first:])
            )
            if phase in (Phase.TRY_FIRST, Phase.GIVEN_FIRST):
                self._try_first_step(sample, times, norm, slope)
            if phase is Phase.TRY_FIRST:
                flags |= Flag.RUNNING
                continue
            was_on_jump = sample.on_jump
            if phase is Phase.GIVEN_FIRST:
                sample.dt = first_step if math.isfinite(first_step) else given[b]
            elif phase is Phase.CHOOSE_FIRST:
                self._choose_first_step(sample, times, norm)
            else:
                self._judge_step(sample, times, norm)
            self._plan_step(sample, times)
            flags |= Flag.RUNNING if sample.status == _RUNNING else 0
            flags |= Flag.ACCEPTED if sample.accepted else Flag.STAYED
            flags |= Flag.OUTPUT if sample.output_end > sample.output_begin else 0
            flags |= Flag.JUMP if sample.accepted and was_on_jump else 0
            flags |= Flag.FAILED if sample.status > _RUNNING else 0
        self.dt = torch.tensor([sample.dt for sample in self._samples], dtype=torch.float64)
        self.stage_times = self._times_of(phase)
        return unseen or (int(flags) if phase is Phase.TRY_FIRST else self.read(int(flags)))

    def read(self, flags: int) -> int:
        """See native.Controller.read."""
        return flags

    def _times_of(self, phase: Phase) -> Tensor:
        """The times that func will see: of the trial step, or [stages, B] of the step planned."""
        state = self.layouts[0]

        def tensor(rows: list[list[float]]) -> Tensor:
            return torch.tensor(rows, dtype=state.real_dtype, device=state.device).reshape(len(rows), state.samples)

        if phase is Phase.TRY_FIRST:
            rows = tensor([[s.t + s.dt for s in self._samples]])
            return rows[0, 0] if state.samples == 1 else rows[0]
        rows = tensor([[s.t1 if c == 1 else s.t + c * s.dt for s in self._samples] for c in self.abscissae])
        # The end of the step is seen from before it: there may be a discontinuity.
        before = tensor([[s.t1 if s.dt == 0 else -math.copysign(math.inf, s.dt) for s in self._samples]])
        ends = torch.tensor([c == 1 for c in self.abscissae], dtype=torch.bool, device=state.device)
        rows = torch.where(ends[:, None], torch.nextafter(rows, before.expand_as(rows)), rows)
        return rows[:, 0] if state.samples == 1 else rows

    def _try_first_step(self, s: Sample, times: _Times, size: float, slope: float) -> None:
        """Hairer, Norsett, Wanner I, II.4, starting step size, a to c."""
        if s.status == _RUNNING and not (math.isfinite(size) and math.isfinite(slope)):
            s.status = _NON_FINITE
        s.slope = slope
        h0 = 1e-6 if size < 1e-5 or slope < 1e-5 else 0.01 * size / slope
        if self.policy.clip:
            h0 = min(abs(times.outputs[-1] - times.sign * s.t), h0)  # in this order: h0 may be nan
        s.dt = times.sign * h0

    def _choose_first_step(self, s: Sample, times: _Times, change: float) -> None:
        """Steps d to f."""
        h0 = abs(s.dt)
        if not (math.isfinite(change) and h0):
            return
        curvature = change / (h0 * h0)
        if s.slope <= 1e-15 and curvature <= 1e-15:
            h1 = max(1e-6, h0 * 1e-3)
        else:
            h1 = _power(0.01 / max(s.slope, curvature), 1 / self.policy.order)
        s.dt = times.sign * min(100 * h0, h1)

    def _judge_step(self, s: Sample, times: _Times, error: float) -> None:
        policy = self.policy
        s.accepted, s.output_begin = 0, s.output_end
        if s.status != _RUNNING:
            return
        s.non_finite = not math.isfinite(error)
        smallest = abs(s.dt) <= policy.min_step
        s.accepted = int(error <= 1 or (smallest and not s.non_finite))
        if s.non_finite and smallest:
            s.status = _NON_FINITE
        factor = policy.dfactor if s.non_finite else self._step_factor(s, error)
        if s.rejected and policy.cautious:
            factor = min(factor, 1.0)
        s.rejected = int(not s.accepted)
        if s.accepted:
            s.error1, s.error2 = max(error, _LEAST_ERROR), s.error1
            s.ratio1 = 1.0 if s.size1 == 0 else s.dt / s.size1
            s.size1 = s.dt
        s.t_prev, s.dt_prev, s.dt = s.t, s.dt, s.dt * factor
        s.n_steps += 1
        if not s.accepted:
            s.n_rejected += 1
            return
        if policy.resume:
            s.dt = times.sign * max(abs(s.dt), abs(s.dt_whole))
        s.n_accepted += 1
        s.t = s.t1
        s.output_end = max(s.output_begin, bisect_right(times.outputs, times.sign * s.t))
        if (s.output_end > s.output_begin or (s.on_jump and policy.resume)) and policy.count_per_output:
            s.n_steps = 0
        if s.output_end == len(times.outputs):
            s.status = _SUCCESS

    def _step_factor(self, s: Sample, error: float) -> float:
        """Soderlind's digital filter; elementary control after a rejection."""
        policy = self.policy
        if error == 0:
            return policy.ifactor
        (b1, b2, b3), (a1, a2), k = policy.beta, policy.alpha, policy.order
        integrating = b2 == b3 == a1 == a2 == 0
        if integrating or not s.accepted:
            least = 1.0 if integrating and error < 1 else policy.dfactor
            return min(policy.ifactor, max(policy.safety / math.pow(error, (b1 if s.accepted else 1) / k), least))
        ratio = 1.0 if s.size1 == 0 else s.dt / s.size1
        powers = ((error, b1 / k), (s.error1, b2 / k), (s.error2, b3 / k), (ratio, a1), (s.ratio1, a2))
        filtered = math.prod(math.pow(x, power) for x, power in powers)
        return min(policy.ifactor, max(policy.safety / filtered, policy.dfactor))

    def _plan_step(self, s: Sample, times: _Times) -> None:
        policy, sign = self.policy, times.sign
        if s.status == _RUNNING and s.n_steps >= policy.max_num_steps:
            s.status = _TOO_MANY_STEPS
        s.dt = s.dt_whole = sign * min(max(abs(s.dt), policy.min_step), policy.max_step)
        least = policy.least_ulps * sys.float_info.epsilon * abs(s.t)
        if s.status == _RUNNING and (not sign * (s.t + s.dt - s.t) > 0 or abs(s.dt) < least):
            s.status = _NON_FINITE if s.non_finite else _STEP_TOO_SMALL
        s.on_jump = 0
        if s.status != _RUNNING:
            s.dt, s.t1 = 0.0, s.t
            return
        s.t1 = s.t + s.dt
        step_t, jump_t = (times.next_stop(stops, s.t) for stops in (times.step_t, times.jump_t))
        end = sign * times.outputs[-1]
        for stop, reached in (
            (step_t, sign * (s.t1 - step_t) > 0),
            (jump_t, sign * (s.t1 - jump_t) >= 0),
            (end, policy.clip and sign * (s.t1 - end) > 0),
        ):
            if reached and sign * (s.t1 - stop) >= 0:
                s.t1, s.dt = stop, stop - s.t
        s.on_jump = int(s.t1 == jump_t)


class Interpolant:
    """For each stage the coefficients of x, x^2, ... in its weight, and the weights at x = 1."""

    def __init__(self, coefficients: tuple[tuple[float, ...], ...], end: tuple[float, ...]) -> None:
        self.coefficients, self.end = coefficients, end

    def weights_at(self, x: float) -> tuple[float, ...]:
        """The weights at position x of a step."""
        if x == 1.0:
            return self.end
        weights = []
        for row in self.coefficients:
            weight = 0.0
            for c in reversed(row):
                weight = (weight + c) * x
            weights.append(weight)
        return tuple(weights)

    def slopes_at(self, x: float) -> tuple[float, ...]:
        """The derivatives of the weights there."""
        return tuple(sum(p * c * x ** (p - 1) for p, c in enumerate(row, 1)) for row in self.coefficients)


def interpolate_at(interpolant: Interpolant, x: Tensor, y: Tensor, ks: list[Tensor], dt: float | Tensor) -> Tensor:
    """The state at position x, a 0-dim tensor that may require a gradient, of a joint step."""
    wide = _widened(y)
    total: Tensor | float = 0.0
    for row, k in zip(interpolant.coefficients, ks):
        if any(row):
            weight: Tensor | float = 0.0
            for c in reversed(row):
                weight = (weight + c) * x
            total = total + weight * _widened(k)
    return (wide + dt * total).to(y.dtype)


def interpolate(
    layout: Layout, interpolant: Interpolant, controller: Controller, y: Tensor, ks: list[Tensor], out: Tensor
) -> None:
    """Writes all outputs that the last step passed to their rows of `out`, [T, ...]."""
    single = Layout(1, layout.size, layout.segments, layout.dtype, layout.device)
    for b, (s, times) in enumerate(zip(controller._samples, controller._times)):
        for i in range(s.output_begin, s.output_end):
            time = times.sign * times.outputs[i]
            weights = interpolant.weights_at(1.0 if time == s.t else (time - s.t_prev) / s.dt_prev)
            step = torch.tensor([s.dt_prev], dtype=torch.float64)
            if layout.samples == 1:
                out[i] = stage_combine(single, weights, y, ks, step)
            else:
                out[i, b] = stage_combine(single, weights, y[b], [k if k is None else k[b] for k in ks], step)
