"""gradient="checkpoint" in solve_ivp: to rounding the direct gradient, sample by sample and jointly."""

from __future__ import annotations

import math

import pytest
import torch
from ensembles import oscillators, van_der_pol
from fields import assert_close
from problems import tensor
from torch import Tensor

import pyode
from pyode import Status, solve_ivp
from pyode.methods import TABLEAUS

F64 = torch.float64
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
Y0 = torch.tensor([[1.0, -2.0], [0.5, 0.3], [2.0, 1.0]], dtype=F64)
WEIGHT = torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=F64)
SHARED = tensor(0.0, 0.4, 0.5, 1.3)
OWN = torch.tensor([[0.0, 0.3, 1.0], [0.4, -0.4, 1.2], [0.5, -1.0, 2.0], [1.3, -1.0, 2.2]], dtype=F64)  # one is padded
TIMES = pytest.mark.parametrize("t", [SHARED, -SHARED, OWN], ids=["forward", "backward", "own"])


def field(t: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """Nonlinear, and fast enough in time for rejected steps; t is [B] or 0-dim."""
    return torch.tanh(y @ a) * (1 + torch.sin(5 * t)).unsqueeze(-1)


def gradients(gradient, t, func=field, y0=Y0, event=None, options=None, **kwargs) -> list[Tensor]:
    """Of a loss on all that a Solution has, with respect to the start, the times and the argument."""
    inputs = [x.clone().requires_grad_() for x in (y0, t, WEIGHT)]
    y0, t, a = inputs
    solution = solve_ivp(
        func, y0, t, args=(a,), event_fn=event, gradient=gradient,
        options=options if gradient == "checkpoint" or not options else {
            k: v for k, v in options.items() if k not in ("checkpoints", "graph_bytes")
        }, **kwargs,
    )  # fmt: skip
    ys = solution.ys.nan_to_num()
    loss = (torch.linspace(-1, 2, ys.numel(), dtype=F64).view(ys.shape) * ys).abs().square().sum()
    if event is not None:
        loss = loss + 0.7 * solution.event_t.nansum() + solution.event_y.nan_to_num().square().sum()
    return list(torch.autograd.grad(loss, inputs, materialize_grads=True))


MODES = ({}, {"graph_bytes": 3000}, {"graph_bytes": 0}, {"checkpoints": 1}, {"checkpoints": 3})


def assert_as_direct(t, modes=MODES, options=None, **kwargs) -> None:
    expected = gradients("direct", t, options=options, **kwargs)
    for mode in modes:
        assert_close(gradients("checkpoint", t, options={**(options or {}), **mode}, **kwargs), expected, 1e-11)


@TIMES
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("stop", [None, "step_t", "jump_t"])
def test_of_samples(t, method, stop):
    sign = -1.0 if t is not OWN and t[-1] < 0 else 1.0
    options = {} if stop is None else {stop: sign * tensor(0.45, 1.2)}
    assert_as_direct(t, method=method, options=options, atol=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("stop", [None, "jump_t"])
@pytest.mark.parametrize(
    ("control", "t"), [("per_sample", SHARED), ("per_sample", -SHARED), ("per_sample", OWN), ("joint", SHARED)]
)
def test_with_events(t, method, stop, control):
    # One event inside the first steps, one late, one never; with outputs on both sides of it.
    options = {} if stop is None else {stop: math.copysign(1.0, float(t.reshape(-1)[-1])) * tensor(0.2, 0.9)}

    def event(t, y, a):
        if control == "joint":
            return y[0, 0] - 1.1 * a[0, 1] - 0.1 * t
        levels = torch.tensor([[1.5, 0.5], [0.45, 0.55], [9.0, 9.0]], dtype=F64) * a[0, 1]
        return (y[:, :1] - levels).prod(1)

    with torch.no_grad():
        met = solve_ivp(
            field, Y0, t, args=(WEIGHT,), event_fn=event, control=control, options=dict(options)
        ).event_index
    assert control == "joint" or 0 < int((met >= 0).sum()) < 3
    assert_as_direct(t, method=method, options=options, event=event, control=control)


def test_an_event_of_a_joint_solve_is_met():
    t = tensor(0.0, 0.4, 0.5, 5.0)
    for method in ("dopri5", "bosh3"):
        event = lambda t, y, a: y[0, 0] - a[0, 1] * (0.9 + 0.1 * t)  # noqa: E731
        found = solve_ivp(
            field, Y0, t, args=(WEIGHT,), event_fn=event, control="joint", gradient="checkpoint", method=method
        )
        assert found.status.tolist() == [Status.EVENT]
        assert_as_direct(t, event=event, control="joint", method=method)


def test_an_event_at_the_start():
    assert_as_direct(SHARED, event=lambda t, y, a: y[:, 0] - 0.5)


@pytest.mark.parametrize("controller", ["PI", "H211b"])
def test_with_other_controllers(controller):
    assert_as_direct(SHARED, controller=controller)


@pytest.mark.parametrize("method", ["rk4", "euler"])
def test_of_methods_with_fixed_steps(method):
    assert_as_direct(SHARED, method=method, control="joint", options={"step_size": 0.3})


def test_with_the_reference_backend():
    with pyode.backend("reference"):
        assert_as_direct(OWN)


def test_of_one_sample_and_of_none():
    assert_as_direct(SHARED, y0=Y0[:1])
    by_y0, by_t, by_a = gradients("checkpoint", SHARED, y0=Y0[:0])
    assert by_y0.shape == (0, 2)
    assert not by_t.any()
    assert not by_a.any()


def test_of_nested_complex_states():
    def run(gradient):
        z = (Y0[:, 0] + 1j * Y0[:, 1]).requires_grad_()
        x, a = (0.3j * Y0).requires_grad_(), WEIGHT.clone().requires_grad_()

        def func(t, y):
            return {"z": 1j * y["z"] * (1 + t) - y["x"][:, 0] * y["z"].abs(), "x": y["x"].conj() @ a.to(y["x"].dtype)}

        solution = solve_ivp(func, {"z": z, "x": x}, OWN, gradient=gradient)
        loss = solution.ys["z"].abs().square().sum() + (solution.ys["x"] ** 3).real.sum()
        return list(torch.autograd.grad(loss, (z, x, a)))

    assert_close(run("checkpoint"), run("direct"), 1e-11)


def test_where_some_samples_fail():
    # The first runs into a region where func is nan.
    def func(t, y, a):
        bad = (y[:, 0] > 1.6) & (y[:, 1] < -0.5)
        return field(t, y, a) + torch.where(bad, math.nan, 0.0)[:, None]

    found = solve_ivp(func, Y0, SHARED, args=(WEIGHT,), throw=False, gradient="checkpoint")
    assert found.status.tolist() == [Status.NON_FINITE, Status.SUCCESS, Status.SUCCESS]
    assert_as_direct(SHARED, func=func, throw=False)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])  # with an evaluation of its own for dense output, and without
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_both_passes_may_call_func_with_running_rows_alone(mode, method):
    rows = []

    def func(t, y, a):
        rows.append(len(y))
        return field(t, y, a)

    y0, ends = torch.linspace(-2, 2, 32, dtype=F64).view(16, 2), torch.linspace(0.05, 3, 16, dtype=F64)
    t = torch.stack([0 * ends, 0.7 * ends, ends])
    expected = gradients("direct", t, y0=y0, method=method)
    counts = []
    for compact in (True, False):
        rows.clear()
        found = gradients("checkpoint", t, func, y0, options=mode, method=method, compact=compact)
        assert_close(found, expected, 1e-11)
        counts.append(sum(rows))
    forward = []
    with torch.no_grad():
        for compact in (True, False):
            rows.clear()
            solve_ivp(func, y0, t, args=(WEIGHT,), method=method, compact=compact)
            forward.append(sum(rows))
    backward = [both - one for both, one in zip(counts, forward)]
    assert backward[0] < 0.9 * backward[1]  # the first steps, which few checkpoints repeat, move all rows


