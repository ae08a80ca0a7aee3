"""Dense output: the solution as a function of time."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torchdiffeq
from problems import growth, rigid_body, tensor
from torch import Tensor
from torch.autograd import gradcheck

import pyode
from pyode import InvalidValue, Stats
from pyode.methods import METHODS

ADAPTIVE = [name for name, method in METHODS.items() if method.adaptive and name != "scipy_solver"]
FIXED = [name for name, method in METHODS.items() if not method.adaptive]
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
Y0 = tensor(1.0, -0.4)
FORCED = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -torch.sin(y[0]) + 0.1 * torch.cos(t)])


def options_of(method: str, step: float) -> dict:
    """Explicit Adams methods of high order are hardly stable."""
    options = {"step_size": step, "interp": "cubic", **({"max_order": 5} if method == "explicit_adams" else {})}
    return {"method": method, **({"options": options} if method in FIXED else {})}


@SIGNS
@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_at_the_steps_ends_and_between_it_is_the_solution(method, sign):
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if "_adams" in method else {"rtol": 1e-6, "atol": 1e-8}
    end = 1.9
    solution = pyode.odeint_dense(pendulum, Y0, 0.1, 0.1 + sign * end, **tolerance, **options_of(method, 0.02))
    t = 0.1 + sign * torch.linspace(0, end, 37, dtype=torch.float64)
    exact = pyode.odeint(pendulum, Y0, t, rtol=1e-12, atol=1e-12)
    found = solution(t)
    assert found.shape == exact.shape
    assert torch.equal(found[0], Y0)
    assert (solution.t0, solution.t1) == (0.1, 0.1 + sign * end)
    # dopri8 takes long steps, and its dense output is of order 4.
    tolerated = {1: 0.05, 2: 1e-3}.get(METHODS[method].order, 2e-5) if method in FIXED else 2e-5
    tolerated = {"dopri8": 1e-4, "fehlberg2": 2e-4}.get(method, tolerated)
    assert torch.allclose(found, exact, rtol=0, atol=tolerated)


@pytest.mark.parametrize("method", [name for name in ADAPTIVE if name != "bosh3"] + FIXED)
@SIGNS
def test_it_agrees_with_odeints_outputs(method, sign):
    # bosh3 does not: odeint's outputs between steps are torchdiffeq's, of the first order.
    t = sign * torch.linspace(0, 2, 13, dtype=torch.float64)
    kwargs = options_of(method, 0.11)
    with_rtol = {"rtol": 1e-3, "atol": 1e-5}
    solution = pyode.odeint_dense(pendulum, Y0, t[0], t[-1], **kwargs, **with_rtol)
    expected = pyode.odeint(pendulum, Y0, t, **kwargs, **with_rtol)
    assert torch.allclose(solution(t), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "order"),
    [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 3), ("dopri5", 4), ("tsit5", 4), ("dopri8", 4),
     ("bosh3", 3), ("fehlberg2", 2), ("adaptive_heun", 2)],
)  # fmt: skip
def test_the_order_of_accuracy_between_steps(method, order):
    def error(n: int) -> float:
        h = 2.4 / n
        forced = {"first_step": h, "min_step": h, "max_step": h}
        options = {"step_size": h, "interp": "cubic"} if method in FIXED else forced
        solution = pyode.odeint_dense(growth.f, growth.y0, 0.0, 2.4, method=method, options=options)
        t = h * (torch.arange(n, dtype=torch.float64)[:, None] + tensor(0.2, 0.37, 0.5, 0.81)).reshape(-1)
        return float((solution(t) - growth.at(t)).abs().max())

    # Within a step the error has one power more than the order, but steps carry their own on.
    observed = math.log2(error(24) / error(48))
    assert observed > order - 0.3


def test_linear_interpolation_is_a_line():
    solution = pyode.odeint_dense(pendulum, Y0, 0.0, 1.0, method="rk4", options={"step_size": 0.25})
    a, b, c = solution(tensor(0.25, 0.375, 0.5))
    assert torch.allclose(b, (a + c) / 2, rtol=1e-15)
    assert repr(solution) == "DenseOutput(t from 0 to 1, 4 steps)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_torchdiffeq(dtype):
    y0, t = Y0.to(dtype), torch.linspace(0.1, 2.9, 23, dtype=torch.float64)
    ends = torch.tensor(0.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    ours, theirs = (
        module.odeint_dense(pendulum, y0, *ends, rtol=1e-5, atol=1e-6, options={"first_step": 0.1})
        for module in (pyode, torchdiffeq)
    )
    expected = torch.stack([theirs(x) for x in t])
    assert ours(t).dtype == expected.dtype == dtype
    assert torch.allclose(ours(t), expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3)])
def test_many_times_at_once_of_any_shape_in_any_order(shape):
    solution = pyode.odeint_dense(pendulum, Y0, 0.0, 4.0)
    t = 4 * torch.rand(shape, dtype=torch.float64)
    together = solution(t)
    assert together.shape == (*shape, 2)
    apart = [solution(float(x)) for x in t.reshape(-1)]
    assert not apart or torch.allclose(together.reshape(-1, 2), torch.stack(apart), rtol=1e-14)
    assert torch.equal(solution(t.transpose(0, -1) if t.dim() > 1 else t), together.transpose(0, -2)
                       if t.dim() > 1 else together)  # fmt: skip


def test_numbers_and_tensors_of_any_precision_are_times():
    solution = pyode.odeint_dense(pendulum, Y0, 0, 2)
    for t in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float16)):
        assert torch.equal(solution(t), solution(torch.tensor(0.5, dtype=torch.float64)))
    assert torch.equal(solution(1), solution(1.0))


@SIGNS
def test_tuples(sign):
    parts = (torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))

    def func(t, y):
        return y[1] * torch.ones_like(y[0]), -y[0].sum()

    solution = pyode.odeint_dense(func, parts, 0.0, sign * 2.0)
    t = sign * torch.linspace(0, 2, 6, dtype=torch.float64).reshape(2, 3)
    a, b = solution(t)
    assert (a.shape, b.shape) == ((2, 3, 1, 2), (2, 3))
    expected = pyode.odeint(func, parts, t.reshape(-1))
    assert torch.allclose(a.reshape(6, 1, 2), expected[0], rtol=1e-13)
    assert torch.allclose(b.reshape(6), expected[1], rtol=1e-13)
    assert [part.shape for part in solution(0.0)] == [(1, 2), ()]


@pytest.mark.parametrize("method", ADAPTIVE + FIXED)
@SIGNS
def test_gradients_are_the_finite_differences(method, sign):
    options = {"step_size": 0.25, "interp": "cubic"} if method in FIXED else FORCED
    rtol = {"rtol": 1e6} if "_adams" in method else {}  # one iteration, so that their number does not change

    def evaluated(y0, rate, t0, t):
        solution = pyode.odeint_dense(
            lambda t, y: rate * torch.sin(y) * (1 + t), y0, t0, sign * 1.1 + t0.detach(), method=method,
            options=options, **rtol,
        )  # fmt: skip
        return solution(t)

    inputs = (Y0, tensor(0.7), torch.tensor(0.0, dtype=torch.float64), sign * tensor(0.1, 0.6, 0.45, 0.9))
    if method in FIXED:  # the end is not to move against the grid
        inputs = (*inputs[:2], inputs[3])

        def evaluate(y0, rate, t):
            return evaluated(y0, rate, torch.tensor(0.0, dtype=torch.float64), t)

    else:
        evaluate = evaluated
    assert gradcheck(evaluate, [x.clone().requires_grad_() for x in inputs], rtol=1e-6, atol=1e-7)


def test_its_slope_is_the_field():
    t = torch.linspace(0, 2, 9, dtype=torch.float64, requires_grad=True)
    y = pyode.odeint_dense(rigid_body.f, rigid_body.y0, 0.0, 2.0)(t)
    for i in range(3):
        (slope,) = torch.autograd.grad(y[:, i].sum(), t, retain_graph=True)
        expected = torch.stack([rigid_body.f(x, row)[i] for x, row in zip(t, y)])
        assert torch.allclose(slope, expected, atol=1e-5)  # a quartic's derivative has lost an order


@SIGNS
def test_outside_it_is_an_error(sign):
    solution = pyode.odeint_dense(pendulum, Y0, 0.0, sign * 1.0)
    for t in (sign * -0.01, sign * 1.01, sign * tensor(0.5, 2.0), math.nan):
        with pytest.raises(InvalidValue, match="t must lie between"):
            solution(t)


def test_the_ends_are_checked():
    for ends in ((0.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(InvalidValue, match="t must be"):
            pyode.odeint_dense(pendulum, Y0, *ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128, torch.bfloat16])
def test_every_dtype(dtype):
    y0 = torch.tensor([1.0, 0.5]).to(dtype) * (1 + 1j if dtype.is_complex else 1)
    rate = 1j if dtype.is_complex else -1.0
    solution = pyode.odeint_dense(lambda t, y: rate * y, y0, 0.0, 2.0, rtol=1e-4, atol=1e-5)
    t = torch.linspace(0, 2, 7)
    found = solution(t)
    assert found.dtype == dtype
    exact = torch.exp(rate * t)[:, None].to(found) * y0
    assert torch.allclose(found, exact, rtol=0.02 if dtype == torch.bfloat16 else 1e-3)


def test_without_gradients_there_is_no_graph_and_stats_are_counted():
    stats = Stats()
    with torch.no_grad():
        solution = pyode.odeint_dense(pendulum, Y0.clone().requires_grad_(), 0.0, 1.0, options={"stats": stats})
        assert not solution(0.5).requires_grad
    assert stats.n_f_evals == 2 + 6 * stats.n_steps
    evaluated = stats.n_f_evals
    solution(torch.linspace(0, 1, 50))
    assert stats.n_f_evals == evaluated


def test_a_discontinuity_is_met():
    def func(t, y):
        return torch.where(t < 0.5, 1.0, -2.0) * torch.ones_like(y)

    solution = pyode.odeint_dense(func, tensor(0.0), 0.0, 1.0, options={"jump_t": tensor(0.5)})
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(solution(t)[:, 0], torch.where(t < 0.5, t, 0.5 - 2 * (t - 0.5)), atol=1e-13)


def test_after_a_failure_it_ends_there():
    # y' = y^2 from 1 blows up at t = 1.
    with pytest.warns(UserWarning, match="the solve failed"):
        solution = pyode.odeint_dense(lambda t, y: y * y, tensor(1.0), 0.0, 2.0, options={"on_failure": "return"})
    assert float(solution(0.5)) == pytest.approx(2.0, rel=1e-6)
    assert 0.99 < solution.t1 <= 1.01
    with pytest.raises(InvalidValue, match="t must lie between"):
        solution(1.5)
    with pytest.warns(UserWarning, match="the solve failed"):
        solution = pyode.odeint_dense(lambda t, y: math.nan * y, Y0, 0.0, 2.0, options={"on_failure": "return"})
    assert torch.equal(solution(0.0), Y0)
    assert torch.equal(solution(torch.zeros(2, 3)), Y0.expand(2, 3, 2))
    with pytest.raises(InvalidValue, match="t must lie between"):
        solution(0.1)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "adams"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_it_can_be_copied_and_pickled(method, again):
    solution = pyode.odeint_dense(pendulum, Y0, 0.0, 1.0, **options_of(method, 0.1))
    t = torch.linspace(0, 1, 9)
    assert torch.equal(again(solution)(t), solution(t))
