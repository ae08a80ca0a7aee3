"""Implicit Runge-Kutta methods: what one is, and the table of each.

Notation of Hairer and Wanner, Solving Ordinary Differential Equations II, section IV.5::

    k_i = f(t + c_i dt, y + dt sum_j a_ij k_j),    y1 = y + dt sum_i b_i k_i

with a full matrix a: the k_i are the solution of a system of equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isqrt
from typing import ClassVar

from .tableau import Row, exact

_DIGITS = 10**40


def root(n: int) -> Fraction:
    """The square root of n, to 40 digits."""
    return Fraction(isqrt(n * _DIGITS**2), _DIGITS)


@dataclass(frozen=True, eq=False)
class ImplicitTableau:
    """An implicit Runge-Kutta method with fixed steps.

    Args:
        name: what users call it.
        order: of the solution.
        a: the matrix, s rows of s entries. Only the first row may be all zeros: f(t, y) is then the first stage.
        b: weights of the solution, s entries.
        c: abscissae, s entries. Checked against the row sums.
        source: where the numbers are from.
    """

    name: str
    order: int
    a: tuple[Row, ...]
    b: Row
    c: Row
    source: str

    adaptive = False
    one_step: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset(["max_iters", "newton_tol"])

    def __post_init__(self) -> None:
        """Checks what can be checked without the order conditions, which the tests do."""
        stages = len(self.b)
        if [len(row) for row in self.a] != [stages] * stages or len(self.c) != stages:
            raise ValueError(
                f"{self.name}: an implicit method of {stages} stages has {stages} rows of {stages} entries"
            )
        sums = [sum(row, Fraction(0)) for row in (*self.a, self.b)]
        if any(abs(s - c) > Fraction(10, _DIGITS) for s, c in zip(sums, [*self.c, Fraction(1)])):
            raise ValueError(f"{self.name}: rows of a sum to c, and b to 1")
        if any(not self.a[i][i] for block in self.blocks for i in block):
            raise ValueError(f"{self.name}: only the first stage may be explicit, with a row of zeros")

    @cached_property
    def first_is_explicit(self) -> bool:
        """Whether the first stage is f(t, y)."""
        return not any(self.a[0])

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The implicit stages, those together that have to be solved for together, in order.

        Each on its own in a diagonally implicit method, whose a is lower triangular; all together otherwise.
        """
        stages = range(int(self.first_is_explicit), len(self.b))
        if any(self.a[i][j] for i in stages for j in range(i + 1, len(self.b))):
            return (tuple(stages),)
        return tuple((i,) for i in stages)

    @cached_property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """Weights of the stages' states."""
        return tuple(tuple(float(x) for x in row) for row in self.a)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Those of the solution."""
        return tuple(float(x) for x in self.b)

    @cached_property
    def abscissae(self) -> tuple[float, ...]:
        """Where in the step the stages lie, from 0 to 1."""
        return tuple(float(x) for x in self.c)


_HALF = Fraction(1, 2)
_GAMMA = 1 - root(2) / 2  # that of both methods with two diagonal entries: it makes them L-stable
_BETA = root(2) / 4

implicit_euler = ImplicitTableau(
    name="implicit_euler",
    order=1,
    a=(exact(1),),
    b=exact(1),
    c=exact(1),
    source="A.-L. Cauchy (1824); Hairer, Norsett, Wanner I, I.7; L-stable",
)

implicit_midpoint = ImplicitTableau(
    name="implicit_midpoint",
    order=2,
    a=(exact("1/2"),),
    b=exact(1),
    c=exact("1/2"),
    source="the Gauss method with one stage; Hairer, Wanner II, IV.5; A-stable, symplectic",
)

trapezoid = ImplicitTableau(
    name="trapezoid",
    order=2,
    a=(exact(0, 0), exact("1/2", "1/2")),
    b=exact("1/2", "1/2"),
    c=exact(0, 1),
    source="J. Crank, P. Nicolson, Proc. Camb. Phil. Soc. 43 (1947); Hairer, Wanner II, IV.3; A-stable",
)

radau_iia3 = ImplicitTableau(
    name="radauIIA3",
    order=3,
    a=(exact("5/12", "-1/12"), exact("3/4", "1/4")),
    b=exact("3/4", "1/4"),
    c=exact("1/3", 1),
    source="B. L. Ehle, report CSRR 2010, Waterloo (1969); Hairer, Wanner II, IV.5, table 5.5; L-stable",
)

gl4 = ImplicitTableau(
    name="gl4",
    order=4,
    a=(
        (Fraction(1, 4), Fraction(1, 4) - root(3) / 6),
        (Fraction(1, 4) + root(3) / 6, Fraction(1, 4)),
    ),
    b=exact("1/2", "1/2"),
    c=(_HALF - root(3) / 6, _HALF + root(3) / 6),
    source="P. C. Hammer, J. W. Hollingsworth (1955): Gauss; Hairer, Wanner II, IV.5, table 5.1; A-stable, symplectic",
)

_RADAU_B = ((16 - root(6)) / 36, (16 + root(6)) / 36, Fraction(1, 9))

radau_iia5 = ImplicitTableau(
    name="radauIIA5",
    order=5,
    a=(
        ((88 - 7 * root(6)) / 360, (296 - 169 * root(6)) / 1800, (-2 + 3 * root(6)) / 225),
        ((296 + 169 * root(6)) / 1800, (88 + 7 * root(6)) / 360, (-2 - 3 * root(6)) / 225),
        _RADAU_B,
    ),
    b=_RADAU_B,
    c=((4 - root(6)) / 10, (4 + root(6)) / 10, Fraction(1)),
    source="B. L. Ehle, report CSRR 2010, Waterloo (1969); Hairer, Wanner II, IV.5, table 5.6; L-stable",
)

gl6 = ImplicitTableau(
    name="gl6",
    order=6,
    a=(
        (Fraction(5, 36), Fraction(2, 9) - root(15) / 15, Fraction(5, 36) - root(15) / 30),
        (Fraction(5, 36) + root(15) / 24, Fraction(2, 9), Fraction(5, 36) - root(15) / 24),
        (Fraction(5, 36) + root(15) / 30, Fraction(2, 9) + root(15) / 15, Fraction(5, 36)),
    ),
    b=exact("5/18", "4/9", "5/18"),
    c=(_HALF - root(15) / 10, _HALF, _HALF + root(15) / 10),
    source="J. Kuntzmann (1961), J. C. Butcher (1964): Gauss; Hairer, Wanner II, IV.5, table 5.2; A-stable, symplectic",
)

sdirk2 = ImplicitTableau(
    name="sdirk2",
    order=2,
    a=((_GAMMA, Fraction(0)), (1 - _GAMMA, _GAMMA)),
    b=(1 - _GAMMA, _GAMMA),
    c=(_GAMMA, Fraction(1)),
    source="R. Alexander, SIAM J. Numer. Anal. 14 (1977); Hairer, Wanner II, IV.6; L-stable",
)

trbdf2 = ImplicitTableau(
    name="trbdf2",
    order=2,
    a=(exact(0, 0, 0), (_GAMMA, _GAMMA, Fraction(0)), (_BETA, _BETA, _GAMMA)),
    b=(_BETA, _BETA, _GAMMA),
    c=(Fraction(0), 2 * _GAMMA, Fraction(1)),
    source="R. E. Bank et al., IEEE Trans. CAD 4 (1985); as a Runge-Kutta method M. E. Hosea, L. F. Shampine, "
    "Appl. Numer. Math. 20 (1996); L-stable",
)
