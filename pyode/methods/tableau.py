"""What an explicit Runge-Kutta method is: a table of exact numbers, and what follows from it.

Notation of Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.1::

    k_i = f(t + c_i dt, y + dt sum_j a_ij k_j),    y1 = y + dt sum_i b_i k_i
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import zip_longest

Row = tuple[Fraction, ...]


def exact(*numbers: int | str | Fraction) -> Row:
    """Exact numbers from integers, decimal strings and "p/q" strings."""
    return tuple(Fraction(number) for number in numbers)


def combine(*rows: tuple[int, Row]) -> Row:
    """A linear combination of rows, each padded with zeros to the longest."""
    scaled = [[factor * x for x in row] for factor, row in rows]
    return tuple(sum(column, Fraction(0)) for column in zip_longest(*scaled, fillvalue=Fraction(0)))


def unit(index: int, length: int) -> Row:
    """A one at the index, zeros elsewhere."""
    return tuple(Fraction(int(i == index)) for i in range(length))


def _floats(row: Sequence[Fraction]) -> tuple[float, ...]:
    return tuple(float(x) for x in row)


@dataclass(frozen=True, eq=False)
class Tableau:
    """An explicit Runge-Kutta method.

    Args:
        name: what users call it.
        order: of the solution that is carried on.
        a: rows 2 to s of the matrix; row i has i - 1 entries.
        b: weights of the solution, s entries.
        c: abscissae of stages 2 to s. Checked against the row sums.
        error: weights of the error estimate (b minus the embedded method's), or None for a fixed-step method. May
            have one entry more than b: the derivative at the step's end.
        mid: weights of the state at the step's middle, from which a quartic for dense output is made.
        polynomial: for each stage the coefficients of x, x^2, ... in the dense output's weight, x from 0 to 1; instead
            of `mid`. Without either, dense output is the cubic Hermite interpolant.
        source: where the numbers are from.
    """

    name: str
    order: int
    a: tuple[Row, ...]
    b: Row
    c: Row
    error: Row | None
    source: str
    mid: Row | None = None
    polynomial: tuple[Row, ...] | None = None

    own_options = frozenset[str]()

    def __post_init__(self) -> None:
        """Checks what can be checked without the order conditions, which the tests do."""
        stages = len(self.b)
        if [len(row) for row in self.a] != list(range(1, stages)) or len(self.c) != stages - 1:
            raise ValueError(
                f"{self.name}: an explicit method of {stages} stages has rows of 1 to {stages - 1} entries"
            )
        sums = [sum(row, Fraction(0)) for row in (*self.a, self.b)]
        # Some published coefficients are rational approximations, good to 18 digits.
        if any(abs(s - c) > Fraction(1, 10**15) for s, c in zip(sums, [*self.c, Fraction(1)])):
            raise ValueError(f"{self.name}: rows of a sum to c, and b to 1")
        if self.error is not None and abs(sum(self.error, Fraction(0))) > Fraction(1, 10**15):
            raise ValueError(f"{self.name}: error weights sum to 0")

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error."""
        return self.error is not None

    @cached_property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is f(t1, y1), and so the next step's first."""
        return bool(self.a) and self.b[-1] == 0 and self.a[-1] == self.b[:-1]

    @cached_property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """Weights of the states at which f is evaluated in a step, after the first.

        The last is y1 itself if f(t1, y1) belongs to the step: always for an adaptive method, whose dense output
        and whose next step need it.
        """
        rows = [_floats(row) for row in self.a]
        if self.adaptive and not self.first_same_as_last:
            rows.append(self.weights)
        return tuple(rows)

    @cached_property
    def abscissae(self) -> tuple[float, ...]:
        """Where in the step `rows` are evaluated, from 0 to 1."""
        c = _floats(self.c)
        return c if len(c) == len(self.rows) else (*c, 1.0)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """B, without the zero for a last stage that is y1 itself."""
        return _floats(self.b[:-1] if self.first_same_as_last else self.b)

    @cached_property
    def error_weights(self) -> tuple[float, ...]:
        """Weights of the error estimate over all evaluations of a step."""
        return _floats(self.error or ())

    @cached_property
    def interpolant(self) -> tuple[tuple[float, ...], ...]:
        """For every evaluation of a step the coefficients of x, x^2, ... in its weight at position x.

        y(t + x dt) = y + dt sum_j w_j(x) k_j. The last evaluation is f(t1, y1).
        """
        n = (len(self.rows) if self.adaptive else len(self.weights)) + 1
        first, last, zero = unit(0, n), unit(n - 1, n), (Fraction(0),) * n
        b = combine((1, self.b), (1, zero))
        if self.polynomial is not None:
            rows = self.polynomial
        elif self.mid is not None:
            rows = tuple(zip(*quartic(b, self.mid, first, last)))
        else:
            rows = tuple(zip(*hermite(b, first, last)))
        return tuple(_floats(row) for row in rows)

    @cached_property
    def end(self) -> tuple[float, ...]:
        """The interpolant's weights at x = 1: to the bit those of the step."""
        return (*self.weights, *[0.0] * (len(self.interpolant) - len(self.weights)))


def hermite(b: Row, first: Row, last: Row) -> tuple[Row, ...]:
    """Coefficients of x, x^2, x^3: the cubic through both ends with their derivatives."""
    return first, combine((3, b), (-2, first), (-1, last)), combine((-2, b), (1, first), (1, last))


def quartic(b: Row, mid: Row, first: Row, last: Row) -> tuple[Row, ...]:
    """Coefficients of x to x^4: the quartic that also meets the state at the middle (Shampine 1986)."""
    return (
        first,
        combine((-5, b), (16, mid), (-4, first), (1, last)),
        combine((14, b), (-32, mid), (5, first), (-3, last)),
        combine((-8, b), (16, mid), (-2, first), (2, last)),
    )
