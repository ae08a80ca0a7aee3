"""The step-size controller, in Python's own numbers; csrc/core/controller.h is its compiled twin."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import REAL_FIELDS, Flag, Grid, Layout, Phase, Policy, largest, neighbour
from .norms import scaled_step_error, segment_means

_SUCCESS, _RUNNING, _STEP_TOO_SMALL, _TOO_MANY_STEPS, _NON_FINITE = range(5)


_LEAST_ERROR = 1e-10  # as kLeastError


@dataclass(eq=False)
class Sample:
    """The step state of one sample; see csrc/core/step_state.h for every field."""

    t: float
    dt: float = 0.0
    t1: float = 0.0
    t_prev: float = 0.0
    dt_prev: float = 0.0
    dt_whole: float = 0.0
    slope: float = 0.0
    size1: float = 0.0
    size2: float = 0.0
    error1: float = 1.0
    error2: float = 1.0
    next_output: float = 0.0
    end: float = 0.0
    status: int = _RUNNING
    accepted: int = 0
    output_begin: int = 1
    output_end: int = 1
    on_jump: int = 0
    non_finite: int = 0
    n_accepted: int = 0
    n_rejected: int = 0
    n_steps: int = 0


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
        return Sample(
            t, t1=t, t_prev=t, output_begin=passed, output_end=passed, status=status,
            next_output=self.output(passed), end=self.output(len(self.outputs)),
        )  # fmt: skip

    def output(self, i: int) -> float:
        """The time of the i-th output, or of the last."""
        return self.sign * self.outputs[min(i, len(self.outputs) - 1)]

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
        jump_t = torch.empty(0, device="cpu") if grid.jump_t is None else grid.jump_t
        jumps = jump_t.T.tolist() if jump_t.dim() == 2 else [jump_t.tolist()] * state.samples
        self._times = [_Times(row, step_t, jump) for row, jump in zip(rows, jumps)]
        self._samples: list[Sample] = []
        self._means = [[0.0] * state.samples] * (2 * sum(layout.n_segments for layout in layouts))
        self.dt, self.one = (torch.full((state.samples,), v, dtype=torch.float64, device="cpu") for v in (0.0, 1.0))
        self.stage_times = torch.empty(0, device="cpu")

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
        for i, mean in enumerate(segment_means(layout, ratio)):
            self._means[slot + i] = mean

    def put_norm(self, norm: Tensor | float, slot: int = 0) -> None:
        """See native.Controller.put_norm."""
        norm = torch.as_tensor(norm, dtype=torch.float64, device="cpu")
        self._means[slot] = norm.detach().square().reshape(-1).tolist()

    def finish(self, which: Tensor, status: int) -> None:
        """See native.Controller.finish."""
        for sample, one in zip(self._samples, which.tolist()):
            if one:
                sample.status, sample.dt = status, 0.0
        self.dt = torch.tensor([sample.dt for sample in self._samples], dtype=torch.float64, device="cpu")

    def field(self, name: str) -> Tensor:
        """See native.Controller.field; a copy."""
        dtype = torch.float64 if name in REAL_FIELDS else torch.int64
        return torch.tensor([getattr(sample, name) for sample in self._samples], dtype=dtype, device="cpu")

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
        self.dt = torch.tensor([sample.dt for sample in self._samples], dtype=torch.float64, device="cpu")
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
        back = tensor([[-math.copysign(1.0, s.dt) if s.dt else 0.0 for s in self._samples]])
        ends = torch.tensor([c == 1 for c in self.abscissae], dtype=torch.bool, device=state.device)
        rows = torch.where(ends[:, None], neighbour(rows, back), rows)
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

    @property
    def _elementary(self) -> bool:
        """Whether the next step depends on the last error alone: I control."""
        return not any((*self.policy.beta[1:], *self.policy.alpha))

    def _judge_step(self, s: Sample, times: _Times, error: float) -> None:
        policy = self.policy
        was_rejected = not s.accepted and s.dt_prev != 0
        s.accepted, s.output_begin = 0, s.output_end
        if s.status != _RUNNING:
            return
        s.non_finite = not math.isfinite(error)
        smallest = abs(s.dt) <= policy.min_step
        s.accepted = int(error <= 1 or (smallest and not s.non_finite))
        if s.non_finite and smallest:
            s.status = _NON_FINITE
        factor = policy.dfactor if s.non_finite else self._step_factor(s, error)
        if was_rejected and policy.cautious:
            factor = min(factor, 1.0)
        if s.accepted:
            if not self._elementary:
                s.error1, s.error2 = max(error, _LEAST_ERROR), s.error1
                s.size2 = s.size1
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
        s.next_output = times.output(s.output_end)
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
        if self._elementary or not s.accepted:
            least = 1.0 if self._elementary and error < 1 else policy.dfactor
            return min(policy.ifactor, max(policy.safety / math.pow(error, (b1 if s.accepted else 1) / k), least))
        ratio1, ratio2 = (size / before if before else 1.0 for size, before in ((s.dt, s.size1), (s.size1, s.size2)))
        powers = ((error, b1 / k), (s.error1, b2 / k), (s.error2, b3 / k), (ratio1, a1), (ratio2, a2))
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
