"""Gradients of compiled solves: those of the eager solve, to rounding."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from fields import TIGHT, Y0, Field, T, assert_close, gradients, loss_of
from problems import kepler, kepler_start, tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyode
from pyode.methods import TABLEAUS


def strict(f):
    return pyode.compile(f, strict=True)


def compiled(solve):
    """A solver that compiles func first."""
    return lambda f, *args, **kwargs: solve(strict(f), *args, **kwargs)


@pytest.mark.parametrize("method", TABLEAUS)
def test_every_method(method):
    arguments = {"method": method, **({"rtol": 1e-5, "atol": 1e-7} if TABLEAUS[method].adaptive else {})}
    options = {} if TABLEAUS[method].adaptive else {"options": {"step_size": 0.15}}
    found = [gradients(solve, time=False, **arguments, **options) for solve in (compiled(pyode.odeint), pyode.odeint)]
    # dopri8's error estimate is a millionth of its terms, and the sizes of its steps are as exact as that.
    assert_close(*found, 1e-10 if method == "dopri8" else 1e-11)


WATCHES = {
    "anomaly mode": torch.autograd.detect_anomaly,
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().numpy(), torch.from_numpy),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("way", ["checkpoint", "reentrant checkpoint", *WATCHES])
def test_who_looks_at_gradients_does_not_look_at_their_trace(way):
    def found(make, again, watch):
        field, y0 = Field(), Y0.clone().requires_grad_()
        f = make(field)
        solve = partial(pyode.odeint, f, t=T, **TIGHT)
        with watch():
            loss_of(again(solve, y0) if again else solve(y0)).backward()
        return [y0.grad, *(p.grad for p in field.trained())]

    again = partial(checkpoint, use_reentrant=way.startswith("reentrant")) if "checkpoint" in way else None
    expected = found(lambda field: field, None, nullcontext)
    assert_close(found(strict, again, WATCHES.get(way, nullcontext)), expected, 1e-11)


@pytest.mark.parametrize("sign", [1, -1])
def test_discontinuities_and_prescribed_steps(sign):
    options = {"jump_t": sign * tensor(0.2, 0.5), "step_t": sign * tensor(0.9)}
    found = [
        gradients(solve, sign, time=False, **TIGHT, options=options) for solve in (compiled(pyode.odeint), pyode.odeint)
    ]
    assert_close(*found, 1e-11)


@pytest.mark.parametrize("method", [name for name, tableau in TABLEAUS.items() if not tableau.adaptive])
def test_cubics_between_fixed_steps(method):
    for sign, options in ((1, {}), (-1, {"perturb": True})):
        arguments = {"method": method, "options": {"step_size": 0.15, "interp": "cubic", **options}}
        found = [gradients(solve, sign, time=False, **arguments) for solve in (compiled(pyode.odeint), pyode.odeint)]
        assert_close(*found, 1e-11)


@pytest.mark.parametrize("n", [2, 33, 200])
def test_a_first_solve_of_any_number_of_fixed_steps(n):
    arguments = {"method": "rk4", "options": {"step_size": 1.0 / n}}
    found = [gradients(solve, time=False, **arguments) for solve in (compiled(pyode.odeint), pyode.odeint)]
    assert_close(*found, 1e-11)


def test_gradcheck():
    field = Field()
    f = strict(field)

    def solve(y0: Tensor, *_: Tensor) -> Tensor:
        return pyode.odeint(f, y0, T, method="rk4", options={"step_size": 0.2})

    assert torch.autograd.gradcheck(solve, (Y0.clone().requires_grad_(), *field.trained()))


def test_gradients_of_gradients():
    found = []
    for f in (strict(Field()), Field()):
        y0 = Y0.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(pyode.odeint(f, y0, T)), y0, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), y0))
    assert_close(*found, 1e-8)


def test_many_gradients_at_once():
    f = strict(Field())
    at_once, apart = (
        torch.autograd.functional.jacobian(lambda y0: pyode.odeint(f, y0, T), Y0, vectorize=way)
        for way in (True, False)
    )
    assert_close([at_once], [apart], 1e-11)


def networks() -> list[nn.Module]:
    """With layers of every kind, wide enough for sums over rows of either form."""
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(3, 50), nn.SiLU(), nn.LayerNorm(50), nn.Linear(50, 3)),
        nn.Sequential(nn.Linear(3, 70), nn.GELU(), nn.Linear(70, 40), nn.Softplus(), nn.Linear(40, 3, bias=False)),
    ]


@pytest.mark.parametrize("i", [0, 1])
def test_networks(i):
    net = networks()[i].double()
    y0, t = torch.randn(21, 3, dtype=torch.float64), tensor(0.0, 0.3, 1.0)
    found = []
    for f in (strict(lambda t, y: net(y)), lambda t, y: net(y)):
        start = y0.clone().requires_grad_()
        loss = loss_of(pyode.odeint(f, start, t, method="midpoint"))
        found.append(torch.autograd.grad(loss, [start, *net.parameters()]))
    assert_close(*found, 1e-10)


@pytest.mark.parametrize("dim", [0, None])
def test_weight_norm(dim):
    """Torch's derivative of a norm writes into what it computes from parameters alone."""
    net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2), dim=dim).double()
    found = []
    for f in (strict(lambda t, y: net(y).tanh()), lambda t, y: net(y).tanh()):
        start = Y0.clone().requires_grad_()
        found.append(torch.autograd.grad(loss_of(pyode.odeint(f, start, T, **TIGHT)), [start, *net.parameters()]))
    assert_close(*found, 1e-10)


