"""odeint_adjoint: against odeint's gradients, finite differences and torchdiffeq's adjoint."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq
from fields import TIGHT, Y0, Field, T, assert_close, gradients, loss_of
from problems import tensor
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import pyode
from pyode import SolveError, Stats

SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
RESTART = {"restart": True}


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
@SIGNS
@pytest.mark.parametrize("restart", [False, True])
def test_direct_is_adjoint(method, sign, restart):
    # dopri8 and bosh3 have to end steps at the outputs: their dense output is less accurate than their steps.
    tight = {"rtol": 1e-8, "atol": 1e-9} if method == "bosh3" else TIGHT
    step_t = {"step_t": sign * T} if method in ("dopri8", "bosh3") else {}
    direct = gradients(pyode.odeint, sign, method=method, options=step_t, **tight)
    adjoint = gradients(pyode.odeint_adjoint, sign, method=method, options=step_t, **tight,
                        adjoint_options={"restart": restart, **step_t})  # fmt: skip
    assert_close(adjoint, direct, 1e-6)
    assert torch.equal(adjoint[-1], torch.zeros(3, dtype=torch.float64))  # not used: zeros, as torchdiffeq's


@SIGNS
def test_both_are_the_finite_differences(sign):
    adjoint = gradients(pyode.odeint_adjoint, sign, **TIGHT)
    step, field = 1e-5, Field()

    def loss(y0, t, *params):
        with torch.no_grad():
            for own, value in zip(field.trained(), params):
                own.copy_(value)
            return float(loss_of(pyode.odeint(field, y0, t, **TIGHT)))

    inputs = [Y0.clone(), sign * T, *(p.detach().clone() for p in field.trained())]
    for position, (x, gradient) in enumerate(zip(inputs, adjoint)):
        for i in range(x.numel()):
            moved = []
            for direction in (step, -step):
                changed = [y.clone() for y in inputs]
                changed[position].view(-1)[i] += direction
                moved.append(loss(*changed))
            # The difference's error: step^2 times a third derivative, and 1e-10 / step.
            assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(
                float(gradient.reshape(-1)[i]), rel=2e-4, abs=2e-4
            )


@SIGNS
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_the_backward_solve_knows_of_a_discontinuity_too(method, restart, sign):
    rate, seen = tensor(0.7).requires_grad_(), []

    def func(t, y):
        seen.append(sign * float(t.detach()))
        return torch.where(sign * t < 0.55, rate, -3 * rate) * y

    evaluations = []
    for jump_t in ({}, {"jump_t": [sign * 0.55]}):
        options = {"restart": restart, **jump_t}
        y0, t = tensor(1.0).requires_grad_(), sign * tensor(0.0, 0.3, 1.0)
        y = pyode.odeint_adjoint(
            func, y0, t, 1e-8, 1e-8, method, jump_t, adjoint_params=(rate,), adjoint_options=options
        )  # fmt: skip
        seen.clear()
        (gradient,) = torch.autograd.grad(y[-1].sum(), rate)
        evaluations.append(len(seen))
    grown = sign * (0.55 - 3 * 0.45)
    assert float(gradient) == pytest.approx(grown * math.exp(0.7 * grown), rel=1e-6)
    assert evaluations[1] < 0.8 * evaluations[0]
    # It is met from behind, and left from before.
    assert min(time for time in seen if time > 0.55) == pytest.approx(0.55, abs=1e-12)
    assert max(time for time in seen if time < 0.55) == pytest.approx(0.55, abs=1e-12)


def test_carrying_the_step_size_on_saves_evaluations_and_no_accuracy():
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    exact, calls, errors = None, {}, {}
    for name, solve, kwargs in (
        ("exact", pyode.odeint, TIGHT),
        ("restart", pyode.odeint_adjoint, {"rtol": 1e-6, "atol": 1e-7, "adjoint_options": RESTART}),
        ("carry", pyode.odeint_adjoint, {"rtol": 1e-6, "atol": 1e-7}),
    ):
        field, y0 = Field(), Y0.clone().requires_grad_()
        y = solve(field, y0, t, **kwargs)
        before = field.calls
        loss_of(y).backward()
        calls[name] = field.calls - before
        found = torch.cat([y0.grad.flatten(), *(p.grad.flatten() for p in field.trained())])
        exact = found if exact is None else exact
        errors[name] = float((found - exact).norm() / exact.norm())
    assert calls["carry"] <= calls["restart"] - 2 * 15  # of 20 intervals; the first one has to choose a step
    assert errors["carry"] <= max(10 * errors["restart"], 1e-6)


@pytest.mark.parametrize("restart", [False, True])
def test_of_tuples(restart):
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(tensor(0.7, -0.4))

        def forward(self, t, y):
            return self.rate * y[1] * y[0], torch.cos(t) - y[0].sum() * self.rate[0]

    found = []
    for solve in (pyode.odeint, pyode.odeint_adjoint, torchdiffeq.odeint_adjoint):
        options = {"adjoint_options": {"restart": restart}} if solve is pyode.odeint_adjoint else {}
        func, t = Coupled(), T.clone().requires_grad_()
        y0 = (tensor(1.0, 0.5).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True))
        y = solve(func, y0, t, **TIGHT, **options)
        assert [part.shape for part in y] == [(4, 2), (4,)]
        (loss_of(y[0]) + loss_of(y[1])).backward()
        found.append([y0[0].grad, y0[1].grad, t.grad, func.rate.grad])
    assert_close(found[1], found[0], 1e-6)
    assert_close(found[1], found[2], 1e-6)


EACH = {  # a state, and one tolerance told for each of its parts or numbers
    "parts": (lambda y: (y[:, :1], y[:, 1:]), lambda x: (x, x)),
    "leaves": (lambda y: {"a": y, "b": [y[:, 1]]}, lambda x: {"a": x, "b": [x]}),
    "numbers": (lambda y: y, lambda x: tensor(x, x)),
    "complex numbers": (lambda y: y + 0.5j * y, lambda x: tensor(x, x)),
}


@pytest.mark.parametrize("which", ["", "adjoint_"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("kind", EACH)
def test_tolerances_for_each_part_or_number_are_the_adjoints_too(kind, control, which):
    of, each = EACH[kind]

    def found(rtol, atol):
        rate, y0 = tensor(0.7).requires_grad_(), Y0.clone().requires_grad_()
        y = pyode.odeint_adjoint(
            lambda t, y: tree_map(lambda part: torch.sin(rate * part), y), of(y0), T,
            options={"control": control}, adjoint_params=(rate,), **{f"{which}rtol": rtol, f"{which}atol": atol},
        )  # fmt: skip
        sum(loss_of(part) for part in tree_leaves(y)).backward()
        return y0.grad, rate.grad

    assert all(map(torch.equal, found(each(1e-4), each(1e-6)), found(1e-4, 1e-6)))
    assert not torch.equal(found(1e-4, 1e-6)[1], found(1e-6, 1e-6)[1])


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_of_complex_states(dtype):
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.3 - 1j, dtype=dtype))
            self.real = nn.Parameter(torch.tensor(0.4, dtype=dtype).real.clone())

        def forward(self, t, y):
            return self.factor * y + self.real * t * y.conj()

    found = []
    tight = TIGHT if dtype == torch.complex128 else {"rtol": 1e-5, "atol": 1e-6}
    for solve in (pyode.odeint, pyode.odeint_adjoint):
        func, y0 = Wave(), torch.tensor([1 + 1j, 0.3 - 2j], dtype=dtype).requires_grad_()
        t = T.to(func.real.dtype, copy=True).requires_grad_()
        loss_of(solve(func, y0, t, **tight)).backward()
        found.append([y0.grad, t.grad, func.factor.grad, func.real.grad])
    assert_close(*found, 1e-6 if dtype == torch.complex128 else 1e-3)


@pytest.mark.parametrize("i", [0, 1, 3])
@pytest.mark.parametrize("restart", [False, True])
def test_a_gradient_that_arrives_at_one_output_only(i, restart):
    found = []
    for solve in (pyode.odeint, pyode.odeint_adjoint):
        options = {"adjoint_options": {"restart": restart}} if solve is pyode.odeint_adjoint else {}
        field, y0 = Field(), Y0.clone().requires_grad_()
        solve(field, y0, T, **TIGHT, **options)[i].sum().backward()
        found.append([y0.grad, *(p.grad for p in field.trained())])
    assert_close(found[1], found[0], 1e-6)


def test_parameters_may_be_given_for_any_callable():
    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    other = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="other requires gradient"):
        y = pyode.odeint_adjoint(
            lambda t, y: factor * y + other, tensor(1.0), tensor(0.0, 1.0), adjoint_params=(factor,)
        )
    y[-1].sum().backward()
    assert other.grad is None
    # y = (1 + 1) exp(t / 2) - 1; dy/dfactor by the variation of constants.
    exact = pyode.odeint(
        lambda t, z: torch.stack([0.5 * z[0] + 0.5, 0.5 * z[1] + z[0]]), tensor(1.0, 0.0), tensor(0.0, 1.0)
    )
    assert float(factor.grad) == pytest.approx(float(exact[-1, 1]), rel=1e-6)
    params = (p for p in (factor,))  # a generator will do
    assert pyode.odeint_adjoint(
        lambda t, y: factor * y, tensor(1.0), tensor(0.0, 1.0), adjoint_params=params
    ).requires_grad


def test_a_frozen_parameter_is_left_out_of_a_users_norm_with_a_warning():
    shapes = set()

    def norm(parts):
        shapes.add(tuple(tuple(part.shape) for part in parts))
        return max(part.abs().max() for part in parts)

    y0 = Y0.clone().requires_grad_()
    with pytest.warns(UserWarning, match="without requiring gradient"):
        y = pyode.odeint_adjoint(Field(), y0, T, adjoint_options={"norm": norm})
    y.sum().backward()
    assert shapes == {
        ((), (2, 2), (2, 2), (2, 2), (2,), (), (3,))
    }  # t, y, adj_y, and the parameters but the frozen one


@pytest.mark.parametrize("wanted", ["y0", "params", "nothing"])
def test_what_is_not_wanted_is_not_computed(wanted):
    field, y0 = Field(), Y0.clone().requires_grad_(wanted == "y0")
    for p in field.parameters():
        p.requires_grad_(wanted == "params")
    y = pyode.odeint_adjoint(field, y0, T)
    assert y.requires_grad == (wanted != "nothing")
    assert torch.allclose(y, pyode.odeint(field, Y0, T), rtol=1e-12)
    if wanted != "nothing":
        y.sum().backward()
        assert (y0.grad is None) == (wanted != "y0")
        assert (field.matrix.grad is None) == (wanted != "params")


class Noted(torch.autograd.Function):
    """Its argument; counts the gradients that pass through it."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Noted.count += 1
        return g


