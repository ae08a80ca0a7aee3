"""Which tensors an adjoint solve returns gradients to: args, parameters that are found, parameters that are lost."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from problems import tensor
from torch import Tensor, nn

import pyode
from pyode import InvalidType, InvalidValue
from pyode.parameters import find_parameters, reachable
from pyode.problem import pose

Y0, T = tensor(0.5, -1.0), tensor(0.0, 0.4, 1.0)
SOLVERS = pytest.mark.parametrize("solve", [pyode.odeint, pyode.odeint_adjoint], ids=lambda f: f.__name__)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2).double()

    def forward(self, t, y):
        return torch.tanh(self.inner(y)) * torch.cos(t)

    def other(self, t, y):
        return self.forward(t, y)


def field(t, y, net, scale=1.0):
    return scale * net(t, y)


NET = Net()  # a global, as in a script


class CallableObject:
    def __init__(self, net):
        self.nets = {"first": [net]}

    def __call__(self, t, y):
        return self.nets["first"][0](t, y)

    def method(self, t, y):
        return self(t, y)


class Slotted:
    __slots__ = "net"

    def __init__(self, net):
        self.net = net

    def __call__(self, t, y):
        return self.net(t, y)


def decorated(func):
    @functools.wraps(func)
    def wrapper(t, y):
        return func(t, y)

    return wrapper


def uses_global(t, y):
    return NET(t, y)


FUNCS = {
    "a bound method": lambda net: net.other,
    "a closure": lambda net: lambda t, y: net(t, y),
    "a closure in a closure": lambda net: lambda t, y: (lambda: net(t, y))(),
    "a closure over a method": lambda net, f=None: (lambda method: lambda t, y: method(t, y))(net.forward),
    "a closure over parameters": lambda net: (
        lambda t, y, w=net.inner.weight, b=net.inner.bias: torch.tanh(y @ w.T + b) * torch.cos(t)
    ),
    "a partial": lambda net: partial(field, net=net),
    "a partial of a partial": lambda net: partial(partial(field, net=net), scale=1.0),
    "a callable object": CallableObject,
    "a method of an object": lambda net: CallableObject(net).method,
    "an object with slots": Slotted,
    "a decorated function": lambda net: decorated(net.other),
    "a torch decorator": lambda net: torch.enable_grad()(net.other),
    "a global": lambda net: uses_global,
    "a lambda over a global": lambda net: lambda t, y: uses_global(t, y),
}


@pytest.mark.parametrize("name", FUNCS)
def test_parameters_are_found_without_a_module(name):
    # A module passed as such is the measure.
    func, found = FUNCS[name](NET), []
    for solve in (lambda y0: pyode.odeint_adjoint(NET, y0, T), lambda y0: pyode.odeint_adjoint(func, y0, T)):
        NET.zero_grad()
        y0 = Y0.clone().requires_grad_()
        solve(y0).square().sum().backward()
        found.append([y0.grad, NET.inner.weight.grad, NET.inner.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", ["scripted", "traced"])
def test_a_module_that_is_scripted_or_traced_is_one(made):
    net = Net()
    func, found = torch.jit.script(net) if made == "scripted" else torch.jit.trace(net, (T[0], Y0)), []
    checkpoint = {"options": {"gradient": "checkpoint"}}
    for solve, of, more in (
        (pyode.odeint, net, {}),
        (pyode.odeint_adjoint, func, {}),
        (pyode.odeint_adjoint, lambda t, y: func(t, y), {}),
        (pyode.odeint, func, checkpoint),
    ):
        net.zero_grad()
        solve(of, Y0, T, **more).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for gradients in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(gradients, found[0]))


def test_tensors_that_require_grad_are_found_and_others_are_not():
    leaf, frozen = tensor(0.3, 0.7).requires_grad_(), tensor(2.0)
    computed = leaf * 2
    found = find_parameters(lambda t, y: -computed * frozen * y)
    assert len(found) == 1
    assert found[0] is computed
    pyode.odeint_adjoint(lambda t, y: -computed * frozen * y, Y0, T).sum().backward()
    assert leaf.grad is not None


NOTHING_FOUND = [torch.neg, lambda t, y: -y, len, nn.functional.relu, partial(torch.mul, 2)]


@pytest.mark.parametrize("func", NOTHING_FOUND, ids=["builtin", "lambda", "len", "function", "partial"])
def test_where_nothing_is_found_torchdiffeqs_error_stays(func):
    with pytest.raises(ValueError, match=r"must be an instance of nn\.Module to specify the adjoint parameters"):
        pyode.odeint_adjoint(func, Y0, T)


def test_a_search_ends_whatever_refers_to_itself():
    loop = CallableObject(NET)
    loop.itself, loop.nets["again"] = loop, loop.nets
    loop.far = SimpleNamespace(torch=torch, type=CallableObject, function=loop.method)
    names = [name for name, _ in reachable(loop)]
    assert names == ["func.nets['first'][0].inner.weight", "func.nets['first'][0].inner.bias"]


def test_a_replica_of_data_parallel_has_its_parameters_as_attributes():
    # What torch.nn.parallel.replicate leaves on each device.
    replica = Net()._replicate_for_data_parallel()
    inner = replica.inner._replicate_for_data_parallel()
    replica._modules["inner"] = inner
    inner.weight, inner.bias = (p.detach().clone().requires_grad_() for p in (NET.inner.weight, NET.inner.bias))
    assert list(map(id, find_parameters(replica))) == [id(inner.weight), id(inner.bias)]
    pyode.odeint_adjoint(replica, Y0, T).sum().backward()
    assert inner.weight.grad is not None


def lost_by(func, **kwargs) -> list[str]:
    """What warnings of a solve say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyode.odeint_adjoint(func, Y0.clone().requires_grad_(), T, **kwargs)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


