"""Warnings: torchdiffeq's, where it warns, by the beginning of their text; and none where it does not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchdiffeq
from problems import tensor
from torch import nn

import pyode
from pyode.methods import METHODS

ON_PYPI = list(torchdiffeq._impl.odeint.__globals__["SOLVERS"])
T = tensor(0.0, 0.1, 0.2)


class Decay(nn.Module):
    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.rate = nn.Parameter(tensor(1.0, 2.0))
        self.other = nn.Parameter(tensor(1.0), requires_grad=not frozen)

    def forward(self, t, y):
        return -self.rate * y


def warned(solve, *args, **kwargs) -> list[tuple[type, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(*args, **kwargs)
    return [(w.category, str(w.message)) for w in caught]


def compare(ours: list[tuple[type, str]], theirs: list[tuple[type, str]], exactly: bool = True) -> None:
    assert len(ours) == len(theirs), (ours, theirs)
    for (category, text), (expected, beginning) in zip(ours, theirs):
        assert category is expected
        assert text == beginning if exactly else text.startswith(beginning)


def both(interface: str, func=None, **kwargs) -> list[list[tuple[type, str]]]:
    y0 = tensor(1.0, 0.5)
    return [
        warned(getattr(module, interface), func or Decay(), y0, T, **{"rtol": 1e-4, "atol": 1e-4, **kwargs})
        for module in (pyode, torchdiffeq)
    ]


@pytest.mark.parametrize("method", ON_PYPI)
@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
def test_of_unknown_options(method, interface):
    ours, theirs = both(interface, method=method, options={"wrong": 1, "also_wrong": None})
    # odeint_adjoint hands them to both solves; torchdiffeq's second warns in the backward pass, ours when it is posed.
    assert {text.partition(";")[0] for _, text in ours} == {text for _, text in theirs} != set()


@pytest.mark.parametrize("method", ON_PYPI)
def test_of_those_of_the_other_kind_of_methods(method):
    options = {"interp": "cubic"} if METHODS[method].adaptive else {"first_step": 0.1}
    ours, theirs = both("odeint", method=method, options=options)
    compare(ours, theirs, exactly=False)
    assert ours


@pytest.mark.parametrize("method", ON_PYPI)
@pytest.mark.parametrize("options", [{"norm": lambda y: y.abs().max()}, {}])
def test_none_of_what_is_known(method, options):
    compare(*both("odeint", method=method, options=options))


@pytest.mark.parametrize("method", [name for name in ON_PYPI if name not in ("dopri5", "dopri8")])
@pytest.mark.parametrize("suffix", ["", "_adjoint"])
@pytest.mark.parametrize("name", ["callback_step", "callback_accept_step", "callback_reject_step"])
def test_of_a_callback(name, suffix, method):
    func = Decay()
    setattr(func, name + suffix, lambda t0, y0, dt: None)
    compare(*both("odeint", func, method=method))


@pytest.mark.parametrize("method", ["rk4", "euler", "bosh3", "implicit_adams"])
@pytest.mark.parametrize("name", ["callback_step", "callback_accept_step", "callback_reject_step"])
def test_of_a_callback_of_the_backward_solve(name, method):
    texts = []
    for module in (pyode, torchdiffeq):
        func = Decay()
        setattr(func, name + "_adjoint", lambda t0, y0, dt: None)

        def solve(module=module, func=func):
            y = module.odeint_adjoint(func, tensor(1.0, 0.5), T, rtol=1e-4, atol=1e-4, method=method)
            y.sum().backward()

        texts.append({text.replace("_adjoint", "") for _, text in warned(solve)})  # where torchdiffeq has lost the name
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["callback_step", "callback_accept_step", "callback_reject_step"])
@pytest.mark.parametrize("suffix", ["", "_adjoint"])
@pytest.mark.parametrize("method", METHODS)
def test_of_a_callback_that_is_called_in_neither_solve(method, suffix, name):
    func, calls = Decay(), []
    setattr(func, name + suffix, lambda t0, y0, dt: calls.append(dt))

    def solve():
        y = pyode.odeint_adjoint(func, tensor(1.0, 0.5), T, rtol=1e-4, atol=1e-4, method=method)
        y.sum().backward()

    texts = [text for _, text in warned(solve)]
    called = method != "scipy_solver" and (METHODS[method].adaptive or name == "callback_step")
    assert texts == ([] if called else [f"Solver '{method}' does not support callbacks {{'{name}{suffix}'}}"])
    assert bool(calls) == called or name == "callback_reject_step"  # perhaps none was rejected


@pytest.mark.parametrize("suffix", ["", "_adjoint"])
def test_of_a_callback_where_every_sample_takes_its_own_steps(suffix):
    func = Decay()
    setattr(func, "callback_step" + suffix, lambda t0, y0, dt: None)
    ((_, text),) = warned(pyode.odeint_adjoint, func, torch.ones(3, 2), T, options={"control": "per_sample"})
    assert text == f"Solver 'dopri5' does not support callbacks {{'callback_step{suffix}'}} with control='per_sample'"


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_of_an_adjoint_callback_that_solve_ivp_does_not_call(control):
    func, y0 = Decay(), torch.ones(3, 2, requires_grad=True)
    func.callback_accept_step_adjoint = lambda t0, y0, dt: pytest.fail("was called")

    def solve():
        pyode.solve_ivp(func, y0, T, control=control, gradient="adjoint").ys.sum().backward()

    ((_, text),) = warned(solve)
    assert text == (
        "Solver 'dopri5' does not support callbacks {'callback_accept_step_adjoint'} in solve_ivp's backward solve"
    )


class Steep(Decay):
    def forward(self, t, y):
        return 100 * super().forward(t, y)


CALLS = {
    "an unknown option": lambda: pyode.odeint(Decay(), tensor(1.0, 0.5), T, options={"wrong": 1}),
    "a callback": lambda: pyode.odeint(with_callback(), tensor(1.0, 0.5), T, method="rk4"),
    "a low order": lambda: pyode.odeint(Decay(), tensor(1.0, 0.5), T, 1e-3, 1e-3, "implicit_adams", {"max_order": 3}),
    "few iterations": lambda: pyode.odeint(
        Steep(), tensor(1.0, 0.5), torch.linspace(0, 1, 9), 1e-9, 1e-9, "implicit_adams"
    ),
    "a frozen parameter": lambda: pyode.odeint_adjoint(
        Decay(True), tensor(1.0, 0.5), T, adjoint_options={"norm": lambda parts: parts[1].abs().max()}
    ),
    "a lost gradient": lambda: pyode.odeint_adjoint(
        Decay(), tensor(1.0, 0.5), T, adjoint_params=tuple(Decay().parameters())
    ),
    "a failure": lambda: pyode.odeint(
        Decay(), tensor(1.0, 0.5), T, options={"on_failure": "return", "max_num_steps": 0}
    ),
    "the second solve": lambda: pyode.odeint_adjoint(
        Steep(), tensor(1.0, 0.5), torch.linspace(0, 1, 9), 1e-4, 1e-4, "rk4", adjoint_method="implicit_adams",
        adjoint_rtol=1e-12, adjoint_atol=1e-14, adjoint_options={"step_size": 0.02},
    ).sum().backward(),
}  # fmt: skip


def with_callback() -> Decay:
    func = Decay()
    func.callback_reject_step = print
    return func


@pytest.mark.parametrize("call", CALLS)
def test_they_point_at_the_line_that_called(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[call]()
    assert caught
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("kwargs", [
    {}, {"adjoint_options": {}}, {"adjoint_options": {"norm": "seminorm"}},
    {"adjoint_options": {"norm": lambda parts: max(part.abs().max() for part in parts)}},
    {"options": {"norm": lambda y: y.abs().max()}},
    {"options": {"norm": lambda y: y.abs().max()}, "adjoint_options": {}},
], ids=["nothing", "options", "seminorm", "norm", "norm of the forward solve", "and options"])  # fmt: skip
@pytest.mark.parametrize("frozen", [False, True])
def test_of_a_frozen_parameter(kwargs, frozen):
    compare(*both("odeint_adjoint", Decay(frozen), **kwargs))


def test_of_orders_too_low_and_iterations_too_few():
    compare(*both("odeint", method="implicit_adams", options={"max_order": 3}))

    class Fast(Decay):
        def forward(self, t, y):
            return 100 * super().forward(t, y)

    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    ours, theirs = (
        warned(module.odeint, Fast(), tensor(1.0, 0.5), t, rtol=1e-9, atol=1e-9, method="implicit_adams")
        for module in (pyode, torchdiffeq)
    )
    assert set(ours) == set(theirs) != set()