def test_a_backward_solve_may_call_func_with_running_rows_alone():
    rows, found, counts = [], [], []

    def func(t, y, a):
        rows.append(len(y) if torch.is_grad_enabled() else 0)  # in the backward solve
        return field(t, y, a)

    y0, ends = torch.linspace(-2, 2, 32, dtype=F64).view(16, 2), torch.linspace(0.05, 3, 16, dtype=F64)
    t = torch.stack([0 * ends, 0.7 * ends, ends])
    for compact in (True, False):
        rows.clear()
        found.append(gradients("adjoint", t, func, y0, compact=compact))
        counts.append(sum(rows))
    assert_close(*found, 1e-12)
    assert counts[0] < 0.7 * counts[1]


def test_samples_of_one_thousand_oscillators_each():
    # Hundreds of steps with many rejections, of which the tape has those alone that somebody accepted.
    results = []
    for gradient in ("direct", "checkpoint"):
        y0 = oscillators(12, stiffest=20.0).requires_grad_()
        ys = solve_ivp(van_der_pol, y0, tensor(0.0, 3.0), gradient=gradient).ys
        results.append(torch.autograd.grad(ys[-1].square().sum(), y0))
    assert_close(list(results[1]), list(results[0]), 1e-9)  # stiff ones amplify rounding


@pytest.mark.filterwarnings("ignore:the solve failed")
@pytest.mark.parametrize(
    "options", [{}, {"on_failure": "return", "max_num_steps": 2, "max_step": 0.1}], ids=["done", "failed"]
)
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_odeint_by_samples(options, method):
    def run(gradient, t, **more):
        inputs = [x.clone().requires_grad_() for x in (Y0, t, WEIGHT)]
        y0, t, a = inputs
        ys = pyode.odeint(
            field,
            y0,
            t,
            1e-3,
            1e-4,
            method,
            {**options, "control": "per_sample", "gradient": gradient, **more},
            args=(a,),
        )
        loss = (torch.linspace(-1, 2, ys.numel(), dtype=F64).view(ys.shape) * ys).square().sum()
        return list(torch.autograd.grad(loss, inputs))

    for t in (SHARED, -SHARED, OWN):
        expected = run("direct", t)
        for mode in MODES:
            assert_close(run("checkpoint", t, **mode), expected, 1e-11)


def test_it_is_told_where_gradient_belongs():
    with pytest.raises(pyode.InvalidValue, match="is the argument gradient"):
        solve_ivp(field, Y0, SHARED, options={"gradient": "checkpoint"})
    with pytest.raises(pyode.InvalidValue, match="checkpoints"):
        solve_ivp(field, Y0, SHARED, args=(WEIGHT.requires_grad_(),), gradient="checkpoint", options={"checkpoints": 0})
