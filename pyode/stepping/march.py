"""A solve of the adaptive loop, under way from step to step."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ops import autograd
from .._ops.contract import Flag, Phase, neighbour
from ..errors import Status
from .outputs import Output, RecordedBatchOutput, RecordedOutput, column, interpolant_of
from .segment import unmoved
from .tape import Step, Tape, passed_by_one, passed_by_samples

if TYPE_CHECKING:
    from .adaptive import AdaptiveLoop

RUNNING = int(Flag.RUNNING)
ACCEPTED, _STAYED, _OUTPUT = int(Flag.ACCEPTED), int(Flag.STAYED), int(Flag.OUTPUT)
_JUMP, FAILED = int(Flag.JUMP), int(Flag.FAILED)
_NOT_READ = RUNNING | ACCEPTED | _STAYED | _OUTPUT  # of a step whose flags are not read: as if anything had happened


class March:
    """A solve by a loop, from its start on: take a step, look at it, settle where the next one starts, until finished.

    Args:
        loop: whose solve it is.
        y0, first_step: as AdaptiveLoop.solve's.

    Attributes:
        flags: what the controller has said of the last step; RUNNING as long as there is a next one.
        plain: whether nobody looks at single steps.
    """

    def __init__(self, loop: AdaptiveLoop, y0: Tensor, first_step: float | Tensor | None) -> None:
        self.loop, self.y, self.y1, self.flags = loop, y0, y0, RUNNING
        hooks, quadrature, samples = loop.hooks, loop.quadrature, loop.layout.samples
        self.recording = recording = torch.is_grad_enabled()
        self.plain = loop.unwatched
        self.dt = loop.controller.dt
        self._lasting = recording or hooks.tape is not None or hooks.after_step  # dt is needed beside the next one's
        self._shift = self._moving() if recording else None
        self._stages = partial(autograd.stages, loop.ops) if recording else loop.ops.stages
        self._every = loop.check_every if self.plain and samples > 1 and loop.grid.jump_t is None else 1
        self._n_steps = 0
        recorded = RecordedOutput if samples == 1 else RecordedBatchOutput
        self.output = recorded(loop, y0) if recording else Output(loop, y0)
        start = loop.start()
        self._opening: Tensor | None = start  # the time of a first evaluation, if the step before has not made it
        self.ks: list[Any] = [None] * (len(loop.table.rows) + 1)  # the derivatives of the step under way
        if quadrature is not None:
            quadrature.start(trial=first_step is None)
        self.ks[0] = loop.dynamics(start, y0)
        self.flags = loop.measure.start(loop.dynamics, y0, self.ks[0], first_step)
        if hooks.tape is not None:
            hooks.tape.keep_first()
        loop.evals_before_steps, loop.n_jumps = loop.dynamics.n_evals, 0

    def step(self) -> None:
        """Takes a step as the controller has planned it and lets it be judged; if plain, as many as follow alike."""
        loop, controller = self.loop, self.loop.controller
        if self.plain and self._every == 1:
            assert isinstance(self.output, Output)
            self.y, self.y1, self.flags, _ = loop.steps.take(self.y, self.ks, loop.dynamics, self.output.out, None)
            return
        if loop.hooks.step is not None:
            loop.hooks.step(loop.field("t"), self.y, abs(loop.field("dt_whole")))
        self._n_steps += 1
        self.dt, self._times = controller.dt.clone() if self._lasting else controller.dt, controller.stage_times
        if self._shift is not None:
            self._times, self.dt = self._moved(self._times, self.dt, self._shift)
        self.y1 = self._evaluate()
        loop.measure.step(self.y, self.y1, self.ks)
        seen = self._n_steps % self._every == 0
        self.flags = controller.run(Phase.JUDGE) if seen else controller.run(Phase.JUDGE, unseen=_NOT_READ)

    def look(self) -> Tensor | None:
        """Shows the step just judged to all who look at steps; returns the state at which the solve ends, if it is to.

        Samples that became inf or nan in it now stand still, so it is made anew where it has a graph.
        """
        loop, hooks = self.loop, self.loop.hooks
        accepted = bool(self.flags & ACCEPTED)
        if self.recording and self.flags & _STAYED and accepted:
            self._spare()
        if hooks.tape is not None and accepted:
            self._note_on(hooks.tape)
        if not hooks.after_step:
            return None
        if hooks.judged is not None:
            hooks.judged(loop.controller)
        callback = hooks.accept if accepted else hooks.reject
        if callback is not None:
            callback(loop.field("t_prev"), self.y, abs(loop.field("dt_prev")))
        if hooks.watch_batch is not None:  # which may finish samples, failed ones too
            if accepted:
                hooks.watch_batch(loop.batch_segment(loop.dense_output, self.y, self.ks, self.dt, self._shift))
            self.flags = self.flags & ~(RUNNING | FAILED) | self._standing()
        if accepted and hooks.watch is not None:
            return hooks.watch(loop.segment(loop.dense_output, self.y, self.ks, self.dt, self._shift, self.y1))
        return None

    def settle(self) -> None:
        """Writes the outputs that the step has passed, and goes to where the next one starts."""
        loop, flags, ks = self.loop, self.flags, self.ks
        tape, quadrature = loop.hooks.tape, loop.quadrature
        if flags & _OUTPUT:
            self.output.add(self.y, ks, self.dt, self._shift)
            if quadrature is not None:
                quadrature.add_output(loop.controller, loop.interpolant)
        if not flags & ACCEPTED:
            if quadrature is not None:
                quadrature.reject()
            if tape is not None:
                tape.keep_first()
            return
        if flags & _STAYED:
            accepted = loop.controller.field("accepted")
            self.y, ks[0] = self._select(self.y1, self.y, accepted), self._select(ks[-1], ks[0], accepted)
        else:
            self.y, ks[0] = self.y1, ks[-1]
        if quadrature is not None:
            quadrature.accept()
        if flags & _JUMP:
            if self._shift is not None:  # what comes behind a discontinuity does not move with the start
                self._shift = torch.where(loop.on_jump(), torch.zeros_like(self._shift), self._shift)
            if flags & RUNNING:
                self._pass_jump()
                if tape is not None:
                    tape.keep_last()

    def finish(self, y0: Tensor) -> Tensor:
        """All outputs; of a solve that has failed those that are left are its last state."""
        loop, hooks, y, ks, shift = self.loop, self.loop.hooks, self.y, self.ks, self._shift
        if self.flags & FAILED:
            loop.fail(y, ks[0])
        if self.flags & FAILED or hooks.watch_batch is not None:  # some outputs may not have been reached
            if shift is not None:
                shift = shift.reshape(()) if loop.layout.samples == 1 else column(shift, y)
            if hooks.tape is not None:
                hooks.tape.left = loop.left()
            self.output.repeat(unmoved(y, ks[0], shift))
        if loop.quadrature is not None:
            loop.quadrature.finish()
        return self.output.collect(y0)

    def _evaluate(self) -> Tensor:
        """The stages from y, into ks; returns the state at the step's end."""
        loop = self.loop
        y1: Tensor = self._stages(
            loop.layout, loop.table, self.y, self.ks, self.dt, self._times.unbind(), loop.dynamics
        )
        return y1

    def _spare(self) -> None:
        """Takes the step anew if samples became inf or nan in it, with size 0 for these.

        They share parameters with the others, whose gradients 0 times nan would spoil.
        """
        field, dt = self.loop.controller.field, self.dt
        still = (field("non_finite") != 0) & (field("accepted") == 0) & (dt.detach() != 0)
        if bool(still.any()):
            times = torch.where(still.to(self._times.device), field("t").to(self._times), self._times)
            self._times, self.dt = times, torch.where(still, torch.zeros_like(dt), dt)
            self.y1 = self._evaluate()

    def _note_on(self, tape: Tape) -> None:
        """Notes the step, which some sample has accepted."""
        stayed, field = self.flags & _STAYED, self.loop.controller.field
        end = self.y1 if not stayed else self._select(self.y1, self.y, field("accepted"))
        tape.add(self._noted(tape), self.y, end)
        self._opening = None
        if stayed:
            tape.mix(bool(((field("non_finite") != 0) & (field("accepted") == 0)).any()))

    def _noted(self, tape: Tape) -> Step:
        loop, flags, dt, times = self.loop, self.flags, self.dt, self._times
        polynomial, field = interpolant_of(loop.ops, loop.tableau), loop.controller.field
        if loop.layout.samples == 1:
            passed = passed_by_one(loop.controller, loop.times.values, polynomial) if flags & _OUTPUT else ()
            return Step(dt, times, self._opening, bool(flags & _JUMP), tuple(passed))
        if flags & _STAYED:
            moved = field("accepted") != 0
            first = self._first_times(tape)
            times, dt = torch.where(moved.to(times.device), times, first), torch.where(moved, dt, 0.0)
        dt = dt.to(loop.grid.times.device)
        several = passed_by_samples(loop.controller, loop.grid.times, polynomial) if flags & _OUTPUT else ()
        return Step(dt, times, self._opening, loop.on_jump() if flags & _JUMP else False, tuple(several))

    def _first_times(self, tape: Tape) -> Tensor:
        """Those of the step's first evaluations, as the tape has them."""
        return tape.steps[-1].times[-1] if self._opening is None else self._opening

    def _standing(self) -> int:
        """The flags of how all samples stand."""
        status = self.loop.controller.field("status")
        running, failed = (bool(some.any()) for some in (status == int(Status.RUNNING), status > int(Status.RUNNING)))
        return RUNNING * running | FAILED * failed

    def _select(self, moved: Tensor, stayed: Tensor, rows: Tensor) -> Tensor:
        """Rows of `moved` where `rows` is not 0, of `stayed` elsewhere."""
        if moved.requires_grad or stayed.requires_grad:
            selected: Tensor = torch.where(column(rows.to(moved.device) != 0, moved), moved, stayed)
        else:
            selected = self.loop.ops.select_rows(self.loop.layout, moved, stayed, rows)
        return selected

    def _moving(self) -> Tensor | None:
        """How far the start has moved, [B]: 0, with the gradient of t[0]; None if that is not wanted."""
        t = self.loop.times.tensor
        return (t[0] - t[0].detach()).expand(self.loop.layout.samples) if t.requires_grad else None

    def _moved(self, stage_times: Tensor, dt: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Stage times and step size of a step that moves with the start; one up to a discontinuity keeps its end."""
        loop = self.loop
        jumping = loop.controller.field("on_jump").to(stage_times)
        if not bool(jumping.any()):
            return stage_times + shift.to(stage_times), dt
        c = torch.tensor(loop.tableau.abscissae, dtype=torch.float64, device="cpu").to(stage_times)
        if loop.layout.samples != 1:
            c = c[:, None]
        return stage_times + (1 - c * jumping) * shift.to(stage_times), dt - (jumping * shift).to(dt)

    def _pass_jump(self) -> None:
        """Goes to just behind the discontinuity at which the solve, or a sample, has arrived, and evaluates there."""
        loop, controller = self.loop, self.loop.controller
        if loop.layout.samples == 1:
            self._opening, self.y = loop.pass_jump(self.y)
            if loop.quadrature is not None:
                loop.quadrature.restart()
            self.ks[0] = loop.dynamics(self._opening, self.y)
            return
        now, on_jump = controller.field("t"), loop.on_jump()
        if loop.at_jump is not None:
            self.y = loop.at_jump(now, on_jump, self.y)
        if loop.quadrature is not None:
            loop.quadrature.restart()
        t = now.to(device=self.y.device, dtype=loop.layout.real_dtype)
        behind = neighbour(t.expand(2, -1), controller.field("dt_prev").sign().to(t))[0]
        jumped = on_jump & (controller.field("status") == int(Status.RUNNING))
        loop.n_jumps = loop.n_jumps + jumped.cpu()
        tape = loop.hooks.tape
        behind = torch.where(jumped.to(t.device), behind, t if tape is None else self._first_times(tape))
        slopes = loop.dynamics(behind, self.y)
        self.ks[0], self._opening = self._select(slopes, self.ks[0], jumped.to(torch.int64)), behind
