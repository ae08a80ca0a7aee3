"""Methods of fixed steps: grids, interpolation, perturbed times, gradients; against torchdiffeq."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from problems import growth, linear, tensor
from torch import Tensor

import pyode
from pyode import Stats
from pyode.methods import TABLEAUS

METHODS = pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
A = torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=torch.float64)
Y0 = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]], dtype=torch.float64)
TIGHT = {"rtol": 1e-6, "atol": 1e-7}  # a difference with steps of 1e-6 is right to 1e-9 or so
# Sums of the same few terms in another order.
ROUNDING = {torch.float64: 1e-13, torch.complex128: 1e-13, torch.float32: 1e-5}


def f(t: Tensor, y: Tensor) -> Tensor:
    """Nonlinear, and dependent on time."""
    return torch.sin(y @ A.to(y)) + t * y


def uneven(n: int = 7, sign: float = 1.0) -> Tensor:
    return sign * tensor(0.0, 0.1, 0.35, 0.4, 0.8, 0.85, 1.3, 1.5)[:n]


def grid_of_squares(func, y0, t):
    """Steps that are fine at the start, and meet none of the inner output times."""
    return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 12, dtype=t.dtype, device=t.device) ** 2


OPTIONS = {
    "the output times": {},
    "step_size": {"step_size": 0.07},
    "step_size that divides": {"step_size": 0.05},
    "one long step": {"step_size": 100.0},
    "grid_constructor": {"grid_constructor": grid_of_squares},
    "cubic": {"step_size": 0.3, "interp": "cubic"},
    "cubic on the grid": {"interp": "cubic"},
    "perturb": {"step_size": 0.3, "perturb": True},
    "perturb and cubic": {"grid_constructor": grid_of_squares, "perturb": True, "interp": "cubic"},
}


@METHODS
@SIGNS
@BACKENDS
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_results_are_torchdiffeqs(method, sign, backend, name, dtype, device):
    t, options = uneven(sign=sign).to(device), OPTIONS[name]
    if dtype == torch.float32:
        t = t.float()
    y0 = Y0.to(device, dtype)
    with torch.no_grad(), pyode.backend(backend):
        ours = pyode.odeint(f, y0, t, method=method, options=options)
        theirs = torchdiffeq.odeint(f, y0, t, method=method, options=options)
    assert torch.allclose(ours, theirs, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@METHODS
@SIGNS
@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_func_sees_torchdiffeqs_times(method, sign, perturb, dtype):
    seen = {}
    for module in (pyode, torchdiffeq):
        seen[module] = []

        def watch(t, y, times=seen[module]):
            times.append(float(t))
            return f(t, y)

        module.odeint(watch, Y0.to(dtype), uneven(sign=sign).to(dtype), method=method, options={"perturb": perturb})
    ours, theirs = tensor(*seen[pyode]), tensor(*seen[torchdiffeq])
    assert len(ours) == len(theirs)
    exact = [c in (0, 1) for c in (0.0, *TABLEAUS[method].abscissae)][: len(TABLEAUS[method].b)] * 6
    # Ends of steps to the bit; between them torchdiffeq computes in the dtype of t, pyode in float64.
    assert torch.equal(ours[torch.tensor(exact)], theirs[torch.tensor(exact)])
    assert torch.allclose(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-14)


@METHODS
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("which", ["y0", "y0 and t"])
@SIGNS
def test_gradients_are_torchdiffeqs(method, name, which, sign):
    if which == "y0 and t" and name == "step_size that divides":
        pytest.skip("torchdiffeq has no gradient to a time that happens to be on the grid; ours is tested below")
    found = []
    for module in (pyode, torchdiffeq):
        y0, t = Y0.clone().requires_grad_(), uneven(5, sign).requires_grad_(which == "y0 and t")
        matrix = A.clone().requires_grad_()
        y = module.odeint(
            lambda t, y, m=matrix: torch.sin(y @ m) * (1 + t), y0, t, method=method, options=OPTIONS[name]
        )
        weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
        inputs = (y0, matrix, t) if t.requires_grad else (y0, matrix)
        found.append([y.detach(), *torch.autograd.grad((weights * y).sum(), inputs, materialize_grads=True)])
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-11)  # sums of some hundred terms


@METHODS
def test_gradients_to_times_reach_through_a_grid_that_does_not_depend_on_them(method):
    # The output times move along the interpolant of a fixed grid.
    grid = torch.linspace(0, 1, 6, dtype=torch.float64)
    found = []
    for module in (pyode, torchdiffeq):
        t = tensor(0.0, 0.33, 0.71, 1.0).requires_grad_()
        y = module.odeint(f, Y0, t, method=method, options={"grid_constructor": lambda func, y0, t: grid})
        found.append(torch.autograd.grad(y[1:3].square().sum(), t)[0][1:3])
    assert torch.allclose(*found, rtol=1e-11)


@METHODS
@pytest.mark.parametrize("name", ["the output times", "cubic", "grid_constructor", "cubic on the grid"])
def test_gradcheck(method, name):
    def end(y0, matrix, t):
        return pyode.odeint(lambda t, y: torch.sin(y @ matrix) * (1 + t), y0, t, method=method, options=OPTIONS[name])

    inputs = (Y0[:1].clone().requires_grad_(), A.clone().requires_grad_(), uneven(3).requires_grad_())
    assert torch.autograd.gradcheck(end, inputs, **TIGHT)
    if name == "the output times":
        assert torch.autograd.gradgradcheck(end, inputs, **TIGHT)


@METHODS
def test_a_time_that_happens_to_be_on_the_grid_has_the_slope_of_a_step_as_its_gradient(method):
    t = tensor(0.0, 0.2, 0.6, 1.0).requires_grad_()
    y = pyode.odeint(growth.f, growth.y0, t, method=method, options={"step_size": 0.2})
    (gradient,) = torch.autograd.grad(y[2].sum(), t)
    y0, y1 = pyode.odeint(growth.f, growth.y0, tensor(0.0, 0.4, 0.6), method=method, options={"step_size": 0.2})[1:]
    assert float(gradient[2]) == pytest.approx(float(y1 - y0) / 0.2, rel=1e-12)


@METHODS
def test_cubic_output_has_the_order_of_a_cubic(method):
    # One step of size h and its middle: the error of a cubic is of order 4, unless the method's own is lower.
    errors = []
    for h in (0.2, 0.1):
        t = tensor(0.0, h / 2, h)
        y = pyode.odeint(growth.f, growth.y0, t, method=method, options={"step_size": h, "interp": "cubic"})
        errors.append(float((y[1] - growth.solution(h / 2)).abs().max()))
    expected = 2.0 ** min(4, TABLEAUS[method].order + 1)
    assert errors[0] / errors[1] > 0.8 * expected


@METHODS
def test_linear_output_lies_on_the_line(method):
    t = tensor(0.0, 0.25, 0.5, 1.0)
    y = pyode.odeint(linear.f, linear.y0, t, method=method, options={"step_size": 1.0})
    assert torch.allclose(y[1], y[0] + 0.25 * (y[3] - y[0]), rtol=1e-14)
    assert torch.allclose(y[2], y[0] + 0.5 * (y[3] - y[0]), rtol=1e-14)


@METHODS
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_every_evaluation_is_counted(method, interp):
    calls, stats = [], Stats()

    def watch(t, y):
        calls.append(float(t))
        return f(t, y)

    options = {"step_size": 0.25, "interp": interp, "stats": stats}
    pyode.odeint(watch, Y0, tensor(0.0, 0.3, 0.9, 1.0), method=method, options=options)
    assert stats.n_f_evals == len(calls)
    assert (stats.n_accepted, stats.n_rejected) == (4, 0)


@METHODS
def test_tuples_and_their_grid_constructor(method):
    def parts(t, y):
        return f(t, y[0]), y[1] * t

    seen = []

    def constructor(func, y0, t):
        seen.append((y0[0].shape if isinstance(y0, tuple) else None, len(t)))
        return grid_of_squares(func, y0, t)

    t, y0 = uneven(), (Y0, torch.ones((), dtype=torch.float64))
    ours = pyode.odeint(parts, y0, t, method=method, options={"grid_constructor": constructor})
    theirs = torchdiffeq.odeint(parts, y0, t, method=method, options={"grid_constructor": grid_of_squares})
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    assert seen == [(Y0.shape, len(t))]


@METHODS
def test_one_time_is_the_start(method):
    y = pyode.odeint(f, Y0, tensor(2.0), method=method, options={"step_size": 0.1})
    assert torch.equal(y, Y0[None])


def test_tolerances_mean_nothing_here():
    y = pyode.odeint(f, Y0, uneven(), method="rk4")
    assert torch.equal(pyode.odeint(f, Y0, uneven(), 1e-2, 1e-2, "rk4"), y)