@pytest.mark.parametrize("backward", [{}, RESTART], ids=str)
def test_integrands_that_have_no_weight_are_not_computed(backward):
    # That of dopri5's second stage, which is also the trial of a first step that is chosen.
    rate, stats = tensor(-0.7).requires_grad_(), Stats()

    def func(t, y):
        return Noted.apply(rate) * y

    y = pyode.odeint_adjoint(func, Y0, T, adjoint_params=(rate,), adjoint_options={**backward, "stats": stats})
    Noted.count = 0
    y.sum().backward()
    assert Noted.count == stats.n_f_evals - stats.n_accepted - stats.n_rejected


def test_a_parameter_keeps_its_dtype_and_strides():
    weight = torch.randn(2, 3).T[:2, :].requires_grad_()
    y0 = Y0.clone().requires_grad_()
    pyode.odeint_adjoint(lambda t, y: y @ weight.double(), y0, T, adjoint_params=(weight,)).sum().backward()
    expected = weight.detach().clone().requires_grad_()
    pyode.odeint(lambda t, y: y @ expected.double(), Y0, T).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.allclose(weight.grad, expected.grad, rtol=1e-4)


def test_a_third_derivative_is_refused():
    y0 = Y0.clone().requires_grad_()
    (first,) = torch.autograd.grad(pyode.odeint_adjoint(Field(), y0, T).sum(), y0, create_graph=True)
    with pytest.raises(pyode.InvalidValue, match="first and second derivatives"):
        torch.autograd.grad(first.square().sum(), y0, create_graph=True)


