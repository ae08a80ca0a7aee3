"""The checkpoint gradient on a GPU as two launches: the bits and counts of the host-driven loop's."""

from __future__ import annotations

import warnings

import pytest
import torch
from device_loops import (
    DEVICE,
    MARKS,
    ON,
    Field,
    both_gradients,
    check_same_gradients,
    check_training,
    normal,
    times,
)
from factories import ROUNDOFF, controller_for, layout_for, numbers, operands

import pyode
from pyode import device_checkpoint, device_grid
from pyode._ops import native
from pyode._ops.contract import Phase, Policy
from pyode.methods import TABLEAUS

pytestmark = MARKS

FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
METHODS = ["rk4", "dopri5"]


def by_odeint(func, y, t, options, counting, method="rk4", **kwargs):
    options = {**options, "gradient": "checkpoint", "stats": counting["stats"]}
    return pyode.odeint(func, y, t, 1e-4, 1e-6, method=method, options=options, **kwargs)


def by_solve_ivp(func, y, t, options, counting, method="rk4", **kwargs):
    options = {**options, "stats": counting["stats"]}
    kwargs = {"control": "joint", **kwargs}
    return pyode.solve_ivp(func, y, t, method=method, gradient="checkpoint", options=options, **kwargs).ys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128, torch.bfloat16])
@pytest.mark.parametrize(("size", "n"), [(1, 1), (3, 40), (300, 0), (300, 17), (3001, 2)])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_what_outputs_give_to_a_step_is_the_transpose_of_dense_output(method, size, n, dtype):
    tableau = TABLEAUS[method]
    y, ks, _ = operands(1, size, dtype, DEVICE, len(tableau.interpolant))
    layout, times = layout_for(native, y), torch.cat([torch.linspace(0, 0.1, n + 1), torch.ones(1)]).double()
    controller = controller_for(native, layout, times, Policy(float(tableau.order), max_step=0.1))
    controller.run(Phase.GIVEN_FIRST, 0.1)
    controller.error_norm((0.0,), y, y, ks, controller.dt, 0.0, 1.0)
    controller.run(Phase.JUDGE)
    g = numbers(len(times), *y.shape, dtype=dtype, device=DEVICE, seed=90)
    interpolant = native.Interpolant(tableau.interpolant, tableau.end)
    start, end = torch.empty_like(y), torch.empty_like(y)
    passed, t1 = int(controller.field("output_end")) - 1, float(controller.field("t"))
    inside = [i for i in range(1, passed + 1) if float(times[i]) != t1]
    assert len(inside) in (n - 1, n) if n else not inside  # the last may lie a rounding away from the step's end
    found = native.interpolate_vjp(layout, interpolant, controller.words, times.to(DEVICE), g, start, end)
    # Chains of stage sums, as the host has them.
    columns = {i: interpolant.weights_at(float(times[i]) / 0.1) for i in inside}
    for j, share in enumerate(found):
        total = torch.zeros_like(y)
        for first in range(0, len(inside), 16):
            some = inside[first : first + 16]
            weights, gs = tuple(columns[i][j] for i in some), [g[i] for i in some]
            total = native.stage_combine(layout, weights, total, gs, controller.field("dt_prev"))
        assert torch.equal(total, torch.zeros_like(y) if share is None else share)
    assert torch.equal(start, sum((g[i] for i in inside), torch.zeros_like(y)))
    assert torch.equal(end, sum((g[i] for i in range(1, passed + 1) if i not in inside), torch.zeros_like(y)))
    # <g, what is interpolated of the derivatives> = <what is given to them, the derivatives>.
    out = torch.zeros_like(g)
    native.interpolate(layout, interpolant, controller, torch.zeros_like(y), ks, out)
    products = [(share.conj() * k).abs().double() for share, k in zip(found, ks) if share is not None]
    sides = [
        sum(torch.sum((a.conj() * b).real.double()) for a, b in pairs if a is not None)
        for pairs in ([(g[inside], out[inside])], zip(found, ks))
    ]
    scale = 1e-30 + sum(product.sum() for product in products)
    assert abs(sides[0] - sides[1]) <= 8 * ROUNDOFF[dtype] * 40 * scale


@pytest.mark.parametrize("options", [{}, {"step_size": 0.3}, {"step_size": 0.3, "interp": "cubic"}, {"perturb": True}])
@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_of_given_steps(method, with_time, options):
    func, t = Field(), times(4).requires_grad_(with_time)
    check_same_gradients(by_odeint, func, normal(5, 3), t, tuple(func.parameters()), method=method, options=options)


CHOICES = [{}, {"step_t": [0.3, 1.5]}, {"first_step": 0.3, "max_step": 0.4}, {"jump_t": [0.5, 2 / 3, 0.7, 2.0]}]


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_of_chosen_steps(method, options):
    func = Field()
    params, kwargs = tuple(func.parameters()), {"method": method, "options": options}
    if method == "adaptive_heun":
        kwargs["captures"] = 3  # more steps than the ring has room for at first
    check_same_gradients(by_odeint, func, normal(5, 3), times(4), params, **kwargs)