def test_what_parameters_alone_give_is_written_into():
    a = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        scale = 2 * a
        scale += t
        scale[0] = y.new_ones(())
        return torch.tanh(scale * y)

    found = []
    for f in (strict(func), func):
        start = Y0.clone().requires_grad_()
        found.append(torch.autograd.grad(loss_of(pyode.odeint(f, start, T, **TIGHT)), [start, a]))
    assert_close(*found, 1e-10)


def test_parameters_behind_a_network_of_time():
    """To them eagerly, with a warning that says so; frozen, they are no obstacle."""
    hyper, a = nn.Linear(1, 4).double(), torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ torch.tanh(hyper(t.reshape(1))).view(2, 2) @ a)

    def solved(f, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(pyode.odeint(f, Y0, T, **TIGHT)), wanted)

    f = pyode.compile(func)
    with pytest.warns(UserWarning, match="runs eagerly: its gradient: .* for parameters behind a network of time"):
        found = solved(f, [a, *hyper.parameters()])
    assert_close(found, solved(func, [a, *hyper.parameters()]), 1e-12)
    hyper.requires_grad_(False)
    assert_close(solved(strict(func), [a]), solved(func, [a]), 1e-10)


def test_parameters_used_before_the_rows_come_in():
    a = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    y0, t = torch.randn(9, 3, dtype=torch.float64), tensor(0.0, 1.0)
    found = []
    for f in (strict(lambda t, y: y @ (a - a.T) * a.sum()), lambda t, y: y @ (a - a.T) * a.sum()):
        found.append(torch.autograd.grad(loss_of(pyode.odeint(f, y0, t, method="midpoint")), a))
    assert_close(*found, 1e-10)


@pytest.mark.parametrize("solve", [pyode.odeint, pyode.odeint_adjoint])
def test_what_func_computes_without_gradients_is_a_constant(solve):
    a = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    y0, t = torch.randn(9, 3, dtype=torch.float64), tensor(0.0, 1.0)

    def scaled(t, y):
        with torch.no_grad():
            size = (y @ a).square().mean(1, keepdim=True)
        with torch.set_grad_enabled(False):
            shift = t * a.sum()
        return y @ (a - a.T) / (1 + size) + shift

    found = []
    for f in (strict(scaled), scaled):
        start = y0.clone().requires_grad_()
        found.append(torch.autograd.grad(loss_of(solve(f, start, t, **TIGHT)), [start, a]))
    assert_close(*found, 1e-9)


def test_matrices_bigger_than_a_threads_stack():
    a = (torch.randn(1500, 1500) / 100).requires_grad_()
    y0, t = torch.randn(3, 1500), torch.tensor([0.0, 0.3])
    found = []
    for f in (strict(lambda t, y: y @ (a - a.T)), lambda t, y: y @ (a - a.T)):
        found.append(torch.autograd.grad(loss_of(pyode.odeint(f, y0, t, method="euler")), a))
    assert_close(*found, 1e-4)


