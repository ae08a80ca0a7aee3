"""Undoing the steps on a ring as work for a GPU to do by itself: an opening, and a turn for every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._ops import native
from ..methods import Tableau
from ..stepping.outputs import interpolant_of
from ..stepping.ring import DT, Rows, rows_for
from ..stepping.tape import Step
from .explicit import ExplicitReversal
from .reversal import Forward, Recipe
from .survey import Survey


class CapturedReversal:
    """The steps of a solve undone, as ExplicitReversal does it, where nobody looks.

    Args:
        recipe: of the solve.
        room: for how many steps.
        y0: what states are like.
        stage_times, words: what a step's are like; see Ring.
        jumps: whether steps may begin anew.
        output_times: the shape of the solve's, [T] or [T, B].
        params: the tensors whose gradients are wanted.

    Attributes:
        states, rows: as a Ring's.
        output_times: float64.
        gradients: [T, *y0.shape] what arrives at the outputs.
        end: the last state.
        left: [1] int64, how many steps are to be undone; all of these are to be filled before `open`.
        lam: the gradient at the start of the step undone last.
        totals: those of the params.
    """

    def __init__(
        self,
        recipe: Recipe,
        room: int,
        y0: Tensor,
        stage_times: Tensor,
        words: Tensor,
        jumps: bool,
        output_times: torch.Size,
        params: tuple[Tensor, ...],
    ) -> None:
        method = recipe.method
        assert isinstance(method, Tableau)
        self.jumps = jumps
        self.states, self.rows = rows_for(room, y0, stage_times, words)
        self.output_times = torch.zeros(output_times, dtype=torch.float64, device=y0.device)
        self.gradients, self.end = y0.new_zeros((output_times[0], *y0.shape)), torch.zeros_like(y0)
        self.lam = torch.zeros_like(y0)
        self.left, self._both = (torch.tensor(x, dtype=torch.int64, device=y0.device) for x in ([1], [-1, 0]))
        self.totals = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in params]
        # The step to be undone, and the one before it; and the state at the end, and whether a step begins there anew.
        self._here = Rows(*(x[:2].clone() for x in self.rows))
        self._end, self._apart = torch.zeros_like(y0), torch.ones((), dtype=torch.bool, device=y0.device)
        opening = self._here.openings[1] if jumps else None
        steps = [Step(its_words[DT], times, opening) for times, its_words in zip(self._here.times, self._here.words)]
        forward = Forward(steps, self.end, None, self.gradients, params, start=True, time=False)
        self.reversal = ExplicitReversal(recipe, forward, [])
        self.reversal.survey = Survey(params, recipe.warns)
        self.interpolant = interpolant_of(native, method)
        # Of the derivative at a step's end alone, which the step after it has evaluated.
        last = len(method.weights)
        alone = tuple(row if j == last else () for j, row in enumerate(self.interpolant.coefficients))
        self._at_end = native.Interpolant(alone, self.interpolant.end)
        self._inside, self._arriving = torch.zeros_like(y0), torch.zeros_like(y0)

    def trial(self) -> Iterator[None]:
        """Undoes the last step, driven by the host."""
        self.open()
        yield
        self._turn()
        yield

    def capture(self, graph: Any) -> None:
        """Has a GraphLoop capture the work, after a trial; RuntimeError if something can't be."""
        self._condition = graph.condition
        graph.capture(self.open, self.turn)

    def turn(self) -> None:
        """Undoes a step, and tells whether there is another."""
        self._turn()
        native.repeat_while(self.reversal.layout, self.left, self._condition)

    @torch.enable_grad()
    def open(self) -> None:
        """Begins at the end, whose derivative the last step's outputs may need."""
        for place in (self.lam, *self.totals):
            place.zero_()
        self._end.copy_(self.end)
        self._apart.fill_(True)
        if not self.jumps:
            self._load()
            self._undo_end()

    @torch.enable_grad()
    def _turn(self) -> None:
        y, anew = self._load(), self._here.anew[1]
        shares = self._shares(1, self.interpolant, self._inside, self._arriving)
        carried = self._shares(0, self._at_end)[-1]
        self.lam += self._arriving
        if self.jumps:
            self._undo_end()
        if self.jumps and carried is not None:
            carried = torch.where(anew, 0, carried)
        self.reversal.totals.restart(self.totals)
        lam, _ = self.reversal.undo(1, y, self.lam, shares, carried)
        torch._foreach_copy_((self.lam, *self.totals), (lam + self._inside, *self.reversal.totals.settled()))
        if self.jumps:
            self._end.copy_(y)
            self._apart.copy_(anew)
        self.left -= 1

    def _undo_end(self) -> None:
        """Undoes the evaluation at the step's end, where that is not the first of the step behind."""
        share = self._shares(1, self._at_end)[-1]
        if share is None:
            return
        places = self.lam, *self.totals
        self.reversal.totals.restart(self.totals)
        lam, _ = self.reversal.undo_end(1, self._end, self.lam, share)
        arrives = self._apart & (share != 0).any()
        for place, found in zip(places, (lam, *self.reversal.totals.settled())):
            place.copy_(torch.where(arrives, found, place))

    def _load(self) -> Tensor:
        """Brings here the last step that is left, and the one before; returns the state at its start."""
        rows = self.left + self._both
        n = len(self.rows) if self.jumps else 2  # what else there is nobody needs
        for place, ring in zip(self._here[:n], self.rows):
            torch.index_select(ring, 0, rows, out=place)
        if self.jumps:
            times, _, anew, openings = self._here
            openings[1] = torch.where(anew[1], openings[1], times[0, -1])
        return self.states.index_select(0, self.left)[0]

    def _shares(self, step: int, interpolant: Any, *start_and_end: Tensor) -> list[Tensor | None]:
        """What outputs within one of both steps give to its derivatives, that at its end the last, and to its ends."""
        found = native.interpolate_vjp(
            self.reversal.layout, interpolant, self._here.words[step], self.output_times, self.gradients, *start_and_end
        )
        n = self.reversal.n_stages + 1
        return [*found, *[None] * (n - len(found))]
