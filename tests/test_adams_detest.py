"""The variable-coefficient Adams method on DETEST: errors and evaluations beside LSODA and dopri5."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detest import END, PROBLEMS
from problems import tensor
from scipy.integrate import solve_ivp
from torch import Tensor

import pyode
from pyode import Stats

TOLERANCES = (1e-3, 1e-6, 1e-9)


def scipys(name: str, method: str, rtol: float, atol: float) -> Tensor:
    problem = PROBLEMS[name]

    def f(t, y):
        return problem.f(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y)).numpy()

    done = solve_ivp(f, (0, END), problem.y0.numpy(), method, rtol=rtol, atol=atol)
    assert done.success
    return torch.from_numpy(done.y[:, -1].copy())


def solved(name: str, method: str, tolerance: float) -> tuple[Tensor, int]:
    stats, problem = Stats(), PROBLEMS[name]
    y = pyode.odeint(problem.f, problem.y0, tensor(0, END), tolerance, tolerance, method, {"stats": stats})
    return y[-1], stats.n_f_evals


@pytest.fixture(scope="module")
def judged() -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: scipys(name, "DOP853", 1e-13, 1e-14) for name in PROBLEMS}


@pytest.fixture(scope="module")
def ours() -> dict[tuple[str, float], tuple[Tensor, int]]:
    with torch.no_grad():
        return {(name, tol): solved(name, "adams", tol) for name in PROBLEMS for tol in TOLERANCES}


class TestDetest:
    """DETEST's 25 problems with rtol = atol = tol: SciPy's DOP853 at 1e-13 is the judge."""

    @pytest.mark.parametrize("tolerance", TOLERANCES)
    def test_errors_are_no_larger_than_lsodas(self, tolerance, judged, ours):
        def mean_error(y: dict[str, Tensor]) -> float:
            return math.exp(np.mean([math.log((y[name] - judged[name]).abs().max()) for name in PROBLEMS]))

        lsoda = {name: scipys(name, "LSODA", tolerance, tolerance) for name in PROBLEMS}
        assert mean_error({name: ours[name, tolerance][0] for name in PROBLEMS}) <= mean_error(lsoda)

    def test_evaluations_at_tight_tolerances_are_far_fewer_than_dopri5s(self, ours):
        with torch.no_grad():
            ratios = [ours[name, 1e-9][1] / solved(name, "dopri5", 1e-9)[1] for name in PROBLEMS]
        assert math.exp(np.mean(np.log(ratios))) < 0.5
        assert max(ratios) < 0.8

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_the_error_is_in_proportion_to_the_tolerance(self, name, judged, ours):
        most = 5e3 if name[0] == "D" or name == "C5" else 5e2  # as in test_detest.py
        for tolerance in (1e-6, 1e-9):
            assert float((ours[name, tolerance][0] - judged[name]).abs().max()) <= most * tolerance