def test_a_state_that_is_one_row():
    mass = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    y0, t = kepler_start(0.3), tensor(0.0, 1.0, 2.0)
    found = []
    for f in (strict(lambda t, y: kepler(t, y) * mass), lambda t, y: kepler(t, y) * mass):
        start = y0.clone().requires_grad_()
        found.append(torch.autograd.grad(loss_of(pyode.odeint(f, start, t)), [start, mass]))
    assert_close(*found, 1e-9)


def test_what_is_frozen_has_none_and_a_longer_solve_finds_room():
    field = Field()
    f = strict(field)
    field.bias.requires_grad_(False)
    for end in (0.1, 20.0):
        pyode.odeint(f, Y0, tensor(0.0, end)).sum().backward()
        assert field.bias.grad is None
        assert field.matrix.grad is not None
        field.zero_grad()
    field.bias.requires_grad_(True)
    loss_of(pyode.odeint(f, Y0, T)).backward()
    assert field.bias.grad is not None


def test_shared_parameters_are_one_until_they_part():
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    second.weight = first.weight

    def f(t: Tensor, y: Tensor) -> Tensor:
        return second(torch.tanh(first(y)))

    compiled, y0, t = strict(f), torch.randn(9, 3, dtype=torch.float64), tensor(0.0, 1.0)
    for n in (3, 4):
        params = list(nn.ModuleList([first, second]).parameters())
        assert len(params) == n
        losses = [loss_of(pyode.odeint(g, y0, t, method="midpoint")) for g in (compiled, f)]
        assert_close(*(torch.autograd.grad(loss, params) for loss in losses), 1e-10)
        second.weight = nn.Parameter(first.weight.detach() + 0.1)


def test_the_same_bits_for_any_number_of_threads():
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    y0, t, f, found = torch.randn(1000, 8), torch.tensor([0.0, 1.0]), strict(lambda t, y: net(y)), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        loss = pyode.odeint(f, y0, t, rtol=1e-4, atol=1e-5).square().sum()
        found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()))]))
    assert all(torch.equal(g, found[0]) for g in found)


@pytest.mark.parametrize("solver", ["odeint", "joint", "per_sample"])
def test_checkpoints_asked_for_by_name_are_a_compiled_solves_own(solver):
    def solve(f, y0, **options):
        if solver == "odeint":
            return pyode.odeint(f, y0, T, **TIGHT, options={"gradient": "checkpoint", **options})
        return pyode.solve_ivp(f, y0, T, **TIGHT, gradient="checkpoint", control=solver, options=options).ys

    found, calls = [], []
    for make, options in ((strict, {}), (strict, {"checkpoints": 3}), (lambda f: f, {})):
        field = Field()
        f = make(lambda t, y, field=field: field(t[:, None] if t.dim() else t, y))
        for _ in range(2):  # func is called once to be traced
            y0, before = Y0.clone().requires_grad_(), field.calls
            gradients = torch.autograd.grad(loss_of(solve(f, y0, **options)), [y0, *field.trained()])
        found.append(gradients)
        calls.append(field.calls - before)
    assert calls[0] == 0
    assert calls[1] > 0  # fewer states than steps are kept: by the eager loop
    for gradients in found[:2]:
        assert_close(gradients, found[2], 1e-9)


def test_under_autocast_a_solve_is_the_eager_one():
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    y0, t = torch.randn(5, 2), torch.linspace(0, 1, 3)
    f = strict(lambda t, y: net(y).to(y.dtype))

    def solve(g):
        return pyode.odeint(g, y0, t, method="midpoint")

    plain = solve(f)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(solve(f), solve(f.func))
            assert not torch.equal(solve(f), plain)
    assert torch.equal(solve(f), plain)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_written_to_before_the_backward_pass_is_noticed(frozen):
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=not frozen)
    y0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    f = strict(lambda t, y: torch.sin(y @ weight))
    ys = pyode.odeint(f, y0, torch.linspace(0, 1, 3), method="midpoint")
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        ys.sum().backward()