def by_samples(func, y, t, options, counting, method="dopri5", **kwargs):
    return by_solve_ivp(func, y, t, options, counting, method, control="per_sample", **kwargs)


def odeint_by_samples(func, y, t, options, counting, method="dopri5", **kwargs):
    return by_odeint(func, y, t, {**options, "control": "per_sample"}, counting, method, **kwargs)


@pytest.mark.parametrize(
    "options", [{}, {"step_t": [0.3, 1.5]}, {"max_step": 0.4}, {"jump_t": [0.5, 0.7, 2.0]}], ids=str
)
@pytest.mark.parametrize("solve", [by_samples, odeint_by_samples])
@pytest.mark.parametrize("samples", [1, 5, 100])
def test_of_samples(samples, solve, options):
    func = Field()
    check_same_gradients(solve, func, normal(samples, 3), times(4), tuple(func.parameters()), options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("method", ["dopri8", "tsit5", "bosh3", "fehlberg2"])
@pytest.mark.parametrize("n", [2, 40])
def test_of_samples_of_other_dtypes_and_methods_backwards_in_time(n, method, dtype):
    rate = normal(3, dtype=dtype).requires_grad_()
    check_same_gradients(
        by_samples, lambda t, y: torch.sin(y) / 2 - rate * y * t[:, None] / 8, normal(4, 3, dtype=dtype),
        times(n).flip(0), (rate,), method=method,
    )  # fmt: skip


def test_of_samples_with_times_of_their_own():
    t = torch.stack([torch.linspace(0, 1 + b, 5) for b in range(4)], 1).to(DEVICE)
    t[:, 3] = t[0, 3]  # has no way to go
    t[3:, 1] = t[3, 1]
    func = Field()
    check_same_gradients(by_samples, func, normal(4, 3), t, tuple(func.parameters()))


@pytest.mark.parametrize("samples", [1, 6])
def test_of_samples_that_are_stiff_behind_a_discontinuity(samples):
    stiff = torch.linspace(40, 0, samples, device=DEVICE)
    rate = normal(3).abs().requires_grad_()

    def func(t, y):  # steps that are rejected, by some samples, follow the discontinuity
        return torch.cos(5 * t)[:, None] - rate * y * torch.where(t > 0.7, stiff, 1.0)[:, None]

    check_same_gradients(by_samples, func, normal(samples, 3), times(3), (rate,), {"jump_t": [0.7]})


@pytest.mark.parametrize("n", [0, 2])
def test_of_samples_none_of_which_moves(n):
    func, t = Field(), torch.ones(3, n, device=DEVICE)
    (theirs, _), (ours, _) = both_gradients(by_samples, func, normal(n, 3), t, tuple(func.parameters()))
    assert all(map(torch.equal, theirs, ours))


def test_of_samples_some_of_which_fail():
    y0, found = torch.tensor([[1.0], [-1.0], [0.5], [2.0]], device=DEVICE), []
    rate = torch.ones(1, device=DEVICE, requires_grad=True)
    for more in ({}, ON):
        y = y0.clone().requires_grad_()
        with torch.enable_grad():
            out = by_samples(lambda t, y: rate * y * y.abs() * 0.9, y, times(), more, {"stats": None}, throw=False)
            found += [(out, *torch.autograd.grad(out.nan_to_num(0, 0, 0).sum(), (y, rate)))]
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*found))


@pytest.mark.parametrize("n", [2, 60])  # and many in a step
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_of_outputs_in_the_last_step_and_many_in_each(method, n):
    func = Field()
    check_same_gradients(by_odeint, func, normal(5, 3), times(n), tuple(func.parameters()), method=method)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("solve", [by_odeint, by_solve_ivp])
@pytest.mark.parametrize("method", METHODS)
def test_of_every_dtype_backwards_in_time(method, solve, dtype):
    rate, t = normal(3, dtype=dtype).requires_grad_(), times(4).flip(0).requires_grad_(method == "rk4")
    check_same_gradients(
        solve, lambda t, y: torch.sin(y) / 2 - rate * y * t / 8, normal(5, 3, dtype=dtype), t, (rate,), method=method
    )


