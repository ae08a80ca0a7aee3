"""Adams methods of fixed step size: weights follow from the order (Hairer, Norsett, Wanner I, section III.1)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

LOWEST_ORDER = 4  # below, steps are those of rk4
HIGHEST_ORDER = 12
HIGHEST_EXPLICIT_IN_FLOAT32 = 10  # by default: above, rounding errors grow from step to step, however short these are


@dataclass(frozen=True, eq=False)
class FixedAdams:
    """An Adams-Bashforth method, or with it as predictor an Adams-Moulton method solved by functional iteration.

    The order grows with the number of past derivatives, up to the option max_order.
    """

    name: str
    implicit: bool
    source: str
    order: int = HIGHEST_ORDER
    adaptive: bool = False
    one_step: bool = False
    options: frozenset[str] = frozenset(["max_order", "max_iters", "implicit"])


@cache
def bashforth(n: int) -> tuple[float, ...]:
    """Weights of the last n derivatives, the newest first: explicit, of order n."""
    return _adams(n, newest=0)


@cache
def moulton(n: int) -> tuple[float, ...]:
    """Weights of the derivative at the step's end and the n - 1 before: implicit, of order n."""
    return _adams(n, newest=1)


def _adams(n: int, newest: int) -> tuple[float, ...]:
    """Integrals over [0, 1] of the Lagrange polynomials through newest, newest - 1, ...: n exact numbers, rounded."""
    points = [newest - j for j in range(n)]
    weights = []
    for j, point in enumerate(points):
        polynomial, divisor = [Fraction(1)], 1  # coefficients of x^0, x^1, ...
        for other in points[:j] + points[j + 1 :]:
            shifted = [Fraction(0), *polynomial]
            polynomial = [a - other * b for a, b in zip(shifted, [*polynomial, Fraction(0)])]
            divisor *= point - other
        weights.append(float(sum(c / (p + 1) for p, c in enumerate(polynomial)) / divisor))
    return tuple(weights)


_SOURCE = "Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section III.1"
explicit_adams = FixedAdams("explicit_adams", False, _SOURCE)
implicit_adams = FixedAdams("implicit_adams", True, _SOURCE)
