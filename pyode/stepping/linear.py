"""phi near a point, and linear systems with I - J, the Jacobian of x - phi(x): by LU factors, or by GMRES.

Jacobians are never asked of the user: with phi's graph at hand a product J'v is a backward pass, and J u the derivative
of J'v, which is linear in v. Neither evaluates phi again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ..solution import Stats
from .krylov import gmres, norm_of

Map = Callable[[Tensor], Tensor]

# Up to so many unknowns the Jacobian is made and factorised. Measured at 512 on one core, a step of trbdf2: of the heat
# equation, which is stiff, 4 ms with factors and 40 ms with GMRES; of a tanh network, which is not, 11 ms and 8 ms.
DIRECT_UNKNOWNS = 512
REDUCTION = 1e-3  # of the residual by GMRES in one iteration of Newton
MAX_KRYLOV = 1000  # iterations of GMRES in one of Newton
STAGNATED = 100.0  # so many times the tolerance is accepted where rounding lets a correction shrink no more


class Linearization:
    """phi near x.

    Args:
        phi: [N] to [N], real.
        x: [N].
    """

    def __init__(self, phi: Map, x: Tensor) -> None:
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self.value = phi(self.x)

    @property
    def residual(self) -> Tensor:
        """phi(x) - x."""
        return self.value.detach() - self.x.detach()

    def vjp(self, v: Tensor) -> Tensor:
        """J'v."""
        return _product(self.value, self.x, v)

    @cached_property
    def _linear(self) -> tuple[Tensor, Tensor]:
        """Some v, and J'v with a graph."""
        with torch.enable_grad():
            v = torch.zeros_like(self.x, requires_grad=True)
            return v, _product(self.value, self.x, v, create_graph=True)

    def jvp(self, u: Tensor) -> Tensor:
        """J u."""
        v, product = self._linear
        return _product(product, v, u)

    def matrix(self) -> Tensor:
        """J, [N, N]."""
        rows = torch.eye(len(self.x), dtype=self.x.dtype, device=self.x.device)
        if not self.value.requires_grad:
            return torch.zeros_like(rows)
        try:
            with torch.autograd.set_detect_anomaly(False):  # its checks can't be batched
                (found,) = torch.autograd.grad(
                    self.value, self.x, rows, retain_graph=True, allow_unused=True, is_grads_batched=True
                )
        except RuntimeError:  # a backward pass that vmap can't enter
            found = torch.stack([self.vjp(row) for row in rows])
        return torch.zeros_like(rows) if found is None else found.detach()


def _product(value: Tensor, x: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """v' d(value)/dx, from the graph between them, which is kept."""
    found = None
    if value.requires_grad:
        (found,) = torch.autograd.grad(value, x, v, retain_graph=True, allow_unused=True, create_graph=create_graph)
    return torch.zeros_like(x) if found is None else found


class Direct:
    """Systems with I - J by the LU factors of a dense matrix."""

    slow = 1e-3  # RADAU5's default
    precision = 0.0

    def __init__(self) -> None:
        self._at: Linearization | None = None
        self._factors: tuple[Tensor, Tensor] | None = None

    def renew(self, at: Linearization) -> bool:
        """Takes the Jacobian at this point from now on; False if it is the one held."""
        if self._at is at:
            return False
        self._at, self._factors = at, _factors(at)
        return True

    def solve(self, residual: Tensor, scale: Tensor) -> Tensor:
        """Returns d with (I - J) d = residual, for the Jacobian held; `scale` is the size of each number of x."""
        assert self._factors is not None
        d: Tensor = torch.linalg.lu_solve(*self._factors, residual[:, None])[:, 0]
        return d

    @staticmethod
    def solve_transposed(at: Linearization, g: Tensor, scale: Tensor, tolerance: float) -> Tensor | None:
        """Returns u with (I - J') u = g; None if there is none."""
        u = torch.linalg.lu_solve(*_factors(at), g[:, None], adjoint=True)[:, 0]
        return u if torch.isfinite(u).all() else None


def _factors(at: Linearization) -> tuple[Tensor, Tensor]:
    eye = torch.eye(len(at.x), dtype=at.x.dtype, device=at.x.device)
    factors, pivots, _ = torch.linalg.lu_factor_ex(eye - at.matrix())  # of a singular one: its solutions are not finite
    return factors, pivots


class Krylov:
    """The same by GMRES.

    Args:
        tolerance: Newton's; a residual far below it is not reduced further.
        counts: n_krylov is added to.
    """

    slow = 1e-2  # a new Jacobian costs nothing, but all of GMRES comes behind it
    precision = REDUCTION

    def __init__(self, tolerance: float, counts: Stats) -> None:
        self.tolerance, self.counts = tolerance, counts
        self._at: Linearization | None = None

    def renew(self, at: Linearization) -> bool:
        """As Direct's."""
        renewed, self._at = self._at is not at, at
        return renewed

    def solve(self, residual: Tensor, scale: Tensor) -> Tensor:
        """As Direct's; nan where not even half the residual goes away."""
        at, b = self._at, residual / scale
        assert at is not None
        floor = 0.1 * self.tolerance * math.sqrt(b.numel())
        d, left, n = gmres(lambda u: u - at.jvp(u * scale) / scale, b, REDUCTION, floor, MAX_KRYLOV)
        self.counts.n_krylov += n
        return d * scale if left <= max(floor, 0.5 * norm_of(b)) else torch.full_like(d, math.nan)

    @staticmethod
    def solve_transposed(at: Linearization, g: Tensor, scale: Tensor, tolerance: float) -> Tensor | None:
        """As Direct's, to within the tolerance in relation to g; what rounding costs is allowed for."""
        b = g * scale
        u, left, _ = gmres(lambda u: u - at.vjp(u / scale) * scale, b, tolerance, 0.0, 10 * MAX_KRYLOV)
        return u / scale if left <= STAGNATED * tolerance * norm_of(b) else None