@pytest.mark.parametrize("method", METHODS)
def test_of_a_structure_with_args_and_a_parameter_without_effect(method):
    def func(t, y, rate, unused):
        return {"a": -rate * y["a"] * t, "b": y["b"] * rate[0] + 0 * unused.detach()}

    y0, rate = {"a": normal(3), "b": normal(2, 2)}, torch.full((3,), 0.5, device=DEVICE, requires_grad=True)
    unused = normal(1).requires_grad_()
    check_same_gradients(by_odeint, func, y0, times(4), (rate, unused), args=(rate, unused), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_training_captures_once_and_args_are_copied_in(method):
    def solve(func, y0, more, scale, i):
        return by_odeint(func, y0, times(), more, {"stats": None}, method, args=(scale,))

    check_training(solve)


@pytest.mark.parametrize("method", METHODS)
def test_several_solves_wait_for_their_gradients(method):
    func, starts, found = Field(), [normal(4, 3).requires_grad_() for _ in range(3)], []
    for more in ({}, ON):
        with torch.enable_grad():
            outs = [by_odeint(func, y, times(), more, {"stats": None}, method) for y in starts]
            loss = sum((i * out).square().sum() for i, out in enumerate(outs, 1))
            found.append(torch.autograd.grad(loss, (*starts, *func.parameters())))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_lost_is_told(method):
    func, y, hidden = Field(), normal(4, 3), normal(3).requires_grad_()
    params = tuple(func.parameters())
    kwargs = {"options": {"params": params}, "method": method}
    with pytest.warns(UserWarning, match="requires gradient and is not among those") as caught:
        check_same_gradients(by_odeint, lambda t, y: func(t, y) * hidden, y, times(), params, **kwargs)
    assert len(caught) == 2  # once by each


@pytest.mark.parametrize(
    ("solve", "method", "options"),
    [(by_odeint, "rk4", {}), (by_odeint, "dopri5", {"jump_t": [0.7]}), (by_samples, "dopri5", {"jump_t": [0.7]})],
)
def test_a_tensor_for_which_none_can_stand_has_its_gradient_by_the_host(solve, method, options):
    names = {"rates": normal(3).requires_grad_()}
    exec("def func(t, y): return -rates * y", names)
    with pytest.warns(UserWarning, match="because a tensor that wants a gradient is a global variable") as caught:
        check_same_gradients(
            solve, names["func"], normal(4, 3), times(), (names["rates"],), options, captures=1, method=method
        )
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("choice", "kwargs", "why"),
    [
        ({"checkpoints": 2}, {}, "keeps a part of the states"),
        ({"step_size": 0.2}, {}, "10 steps are too many"),
        ({}, {"method": "trbdf2"}, "equations of a step"),
        ({"checkpoints": 2}, {"method": "dopri5"}, "keeps a part of the states"),
    ],
    ids=str,
)
def test_what_the_host_drives_with_one_warning(choice, kwargs, why, monkeypatch):
    monkeypatch.setattr(device_grid, "MOST_STEPS", 5)
    func = Field()
    with pytest.warns(UserWarning, match=why) as caught:
        check_same_gradients(
            by_odeint, func, normal(2, 3), times(2), tuple(func.parameters()), choice, captures=0, **kwargs
        )
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_odeint(func, normal(2, 3), times(2), {**choice, "device_loop": "auto"}, {"stats": None}, **kwargs)


def test_gradients_of_times_are_the_hosts_where_steps_are_chosen():
    with pytest.warns(UserWarning, match="has the gradient of times from every step") as caught:
        check_same_gradients(
            by_odeint, lambda t, y: -y, normal(2, 3), times(3).requires_grad_(), captures=0, method="dopri5"
        )
    assert len(caught) == 1


def test_room_for_all_steps_or_none(monkeypatch):
    func, y0, kwargs = Field(), normal(2, 3), {"method": "dopri5", "options": {"max_step": 0.02}}
    for captures in (3, 0):  # at first the ring has room for fewer
        check_same_gradients(by_odeint, func, y0, times(3), tuple(func.parameters()), captures=captures, **kwargs)
    other = Field()
    monkeypatch.setattr(device_checkpoint, "MOST_BYTES", 80 * device_checkpoint.bytes_of_step(y0, 1))
    for captures in (1, 0):  # the second time nothing is tried
        with pytest.warns(UserWarning, match="more than 80 steps take more than") as caught:
            check_same_gradients(by_odeint, other, y0, times(3), tuple(other.parameters()), captures=captures, **kwargs)
        assert len(caught) == 1


def test_a_failure_that_is_returned():
    rate = torch.ones(3, device=DEVICE, requires_grad=True)

    def func(t, y):
        return torch.where(t > 0.5, torch.nan, 1.0) * -rate * y

    found, y = [], normal(3).requires_grad_()
    for more in ({}, ON):
        with torch.enable_grad():
            with pytest.warns(UserWarning, match="the solve failed"):
                out = by_odeint(func, y, times(), {"on_failure": "return", **more}, {"stats": None}, "dopri5")
            found += [(out, *torch.autograd.grad(out.square().sum(), (y, rate)))]
    assert all(map(torch.equal, *found))
    assert all(gradient.any() for gradient in found[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_that_is_kept_is_gone_through_again(method):
    func, y, found = Field(), normal(4, 3).requires_grad_(), []
    with torch.enable_grad():
        out = by_odeint(func, y, times(), ON, {"stats": None}, method)
        for _ in range(2):
            found.append(torch.autograd.grad(out.square().sum(), (y, *func.parameters()), retain_graph=True))
    assert all(map(torch.equal, *found))
