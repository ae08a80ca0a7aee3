"""Initial value problems whose solutions are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import scipy.special
import torch
from torch import Tensor


@dataclass
class ClosedForm:
    """y' = f(t, y) with y(t0) = y0, solved by `solution`, which takes a number t."""

    name: str
    f: Callable[[Tensor, Tensor], Tensor]
    solution: Callable[[float], Tensor]
    t0: float
    t1: float

    @property
    def y0(self) -> Tensor:
        return self.solution(self.t0)

    def times(self, n: int = 5, backward: bool = False) -> Tensor:
        """n output times over the whole interval, float64."""
        ends = (self.t1, self.t0) if backward else (self.t0, self.t1)
        return torch.linspace(*ends, n, dtype=torch.float64)

    def at(self, t: Tensor) -> Tensor:
        """The solution at times t, [T, ...]."""
        return torch.stack([self.solution(float(x)) for x in t])


def tensor(*numbers: float) -> Tensor:
    """A vector in float64."""
    return torch.tensor(numbers, dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    """The same as a leaf of a graph."""
    return x.clone().requires_grad_()


constant = ClosedForm(
    "constant",
    lambda t, y: 0.2 + (y - (0.2 * t + 3.0)) ** 5,  # torchdiffeq's own test: a straight line, held there
    lambda t: tensor(0.2 * t + 3.0),
    1.0,
    8.0,
)
sine = ClosedForm(
    "sine",
    lambda t, y: 2 * y / t + t**4 * torch.sin(2 * t) - t**2 + 4 * t**3,
    lambda t: tensor(
        -0.5 * t**4 * math.cos(2 * t)
        + 0.5 * t**3 * math.sin(2 * t)
        + 0.25 * t**2 * math.cos(2 * t)
        - t**3
        + 2 * t**4
        + (math.pi - 0.25) * t**2
    ),
    1.0,
    8.0,
)
exponential = ClosedForm("exponential", lambda t, y: 0.5 * y, lambda t: math.exp(t / 2) * tensor(1.0, 3.0), 0.0, 3.0)
growth = ClosedForm("growth", lambda t, y: y * torch.cos(t), lambda t: tensor(math.exp(math.sin(t))), 0.0, 2.5)
decay = ClosedForm("decay", lambda t, y: -(y**3) / 2, lambda t: tensor(1 / math.sqrt(1 + t)), 0.0, 10.0)
rigid_body = ClosedForm(  # Jacobi's elliptic functions sn, cn, dn
    "rigid_body",
    lambda t, y: torch.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]]),
    lambda t: tensor(*scipy.special.ellipj(t, 0.51)[:3]),
    0.0,
    5.0,
)

_MATRIX = torch.tensor([[-0.3, 2.0, 0.0], [-2.0, -0.3, 0.5], [0.1, 0.0, -1.0]], dtype=torch.float64)
linear = ClosedForm(
    "linear",
    lambda t, y: y @ _MATRIX.to(y).T,
    lambda t: torch.linalg.matrix_exp(t * _MATRIX) @ tensor(1.0, 0.5, -1.0),
    0.0,
    5.0,
)

# A skew-symmetric matrix: its solutions turn and neither grow nor decay.
_TURN = torch.triu(torch.arange(25, dtype=torch.float64).reshape(5, 5).cos(), 1)
TURN = 0.3 * (_TURN - _TURN.T)
turning = ClosedForm(
    "turning",
    lambda t, y: y @ TURN.to(y).T,
    lambda t: torch.linalg.matrix_exp(t * TURN) @ torch.ones(5, dtype=torch.float64),
    1.0,
    4.0,
)

# The cubic spiral of the neural ODE demo has no formula; its radius in the norm |.|_4 has: with y' = y**3 A and
# A = [[a, b], [-b, a]], the sum q of the fourth powers obeys q' = 4 a sum y_i^6, so for a = 0 it stays as it is.
SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)


def spiral(t: Tensor, y: Tensor) -> Tensor:
    """dy/dt = y**3 A."""
    return y**3 @ SPIRAL.to(y)


def undamped_spiral(t: Tensor, y: Tensor) -> Tensor:
    """The same without damping: y1^4 + y2^4 is conserved."""
    return y**3 @ torch.tensor([[0.0, 2.0], [-2.0, 0.0]]).to(y)


def line(t: Tensor, y: Tensor) -> Tensor:
    """y' = 1."""
    return torch.ones_like(y)


def kepler(t: Tensor, y: Tensor) -> Tensor:
    """Two bodies, positions and velocities; period 2 pi with `kepler_start`."""
    radius = torch.linalg.vector_norm(y[:2])
    return torch.cat([y[2:], -y[:2] / radius**3])


def kepler_start(eccentricity: float) -> Tensor:
    """At the point closest to the centre."""
    e = eccentricity
    return tensor(1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e)))


def van_der_pol(t: Tensor, y: Tensor, mu: float = 1.0) -> Tensor:
    """Of any leading shape, [..., 2]."""
    x, v = y.unbind(-1)
    return torch.stack([v, mu * (1 - x * x) * v - x], -1)


CLOSED_FORMS = (constant, sine, exponential, growth, decay, rigid_body, linear)
