"""Integrals carried along with a solve: q' = g(t, y), where y does not depend on q.

They need no stage sums, only the step's weighted sum and their share of the error norm. The adjoint's gradients of
parameters and of time are such integrals.
"""

from __future__ import annotations

from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from .._ops.contract import Layout
from ..methods import Method, Tableau


class Quadrature:
    """The values of some integrals, and the integrands of the step under way.

    Args:
        values: the integrals at the start; contiguous. Replaced by new tensors, never written to.
        method: of the solve.
        ops: the backend of the solve.
        rtol, atol: for the integrals' share of the norm.
        in_norm: for each integral whether it has such a share.
    """

    def __init__(
        self,
        values: list[Tensor],
        method: Method,
        ops: ModuleType,
        rtol: float | Tensor,
        atol: float | Tensor,
        in_norm: list[bool],
    ) -> None:
        self.values, self.ops = values, ops
        self.rtol, self.atol, self.in_norm = rtol, atol, in_norm
        self._ends: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._evaluations: list[list[Tensor] | None] = []
        self._trying = False  # a first step is being chosen: every evaluation counts
        self._weights: tuple[float, ...] = ()
        self._error_weights: tuple[float, ...] = ()
        self._needed: list[bool] = []
        if isinstance(method, Tableau):
            self._weights, self._error_weights = method.weights, method.error_weights
            columns = zip(method.interpolant, (*method.error_weights, *[0.0] * 99))
            self._needed = [bool(any(row) or e) for row, e in columns]

    @cached_property
    def _all_layouts(self) -> list[Layout]:
        return [self.ops.Layout(1, v.numel(), (0, v.numel()), v.dtype, v.device) for v in self.values]

    @property
    def layouts(self) -> list[Layout]:
        """Of those integrals that have a share in the norm."""
        return [layout for layout, counts in zip(self._all_layouts, self.in_norm) if counts]

    @property
    def wanted(self) -> bool:
        """Whether the next evaluation's integrands will be used."""
        i = len(self._evaluations)
        return self._trying or i >= len(self._needed) or self._needed[i]

    def note(self, integrands: list[Tensor] | None) -> None:
        """Adds the integrands of an evaluation of the step under way; None if they are not wanted."""
        self._evaluations.append(integrands)

    def restart(self) -> None:
        """Forgets the integrands: the next evaluation is the first after a jump."""
        self._evaluations.clear()

    def start(self, trial: bool) -> None:
        """Forgets the integrands: the next evaluation is the first of a solve, behind which a trial may come."""
        self._evaluations.clear()
        self._trying = trial

    def _columns(self) -> list[list[Any]]:
        """For each integral its integrands, by evaluation."""
        nothing = (None,) * len(self.values)
        return [list(column) for column in zip(*(nothing if e is None else e for e in self._evaluations))]

    def measure_slope(self, controller: Any, dt: Tensor, half: int) -> None:
        """Their share of the norms of a first step's state and slope."""
        self._measure(controller, (1.0,), self.values, [[v] for v in self.values], dt, 1)
        self._measure(controller, (1.0,), self.values, [c[:1] for c in self._columns()], dt, 1 + half)

    def measure_change(self, controller: Any) -> None:
        """Their share of the norm of the slope's change over the trial step, whose evaluation is dropped."""
        self._measure(controller, (-1.0, 1.0), self.values, self._columns(), controller.dt, 1)
        del self._evaluations[1:]
        self._trying = False

    def finish_step(self, controller: Any) -> None:
        """Their values at the step's end, and their share of its error norm."""
        columns = self._columns()
        weights, dt = self._weights, controller.dt
        self._ends = [
            self.ops.stage_combine(layout, weights, value, gs, dt)
            for layout, value, gs in zip(self._all_layouts, self.values, columns)
        ]
        self._measure(controller, self._error_weights, self._ends, columns, dt, 1)

    def finish_fixed_step(self, weights: tuple[float, ...], dt: Tensor) -> None:
        """Moves to the end of a step of a fixed-step method."""
        self.values = [
            self.ops.stage_combine(layout, weights, value, gs, dt)
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

    def scaled_errors(self, weights: tuple[float, ...], dt: Tensor, *, at_start: bool, of_values: bool) -> list[Tensor]:
        """Their errors over the step's weights, scaled, for a norm of the user's; or themselves, for a first step's."""
        ends = self.values if at_start else self._ends
        columns = [[v] for v in self.values] if of_values else self._columns()
        return [
            reference.scaled_step_error(layout, weights, value, end, gs, dt, self.rtol, self.atol)
            for layout, value, end, gs in zip(self._all_layouts, self.values, ends, columns)
        ]

    def add_output(self, controller: Any, interpolant: Any) -> None:
        """Notes their values at the output time that the step has passed: there is one, the last."""
        self._outputs = [
            torch.empty((2, *value.shape), dtype=value.dtype, device=value.device) for value in self.values
        ]
        for layout, value, gs, out in zip(self._all_layouts, self.values, self._columns(), self._outputs):
            self.ops.interpolate(layout, interpolant, controller, value, gs, out)

    def finish(self) -> None:
        """Moves to the last output time."""
        self.values = [out[1] for out in self._outputs]

    def stay_on_device(self) -> None:
        """From now on a loop on the device takes the steps: values and integrands at a step's start keep their place.

        To be called before the loop is captured. The tolerances are tensors of one number then.
        """
        self.values, self._starts = ([torch.empty_like(value) for value in self.values] for _ in range(2))
        self._outputs = [value.new_empty((2, *value.shape)) for value in self.values]
        device = self.values[0].device
        self.rtol, self.atol = (torch.empty((), dtype=torch.float64, device=device) for _ in range(2))

    def begin_as(self, other: Quadrature) -> None:
        """Takes the values and the tolerances of another, for a solve by a loop on the device."""
        for place, given in ((self.rtol, other.rtol), (self.atol, other.atol)):
            assert isinstance(place, Tensor)
            place.fill_(given)
        torch._foreach_copy_(self.values, other.values)

    def keep_integrands(self, where: Tensor | None = None) -> None:
        """Makes the evaluation noted last that at the start of the next step, at once or if a mask, [1], is set."""
        (noted,) = self._evaluations[:1]
        assert noted is not None
        for start, integrand in zip(self._starts, noted):
            start.copy_(integrand if where is None else torch.where(where[0], integrand, start))
        self._evaluations = [list(self._starts)]

    def finish_on_device(self, controller: Any, interpolant: Any) -> None:
        """Notes the values at the outputs that the step has passed, and moves to its end if it was accepted."""
        tracks = zip(self._all_layouts, self.values, self._columns(), self._ends, self._outputs)
        for layout, value, gs, end, out in tracks:
            self.ops.finish_step(layout, interpolant, controller, value, gs, end, out)
        del self._evaluations[1:]

    def copies(self) -> list[Tensor]:
        """The values at the last output time, after a loop on the device."""
        return [out[1].clone() for out in self._outputs]

    def accept(self) -> None:
        """Moves to the step's end; the last evaluation is the next step's first."""
        self.values = self._ends
        del self._evaluations[:-1]

    def reject(self) -> None:
        """Stays; the first evaluation is the next step's too."""
        del self._evaluations[1:]
