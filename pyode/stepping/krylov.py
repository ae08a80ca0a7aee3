"""GMRES: a large linear system from products with its matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

RESTART = 40  # vectors kept; the memory of as many states


def gmres(
    operator: Callable[[Tensor], Tensor], b: Tensor, reduction: float, floor: float, max_iters: int
) -> tuple[Tensor, float, int]:
    """Solves operator(x) = b from x = 0.

    Args:
        operator: linear, [N] to [N].
        b: [N] real.
        reduction, floor: the residual's 2-norm is to be below reduction times that of b, or below floor.
        max_iters: at most so many products, and one more for each restart.

    Returns:
        x, its residual's norm, and the number of iterations. The norm is larger than asked for where max_iters are used
        up or rounding lets it shrink no more.

    Source:
        Saad, Schultz, SIAM J. Sci. Stat. Comput. 7 (1986). Two passes of classical Gram-Schmidt keep the basis
        orthogonal to rounding: Giraud, Langou, Rozloznik, van den Eshof, Numer. Math. 101 (2005).
    """
    x, residual = torch.zeros_like(b), b
    norm = norm_of(b)
    target = max(reduction * norm, floor)
    n = 0
    while norm > target and n < max_iters:
        change, n_more = _cycle(operator, residual, norm, target, min(RESTART, max_iters - n))
        n += n_more
        moved = x + change
        residual = b - operator(moved)
        before, norm = norm, norm_of(residual)
        if not norm < before:
            norm = before
            break
        x = moved
    return x, norm, n


def _cycle(
    operator: Callable[[Tensor], Tensor], b: Tensor, size: float, target: float, length: int
) -> tuple[Tensor, int]:
    """The smallest residual that `length` products reach; ends where it is below the target or the basis complete."""
    basis = b.new_empty(length + 1, b.numel())
    basis[0] = b / size
    columns: list[list[float]] = []  # of the Hessenberg matrix, made triangular by rotations
    rotations: list[tuple[float, float]] = []
    rest = [size]
    for j in range(length):
        w = operator(basis[j])
        known = basis[: j + 1]
        product = torch.linalg.vector_norm(w)
        first = known @ w
        w = w - first @ known
        second = known @ w
        w = w - second @ known
        remainder = torch.linalg.vector_norm(w)
        *column, below, whole = torch.cat([first + second, remainder[None], product[None]]).tolist()
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        complete = not below > torch.finfo(b.dtype).eps * whole
        below = 0.0 if complete else below
        diagonal = math.hypot(column[j], below)
        if not diagonal > 0:
            break  # the matrix is singular on this basis, or nothing is finite
        c, s = column[j] / diagonal, below / diagonal
        column[j] = diagonal
        rotations.append((c, s))
        columns.append(column)
        rest[j:] = [c * rest[j], -s * rest[j]]
        if complete or abs(rest[-1]) <= target:
            break
        basis[j + 1] = w / remainder
    coefficients: list[float] = []
    for j in range(len(columns) - 1, -1, -1):
        known_part = sum(columns[j + 1 + i][j] * y for i, y in enumerate(coefficients))
        coefficients.insert(0, (rest[j] - known_part) / columns[j][j])
    return b.new_tensor(coefficients) @ basis[: len(coefficients)], len(columns)


def norm_of(x: Tensor) -> float:
    """The 2-norm."""
    return float(torch.linalg.vector_norm(x))
