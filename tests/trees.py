"""Rooted trees and the order conditions of Runge-Kutta methods (Hairer, Norsett, Wanner I, II.2).

A tree is the sorted tuple of its root's subtrees; the single node is ().
"""

from __future__ import annotations

from decimal import Decimal, getcontext
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement

from pyode.methods import Tableau

getcontext().prec = 60

Tree = tuple  # of trees
Vector = list[Decimal]


def decimal(x: Fraction | float) -> Decimal:
    """To 60 digits."""
    x = Fraction(x)
    return Decimal(x.numerator) / Decimal(x.denominator)


@cache
def trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees with that many nodes."""
    return tuple(tuple(sorted(forest)) for forest in forests(order - 1, order - 1))


@cache
def forests(nodes: int, largest: int) -> tuple[Tree, ...]:
    """All multisets of trees of at most `largest` nodes each, with `nodes` nodes together."""
    if nodes == 0:
        return ((),)
    if largest == 0:
        return ()
    found = []
    for n in range(nodes // largest + 1):
        for some in combinations_with_replacement(trees(largest), n):
            found += [some + rest for rest in forests(nodes - n * largest, largest - 1)]
    return tuple(found)


@cache
def n_nodes(tree: Tree) -> int:
    return 1 + sum(n_nodes(child) for child in tree)


@cache
def density(tree: Tree) -> int:
    """gamma of the tree."""
    product = n_nodes(tree)
    for child in tree:
        product *= density(child)
    return product


class Stages:
    """All evaluations of f in a step of a method, f(t1, y1) included, and their elementary weights."""

    def __init__(self, tableau: Tableau) -> None:
        rows = [(), *tableau.a]
        if not tableau.first_same_as_last:
            rows.append(tableau.b)
        self.rows = [[decimal(x) for x in row] for row in rows]
        self._cache: dict[Tree, Vector] = {(): [Decimal(1)] * len(rows)}

    def elementary_weights(self, tree: Tree) -> Vector:
        """Phi_i of the tree for every evaluation i."""
        if tree not in self._cache:
            product = [Decimal(1)] * len(self.rows)
            for child in tree:
                inner = self.elementary_weights(child)
                product = [p * sum(a * x for a, x in zip(row, inner)) for p, row in zip(product, self.rows)]
            self._cache[tree] = product
        return self._cache[tree]

    def residual(self, weights: Vector, tree: Tree, target: Decimal | None = None) -> Decimal:
        """sum_i w_i Phi_i - target, which is 1 / gamma for a step's weights."""
        target = 1 / Decimal(density(tree)) if target is None else target
        return sum((w * phi for w, phi in zip(weights, self.elementary_weights(tree))), Decimal(0)) - target

    def worst(self, weights: Vector, order: int) -> Decimal:
        """The largest violation among the conditions of one order."""
        return max(abs(self.residual(weights, tree)) for tree in trees(order))

    def worst_dense(self, coefficients: list[Vector], order: int) -> Decimal:
        """The same for an interpolant: its weight of evaluation i is sum_p coefficients[i][p] x^(p + 1).

        The condition, sum_i w_i(x) Phi_i = x^order / gamma, holds for every power of x on its own.
        """
        worst = Decimal(0)
        for tree in trees(order):
            for power in range(max(len(row) for row in coefficients)):
                column = [row[power] for row in coefficients]
                target = 1 / Decimal(density(tree)) if power + 1 == order else Decimal(0)
                worst = max(worst, abs(self.residual(column, tree, target)))
        return worst