class Stray(Net):
    """A module with a tensor that it does not know as its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = tensor(1.5).requires_grad_()

    def forward(self, t, y):
        return self.scale * super().forward(t, y)


def test_a_gradient_that_would_be_lost_is_warned_of():
    stray, rate = Stray(), tensor(0.5).requires_grad_()
    (message,) = lost_by(stray)
    assert message.startswith("func.scale requires gradient")
    assert "adjoint_params" in message
    (message,) = lost_by(lambda t, y: rate * stray(t, y), adjoint_params=tuple(stray.parameters()))
    assert "rate requires gradient" in message
    (message,) = lost_by(stray.other, adjoint_params=(stray.inner.weight,))
    assert "inner.bias" in message


def test_no_warning_where_nothing_is_lost():
    stray, leaf = Stray(), tensor(0.5).requires_grad_()
    computed = leaf.exp()
    assert lost_by(Net()) == []
    assert lost_by(stray, adjoint_params=()) == []  # says that none is wanted
    assert lost_by(stray, adjoint_params=(*stray.parameters(), stray.scale)) == []
    assert lost_by(lambda t, y: computed * y, adjoint_params=(computed,)) == []
    assert lost_by(lambda t, y: computed * y, adjoint_params=(leaf,)) == []  # reached through what is computed from it
    assert lost_by(lambda t, y, s: s * y, args=(leaf,), adjoint_params=()) == []
    with torch.no_grad():
        assert lost_by(stray) == []
    stray.scale = stray.scale.detach()
    assert lost_by(stray) == []


def test_what_adjoint_params_lists_beside_a_computed_tensor_is_no_excuse_for_its_other_parts():
    leaf, other = tensor(0.5).requires_grad_(), tensor(0.5).requires_grad_()
    computed = leaf * other
    (message,) = lost_by(lambda t, y: computed * y, adjoint_params=(leaf,))
    assert message.startswith("func: computed requires gradient")


def test_frozen_parameters_cost_nothing_in_the_backward_solve():
    wanted = []

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, weight):
            ctx.save_for_backward(y, weight)
            return y @ weight.T

        @staticmethod
        def backward(ctx, g):
            y, weight = ctx.saved_tensors
            wanted.append(ctx.needs_input_grad[1])
            return g @ weight, torch.outer(g, y) if ctx.needs_input_grad[1] else None

    class Two(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.first = nn.Parameter(0.3 * torch.eye(2).double(), requires_grad=not frozen)
            self.second = nn.Parameter(tensor(0.1, -0.2))

        def forward(self, t, y):
            return Linear.apply(y, self.first) + self.second

    counts, gradients = {}, {}
    for frozen in (False, True):
        wanted.clear()
        func, y0 = Two(frozen), Y0.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyode.odeint_adjoint(func, y0, T).sum().backward()
        counts[frozen] = sum(wanted)
        gradients[frozen] = func.second.grad
        assert (func.first.grad is None) == frozen
    assert counts[True] == 0 < counts[False]
    assert torch.allclose(gradients[True], gradients[False], rtol=1e-6)


def test_an_unused_parameter_has_zeros_as_its_gradient():
    net, unused = Net(), tensor(1.0, 2.0).requires_grad_()
    net.register_parameter("idle", nn.Parameter(tensor(3.0)))
    pyode.odeint_adjoint(net, Y0, T).sum().backward()
    assert torch.equal(net.idle.grad, tensor(0.0))
    pyode.odeint_adjoint(lambda t, y: -y, Y0, T, adjoint_params=(unused,)).sum().backward()
    assert torch.equal(unused.grad, torch.zeros(2).double())


@dataclass
class Material:
    stiffness: Tensor
    name: str


def oscillator(t, y, material, options, net=None):
    force = -material.stiffness * y * options["scale"][0] ** options["power"]
    return force if net is None else force + net(t, y)


@SOLVERS
def test_args_are_passed_on_and_gradients_reach_their_tensors(solve):
    found = []
    for by_args in (True, False):
        stiffness, scale = tensor(0.7, 1.1).requires_grad_(), tensor(1.3).requires_grad_()
        args = (Material(stiffness, "steel"), {"scale": [scale, "unused"], "power": 2}, Net())
        args[2].load_state_dict(NET.state_dict())
        if by_args:
            y = solve(oscillator, Y0, T, args=args)
        else:
            y = pyode.odeint(lambda t, y, args=args: oscillator(t, y, *args), Y0, T)
        y.square().sum().backward()
        found.append([y, stiffness.grad, scale.grad, args[2].inner.weight.grad])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_args_may_be_a_list_and_need_not_be_tensors(method):
    expected = pyode.odeint(lambda t, y: -2 * y, Y0, T, method=method)
    for args in ([2], (2.0,), (torch.tensor(2),)):
        assert torch.equal(pyode.odeint(lambda t, y, k: -k * y, Y0, T, method=method, args=args), expected)


def test_args_reach_a_grid_constructor_as_part_of_func():
    def grid(func, y0, t):
        assert torch.equal(func(t[0], y0), -2 * y0)
        return t

    pyode.odeint(lambda t, y, k: -k * y, Y0, T, method="rk4", options={"grid_constructor": grid}, args=(2,))


@SOLVERS
def test_args_of_events_and_dense_output(solve):
    # y = exp(-k t) reaches 1/2 at log(2) / k.
    k, half = tensor(2.0).requires_grad_(), tensor(0.5).requires_grad_()
    time, states = pyode.odeint_event(
        lambda t, y, k, half: -k * y, tensor(1.0), T[0], event_fn=lambda t, y, k, half: y - half, args=(k, half),
        odeint_interface=solve,
    )  # fmt: skip
    gradients = torch.autograd.grad(time, (k, half))
    time = time.detach()
    assert float(time) == pytest.approx(0.5 * torch.log(tensor(2.0)).item(), rel=1e-6)
    assert [g.item() for g in gradients] == pytest.approx([-float(time) / 2, -1.0], rel=1e-5)
    assert states[-1].detach().item() == pytest.approx(0.5, rel=1e-6)
    dense = pyode.odeint_dense(lambda t, y, k: -k * y, tensor(1.0), 0.0, 1.0, args=(k,))
    assert dense(0.25).detach().item() == pytest.approx(torch.exp(tensor(-0.5)).item(), rel=1e-6)


def test_callbacks_are_found_on_a_func_that_has_args():
    class Counting(Net):
        steps = 0

        def forward(self, t, y, factor):
            return factor * super().forward(t, y)

        def callback_step(self, t0, y0, dt):
            self.steps += 1

        def callback_step_adjoint(self, t0, y0, dt):
            self.steps += 100

    func = Counting()
    y = pyode.odeint_adjoint(func, Y0.clone().requires_grad_(), T, args=(2.0,))
    assert 0 < func.steps < 100
    y.sum().backward()
    assert func.steps > 100


@SOLVERS
def test_args_must_be_a_tuple(solve):
    with pytest.raises(InvalidType, match=r"args must be a tuple.*not a Tensor; for one: \(x,\)"):
        solve(lambda t, y, k: -k * y, Y0, T, args=tensor(1.0).requires_grad_())


def test_without_args_func_itself_is_called():
    assert pose(NET, Y0, T, 1e-7, 1e-9, None, None).func is NET


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_option_params_is_known_and_changes_nothing(method):
    options = {"params": tuple(NET.parameters())}
    assert torch.equal(
        pyode.odeint(NET, Y0, T, method=method, options=options), pyode.odeint(NET, Y0, T, method=method)
    )


def test_adjoint_params_that_are_no_tensors_are_an_error():
    with pytest.raises(InvalidType, match=r"adjoint_params\[1\]"):
        pyode.odeint_adjoint(NET, Y0, T, adjoint_params=(tensor(1.0), "weight"))
    with pytest.raises(InvalidValue, match="adjoint_params"):
        pyode.odeint_adjoint(lambda t, y, k: -k * y, Y0, T, args=(2.0,))
