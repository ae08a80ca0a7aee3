"""The variable-coefficient Adams method: formulas for steps of any sizes.

The polynomial through f at the ends of the last steps is integrated over the step. Positions are in steps: 0 is the
step's start, 1 its end, earlier steps end at negative ones; so the formulas depend on ratios of step sizes alone.
All of them are weights of the values of f; by Lagrange instead of the modified divided differences of the literature,
which are as sensitive to rounding and would all have to be computed anew in every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from math import factorial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Row = tuple[float, ...]
Weights = Row | Tensor


@dataclass(frozen=True, eq=False)
class VariableAdams:
    """Adams-Bashforth-Moulton of order k in predict-evaluate-correct-evaluate form, k chosen in every step.

    Args:
        name: what users call it.
        max_order: the largest order k of the predictor, at most 12; the corrector has one more.
        source: where the method is from.
    """

    name: str
    max_order: int
    source: str

    adaptive: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset(["max_order"])

    @property
    def order(self) -> int:
        """The highest one."""
        return self.max_order

    def formulas(self, ratios: Row, order: int) -> Formulas:
        """The formulas of one step.

        Args:
            ratios: the sizes of the last order - 1 steps, latest first, over that of this one; one more, and the error
                of the next higher order can be estimated.
            order: that of the predictor, up to max_order.
        """
        return _formulas(ratios, order)


@dataclass(frozen=True, eq=False)
class Formulas:
    """One step's weights, all to be multiplied by the step size.

    Attributes:
        predictor: of f at the last steps' ends, latest first.
        corrector: of f at this step's end, as predicted, and those.
        error: of the step's error: the corrector minus the one of the next lower order. Like all that follow, of f
            at this step's end and at those of the last ones.
        constant: that error, had the last steps been of this one's size, over what it is.
        lower: of the errors of orders k - 1 and k - 2 under the same supposition, as far as there are such orders.
        higher: of the error of order k + 1, likewise; of order k if there are too few steps to tell.
        positions: of the values of f for the corrector, in steps.
    """

    predictor: Weights
    corrector: Weights
    error: Row
    constant: float
    lower: tuple[Row, ...]
    higher: Row
    positions: Numbers | Tensor

    @cached_property
    def _scales(self) -> tuple[Any, Any]:
        """What makes `node_integrals` those of Lagrange's polynomials, and the last of them, over the whole step."""
        return node_products(self.positions), node_integrals(self.positions, self.positions[0])[1]

    def dense(self, x: float) -> Row:
        """Weights of the state at position x, 0 to 1, of f at this step's end, of f as predicted there, and of those
        at the ends of the last steps.

        The polynomial has the slopes f at all of these times, and the state at both ends of the step: so it is once
        differentiable from step to step (H. A. Watts and L. F. Shampine, Smoother interpolants for Adams codes, SIAM
        J. Sci. Stat. Comput. 7, 1986).
        """
        scale, whole = self._scales
        integrals, vanishing = node_integrals(self.positions, np.float64(x))
        first, *rest = (integrals / scale).tolist()
        predicted = self.corrector[0] * float(vanishing / whole)
        return (first - predicted, predicted, *rest)

    def dense_at(self, x: Tensor) -> Tensor:
        """The same at any number of positions, float64 on the CPU, with their gradients: [..., k + 2]."""
        scale, whole = (torch.as_tensor(x, device="cpu") for x in self._scales)
        integrals, vanishing = node_integrals(torch.as_tensor(self.positions, device="cpu"), x)
        weights = integrals / scale
        predicted = (self.corrector[0] * vanishing / whole).unsqueeze(-1)
        return torch.cat([weights[..., :1] - predicted, predicted, weights[..., 1:]], -1)

    def stretched(self, factor: Tensor) -> Formulas:
        """The formulas of a step that is longer by a factor, 0-dim, with its gradient; not those of errors."""
        past = torch.as_tensor(self.positions, device="cpu")[1:] / factor
        positions = torch.cat([past.new_ones(1), past])
        predictor, corrector, _ = predictor_and_corrector(positions)
        return replace(self, predictor=predictor, corrector=corrector, positions=positions)


