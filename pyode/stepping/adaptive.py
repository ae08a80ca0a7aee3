"""The adaptive loop: evaluate the stages, judge the step, move or stay.

Python calls func and decides what happens next; all numbers are the ops'. One loop serves one step-size controller
for the whole state (B = 1) and one for each sample.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .._ops import autograd, backend_of, reference
from .._ops.contract import Flag, Grid, Layout, Phase, Policy, RightHandSide
from ..control import Times
from ..errors import SolveError, Status
from ..methods import Tableau
from ..solution import SampleStats, Stats
from .course import table_of
from .hooks import NO_HOOKS, Hooks
from .outputs import Output, RecordedBatchOutput, RecordedOutput, column, interpolant_of
from .quadrature import Quadrature
from .segment import BatchSegment, RungeKuttaSegment, unmoved
from .tape import Passed, Step, passed_by_samples

Norm = Callable[[Tensor, list[Tensor]], Any]
AtJump = Callable[[Tensor, Tensor, Tensor], Tensor]

_RUNNING, _ACCEPTED, _STAYED = int(Flag.RUNNING), int(Flag.ACCEPTED), int(Flag.STAYED)
_OUTPUT, _JUMP, _FAILED = int(Flag.OUTPUT), int(Flag.JUMP), int(Flag.FAILED)


class _Ballast(threading.local):
    """The derivatives of a thread's last solve, kept until the next one's take their places, for the same reason.

    Only those on the CPU of some kilobytes: smaller memory is not returned to the system, and bigger would be missed.
    """

    LEAST, MOST = 1 << 12, 1 << 23  # bytes of one state, and of all

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def take(self, n: int, filler: Tensor) -> list[Tensor]:
        """n tensors to be replaced, not read."""
        tensors, self.tensors = self.tensors, []
        return [*tensors[:n], *[filler] * (n - len(tensors))]

    def put(self, ks: list[Tensor]) -> None:
        """Keeps those of a solve that has ended."""
        last = ks[-1]
        if self.LEAST <= last.nbytes <= self.MOST // len(ks) and last.device.type == "cpu":
            self.tensors = [k for k in ks if not k.requires_grad and k.untyped_storage().nbytes() == k.nbytes]


_ballast = _Ballast()


class AdaptiveLoop:
    """An adaptive explicit Runge-Kutta solve.

    Args:
        dynamics: func, on packed states.
        tableau: the method.
        layout: the state's, from the backend that is to do the work.
        rtol, atol: numbers, or tensors with one for each number of the state.
        policy, grid: of the step-size controller.
        times: the output times; grid.times holds their values on the device.
        norm: of the scaled error of the state and those of the integrals, instead of the largest RMS over the segments.
        quadrature: integrals that are carried along and have a share in the norm.
        at_jump: called at each discontinuity with the samples' times, [B], which of them are there, [B], and the state;
            returns the state behind it.
        hooks: what else is called.
        check_every: after how many steps of several samples is asked whether they are done. Between, none waits for the
            device: they go on as if some samples had moved and others not, which is right whatever they did. Where
            steps have to be looked at one by one, for gradients, hooks or discontinuities, they are.
    """

    def __init__(
        self,
        dynamics: RightHandSide,
        tableau: Tableau,
        layout: Layout,
        rtol: float | Tensor,
        atol: float | Tensor,
        policy: Policy,
        grid: Grid,
        times: Times,
        norm: Norm | None = None,
        quadrature: Quadrature | None = None,
        at_jump: AtJump | None = None,
        hooks: Hooks = NO_HOOKS,
        check_every: int = 1,
    ) -> None:
        self.check_every = check_every
        self.dynamics, self.tableau, self.layout = dynamics, tableau, layout
        self.rtol, self.atol, self.grid, self.times = rtol, atol, grid, times
        self.norm, self.quadrature, self.at_jump, self.hooks = norm, quadrature, at_jump, hooks
        self.ops = ops = backend_of(layout)
        layouts = [layout] if quadrature is None else [layout, *quadrature.layouts]
        self.controller = ops.Controller(layouts, policy, grid, tableau.abscissae)
        self.interpolant, self.table = interpolant_of(ops, tableau), table_of(ops, tableau)

    def solve(self, y0: Tensor, first_step: float | Tensor | None = None) -> Tensor:
        """Returns the states at the output times, [T, *y0.shape]. A first step is for all samples, or [B].

        Raises:
            SolveError: says why and where the solve could not go on.
        """
        controller, dynamics, quadrature, hooks = self.controller, self.dynamics, self.quadrature, self.hooks
        tape = hooks.tape
        layout, table = self.layout, self.table
        recording = torch.is_grad_enabled()
        # Whether steps may follow each other without a look at each.
        plain = not (recording or tape or hooks.step or hooks.after_step or self.norm or quadrature)
        lasting = recording or tape is not None or hooks.after_step  # dt is needed when the next one is planned
        shift = self._shift() if recording else None
        stages = partial(autograd.stages, self.ops) if recording else self.ops.stages
        unseen = self.check_every if plain and layout.samples > 1 and self.grid.jump_t is None else 1
        steps = 0
        begins = plain and first_step is None and self.grid.times.dim() == 1 and layout.samples == 1
        recorded = RecordedOutput if layout.samples == 1 else RecordedBatchOutput
        output = recorded(self, y0) if recording else Output(self, y0, begun=not begins)

        if quadrature is not None:
            quadrature.start()
        # The derivatives of the step under way. An old one is let go only when its successor is there: freeing all of
        # them at once would make malloc return the memory to the system, and the next step fetch it page by page.
        ks = _ballast.take(len(table.rows) + 1, y0)
        start = self._at_start(y0)
        opening: Tensor | None = start  # the time of a first evaluation, if the step before has not made it
        y, flags = y0, _RUNNING
        if not begins:
            ks[0] = dynamics(start, y0)
            flags = self._first_step(y, ks[0], first_step)
        if tape is not None:
            tape.keep_first()
        self._evals_before_steps, self._n_jumps = dynamics.n_evals, 0
        while flags & _RUNNING:
            if hooks.step is not None:
                hooks.step(self._field("t"), y, abs(self._field("dt_whole")))
            dt = controller.dt.clone() if lasting else controller.dt
            steps += 1
            if steps % unseen:
                y1 = stages(layout, table, y, ks, dt, controller.stage_times.unbind(), dynamics)
                self._measure(y, y1, ks)
                flags = controller.run(Phase.JUDGE, unseen=_RUNNING | _ACCEPTED | _STAYED | _OUTPUT)
            elif plain and unseen == 1:
                assert isinstance(output, Output)
                y, y1, flags = self.ops.take_steps(
                    layout, table, self.interpolant, y, ks, controller, dynamics, self.rtol, self.atol, output.out,
                    start if begins else None,
                )  # fmt: skip
                begins = False
            else:
                times = controller.stage_times
                if shift is not None:
                    times, dt = self._moved(times, dt, shift)
                y1 = stages(layout, table, y, ks, dt, times.unbind(), dynamics)
                self._measure(y, y1, ks)
                flags = controller.run(Phase.JUDGE)
            if recording and flags & _STAYED and flags & _ACCEPTED:
                y1, dt = self._spare(stages, y, y1, ks, dt, times)
            if tape is not None and flags & _ACCEPTED:
                end = y1 if not flags & _STAYED else self._select(y1, y, controller.field("accepted"))
                tape.add(self._noted(flags, dt, times, opening), y, end)
                opening = None
                if flags & _STAYED:
                    spoiled = (controller.field("non_finite") != 0) & (controller.field("accepted") == 0)
                    tape.mix(bool(spoiled.any()))
            if hooks.after_step:
                end = self._call_hooks(bool(flags & _ACCEPTED), y, ks, dt, shift)
                if end is not None:
                    return torch.stack([y0, end])
                if hooks.watch_batch is not None:  # it may have finished samples, failed ones too
                    flags = flags & ~(_RUNNING | _FAILED) | self._standing()
            if flags & _OUTPUT:
                output.add(y, ks, dt, shift)
                if quadrature is not None:
                    quadrature.add_output(controller, self.interpolant)
            if not flags & _ACCEPTED:
                if quadrature is not None:
                    quadrature.reject()
                if tape is not None:
                    tape.keep_first()
                continue
            if not flags & _STAYED:
                y, ks[0] = y1, ks[-1]
            else:
                accepted = controller.field("accepted")
                y = self._select(y1, y, accepted)
                ks[0] = self._select(ks[-1], ks[0], accepted)
            if quadrature is not None:
                quadrature.accept()
            if flags & _JUMP and flags & _RUNNING:
                if shift is not None:  # what comes behind a discontinuity does not move with the start
                    shift = torch.where(self._on_jump(), torch.zeros_like(shift), shift)
                y, ks[0], opening = self._behind_jump(y, ks[0])
                if tape is not None:
                    tape.keep_last()
        if flags & _FAILED:
            hooks.fail(self._error(y, ks[0]))
        if flags & _FAILED or hooks.watch_batch is not None:  # some outputs may not have been reached
            if shift is not None:
                shift = shift.reshape(()) if layout.samples == 1 else column(shift, y)
            if tape is not None:
                tape.left = self.left()
            output.repeat(unmoved(y, ks[0], shift))
        if quadrature is not None:
            quadrature.finish()
        if not recording:
            _ballast.put(ks)
        return output.collect(y0)

    def _spare(
        self, stages: Callable[..., Tensor], y: Tensor, y1: Tensor, ks: list[Tensor], dt: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The step just judged, anew if samples became inf or nan in it, which now stand still: its end and sizes.

        They share parameters with the others, whose gradients 0 times nan would spoil.
        """
        field = self.controller.field
        still = (field("non_finite") != 0) & (field("accepted") == 0) & (dt.detach() != 0)
        if not bool(still.any()):
            return y1, dt
        times = torch.where(still.to(times.device), field("t").to(times), times)
        dt = torch.where(still, torch.zeros_like(dt), dt)
        return stages(self.layout, self.table, y, ks, dt, times.unbind(), self.dynamics), dt

    def _select(self, moved: Tensor, stayed: Tensor, rows: Tensor) -> Tensor:
        """Rows of `moved` where `rows` is not 0, of `stayed` elsewhere."""
        if moved.requires_grad or stayed.requires_grad:
            selected: Tensor = torch.where(column(rows.to(moved.device) != 0, moved), moved, stayed)
        else:
            selected = self.ops.select_rows(self.layout, moved, stayed, rows)
        return selected

    def _on_jump(self) -> Tensor:
        """Which samples have just arrived at a discontinuity, where one has: [B]."""
        if self.layout.samples == 1:
            return torch.ones(1, dtype=torch.bool)
        now, stops = self.controller.field("t"), self.grid.jump_t
        assert stops is not None
        stops = stops.to(now.device)
        there = torch.isin(now, stops) if stops.dim() == 1 else (now == stops).any(0)
        arrived: Tensor = (self.controller.field("accepted") != 0) & there
        return arrived

    def batch_segment(
        self, polynomial: Any, y: Tensor, ks: list[Tensor], dt: Tensor, shift: Tensor | None
    ) -> BatchSegment:
        """The step just judged, from y, sample by sample."""
        return BatchSegment(self.layout, polynomial, self.controller, y, list(ks), dt, shift)

    def segment(
        self, polynomial: Any, y: Tensor, ks: list[Tensor], dt: Tensor, shift: Tensor | None
    ) -> RungeKuttaSegment:
        """The step just accepted, from y."""
        t0, t1, size = (self._field(name) for name in ("t_prev", "t", "dt_prev"))
        shift = None if shift is None else shift.reshape(())
        return RungeKuttaSegment(self.layout, polynomial, t0, t1, size, y, list(ks), dt, shift)

    def _noted(self, flags: int, dt: Tensor, times: Tensor, opening: Tensor | None) -> Step:
        """The step just accepted, for a tape."""
        polynomial, field = interpolant_of(reference, self.tableau), self.controller.field
        if self.layout.samples == 1:
            outputs = range(*(int(field(name)) for name in ("output_begin", "output_end"))) if flags & _OUTPUT else ()
            t0, t1, size = (self._field(name) for name in ("t_prev", "t", "dt_prev")) if outputs else (0.0, 0.0, 1.0)
            values = self.times.values
            passed = (Passed(i, 0, 1.0 if values[i] == t1 else (values[i] - t0) / size, polynomial) for i in outputs)
            return Step(dt, times, opening, bool(flags & _JUMP), tuple(passed))
        if flags & _STAYED:
            moved = field("accepted") != 0
            first = self._first_times(opening)
            times, dt = torch.where(moved.to(times.device), times, first), torch.where(moved, dt, 0.0)
        several = passed_by_samples(self.controller, self.grid.times, polynomial) if flags & _OUTPUT else ()
        return Step(dt, times, opening, self._on_jump() if flags & _JUMP else False, tuple(several))

    def _first_times(self, opening: Tensor | None = None) -> Tensor:
        """Those of the step's first evaluations, as the tape has them."""
        tape = self.hooks.tape
        assert tape is not None
        return tape.steps[-1].times[-1] if opening is None else opening

    def _call_hooks(
        self, accepted: bool, y: Tensor, ks: list[Tensor], dt: Tensor, shift: Tensor | None
    ) -> Tensor | None:
        """Tells of the step just judged; returns the state at which the solve is to end, if it is."""
        hooks = self.hooks
        if hooks.judged is not None:
            hooks.judged(self.controller)
        callback = hooks.accept if accepted else hooks.reject
        if callback is not None:
            callback(self._field("t_prev"), y, abs(self._field("dt_prev")))
        if accepted and hooks.watch_batch is not None:
            hooks.watch_batch(self.batch_segment(_dense_output_of(self.tableau), y, ks, dt, shift))
        if accepted and hooks.watch is not None:
            return hooks.watch(self.segment(_dense_output_of(self.tableau), y, ks, dt, shift))
        return None

    def _standing(self) -> int:
        """The flags of how all samples stand."""
        status = self.controller.field("status")
        running, failed = (bool(some.any()) for some in (status == int(Status.RUNNING), status > int(Status.RUNNING)))
        return _RUNNING * running | _FAILED * failed

    def status_of_samples(self) -> Tensor:
        """[B] how each sample stands."""
        status: Tensor = self.controller.field("status").cpu().clone()
        return status

    def stats_of_samples(self) -> SampleStats:
        """What each sample has taken."""
        field = self.controller.field
        accepted, rejected = field("n_accepted").cpu().clone(), field("n_rejected").cpu().clone()
        if self.layout.samples == 1:
            evals = torch.tensor([self.dynamics.n_evals])
        else:
            evals = self._evals_before_steps + (accepted + rejected) * len(self.tableau.rows) + self._n_jumps
        return SampleStats(evals, accepted, rejected, field("size1").cpu().clone())

    def left(self) -> Tensor:
        """Which outputs have not been reached: [T, B], or [T] of the only sample."""
        ends = self.controller.field("output_end")
        left: Tensor = torch.arange(len(self.times.values))[:, None] >= ends.cpu()
        return (left[:, 0] if self.layout.samples == 1 else left).to(self.layout.device)

    def _field(self, name: str) -> float:
        """A number of the only sample's step state."""
        return float(self.controller.field(name))

    @property
    def last_step(self) -> float | None:
        """The size of the step taken last, where there is one controller."""
        return abs(float(self.controller.field("dt_prev"))) if self.layout.samples == 1 else None

    def add_to(self, stats: Stats | None, evals_before: int = 0) -> None:
        """Adds the solve's counts."""
        if stats is not None:
            stats.n_f_evals += self.dynamics.n_evals - evals_before
            stats.n_accepted += int(self.controller.field("n_accepted").sum())
            stats.n_rejected += int(self.controller.field("n_rejected").sum())

    def _at_start(self, y0: Tensor) -> Tensor:
        # By two, so that it is a view as times of stages are: torch.compile would compile func anew for what is none.
        start = self.times.tensor[:2].to(device=y0.device, dtype=self.layout.real_dtype)[0]
        return start if self.layout.samples == 1 else start.expand(self.layout.samples).contiguous()

    def _shift(self) -> Tensor | None:
        """How far the start has moved: 0, with the gradient of t[0]; None if that is not wanted."""
        t = self.times.tensor
        return (t[0] - t[0].detach()).expand(self.layout.samples) if t.requires_grad else None

    def _moved(self, stage_times: Tensor, dt: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Stage times and step size of a step that moves with the start; one up to a discontinuity keeps its end."""
        jumping = self.controller.field("on_jump").to(stage_times)
        if not bool(jumping.any()):
            return stage_times + shift.to(stage_times), dt
        c = torch.tensor(self.tableau.abscissae, dtype=torch.float64).to(stage_times)
        if self.layout.samples != 1:
            c = c[:, None]
        return stage_times + (1 - c * jumping) * shift.to(stage_times), dt - (jumping * shift).to(dt)

    def _first_step(self, y: Tensor, k: Tensor, first_step: float | Tensor | None) -> int:
        """Plans the first step; returns the flags (Hairer, Norsett, Wanner I, II.4)."""
        controller, ops, layout = self.controller, self.ops, self.layout
        dt, recording = controller.one, torch.is_grad_enabled()
        if recording:
            y, k = y.detach(), k.detach()
        n = sum(part.n_segments for part in controller.layouts)
        if first_step is not None:  # the state and slope have to be finite, no more
            for x, slot in ((y, 0), (k, n)):
                if self.norm is None:
                    controller.error_norm((1.0,), y, y, [x], dt, 0.0, 1.0, slot)
                else:  # the user's norm is the only one: those of the segments stay 0
                    controller.put_norm(0.0 if bool(x.isfinite().all()) else math.nan, slot)
            if isinstance(first_step, Tensor):
                controller.dt.copy_(first_step)
                first_step = math.nan
            return int(controller.run(Phase.GIVEN_FIRST, first_step))
        self._note_norm((1.0,), y, y, [y], dt, 0)
        self._note_norm((1.0,), y, y, [k], dt, n)
        if self.quadrature is not None:
            self.quadrature.measure_slope(controller, dt, n)
        controller.run(Phase.TRY_FIRST)
        trial = ops.stage_combine(layout, (1.0,), y, [k], controller.dt)
        # Not under no_grad, for which torch.compile would compile func once more.
        change = [self.dynamics(controller.stage_times, trial).detach(), k]
        self._note_norm((1.0, -1.0), y, y, change, controller.dt, 0)
        if self.quadrature is not None:
            self.quadrature.measure_change(controller)
        return int(controller.run(Phase.CHOOSE_FIRST))

    def _measure(self, y: Tensor, y1: Tensor, ks: list[Tensor]) -> None:
        if self.quadrature is not None:
            self.quadrature.finish_step(self.controller)
        self._note_norm(self.tableau.error_weights, y, y1, ks, self.controller.dt, 0)

    def _note_norm(
        self, weights: tuple[float, ...], y: Tensor, y1: Tensor, ks: list[Tensor], dt: Tensor, slot: int
    ) -> None:
        if self.norm is None:
            self.controller.error_norm(weights, y, y1, ks, dt, self.rtol, self.atol, slot)
            return
        with torch.no_grad():
            error = reference.scaled_step_error(self.layout, weights, y, y1, ks, dt, self.rtol, self.atol)
            errors = []
            if self.quadrature is not None:
                errors = self.quadrature.scaled_errors(weights, dt, at_start=y1 is y, of_values=ks[0] is y)
            self.controller.put_norm(self.norm(error, errors), slot)

    def _behind_jump(self, y: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state, its derivative, and the time just behind the jump at which the solve, or a sample, has arrived."""
        now = self.controller.field("t")
        if self.at_jump is not None:
            y = self.at_jump(now, self._on_jump(), y)
        t = now.to(device=y.device, dtype=self.layout.real_dtype)
        behind = torch.nextafter(t.expand(2, -1), t + self.controller.field("dt_prev").sign().to(t))[0]
        if self.quadrature is not None:
            self.quadrature.restart()
        if self.layout.samples == 1 or self.grid.jump_t is None:
            return y, self.dynamics(behind[0], y), behind[0]
        jumped = self._on_jump() & (self.controller.field("status") == int(Status.RUNNING))
        self._n_jumps = self._n_jumps + jumped.cpu()
        behind = torch.where(jumped.to(t.device), behind, t if self.hooks.tape is None else self._first_times())
        return y, self._select(self.dynamics(behind, y), k, jumped.to(torch.int64)), behind

    def _error(self, y: Tensor, k: Tensor) -> SolveError:
        statuses = self.controller.field("status")
        b = int((statuses > int(Status.RUNNING)).nonzero()[0])
        status = Status(int(statuses[b]))
        t, dt, accepted, rejected = (
            self.controller.field(name)[b].item() for name in ("t", "dt_prev", "n_accepted", "n_rejected")
        )
        if status is Status.NON_FINITE and accepted + rejected == 0 and (y.isfinite() & k.isfinite()).all():
            status = Status.STEP_TOO_SMALL  # all is finite, but a tolerance is 0 where y0 is 0
        return SolveError(status, float(t), float(dt), int(accepted + rejected), None if len(statuses) == 1 else b)


@lru_cache(maxsize=64)
def _dense_output_of(tableau: Tableau) -> reference.Interpolant:
    return reference.Interpolant(tableau.dense, tableau.end)
