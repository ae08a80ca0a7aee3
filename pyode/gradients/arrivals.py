"""The gradients that arrive at a solve's outputs, as its steps see them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._ops import reference
from .._ops.contract import Layout, clock_device
from ..stepping.tape import Passed, Step
from .vjp import MOST_TERMS

Shares = list[Tensor | None]


def arrivals_at(gradient: Tensor, layout: Layout, ops: ModuleType) -> JointArrivals | SampleArrivals:
    """Those of one sample or of several.

    Args:
        gradient: [T, *state].
        layout, ops: of the state.
    """
    return JointArrivals(gradient, layout, ops) if layout.samples == 1 else SampleArrivals(gradient, layout)


class JointArrivals:
    """Those of a single sample; see `arrivals_at`."""

    def __init__(self, gradient: Tensor, layout: Layout, ops: ModuleType) -> None:
        self.gradient, self.layout, self.ops = gradient, layout, ops
        self.zero = torch.zeros_like(gradient[0])

    def at_last_state(self, left: Tensor | None) -> Tensor:
        """What arrives at outputs that were not reached."""
        return self.zero if left is None else self.gradient[: len(left)][left].sum(0)

    def at_start(self, steps: list[Step], left: Tensor | None) -> Tensor:
        """What arrives at outputs that are the state at the start."""
        elsewhere = {passed.index for step in steps for passed in step.outputs}
        elsewhere |= set() if left is None else set(left.nonzero()[:, 0].tolist())
        return sum(self.gradient[i] for i in range(1, len(self.gradient)) if i not in elsewhere) + self.gradient[0]

    def at_end(self, step: Step) -> Tensor | None:
        """What arrives at outputs at a step's end."""
        found = [self.gradient[passed.index] for passed in step.outputs if passed.position == 1.0]
        return sum(found[1:], found[0]) if found else None

    def inside(self, step: Step) -> Tensor | None:
        """What arrives at outputs inside a step: they move with its start."""
        found = [self.gradient[passed.index] for passed in step.outputs if passed.position != 1.0]
        return sum(found[1:], found[0]) if found else None

    def shares(self, step: Step, n: int) -> Shares:
        """What outputs inside a step give to its n derivatives, that at its end included."""
        inside = [passed for passed in step.outputs if passed.position != 1.0]
        if not inside:
            return [None] * n
        gradients = [self.gradient[passed.index] for passed in inside]
        columns = [passed.polynomial.weights_at(passed.position) for passed in inside]
        rows = (tuple(column[j] if j < len(column) else 0.0 for column in columns) for j in range(n))
        return [self._sum(row, gradients, step.dt) if any(row) else None for row in rows]

    def _sum(self, weights: tuple[float, ...], gradients: list[Tensor], dt: Tensor) -> Tensor:
        """dt sum_m w_m G_m."""
        total = self.zero
        for i in range(0, len(weights), MOST_TERMS):
            some = slice(i, i + MOST_TERMS)
            total = self.ops.stage_combine(self.layout, weights[some], total, gradients[some], dt)
        return total

    def effects(self, step: Step, ks: list[Tensor]) -> Iterator[tuple[Passed, Tensor]]:
        """Each output within a step, and the effect of moving it along the solution; from all derivatives."""
        one = torch.ones(1, dtype=torch.float64, device=clock_device(self.layout.device))
        for passed in step.outputs:
            slopes = _slopes_at(passed.polynomial, passed.position)
            slope = reference.stage_combine(self.layout, slopes, self.zero, ks, one)
            yield passed, inner(self.gradient[passed.index], slope)[0]