def test_one_time_and_its_gradient():
    y0 = Y0.clone().requires_grad_()
    field = Field()
    pyode.odeint_adjoint(field, y0, T[:1]).sum().backward()
    assert torch.equal(y0.grad, torch.ones_like(Y0))


def test_a_backward_solve_that_fails_says_so_and_harms_nobody():
    field, y0 = Field(), Y0.clone().requires_grad_()
    y = pyode.odeint_adjoint(field, y0, T, adjoint_options={"max_num_steps": 2})
    with pytest.raises(SolveError, match="max_num_steps"):
        y.sum().backward()
    assert_close(gradients(pyode.odeint_adjoint, **TIGHT), gradients(pyode.odeint, **TIGHT), 1e-6)


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("restart", [False, True])
def test_counts_of_both_solves(time, restart):
    forward, backward, field = Stats(), Stats(), Field()
    adjoint_options, t = {"stats": backward, "restart": restart}, T.clone().requires_grad_(time)
    y = pyode.odeint_adjoint(field, Y0, t, options={"stats": forward}, adjoint_options=adjoint_options)
    assert forward.n_f_evals == field.calls
    assert backward.n_steps == 0
    y.sum().backward()
    assert backward.n_f_evals == field.calls - forward.n_f_evals
    assert backward.n_accepted > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_both_backends_have_the_same_gradients(backend, device):
    with pyode.backend(backend):
        field, y0 = Field().to(device), Y0.to(device, copy=True).requires_grad_()
        loss_of(pyode.odeint_adjoint(field, y0, T.to(device), **TIGHT).cpu()).backward()
    assert_close([y0.grad.cpu(), field.matrix.grad.cpu()], gradients(pyode.odeint, time=False, **TIGHT)[:2], 1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3)], ids=str)
