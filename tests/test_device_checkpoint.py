"""The checkpoint gradient on a GPU as two launches: the bits and counts of the host-driven loop's."""

from __future__ import annotations

import warnings

import pytest
import torch
from device_loops import DEVICE, MARKS, ON, Field, check_same_gradients, n_captures, normal, times

import pyode
from pyode.methods import TABLEAUS

pytestmark = MARKS

FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]


def by_odeint(func, y, t, options, counting, method="rk4", **kwargs):
    options = {**options, "gradient": "checkpoint", "stats": counting["stats"]}
    return pyode.odeint(func, y, t, 1e-4, 1e-6, method=method, options=options, **kwargs)


def by_solve_ivp(func, y, t, options, counting, method="rk4", **kwargs):
    options = {**options, "stats": counting["stats"]}
    kwargs = {"control": "joint", **kwargs}
    return pyode.solve_ivp(func, y, t, method=method, gradient="checkpoint", options=options, **kwargs).ys


@pytest.mark.parametrize("options", [{}, {"step_size": 0.3}, {"step_size": 0.3, "interp": "cubic"}, {"perturb": True}])
@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_of_given_steps(method, with_time, options):
    func, t = Field(), times(4).requires_grad_(with_time)
    check_same_gradients(by_odeint, func, normal(5, 3), t, tuple(func.parameters()), method=method, options=options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("solve", [by_odeint, by_solve_ivp])
def test_of_every_dtype_backwards_in_time(solve, dtype):
    rate, t = normal(3, dtype=dtype).requires_grad_(), times(4).flip(0).requires_grad_()
    check_same_gradients(
        solve, lambda t, y: torch.sin(y) / 2 - rate * y * t / 8, normal(5, 3, dtype=dtype), t, (rate,),
        options={"step_size": 0.4},
    )  # fmt: skip


def test_of_a_structure_with_args_and_a_parameter_without_effect():
    def func(t, y, rate, unused):
        return {"a": -rate * y["a"] * t, "b": y["b"] * rate[0] + 0 * unused.detach()}

    y0, rate = {"a": normal(3), "b": normal(2, 2)}, torch.full((3,), 0.5, device=DEVICE, requires_grad=True)
    unused = normal(1).requires_grad_()
    check_same_gradients(by_odeint, func, y0, times(4), (rate, unused), args=(rate, unused))


def test_training_captures_once_and_args_are_copied_in():
    finals, y0, before = [], normal(4, 3), n_captures()

    class Scaled(Field):
        def forward(self, t, y, scale):
            return super().forward(t, y) * scale

    for more in ({}, ON):
        torch.manual_seed(0)
        func, scale = Scaled(), torch.ones(3, device=DEVICE)
        optimizer = torch.optim.SGD(func.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad(set_to_none=False)
            with torch.enable_grad():
                out = by_odeint(func, y0, times(), more, {"stats": None}, args=(scale,))
                (out[-1] - 1).square().mean().backward()
            optimizer.step()
            scale = scale * 0.9
        finals.append([p.detach().clone() for p in func.parameters()])
    assert all(map(torch.equal, *finals))
    assert n_captures() == before + 2


def test_several_solves_wait_for_their_gradients():
    func, starts, found = Field(), [normal(4, 3).requires_grad_() for _ in range(3)], []
    for more in ({}, ON):
        with torch.enable_grad():
            outs = [by_odeint(func, y, times(), more, {"stats": None}) for y in starts]
            loss = sum((i * out).square().sum() for i, out in enumerate(outs, 1))
            found.append(torch.autograd.grad(loss, (*starts, *func.parameters())))
    assert all(map(torch.equal, *found))


def test_a_gradient_that_is_lost_is_told():
    func, y, hidden = Field(), normal(4, 3), normal(3).requires_grad_()
    params = tuple(func.parameters())
    kwargs = {"options": {"params": params}, "captures": 2}
    with pytest.warns(UserWarning, match="requires gradient and is not among those") as caught:
        check_same_gradients(by_odeint, lambda t, y: func(t, y) * hidden, y, times(), params, **kwargs)
    assert len(caught) == 2  # once by each


def test_a_tensor_for_which_none_can_stand_has_its_gradient_by_the_host():
    names = {"rates": normal(3).requires_grad_()}
    exec("def func(t, y): return -rates * y", names)
    with pytest.warns(UserWarning, match="because a tensor that wants a gradient is a global variable") as caught:
        check_same_gradients(by_odeint, names["func"], normal(4, 3), times(), (names["rates"],), captures=1)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("choice", "kwargs", "why"),
    [
        ({"checkpoints": 2}, {}, "keeps a part of the states"),
        ({"step_size": 2 / 3000}, {}, "3000 steps are too many"),
        ({}, {"method": "trbdf2"}, "is not an explicit"),
    ],
    ids=str,
)
def test_what_the_host_drives_with_one_warning(choice, kwargs, why):
    func = Field()
    with pytest.warns(UserWarning, match=why) as caught:
        check_same_gradients(
            by_odeint, func, normal(2, 3), times(2), tuple(func.parameters()), choice, captures=0, **kwargs
        )
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_odeint(func, normal(2, 3), times(2), {**choice, "device_loop": "auto"}, {"stats": None}, **kwargs)