class SampleArrivals:
    """Those of several samples, which have their outputs in other steps each; see JointArrivals."""

    def __init__(self, gradient: Tensor, layout: Layout) -> None:
        self.gradient, self.layout = gradient, layout

    def at_last_state(self, left: Tensor | None) -> Tensor:  # noqa: D102
        if left is None:
            return torch.zeros_like(self.gradient[0])
        gradient = self.gradient[: len(left)]
        return torch.where(_beside(left, gradient), gradient, 0.0).sum(0)

    def at_start(self, steps: list[Step], left: Tensor | None) -> Tensor:  # noqa: D102
        there = torch.ones(self.gradient.shape[:2], dtype=torch.bool, device=self.gradient.device)
        for step in steps:
            for passed in step.outputs:
                there[self._place(passed)] = False
        if left is not None:
            there[: len(left)] &= ~left
        return torch.where(_beside(there, self.gradient), self.gradient, 0.0).sum(0)

    def at_end(self, step: Step) -> None:
        """Nothing: those at a step's end are not told apart from those inside."""

    def inside(self, step: Step) -> Tensor | None:  # noqa: D102
        total = None
        for passed in step.outputs:
            total = torch.zeros_like(self.gradient[0]) if total is None else total
            index, some = self._place(passed)
            total[some] += self.gradient[index, some]
        return total

    def shares(self, step: Step, n: int) -> Shares:  # noqa: D102
        total: Shares = [None] * n
        for passed in step.outputs:
            index, some = self._place(passed)
            gradient, dt = self.gradient[index, some], step.dt[passed.samples]
            for j, weights in enumerate(_weights(passed)):
                if weights is not None:
                    if (share := total[j]) is None:
                        share = total[j] = torch.zeros_like(self.gradient[0])
                    share[some] += self._scaled(gradient, weights * dt)
        return total

    def effects(self, step: Step, ks: list[Tensor]) -> Iterator[tuple[Passed, Tensor]]:  # noqa: D102
        for passed in step.outputs:
            slope: Any = 0.0
            index, some = self._place(passed)
            for k, weights in zip(ks, _weights(passed, slopes=True)):
                if weights is not None:
                    slope = slope + self._scaled(k[some], weights)
            yield passed, inner(self.gradient[index, some], slope, len(some))

    def _place(self, passed: Passed) -> tuple[Tensor, Tensor]:
        """The indices of outputs and their samples, on the gradients' device."""
        index, samples = passed.index, passed.samples
        assert isinstance(index, Tensor)
        assert isinstance(samples, Tensor)
        return index.to(self.gradient.device), samples.to(self.gradient.device)

    def _scaled(self, rows: Tensor, factors: Tensor) -> Tensor:
        """Rows times a factor each."""
        real = torch.promote_types(self.layout.real_dtype, torch.float32)
        return (rows * _beside(factors.to(rows.device, real), rows)).to(rows.dtype)


def _slopes_at(polynomial: Any, x: Any) -> tuple[float, ...]:
    """The derivatives of the dense output's weights at position x."""
    return tuple(sum(p * c * x ** (p - 1) for p, c in enumerate(row, 1)) for row in polynomial.coefficients)


def _weights(passed: Passed, slopes: bool = False) -> list[Tensor | None]:
    """The dense output's weights for each derivative at outputs of several samples, [n], or the weights' slopes."""
    found: list[Tensor | None] = []
    x = passed.position
    assert isinstance(x, Tensor)
    for row, end in zip(passed.polynomial.coefficients, passed.polynomial.end):
        if not any(row):
            found.append(None)
            continue
        weight = torch.zeros_like(x)
        for p, c in reversed(list(enumerate(row, 1))):
            weight = weight * x + p * c if slopes else (weight + c) * x
        found.append(weight if slopes else torch.where(x == 1.0, end, weight))
    return found


def _beside(rows: Tensor, like: Tensor) -> Tensor:
    """[...] for each row so that it broadcasts with [..., *]."""
    return rows.reshape(*rows.shape, *[1] * (like.dim() - rows.dim()))


def inner(a: Tensor, b: Tensor, samples: int = 1) -> Tensor:
    """The real inner product of each sample's numbers, [samples] float64, on the `clock_device`."""
    product = (a.conj() * b).real if a.is_complex() else a * b
    return product.reshape(samples, -1).sum(1).to(clock_device(a.device), torch.float64)
