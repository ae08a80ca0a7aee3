"""GMRES."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import tensor

from pyode.stepping.krylov import RESTART, gmres


@given(n=st.integers(1, 90), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_gmres_solves_what_elimination_solves(n, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.eye(n, dtype=dtype) + 0.5 * torch.randn(n, n, generator=generator, dtype=dtype) / math.sqrt(n)
    b = torch.randn(n, generator=generator, dtype=dtype)
    tolerance = 50 * torch.finfo(dtype).eps
    x, left, iterations = gmres(lambda v: matrix @ v, b, tolerance, 0.0, 10_000)
    assert left <= tolerance * float(b.norm())
    assert torch.allclose(matrix @ x, b, rtol=0, atol=2 * tolerance * float(b.norm()))
    assert n > RESTART or iterations <= n


def test_gmres_ends_where_its_basis_is_complete():
    b = torch.randn(50, dtype=torch.float64)
    eye = torch.eye(50, dtype=torch.float64)
    for matrix, most in ((2 * eye, 1), (eye + torch.ones(50, 50), 2)):
        x, _, iterations = gmres(lambda v, m=matrix: m @ v, b, 1e-13, 0.0, 100)
        assert iterations <= most
        assert torch.allclose(matrix @ x, b)


def test_gmres_gives_up_on_what_has_no_solution():
    b = tensor(1.0, 1.0)
    x, left, _ = gmres(lambda v: v * tensor(1, 0), b, 1e-12, 0.0, 100)
    assert left == pytest.approx(1.0)
    assert torch.allclose(x[0], b[0])
    x, left, iterations = gmres(lambda v: v * math.nan, b, 1e-12, 0.0, 100)
    assert (left, iterations) == (pytest.approx(math.sqrt(2)), 0)


def test_gmres_of_nothing_is_nothing():
    x, left, iterations = gmres(lambda v: v, torch.zeros(3), 1e-6, 0.0, 100)
    assert (x.tolist(), left, iterations) == ([0, 0, 0], 0, 0)
