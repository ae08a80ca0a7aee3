"""Integrals carried along with a solve: q' = g(t, y), where y does not depend on q.

They need no stage sums, only the step's weighted sum and their share of the error norm. The adjoint's gradients of
parameters and of time are such integrals.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from .._ops.contract import Layout
from ..methods import Tableau


class Quadrature:
    """The values of some integrals, and the integrands of the step under way.

    Args:
        values: the integrals at the start; contiguous. Replaced by new tensors, never written to.
        tableau: the method of the solve.
        ops: the backend of the solve.
        rtol, atol: numbers; the integrals' share of the norm.
        in_norm: for each integral whether it has such a share.
    """

    def __init__(
        self, values: list[Tensor], tableau: Tableau, ops: ModuleType, rtol: float, atol: float, in_norm: list[bool]
    ) -> None:
        self.values, self.tableau, self.ops = values, tableau, ops
        self.rtol, self.atol, self.in_norm = rtol, atol, in_norm
        self._all_layouts = [ops.Layout(1, v.numel(), (0, v.numel()), v.dtype, v.device) for v in values]
        self._ends: list[Tensor] = []
        self._evaluations: list[list[Tensor] | None] = []
        columns = zip(tableau.interpolant, (*tableau.error_weights, *[0.0] * 99))
        self._needed = [bool(any(row) or e) for row, e in columns]

    @property
    def layouts(self) -> list[Layout]:
        """Of those integrals that have a share in the norm."""
        return [layout for layout, counts in zip(self._all_layouts, self.in_norm) if counts]

    @property
    def wanted(self) -> bool:
        """Whether the next evaluation's integrands will be used."""
        i = len(self._evaluations)
        return i >= len(self._needed) or self._needed[i]

    def note(self, integrands: list[Tensor] | None) -> None:
        """Adds the integrands of an evaluation of the step under way; None if they are not wanted."""
        self._evaluations.append(integrands)

    def restart(self) -> None:
        """Forgets the integrands: the next evaluation is a step's first."""
        self._evaluations.clear()

    def start(self) -> None:
        """Marks the evaluation noted last as the first of a step."""
        del self._evaluations[:-1]

    def _columns(self) -> list[list[Any]]:
        """For each integral its integrands, by evaluation."""
        return [[e and e[i] for e in self._evaluations] for i in range(len(self.values))]

    def measure_slope(self, controller: Any, ones: Tensor, half: int) -> None:
        """Their share of the norms of a first step's state and slope."""
        self._measure(controller, (1.0,), self.values, [[v] for v in self.values], ones, 1)
        self._measure(controller, (1.0,), self.values, [c[:1] for c in self._columns()], ones, 1 + half)

    def measure_change(self, controller: Any, ones: Tensor) -> None:
        """Their share of the norm of the slope's change over the trial step, whose evaluation is dropped."""
        self._measure(controller, (-1.0, 1.0), self.values, self._columns(), ones, 1)
        del self._evaluations[1:]

    def finish_step(self, controller: Any) -> None:
        """Their values at the step's end, and their share of its error norm."""
        columns = self._columns()
        weights, dt = self.tableau.weights, controller.dt
        self._ends = [
            self.ops.stage_combine(layout, weights, value, gs, dt)
            for layout, value, gs in zip(self._all_layouts, self.values, columns)
        ]
        self._measure(controller, self.tableau.error_weights, self._ends, columns, dt, 1)

    def finish_fixed_step(self, dt: Tensor) -> None:
        """Moves to the end of a step of a fixed-step method."""
        self.values = [
            self.ops.stage_combine(layout, self.tableau.weights, value, gs, dt)
            for layout, value, gs in zip(self._all_layouts, self.values, self._columns())
        ]
        self.restart()

    def _measure(
        self,
        controller: Any,
        weights: tuple[float, ...],
        ends: list[Tensor],
        columns: list[list[Any]],
        dt: Tensor,
        slot: int,
    ) -> None:
        slot += controller.layouts[0].n_segments - 1
        for layout, value, end, gs, counts in zip(self._all_layouts, self.values, ends, columns, self.in_norm):
            if counts:
                controller.error_norm(weights, value, end, gs, dt, self.rtol, self.atol, slot, layout)
                slot += 1

    def accept(self) -> None:
        """Moves to the step's end; the last evaluation is the next step's first."""
        self.values = self._ends
        del self._evaluations[:-1]

    def reject(self) -> None:
        """Stays; the first evaluation is the next step's too."""
        del self._evaluations[1:]
