"""Samples against who solves each of them alone, SciPy, and who steps samples on their own as well, torchode."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import Tensor

from pyode import Solution, solve_ivp

F64 = torch.float64
MU = torch.linspace(1, 30, 256, dtype=F64)
Y0 = torch.tensor([2.0, 0.0], dtype=F64).expand(256, 2).contiguous()
T = torch.linspace(0, 8, 3, dtype=F64)
RTOL, ATOL = 1e-5, 1e-7
# Elementary control never shrinks a step that was accurate enough, as in torchdiffeq. Theirs does, as all filters do
# here: this is the same law with an exponent next to nothing for the error before.
THEIRS = (1.0, 1e-300)


def oscillator(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y.unbind(-1)
    return torch.stack([v, mu * (1 - x * x) * v - x], -1)


def solved(n: slice = slice(None), scale: float = 1.0, **kwargs) -> Solution:
    """256 van der Pol oscillators, or some of them, with tolerances scaled."""
    with torch.no_grad():
        return solve_ivp(oscillator, Y0[n], T, args=(MU[n],), rtol=scale * RTOL, atol=scale * ATOL, **kwargs)


def by_scipy(b: int, rtol: float, atol: float, **kwargs):
    mu = float(MU[b])
    return scipy.integrate.solve_ivp(
        lambda t, y: [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]], (0, 8), [2.0, 0.0], rtol=rtol, atol=atol, **kwargs
    )


def test_each_of_many_takes_the_steps_that_scipy_takes_for_it_alone():
    # RK45 is dopri5 with error weights of 3/2; so with tolerances of 2/3 here all errors are the same.
    ours = solved(scale=2 / 3, controller=THEIRS)
    for b in range(0, 256, 15):
        theirs = by_scipy(b, RTOL, ATOL)
        assert int(ours.stats.n_accepted[b]) == len(theirs.t) - 1
        assert int(ours.stats.n_f_evals[b]) == theirs.nfev
        assert np.allclose(ours.ys[-1, b], theirs.y[:, -1], rtol=1e-9)


def test_the_mean_sample_has_the_work_of_its_solve_alone_and_less_than_that_of_one_step_size_for_all():
    together, joint = solved(), solved(control="joint")
    some = torch.arange(0, 256, 15)
    alone = torch.cat([solved(slice(b, b + 1)).stats.n_accepted for b in some.tolist()])
    assert torch.equal(together.stats.n_accepted[some], alone)
    assert together.stats.n_accepted.double().mean() < 0.55 * float(joint.stats.n_accepted)


def test_every_sample_is_as_accurate_as_its_tolerance_lets_expect():
    together = solved()
    for b in range(0, 256, 51):
        exact = by_scipy(b, 1e-10, 1e-12, method="LSODA", t_eval=T.numpy()).y.T
        # Errors add up over some hundred steps, and grow where the solution falls off its slow branch.
        assert np.allclose(together.ys[:, b], exact, rtol=0, atol=2e-3 * np.abs(exact).max())


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # torchode does
class TestTorchode:
    def by_torchode(self, controller: str, func, y0: Tensor, t: Tensor, *coefficients: float):
        torchode = pytest.importorskip("torchode")
        term = torchode.ODETerm(func)
        control = getattr(torchode, controller)(ATOL, RTOL, *coefficients, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
        with torch.no_grad():
            return solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=t.expand(len(y0), -1).contiguous()))

    def test_each_of_many_takes_as_many_steps_to_the_same_solution(self):
        theirs = self.by_torchode("IntegralController", lambda t, y: oscillator(t, y, MU), Y0, T)
        ours = solved(controller=THEIRS)
        assert torch.allclose(ours.ys.transpose(0, 1), theirs.ys, atol=1e-3)
        # The one difference is that its steps may grow right after a rejection.
        more = theirs.stats["n_accepted"] - ours.stats.n_accepted
        assert more.abs().max() <= 3
        assert more.double().mean().abs() < 0.005 * ours.stats.n_accepted.double().mean()

    @pytest.mark.parametrize(
        ("controller", "coefficients"),
        [(THEIRS, ()), ("PI", (0.2, 0.4, 0.0)), ("PID", (0.01, 0.47, 0.1))],
        ids=["I", "PI", "PID"],
    )
    def test_samples_that_reject_nothing_take_the_same_steps(self, controller, coefficients):
        # Rows that turn at speeds of their own, on both sides of where atol counts.
        speed = torch.linspace(0.5, 8, 64, dtype=F64)[:, None]
        y0 = torch.logspace(-3, 3, 64, dtype=F64)[:, None] * torch.tensor([1.0, 0.0], dtype=F64)
        func = lambda t, y: speed * torch.stack([-y[:, 1], y[:, 0]], 1)  # noqa: E731
        name = "PIDController" if coefficients else "IntegralController"
        theirs = self.by_torchode(name, func, y0, T, *coefficients)
        with torch.no_grad():
            ours = solve_ivp(func, y0, T, rtol=RTOL, atol=ATOL, controller=controller)
        same = ours.stats.n_rejected == 0
        assert same.sum() > 12
        # t + (t1 - t) may fall short of t1 by a rounding, for which it takes one more step.
        more = (theirs.stats["n_accepted"] - ours.stats.n_accepted)[same]
        assert bool(((more == 0) | (more == 1)).all())
        assert ((ours.ys[-1] - theirs.ys[:, -1]) / y0[:, :1])[same].abs().max() < 0.1 * RTOL
        assert len(set(ours.stats.n_accepted.tolist())) > 10
