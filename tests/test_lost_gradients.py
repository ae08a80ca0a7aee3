"""gradient="checkpoint": every tensor that func depends on gets its gradient, or it is told; hooks see it once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fields import Y0, Field, T, assert_close, loss_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pyode

F64 = torch.float64
ROUGH = {"rtol": 1e-3, "atol": 1e-4}
MODES = pytest.mark.parametrize("mode", [{}, {"graph_bytes": 0}, {"checkpoints": 2}], ids=str)
LOST = r"depends on a tensor of shape \(2, 2\) that requires gradient"


def checkpoint(func, y0, t, **options):
    return pyode.odeint(func, y0, t, options={**options, "gradient": "checkpoint"}, **ROUGH)


def out_of_reach(weight: Tensor):
    """A func that holds a tensor where no search finds it: behind too many objects."""

    class Box:
        def __init__(self, inside):
            self.inside = inside

    box = Box(Box(Box(Box(weight))))
    return lambda t, y: torch.tanh(y @ box.inside.inside.inside.inside)


@MODES
@pytest.mark.parametrize("method", ["dopri5", "rk4", "trapezoid"])
def test_a_tensor_out_of_reach_is_told(mode, method):
    weight = torch.eye(2, dtype=F64, requires_grad=True)

    def run():
        y0, options = Y0.clone().requires_grad_(), {**mode, "gradient": "checkpoint"}
        pyode.odeint(out_of_reach(weight), y0, T, method=method, options=options, **ROUGH).sum().backward()

    with pytest.warns(UserWarning, match=LOST):
        run()
    assert weight.grad is None


def by_samples(func, y0, t, **kwargs):
    return pyode.odeint_adjoint(func, y0, t, options={"control": "per_sample"}, **kwargs)


def by_ivp(func, y0, t, control, gradient="adjoint", **kwargs):
    return pyode.solve_ivp(func, y0, t, gradient=gradient, control=control, **kwargs).ys


ADJOINTS = pytest.mark.parametrize(
    "solve",
    [pyode.odeint_adjoint, by_samples, partial(by_ivp, control="per_sample"), partial(by_ivp, control="joint")],
    ids=["odeint_adjoint", "odeint_adjoint by samples", "solve_ivp", "joint solve_ivp"],
)


@ADJOINTS
def test_so_it_is_in_an_adjoint_solve(solve):
    weight, other = torch.eye(2, dtype=F64, requires_grad=True), torch.ones(2, dtype=F64, requires_grad=True)
    hidden = out_of_reach(weight)
    y = solve(lambda t, y: other * hidden(t, y), Y0, T, **ROUGH)
    with pytest.warns(UserWarning, match=LOST):
        y.sum().backward()
    assert other.grad is not None


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_solve_ivp_finds_what_checkpoint_finds_or_is_told_names(gradient, control):
    # Tensors in a closure beside a module; or those named, and those in args.
    net = nn.Linear(2, 2, dtype=F64)
    scale, shift = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.ones(2, dtype=F64, requires_grad=True)
    inputs = [*net.parameters(), scale, shift]

    def func(t, y, shift):
        return torch.tanh(scale * net(y) + shift)

    def found(gradient, args, **kwargs):
        closed = func if args else lambda t, y: func(t, y, shift)
        y = by_ivp(closed, Y0, T, control, gradient, args=args, rtol=1e-6, atol=1e-8, **kwargs)
        return list(torch.autograd.grad(loss_of(y), inputs))

    expected = found("direct", ())
    assert_close(found(gradient, ()), expected, 1e-4)
    assert_close(found(gradient, (shift,), params=inputs[:3]), expected, 1e-4)
    with pytest.raises(pyode.InvalidType, match=r"params\[1\] must be a tensor, not a str"):
        found(gradient, (), params=[shift, "scale"])


@ADJOINTS
def test_an_adjoint_solve_tells_nothing_where_no_gradient_is_wanted(solve):
    weight, y0 = torch.eye(2, dtype=F64, requires_grad=True), Y0.clone().requires_grad_()
    none = {"params" if isinstance(solve, partial) else "adjoint_params": ()}
    solve(lambda t, y: torch.tanh(y @ weight), y0, T, **none, **ROUGH).sum().backward()
    assert y0.grad is not None
    assert weight.grad is None


def test_so_is_one_that_it_was_computed_from():
    raw = torch.eye(2, dtype=F64, requires_grad=True)
    with pytest.warns(UserWarning, match=LOST):
        checkpoint(out_of_reach(raw.exp()), Y0.clone().requires_grad_(), T)


def test_it_gets_its_gradient_where_it_is_named():
    weight, y0 = torch.eye(2, dtype=F64, requires_grad=True), Y0.clone().requires_grad_()
    for named in (weight, weight.exp()):
        func, inputs = out_of_reach(named), (y0, weight)
        y = checkpoint(func, y0, T, params=[named])
        found = torch.autograd.grad(loss_of(y), inputs, retain_graph=True)
        expected = torch.autograd.grad(loss_of(pyode.odeint(func, y0, T, **ROUGH)), inputs)
        assert_close(list(found), list(expected), 1e-11)


def test_nothing_is_told_where_no_gradient_is_wanted():
    weight = torch.eye(2, dtype=F64, requires_grad=True)
    checkpoint(out_of_reach(weight), Y0.clone().requires_grad_(), T, params=())
    pyode.solve_ivp(lambda t, y: y @ weight, Y0, T, gradient="checkpoint", params=())
    seen = []

    def func(t, y):
        seen.append(torch.is_grad_enabled())
        return torch.tanh(y @ weight)

    with torch.no_grad():
        checkpoint(out_of_reach(weight), Y0, T)
        checkpoint(func, Y0, T)
    assert not any(seen)


def test_no_graph_is_made_where_nothing_requires_gradient():
    recorded = []

    def func(t, y):
        k = torch.sin(y)
        recorded.append(k.requires_grad)
        return k

    checkpoint(func, Y0, T)
    assert sum(recorded) == 1  # a look at the first one


@MODES
def test_a_tensor_that_func_differentiates_by_is_not_lost(mode):
    # A Hamiltonian's flow: func makes leaves of its own, another in every evaluation.
    potential = nn.Sequential(nn.Linear(2, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 1, dtype=F64))

    def flow(t, y):
        with torch.enable_grad():
            q = y if y.requires_grad else y.detach().requires_grad_()
            shift = torch.zeros_like(y).requires_grad_()
            (force,) = torch.autograd.grad(potential(q + shift).sum(), shift, create_graph=True)
        return -force + 0 * shift

    y0 = Y0.clone().requires_grad_()
    inputs = [y0, *potential[0].parameters(), potential[2].weight]
    found = torch.autograd.grad(loss_of(checkpoint(flow, y0, T, **mode)), inputs)
    expected = torch.autograd.grad(loss_of(pyode.odeint(flow, y0, T, **ROUGH)), inputs)
    assert_close(list(found), list(expected), 1e-11)


@pytest.mark.parametrize("solve", [checkpoint, pyode.odeint_adjoint, by_samples])
def test_a_compiled_backward_pass_that_can_not_be_kept(solve):
    # torch.compile's may refuse to be called with retain_graph=True, in these words. It is asked once.
    refusals = []

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            if torch._C._autograd._get_current_graph_task_keep_graph():
                refusals.append(g)
                raise RuntimeError("This backward function was compiled with non-empty donated buffers which requires")
            return g * ctx.saved_tensors[0].cos()

    y0 = Y0.clone().requires_grad_()
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
    inputs, results = (y0, scale), []
    for sine in (Sine.apply, torch.sin):
        y = solve(lambda t, y, sine=sine: scale * sine(y), y0, T)
        results.append(list(torch.autograd.grad(loss_of(y), inputs)))
    assert_close(*results, 1e-11)
    assert len(refusals) == 1


@MODES
def test_hooks_on_tensors_that_were_computed_see_the_whole_gradient_once(mode):
    def gradients(odeint):
        raw, seen = torch.full((2, 2), 0.3, dtype=F64, requires_grad=True), []
        weight = raw.exp()
        weight.register_hook(lambda g: seen.append(g) or 2 * g)
        y = odeint(lambda t, y: torch.tanh(y @ weight), Y0, T)
        (gradient,) = torch.autograd.grad(loss_of(y), raw, retain_graph=True)
        (again,) = torch.autograd.grad(loss_of(y), raw)
        assert_close([again], [gradient], 1e-13)
        assert len(seen) == 2
        return [gradient, *seen]

    expected = gradients(lambda func, y0, t: pyode.odeint(func, y0, t, **ROUGH))
    assert_close(gradients(lambda *args: checkpoint(*args, **mode)), expected, 1e-11)


@MODES
def test_what_several_evaluations_have_computed_together(mode):
    # parametrize.cached computes the weight once, in the first evaluation: all graphs share that part.
    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp()

    field = Field()
    parametrize.register_parametrization(field, "matrix", Exponential())
    raw = field.parametrizations.matrix.original
    with torch.no_grad():
        raw.mul_(0.1)

    def gradients(odeint):
        with parametrize.cached():
            y = odeint(field, Y0, T)
        return list(torch.autograd.grad(loss_of(y), (raw, field.bias)))

    expected = gradients(lambda func, y0, t: pyode.odeint(func, y0, t, **ROUGH))
    assert_close(gradients(lambda *args: checkpoint(*args, **mode)), expected, 1e-11)
