"""A whole solve as one launch on a GPU: the host-driven loop's bits, counts and errors, and what it can't do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from device_loops import (
    DEVICE,
    MARKS,
    ON,
    Field,
    HostRead,
    both,
    check_same,
    n_captures,
    nobody_waits,
    normal,
    times,
)
from torch import nn
from torch.utils._pytree import tree_leaves

import pyode
from pyode.methods import TABLEAUS

pytestmark = MARKS

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_bits_and_counts_are_those_of_the_host_driven_loop(method, control):
    check_same(Field(), normal(20, 3), times(), method=method, options={"control": control})


@pytest.mark.parametrize("options", [{}, {"step_size": 0.1}, {"step_size": 0.1, "interp": "cubic"}, {"perturb": True}])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", [*FIXED, "explicit_adams"])
def test_steps_that_are_given(method, backwards, options):
    t = times().flip(0) if backwards else times()
    check_same(Field(), normal(6, 3), t, method=method, options=options)


def test_a_multistep_method_begins_anew_at_every_solve():
    func, y0, before = Field(), normal(6, 3), n_captures()
    for order in (5, 6):
        for _ in range(3):
            (a, _), (b, _) = both(func, y0, times(20), method="explicit_adams", options={"max_order": order})
            assert torch.equal(a, b)
    assert n_captures() == before + 2


def test_given_steps_are_captured_for_their_times():
    func, before = Field(), n_captures()
    for t, n in ((times(), 1), (times(), 1), (times(8), 2), (times() * 1.1, 3), (times(8), 3)):
        for _ in range(2):
            (a, _), (b, _) = both(func, normal(6, 3), t, method="rk4")
            assert torch.equal(a, b)
        assert n_captures() == before + n


def test_given_steps_of_a_structure_with_args():
    def func(t, y, rate):
        return {"a": -rate * y["a"] * t, "b": y["b"] * rate[0]}

    y0, before = {"a": normal(3), "b": normal(2, 2)}, n_captures()
    for rate in (0.5, 1.5):
        args = (torch.full((3,), rate, device=DEVICE),)
        (a, _), (b, _) = both(func, y0, times(), method="heun3", args=args)
        assert all(map(torch.equal, tree_leaves(a), tree_leaves(b)))
    assert n_captures() == before + 1


def test_a_grid_of_the_users_and_more_steps_than_a_graph_takes():
    func, y0 = Field(), normal(6, 3)
    options = {"grid_constructor": lambda func, y0, t: torch.cat([t[:1], t[-1:] * 0.3, t[-1:]])}
    check_same(func, y0, times(), method="midpoint", options=options)
    with torch.no_grad(), pytest.warns(UserWarning, match="3000 steps are too many"):
        pyode.odeint(lambda t, y: -y, y0, times(2), method="euler", options={"step_size": 2 / 3000, **ON})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128, torch.bfloat16, torch.float16])
def test_of_every_dtype(dtype):
    rates = normal(3).to(dtype)
    loose = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {}
    check_same(lambda t, y: -y * rates * rates, normal(5, 3).to(dtype), times(), **loose)


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.05},
        {"step_t": [0.3, 1.5]},
        {"jump_t": [0.7, 1.1]},
        {"jump_t": [0.7, 1.1], "step_t": [0.3], "control": "per_sample"},
        {"max_step": 0.1, "safety": 0.8, "ifactor": 2.0},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("backwards", [False, True])
def test_with_options(options, backwards):
    t = times().flip(0) if backwards else times()
    check_same(Field(), normal(6, 3), t, options=options)


def test_a_structure_a_scalar_and_an_empty_state():
    check_same(lambda t, y: (-y[0], y[1] * t), (normal(3), normal(2, 2)), times())
    check_same(lambda t, y: {"a": -y["a"]}, {"a": normal(3)}, times())
    check_same(lambda t, y: -y, normal(1)[0], times())
    check_same(lambda t, y: -y, normal(0, 3), times())


def test_tolerances_are_copied_in():
    func, y0 = Field(), normal(5, 3)
    each = torch.tensor([1e-3, 1e-5, 1e-4], dtype=torch.float64)
    before = n_captures()
    for rtol, atol in ((1e-3, 1e-5), (1e-5, 1e-7), (each, 1e-6), (1e-4, each)):
        (a, _), (b, _) = both(func, y0, times(), rtol=rtol, atol=atol)
        assert torch.equal(a, b)
    assert n_captures() == before + 3  # numbers; a tensor and a number; a number and a tensor


def test_many_numbers():
    check_same(lambda t, y: -y * t, normal(300_001), times(3))
    check_same(lambda t, y: -y * t[:, None], normal(1000, 33), times(3), options={"control": "per_sample"})


@pytest.mark.parametrize("clipped", [True, False])
def test_times_of_each_sample(clipped):
    t = torch.stack([torch.linspace(0, 1 + b, 5) for b in range(4)], 1).to(DEVICE)
    t[:, 3] = t[0, 3]  # has no way to go
    if clipped:
        func, y0 = Field(), normal(4, 3)
        found = [pyode.solve_ivp(func, y0, t, options=more, throw=False) for more in ({}, ON)]
        assert torch.equal(found[0].ys, found[1].ys)
        for name in ("n_accepted", "n_rejected", "n_f_evals", "last_dt"):
            assert torch.equal(getattr(found[0].stats, name), getattr(found[1].stats, name))
        assert torch.equal(found[0].status, found[1].status)
    else:
        check_same(Field(), normal(4, 3), t, options={"control": "per_sample"})


def test_a_discontinuity_at_the_end_of_some_samples():
    t = torch.stack([torch.linspace(0, end, 3) for end in (1.0, 2.0, 0.5)], 1).to(DEVICE)
    for jump in (0.5, 1.0):
        check_same(Field(), normal(3, 3), t, options={"control": "per_sample", "jump_t": [jump]})


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ({"func": lambda t, y: y * y}, "STEP_TOO_SMALL"),
        ({"options": {"max_num_steps": 2}, "rtol": 1e-9, "atol": 1e-9}, "TOO_MANY_STEPS"),
        ({"func": lambda t, y: torch.where(t > 0.5, torch.nan, 1.0) * y}, "NON_FINITE"),
        ({"func": lambda t, y: y * torch.nan}, "NON_FINITE"),
    ],
)
def test_errors_are_those_of_the_host_driven_loop(what, status):
    errors = []
    func, t = what.get("func", lambda t, y: -y), times()
    for more in ({}, ON):
        with pytest.raises(pyode.SolveError) as caught:
            pyode.odeint(
                func, torch.ones(3, device=DEVICE), t, what.get("rtol", 1e-4), what.get("atol", 1e-6),
                options={**what.get("options", {}), **more},
            )  # fmt: skip
        errors.append(caught.value)
    assert errors[0].args == errors[1].args
    assert errors[0].status is pyode.Status[status]
    check_same(lambda t, y: -y, torch.ones(3, device=DEVICE), t)  # and the next one is right


def test_a_failure_that_is_returned():
    def func(t, y):
        return torch.where(t > 0.5, torch.nan, 1.0) * y

    found = []
    for more in ({}, ON):
        with pytest.warns(UserWarning, match="the solve failed"):
            found.append(
                pyode.odeint(func, torch.ones(3, device=DEVICE), times(), options={"on_failure": "return", **more})
            )
    assert torch.equal(*found)
    y0 = torch.tensor([[1.0], [-1.0], [0.5]], device=DEVICE)
    solutions = [
        pyode.solve_ivp(lambda t, y: y * y.abs() * 2, y0, times(), throw=False, options=more) for more in ({}, ON)
    ]
    assert torch.equal(solutions[0].status, solutions[1].status)
    assert torch.equal(solutions[0].ys.nan_to_num(7.0), solutions[1].ys.nan_to_num(7.0))
    assert not solutions[0].success


@pytest.mark.parametrize(
    "t",
    [
        [0.0, 1.0, 0.5], [0.0, 1.0, 1.0], [0.0, float("nan"), 1.0], [float("nan"), 1.0, 2.0], [0.0, float("inf")],
        [[0.0, 0.0], [1.0, 1.0], [0.5, 2.0]], [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
    ],
)  # fmt: skip
def test_times_that_are_wrong(t):
    t, kwargs = torch.tensor(t, device=DEVICE), {"control": "per_sample"} if isinstance(t[0], list) else {}
    errors, func, y0 = [], Field(), normal(2, 3)
    for more in ({}, ON):
        for _ in range(2):
            with pytest.raises(pyode.errors.InvalidValue, match=r"t must be|column of t must be") as caught:
                pyode.odeint(func, y0, t, options={**more, **kwargs})
            errors.append(str(caught.value))
    assert len(set(errors)) == 1
    solution = pyode.solve_ivp(func, y0, t, throw=False, options=ON)
    with pytest.raises(pyode.errors.InvalidValue, match=r"t must be|column of t must be"):
        solution.status  # noqa: B018
    check_same(func, y0, times())  # and the next one is right


@pytest.mark.parametrize("of_samples", [False, True])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize(
    ("func", "change"),
    [
        (lambda t, y: -y, {}),
        (lambda t, y: 2 * y * y.abs(), {}),  # blows up
        (lambda t, y: -y, {"max_num_steps": 2}),
        (lambda t, y: -y * torch.where(y.mean() > 0, torch.nan, 1.0), {}),
        (lambda t, y: y.abs() + 1, {"rtol": 1e9, "atol": 0.0}),  # beyond all tolerance where y0 is 0
    ],
)
def test_nobody_waits_for_a_solve_that_may_fail_until_somebody_looks(func, change, control, of_samples):
    y0, t = torch.tensor([[1.0], [-1.0], [0.0]], device=DEVICE), times()
    if of_samples and control == "per_sample":
        t = t[:, None] * torch.tensor([1.0, 0.5, 0.7], device=DEVICE)
    kwargs = {"throw": False, "control": control, "rtol": 1e-4, "atol": 1e-6, **change}
    expected = pyode.solve_ivp(func, y0, t, **kwargs)
    pyode.solve_ivp(func, y0, t, **kwargs, options=ON)
    with nobody_waits():
        solution = pyode.solve_ivp(func, y0, t, **kwargs, options=ON)
        assert not {"status", "stats"} & vars(solution).keys()
    for found in (copy.deepcopy(solution), solution, solution.detach()):
        assert torch.equal(found.status, expected.status)
        for name in ("n_f_evals", "n_accepted", "n_rejected", "last_dt"):
            assert torch.equal(getattr(found.stats, name), getattr(expected.stats, name))
        assert torch.equal(found.ys.nan_to_num(7.0), expected.ys.nan_to_num(7.0))
    with pytest.raises(AttributeError, match="no 'statuses'"):
        solution.statuses  # noqa: B018


class Random(nn.Module):
    def forward(self, t, y):
        return y * torch.rand_like(y)


class WithCallback(nn.Module):
    def forward(self, t, y):
        return -y

    def callback_step(self, t, y, dt):
        pass


@pytest.mark.parametrize(
    ("func", "kwargs", "reason"),
    [
        (Random(), {}, "random numbers"),
        (HostRead(), {}, "can't be captured"),
        (WithCallback(), {}, "callbacks"),
        (Random(), {"method": "rk4"}, "random numbers"),
        (lambda t, y: -y, {"method": "adams"}, "orders and sizes of the steps of 'adams'"),
        (lambda t, y: -y, {"method": "fixed_adams"}, "equations of a step of 'fixed_adams' are solved"),
        (lambda t, y: -y, {"method": "gl4"}, "equations of a step of 'gl4' are solved"),
        (lambda t, y: -y, {"method": "scipy_solver"}, "SciPy"),
        (lambda t, y: -y, {"options": {"norm": lambda y: y.abs().max()}}, "options\\['norm'\\]"),
    ],
)
def test_what_the_host_drives_instead_is_told(func, kwargs, reason):
    y0 = torch.ones(3, device=DEVICE)
    options = {**kwargs.pop("options", {}), **ON}
    with pytest.warns(UserWarning, match=reason) as caught:
        y = pyode.odeint(func, y0, times(), 1e-3, 1e-5, **kwargs, options=options)
    assert len(caught) == 1
    assert y.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyode.odeint(func, y0, times(), 1e-3, 1e-5, **kwargs, options={**options, "device_loop": "auto"})
    check_same(Field(), normal(4, 3), times())  # and the next one can be captured


def test_what_could_not_be_captured_is_not_tried_again():
    class Counting(Random):
        calls = 0

        def forward(self, t, y):
            Counting.calls += 1
            return super().forward(t, y)

    func, counts = Counting(), []
    for _ in range(3):
        before, stats = Counting.calls, pyode.Stats()
        with pytest.warns(UserWarning, match="random numbers"):
            pyode.odeint(func, torch.ones(3, device=DEVICE), times(), 1e-1, 1e-1, options={**ON, "stats": stats})
        counts.append(Counting.calls - before - stats.n_f_evals)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_a_graph_through_every_step_is_the_hosts():
    with torch.enable_grad(), pytest.warns(UserWarning, match="gradient='direct'"):
        y = pyode.odeint(Field(), normal(4, 3), times(), options=ON)
    assert y.requires_grad
