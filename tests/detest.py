"""DETEST's 25 non-stiff problems, all on [0, 20].

T. E. Hull, W. H. Enright, B. M. Fellen, A. E. Sedgwick, Comparing numerical methods for ordinary differential
equations, SIAM J. Numer. Anal. 9 (1972). A: single equations, B: small systems, C: moderate systems, D: orbits of
eccentricity 0.1 to 0.9, E: higher order equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

END = 20.0


@dataclass
class Problem:
    """y' = f(t, y), y(0) = y0."""

    f: Callable[[Tensor, Tensor], Tensor]
    y0: Tensor


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def stack(*numbers: Tensor | float) -> Tensor:
    """The components of a derivative."""
    return torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in numbers])


def b2(t: Tensor, y: Tensor) -> Tensor:
    return stack(-y[0] + y[1], y[0] - 2 * y[1] + y[2], y[1] - y[2])


def b4(t: Tensor, y: Tensor) -> Tensor:
    r = torch.hypot(y[0], y[1])
    return stack(-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r)


def chain(rates: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Each substance decays into the next one; the last one is stable."""
    rate = vector(*rates, 0.0)

    def f(t: Tensor, y: Tensor) -> Tensor:
        lost = rate * y
        return torch.cat([-lost[:1], lost[:-1] - lost[1:]])

    return f


def diffusion(t: Tensor, y: Tensor) -> Tensor:
    """The matrix with 1, -2, 1 on its diagonals."""
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([y[1:], zero]) - 2 * y + torch.cat([zero, y[:-1]])


K2 = 2.95912208286  # of gravitation, for 100 days, astronomical units and the sun's mass
SUN = 1.00000597682  # with the inner planets
MASSES = vector(0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778)
POSITIONS = vector(
    3.42947415189, 3.35386959711, 1.35494901715,
    6.64145542550, 5.97156957878, 2.18231499728,
    11.2630437207, 14.6952576794, 6.27960525067,
    -30.1552268759, 1.65699966404, 1.43785752721,
    -21.1238353380, 28.4465098142, 15.3882659679,
)  # fmt: skip
VELOCITIES = vector(
    -0.557160570446, 0.505696783289, 0.230578543901,
    -0.415570776342, 0.365682722812, 0.169143213293,
    -0.325325669158, 0.189706021964, 0.0877265322780,
    -0.0240476254170, -0.287659532608, -0.117219543175,
    -0.176860753121, -0.216393453025, -0.0148647893090,
)  # fmt: skip


def planets(t: Tensor, y: Tensor) -> Tensor:
    """Jupiter to Pluto around the sun, relative to it."""
    x, v = y[:15].view(5, 3), y[15:]
    pull = x / torch.linalg.vector_norm(x, dim=1, keepdim=True) ** 3
    apart = x[None] - x[:, None]  # from body j to body k
    distance = torch.linalg.vector_norm(apart, dim=2, keepdim=True) + torch.eye(5, dtype=torch.float64)[..., None]
    others = MASSES[:, None] * (apart / distance**3 - pull[None])
    others = others * (1 - torch.eye(5, dtype=torch.float64))[..., None]
    a = K2 * (-(SUN + MASSES[:, None]) * pull + others.sum(1))
    return torch.cat([v, a.reshape(-1)])


def orbit(t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([y[2:], -y[:2] / torch.linalg.vector_norm(y[:2]) ** 3])


def perihelion(e: float) -> Tensor:
    return vector(1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e)))


def bessel(t: Tensor, y: Tensor) -> Tensor:
    """Of order 1/2, at t + 1."""
    return stack(y[1], -(y[1] / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y[0]))


def duffing(t: Tensor, y: Tensor) -> Tensor:
    return stack(y[1], y[0] ** 3 / 6 - y[0] + 2 * torch.sin(2.78535 * t))


PROBLEMS = {
    "A1": Problem(lambda t, y: -y, vector(1)),
    "A2": Problem(lambda t, y: -(y**3) / 2, vector(1)),
    "A3": Problem(lambda t, y: y * torch.cos(t), vector(1)),
    "A4": Problem(lambda t, y: y / 4 * (1 - y / 20), vector(1)),
    "A5": Problem(lambda t, y: (y - t) / (y + t), vector(4)),
    "B1": Problem(lambda t, y: stack(2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])), vector(1, 3)),
    "B2": Problem(b2, vector(2, 0, 1)),
    "B3": Problem(lambda t, y: stack(-y[0], y[0] - y[1] ** 2, y[1] ** 2), vector(1, 0, 0)),
    "B4": Problem(b4, vector(3, 0, 0)),
    "B5": Problem(lambda t, y: stack(y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]), vector(0, 1, 1)),
    "C1": Problem(chain([1.0] * 9), vector(1, *[0] * 9)),
    "C2": Problem(chain([float(i) for i in range(1, 10)]), vector(1, *[0] * 9)),
    "C3": Problem(diffusion, vector(1, *[0] * 9)),
    "C4": Problem(diffusion, vector(1, *[0] * 50)),
    "C5": Problem(planets, torch.cat([POSITIONS, VELOCITIES])),
    "D1": Problem(orbit, perihelion(0.1)),
    "D2": Problem(orbit, perihelion(0.3)),
    "D3": Problem(orbit, perihelion(0.5)),
    "D4": Problem(orbit, perihelion(0.7)),
    "D5": Problem(orbit, perihelion(0.9)),
    "E1": Problem(bessel, vector(0.6713967071418030, 0.09540051444747446)),
    "E2": Problem(lambda t, y: stack(y[1], (1 - y[0] ** 2) * y[1] - y[0]), vector(2, 0)),
    "E3": Problem(duffing, vector(0, 0)),
    "E4": Problem(lambda t, y: stack(y[1], 0.032 - 0.4 * y[1] ** 2), vector(30, 0)),
    "E5": Problem(lambda t, y: stack(y[1], torch.sqrt(1 + y[1] ** 2) / (25 - t)), vector(0, 0)),
}
