"""What a program written for torchdiffeq may rely on beside values and steps."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchdiffeq
from fields import Y0, Field, T, loss_of
from problems import tensor
from torch import Tensor, nn

import pyode

FUNCTIONS = ("odeint", "odeint_adjoint", "odeint_event", "odeint_dense")
ADJOINT = {pyode: {"adjoint_options": {"restart": True}}, torchdiffeq: {}}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_there_with_its_default(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (pyode, torchdiffeq))
    by_keyword = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    for parameter in theirs.values():
        if parameter.kind is not parameter.VAR_KEYWORD and not (by_keyword and parameter.name not in ours):
            default = ours[parameter.name].default
            assert default == parameter.default or default is pyode.odeint, parameter.name
    positional = [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(tensor(0.7, -0.4))
        self.idle = nn.Parameter(tensor(1.0))

    def forward(self, t, y):
        return self.rate * y[1] * y[0], torch.cos(t) - y[0].sum() * self.rate[0]


START = (tensor(1.0, 0.5), torch.tensor(0.3, dtype=torch.float64))


class TestNoIntegration:
    """One output time: y0, with the identity as its gradient, and no evaluation."""

    @pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "euler"])
    @pytest.mark.parametrize("solve", ["odeint", "odeint_adjoint"])
    @pytest.mark.parametrize("grad", [False, True])
    def test_of_a_tensor(self, solve, method, grad):
        field, y0 = Field(), Y0.clone().requires_grad_(grad)
        t = T[:1].clone().requires_grad_(grad)
        y = getattr(pyode, solve)(field, y0, t, method=method)
        assert torch.equal(y, Y0[None])
        assert y.data_ptr() != y0.data_ptr()
        assert y.requires_grad == (grad or solve == "odeint_adjoint")
        assert field.calls == 0
        if grad:
            loss = (torch.arange(4.0).view(1, 2, 2) * y).sum()
            loss.backward()
            assert torch.equal(y0.grad, torch.arange(4.0).double().view(2, 2))
            assert t.grad is None or not t.grad.any()

    @pytest.mark.parametrize("solve", ["odeint", "odeint_adjoint"])
    def test_of_a_tuple(self, solve):
        y = getattr(pyode, solve)(Coupled(), START, T[:1])
        assert all(torch.equal(part, start[None]) for part, start in zip(y, START))


@pytest.mark.parametrize("solve", ["odeint", "odeint_adjoint"])
def test_the_parts_of_a_tuples_result_are_views_of_one_flat_output(solve):
    for module in (pyode, torchdiffeq):
        first, second = getattr(module, solve)(Coupled(), START, T)
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert first.stride() == (3, 1)
        assert second.stride() == (3,)


def test_a_part_of_a_tuples_result_may_be_written_into():
    found = []
    for module in (pyode, torchdiffeq):
        func = Coupled()
        first, second = module.odeint(func, START, T)
        first.mul_(2)
        second[0] = 0.0
        (loss_of(first) + loss_of(second)).backward()
        found.append([first.detach(), second.detach(), func.rate.grad])
    assert all(map(torch.allclose, *found))


@pytest.mark.parametrize("of", ["a tensor", "a tuple"])
@pytest.mark.parametrize("time", [False, True])
def test_an_adjoint_norm_is_given_what_torchdiffeq_gives_it(of, time):
    seen = {}
    for module, kwargs in ADJOINT.items():
        calls = seen[module] = []

        def norm(parts, calls=calls):
            calls.append([part.detach().clone() for part in parts])
            return torch.stack([part.abs().max() for part in parts]).max()

        kwargs = {**kwargs, "adjoint_options": {**kwargs.get("adjoint_options", {}), "norm": norm}}
        func, y0 = (Coupled(), START) if of == "a tuple" else (Trained(), Y0)
        t = T.clone().requires_grad_(time)
        y = module.odeint_adjoint(func, y0, t, rtol=1e-5, atol=1e-6, **kwargs)
        (loss_of(y[0]) + loss_of(y[1]) if of == "a tuple" else loss_of(y)).backward()
    shapes = {module: [[part.shape for part in parts] for parts in calls] for module, calls in seen.items()}
    assert shapes[pyode] == shapes[torchdiffeq]  # as often, and the same parts
    for ours, theirs in list(zip(*seen.values()))[:2]:  # of the first step's state and slope: before any noise
        for a, b in zip(ours, theirs):
            assert torch.allclose(a.abs(), b.abs(), rtol=1e-6)  # torchdiffeq turns time round, and the slope's sign


class Trained(Field):
    """Nothing of it is frozen: that is warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen.requires_grad_()


def test_the_adjoints_norm_may_be_replaced_behind_the_solve():
    # As torchdiffeq's own tests do, to look at it.
    gradients = {}
    for module in (pyode, torchdiffeq):
        calls, field = [], Trained()
        y = module.odeint_adjoint(field, Y0, T, rtol=1e-5, atol=1e-6, **ADJOINT[module])
        options = y.grad_fn.adjoint_options
        before = options["norm"]

        def norm(parts, before=before, calls=calls):
            calls.append(len(parts))
            return before(parts)

        options["norm"] = norm
        loss_of(y).backward()
        assert set(calls) == {3 + 5}  # t, y, adj_y, and the parameters
        gradients[module] = (len(calls), field.matrix.grad)
    assert gradients[pyode][0] == gradients[torchdiffeq][0]
    assert torch.allclose(gradients[pyode][1], gradients[torchdiffeq][1], rtol=1e-6)


@pytest.mark.parametrize("adjoint_options", [{}, {"adjoint_options": {"norm": "seminorm"}}], ids=["none", "seminorm"])
@pytest.mark.parametrize("module", [pyode, torchdiffeq])
def test_a_norm_of_the_forward_solve_is_not_the_adjoints(module, adjoint_options):
    shapes = set()

    def norm(state: Tensor) -> Tensor:
        shapes.add(state.shape)
        return state.abs().max()

    y0 = Y0.clone().requires_grad_()
    y = module.odeint_adjoint(Trained(), y0, T, options={"norm": norm}, **adjoint_options)
    y.sum().backward()
    assert shapes == {Y0.shape}  # it is given a state: of the forward solve, and y and adj_y each of the backward one


def test_unused_parameters_have_zeros_and_parameters_of_no_use_none():
    for module in (pyode, torchdiffeq):
        func = Coupled()
        module.odeint_adjoint(func, START, T)[0].sum().backward()
        assert torch.equal(func.idle.grad, tensor(0.0))
        func = Coupled()
        module.odeint(func, START, T)[0].sum().backward()
        assert func.idle.grad is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_works_without_gradients(name):
    with torch.no_grad():
        if name == "odeint_event":
            time, y = pyode.odeint_event(Field(), Y0, T[0], event_fn=lambda t, y: t - 0.5)
            assert float(time) == pytest.approx(0.5)
        elif name == "odeint_dense":
            y = pyode.odeint_dense(Field(), Y0, 0.0, 1.0)(0.5)
        else:
            y = getattr(pyode, name)(Field(), Y0, T)
    assert not y.requires_grad
