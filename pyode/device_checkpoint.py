"""The checkpoint gradient of a solve that chooses its steps: they are undone as one launch on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import graph_loop, native
from ._ops.contract import N_FIELDS
from .captures import BoundFunc, Captured, CaptureError, Key, captured_for, captured_solves, standing_for
from .control import Times
from .device_solve import launch, unless
from .gradients.captured import CapturedReversal
from .gradients.reversal import Forward, Recipe, Undone
from .gradients.vjp import MOST_TERMS
from .methods import Tableau
from .problem import for_one_sample
from .state import Func
from .stepping.captured import CapturedLoop
from .stepping.outputs import column, interpolant_of
from .stepping.ring import Rows, n_passed, steps_from
from .stepping.tape import Step, Tape

FIRST_ROOM = 64  # for so many steps, as long as no solve has taken more
MOST_BYTES = 1 << 28  # of a ring


class TooManySteps(Exception):
    """A ring had no room for all steps of a solve.

    Args:
        n: how many there were.
    """

    def __init__(self, n: int) -> None:
        self.n = n


def bytes_of_step(y: Tensor, samples: int) -> int:
    """What a step takes on a ring, at most, with states like y."""
    return y.nbytes + 8 * (N_FIELDS + MOST_TERMS) * samples


def room_for(n: int, y: Tensor, samples: int, key: Key) -> int:
    """For how many steps there is to be room where there may be n, with states like y.

    Raises:
        CaptureError: their states take too much memory; no solve with that key needs to be tried again.
    """
    most = MOST_BYTES // max(1, bytes_of_step(y, samples))
    room = min(max(FIRST_ROOM, 1 << (n - 1).bit_length()), most)
    if room < max(1, n):
        why = f"more than {most} steps take more than {MOST_BYTES >> 20} MB"
        captured_solves.refuse(key, why)
        raise CaptureError(why)
    return room


def note(tape: Tape, loop: CapturedLoop, times: Times, options: dict[str, Any], bound: BoundFunc, key: Key) -> None:
    """Notes the steps of a captured solve on a tape, and who undoes them.

    Args:
        times: of the outputs.
        options, bound, key: of the solve.

    Raises:
        TooManySteps: some of them are not on the ring.
    """
    ring = loop.ring
    assert ring is not None
    n = int(ring.n)
    if n > ring.room:
        raise TooManySteps(n)
    *states, tape.end = torch.cat([ring.states[1 : n + 1], loop.y[None]]).unbind()
    tape.states = dict(enumerate(states))
    rows, jumps = Rows(*(x[: n + 1].clone() for x in ring.rows)), loop.grid.jump_t is not None
    key = (key[0], "undone", *key[1:], ring.room)
    tape.undo = RingUndoing(options, bound, key, ring.room, loop.tableau, times, rows, jumps) if n else None


@dataclass(eq=False)
class RingUndoing:
    """What undoes the steps of one solve.

    Attributes:
        options, bound: of the forward solve.
        key: tells what is captured from others but for whose gradients are wanted.
        room: on the ring.
        method, output_times: of the solve.
        rows: [N + 1] of the ring, as far as they are used.
        jumps: whether steps may begin anew.
    """

    options: dict[str, Any]
    bound: BoundFunc
    key: Key
    room: int
    method: Tableau
    output_times: Times
    rows: Rows
    jumps: bool

    def steps(self) -> list[Step]:
        """The steps, for the host."""
        return list(steps_from(self.rows, self.output_times, interpolant_of(native, self.method)))

    def __call__(
        self,
        recipe: Recipe,
        states: dict[int, Tensor],
        t: Tensor,
        forward: Forward,
    ) -> Undone | None:
        """Undoes all steps; None, with a warning of why, if that can't be: then the host finds them in `forward`.

        Args:
            recipe, states, t, forward: as of the host's reversal.
        """
        end, gradient, params = forward.end, forward.gradient, forward.params
        key = (*self.key, self.bound.which(params))

        def fill(captured: Captured) -> None:
            loop: CapturedReversal = captured.loop
            n = len(states)
            torch.stack(list(states.values()), out=loop.states[1 : n + 1])
            for place, rows in zip(loop.rows, self.rows):
                place[: n + 1].copy_(rows)
            loop.output_times.copy_(self.output_times.tensor)
            loop.gradients.copy_(gradient)
            loop.end.copy_(end)
            loop.left.fill_(n)
            captured.fill_slots(self.bound)

        def make(func: Func, stand_ins: dict[int, Tensor]) -> tuple[CapturedReversal, list[Tensor]]:
            plain = replace(recipe, func=for_one_sample(func, recipe.form), grid=None)
            like = end, self.rows.times[0], self.rows.words[0], self.jumps, self.output_times.tensor.shape
            return CapturedReversal(plain, self.room, *like, standing_for(params, stand_ins)), []

        def collect(loop: CapturedReversal) -> Undone:
            return loop.lam + self._at_start(gradient), [total.clone() for total in loop.totals], None

        def undo() -> Undone:
            captured = captured_for(key, self.bound, end.device, make, fill, graph_loop.GraphLoop)
            return launch(captured, key, partial(fill, captured), collect)

        undone = unless(None, undo, self.options, "options")
        if undone is None and not forward.steps:
            forward.steps += self.steps()
        return undone

    def _at_start(self, gradient: Tensor) -> Tensor:
        """What arrives at outputs that no step has passed."""
        n = n_passed(self.rows.words)
        if len(n) == 1:
            return gradient[0]
        outputs = torch.arange(len(gradient), device=gradient.device)[:, None]
        return torch.where(column((outputs == 0) | (outputs > n), gradient), gradient, 0.0).sum(0)