def moulton_constants(n: int) -> tuple[Fraction, ...]:
    """The error constants |gamma*_j| of the implicit Adams methods, j = 0 to n (Hairer, Norsett, Wanner I, III.1)."""
    constants = [Fraction(1)]
    for m in range(1, n + 1):
        constants.append(-sum((constants[m - j] / (j + 1) for j in range(1, m + 1)), Fraction(0)))
    return tuple(map(abs, constants))


GAMMA = tuple(map(float, moulton_constants(13)))


@lru_cache(maxsize=1024)
def _formulas(ratios: Row, order: int) -> Formulas:
    positions = np.array([1.0, *accumulate((-r for r in ratios), initial=0.0)])
    predictor, corrector, error = predictor_and_corrector(positions[: order + 1])
    # [i, j]: the product of s_i - s_l over l <= j but i: one over it is f_i's weight in the j-th divided difference.
    products = _without_diagonal(positions[:, None] - positions).cumprod(1)

    def error_of(j: int) -> Row:
        return tuple((GAMMA[j] * factorial(j) / products[: j + 1, j]).tolist())

    return Formulas(
        predictor=tuple(predictor.tolist()),
        corrector=tuple(corrector.tolist()),
        error=tuple(error.tolist()),
        constant=abs(error_of(order)[0] / float(error[0])),
        lower=tuple(error_of(j) for j in range(order - 1, max(order - 3, 0), -1)),
        higher=error_of(len(positions) - 1),
        positions=positions[: order + 1],
    )


def predictor_and_corrector(positions: Any) -> tuple[Any, Any, Any]:
    """Weights of both, and those of the corrector minus the corrector of one order less, from k + 1 positions."""
    integrals, _ = node_integrals(positions, positions[0])
    products = node_products(positions)
    corrector = integrals / products
    # A multiple of the divided difference takes f at the step's end out of a formula, another one the oldest f.
    return (corrector - integrals[0] / products)[1:], corrector, integrals[-1] / products


def node_products(positions: Any) -> Any:
    """[n]: the product of s_i - s_l over l other than i. An array of NumPy from one, a tensor from a tensor."""
    return _without_diagonal(positions[:, None] - positions).prod(-1)


def node_integrals(positions: Any, x: Any) -> tuple[Any, Any]:
    """[..., n]: the integral from 0 to x, [...], of the product of s - s_l over l other than i; [...]: that over all l.

    Gauss' quadrature, exact for these degrees. Of NumPy's numbers, or of tensors and then differentiable.
    """
    quadrature = gauss(len(positions) // 2 + 1)
    points, weights = map(torch.from_numpy, quadrature) if isinstance(positions, Tensor) else quadrature
    gaps = x[..., None, None] * points[:, None] - positions
    others, all_of_them = _without_diagonal(gaps[..., None, :]).prod(-1), gaps.prod(-1)
    return x[..., None] * (weights @ others), x * (all_of_them @ weights)


def _without_diagonal(matrix: Any) -> Any:
    """Ones in the place of the diagonal of each matrix, [..., n, n] or what broadcasts to it."""
    masks = _diagonal(matrix.shape[-1])
    others, diagonal = map(torch.from_numpy, masks) if isinstance(matrix, Tensor) else masks
    return matrix * others + diagonal


@lru_cache
def _diagonal(n: int) -> tuple[Numbers, Numbers]:
    return 1 - np.eye(n), np.eye(n)


@lru_cache
def gauss(n: int) -> tuple[Numbers, Numbers]:
    """Gauss-Legendre points and weights on [0, 1], exact to degree 2n - 1."""
    points, weights = np.polynomial.legendre.leggauss(n)
    return (points + 1) / 2, weights / 2


variable_adams = VariableAdams(
    name="adams",
    max_order=12,
    source="Shampine, Gordon, Computer Solution of Ordinary Differential Equations, 1975; Hairer et al. I, III.5",
)
