"""A nonlinear field that depends on time, for implicit methods, and times at unequal distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import tensor
from torch import Tensor

from pyode.methods import IMPLICIT

METHODS = pytest.mark.parametrize("method", IMPLICIT)
L_STABLE = ("implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2")
SYMPLECTIC = ("implicit_midpoint", "gl4", "gl6")
A = torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=torch.float64)
Y0 = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
TIGHT = {"rtol": 1e-6, "atol": 1e-7}  # a difference with steps of 1e-6 is right to 1e-9 or so


def f(t: Tensor, y: Tensor) -> Tensor:
    """Nonlinear, and dependent on time."""
    return torch.sin(y @ A.to(y)) * (1 + t)


def uneven(n: int = 4) -> Tensor:
    return tensor(0.0, 0.1, 0.35, 0.6)[:n]


def stability(method: str, z: complex | np.ndarray) -> np.ndarray:
    """R(z) = det(I - z a + z 1 b') / det(I - z a), by which a step multiplies (Hairer, Wanner II, IV.3)."""
    a, b = np.array(IMPLICIT[method].rows), np.array(IMPLICIT[method].weights)
    z = np.asarray(z, dtype=complex)[..., None, None]
    eye = np.eye(len(b))
    return np.linalg.det(eye - z * a + z * np.ones((len(b), 1)) * b) / np.linalg.det(eye - z * a)