def test_of_every_shape_and_dtype(shape, dtype, method, device):
    found = []
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    for solve in (pyode.odeint, pyode.odeint_adjoint):
        rate = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
        y0 = torch.full(shape, 0.7, dtype=dtype, device=device, requires_grad=True)
        t = torch.tensor([0.0, 0.5, 1.0], device=device, requires_grad=True)
        extra = {"adjoint_params": (rate,)} if solve is pyode.odeint_adjoint else {}
        options = {"step_size": 0.125} if method == "rk4" else {}
        y = solve(
            lambda t, y, r=rate: r.to(y.dtype) * y * (1 + t), y0, t, tolerance, tolerance, method, options, **extra
        )
        y.float().square().sum().backward()
        assert (y0.grad.dtype, t.grad.dtype, rate.grad.dtype) == (dtype, torch.float32, torch.float64)
        # With fixed steps the times move along a polygon in one, along f in the other: alike for short steps only.
        compared = (y0, rate) if method == "rk4" else (y0, t, rate)
        found.append([x.grad.double().cpu() for x in compared])
    # Some ten roundings of the dtype, and the tolerance.
    roundings = {torch.bfloat16: 0.1, torch.float16: 0.03}.get(dtype, 1e-4)
    if 0 not in shape:
        assert_close(*found, roundings + 10 * tolerance)


def test_without_gradients_there_is_no_graph():
    with torch.no_grad():
        assert not pyode.odeint_adjoint(Field(), Y0, T).requires_grad
    with torch.inference_mode():
        assert pyode.odeint_adjoint(Field(), Y0, T).is_inference()
