"""gradient="checkpoint": to rounding that of backpropagation through the same steps, in the memory of their states."""

from __future__ import annotations

import gc
import math
from functools import partial

import pytest
import torch
import torchdiffeq
from fields import Y0, Field, T, assert_close, gradients, loss_of
from problems import tensor, undamped_spiral
from torch import nn

import pyode
from pyode.methods import IMPLICIT, METHODS, TABLEAUS
from pyode.stepping import newton

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
ROUGH = {"rtol": 1e-3, "atol": 1e-4}


def exact(func, y0, t, options=None, **kwargs):
    return pyode.odeint(func, y0, t, options={**(options or {}), "gradient": "checkpoint"}, **kwargs)


# With all graphs kept, with those of a few evaluations, with none, and with few states.
MODES = ({}, {"graph_bytes": 3000}, {"graph_bytes": 0}, {"checkpoints": 1}, {"checkpoints": 3})


def assert_as_direct(sign=1.0, tolerance=1e-11, modes=MODES, options=None, **kwargs):
    """The gradients of the start, the times and the parameters."""
    expected = gradients(pyode.odeint, sign, options=options, **kwargs)
    for mode in modes:
        found = gradients(exact, sign, options={**(options or {}), **mode}, **kwargs)
        assert_close(found, expected, tolerance)


class TestAsDirect:
    @SIGNS
    @pytest.mark.parametrize("method", ADAPTIVE)
    @pytest.mark.parametrize("stop", [None, "step_t", "jump_t"])
    def test_of_methods_that_choose_their_steps(self, method, sign, stop):
        # With output times at a stop, behind it, and several within a step.
        options = {} if stop is None else {stop: sign * tensor(0.45, 0.5)}
        assert_as_direct(sign, method=method, options=options, **ROUGH)

    @SIGNS
    @pytest.mark.parametrize("method", FIXED)
    @pytest.mark.parametrize(
        "options", [{}, {"step_size": 0.3}, {"step_size": 0.3, "interp": "cubic"}, {"perturb": True}], ids=str
    )
    def test_of_methods_that_do_not(self, method, sign, options):
        assert_as_direct(sign, method=method, options=options)

    @SIGNS
    @pytest.mark.parametrize("method", IMPLICIT)
    @pytest.mark.parametrize(
        "options", [{}, {"step_size": 0.3}, {"step_size": 0.3, "interp": "cubic"}, {"perturb": True}], ids=str
    )
    def test_of_implicit_methods(self, method, sign, options):
        # A step taken again starts without the Jacobian of the one before: the same to Newton's tolerance.
        assert_as_direct(sign, method=method, options=options, modes=({}, {"checkpoints": 2}), tolerance=1e-9)

    def test_of_implicit_steps_by_gmres(self, monkeypatch):
        monkeypatch.setattr(newton, "DIRECT_UNKNOWNS", 0)
        assert_as_direct(method="trbdf2", tolerance=1e-9)

    def test_of_a_grid_that_is_made_of_the_times(self):
        def grid(func, y0, t):
            return torch.cat([t[:1], 0.7 * t[:1] + 0.3 * t[-1:], t[-1:]])

        assert_as_direct(method="rk4", options={"grid_constructor": grid})

    def test_where_a_jump_ends_the_solve(self):
        assert_as_direct(options={"jump_t": T[-1:]}, **ROUGH)

    def test_with_the_reference_backend(self):
        with pyode.backend("reference"):
            assert_as_direct(**ROUGH)

    def test_torchdiffeqs(self):
        options = {"first_step": 0.05}  # to torchdiffeq a chosen one is a function of y0
        ours = gradients(exact, time=False, options=options, **ROUGH)
        theirs = gradients(torchdiffeq.odeint, time=False, options=options, **ROUGH)
        assert_close(ours, theirs, 1e-10)

    @pytest.mark.parametrize("which", [("y0",), ("t",), ("a",), ("b",), ("y0", "b"), ("t", "a")])
    def test_of_some_alone(self, which):
        def solve(odeint, wanted):
            inputs = {"y0": Y0, "t": T, "a": tensor(0.5, -1.0), "b": tensor(0.3)}
            inputs = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
            a, b = inputs["a"], inputs["b"]
            y = odeint(lambda t, y: torch.sin(a * y + t) * b, inputs["y0"], inputs["t"], **ROUGH)
            return torch.autograd.grad(loss_of(y), [inputs[name] for name in which])

        assert_close(list(solve(exact, which)), list(solve(pyode.odeint, ("y0", "t", "a", "b"))), 1e-12)

    @pytest.mark.parametrize("method", ["dopri5", "radauIIA3"])
    def test_of_complex_tuples(self, method):
        def solve(odeint):
            z = torch.tensor([1 + 1j, 0.3 - 2j], dtype=torch.complex128, requires_grad=True)
            x, factor = tensor(0.7).requires_grad_(), torch.tensor(0.3 - 1j, requires_grad=True)
            t = T.clone().requires_grad_()

            def f(t, y):
                return factor * y[0] * y[0].abs() + t * y[0].conj(), (y[1] * y[0].sum()).real

            a, b = odeint(f, (z, x), t, method=method, **ROUGH)
            return list(torch.autograd.grad(loss_of(a) + loss_of(b), (z, x, factor, t)))

        assert_close(solve(exact), solve(pyode.odeint), 5e-7)  # factor is complex64, whose unit is 1.2e-7

    def test_of_args_closures_and_tensors_with_a_graph(self):
        raw = tensor(0.5).requires_grad_()

        def solve(odeint):
            scale, shift = raw.exp(), tensor(0.2).requires_grad_()
            y = odeint(lambda t, y, shift: torch.cos(scale * y) + shift, Y0, T, args=(shift,), **ROUGH)
            return list(torch.autograd.grad(loss_of(y), (raw, shift)))

        assert_close(solve(exact), solve(pyode.odeint), 1e-12)

    def test_of_named_parameters_alone(self):
        field = Field()
        with pytest.warns(UserWarning, match=r"shape \(2,?\d?\).* requires gradient"):
            y = exact(field, Y0, T, options={"params": [field.rate]})
        found = torch.autograd.grad(loss_of(y), (field.rate, field.matrix), allow_unused=True)
        assert found[0] is not None
        assert found[1] is None

    @pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "gl4"])
    def test_at_an_event(self, method):
        def solve(odeint):
            field, y0, t0 = Field(), Y0.clone().requires_grad_(), tensor(0.1).requires_grad_()
            options = {} if METHODS[method].adaptive else {"step_size": 0.2, "interp": "cubic"}
            time, y = pyode.odeint_event(
                field, y0, t0, event_fn=lambda t, y: y[0, 0] - 1.2, odeint_interface=odeint, method=method,
                options=options, **ROUGH,
            )  # fmt: skip
            return list(torch.autograd.grad(time + loss_of(y), (y0, t0, *field.trained())))

        assert_close(solve(exact), solve(pyode.odeint), 1e-11)

    @pytest.mark.filterwarnings("ignore:the solve failed")
    def test_of_a_solve_that_failed_and_returned(self):
        options = {"on_failure": "return", "max_num_steps": 3, "max_step": 0.1}
        assert_as_direct(options=options, **ROUGH)

    @pytest.mark.filterwarnings("ignore:the solve failed")
    @pytest.mark.parametrize("method", ["rk4", "trapezoid"])
    def test_of_a_search_in_vain(self, method):
        options = {"on_failure": "return", "step_size": 0.3, "event_t_max": 1.0}

        def never(odeint, sign, **kwargs):
            def solve(field, y0, t, **kwargs):
                return odeint(field, y0, t[:2], event_fn=lambda t, y: y.sum() + 99, **kwargs)[1]

            return gradients(solve, sign, **kwargs)

        expected = never(pyode.odeint, 1.0, method=method, options=options)
        assert_close(never(exact, 1.0, method=method, options=options), expected, 1e-9)

    @pytest.mark.parametrize("n", [1, 2])
    def test_of_very_short_solves(self, n):
        y0 = Y0.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(exact(lambda t, y: 0 * y, y0, T[:n]).sum(), y0)
        assert torch.equal(gradient, torch.full_like(Y0, n))

    def test_of_a_func_without_a_gradient(self):
        y0 = Y0.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(exact(lambda t, y: torch.ones_like(y), y0, T).sum(), y0)
        assert torch.allclose(gradient, torch.full_like(Y0, 4.0))


def test_in_float32_it_is_that_of_the_steps_but_for_rounding():
    # The same steps in float64: those of a tight min_step and max_step.
    options = {"first_step": 0.05, "min_step": 0.05, "max_step": 0.05}

    def solve(odeint, dtype):
        field, y0 = Field(dtype), Y0.to(dtype, copy=True).requires_grad_()
        y = odeint(field, y0, T.to(dtype), options=options, **ROUGH)
        return [g.double() for g in torch.autograd.grad(loss_of(y), (y0, *field.trained()))]

    for ours, reference in zip(solve(exact, torch.float32), solve(pyode.odeint, torch.float64)):
        assert float((ours - reference).norm() / reference.norm()) < 20 * 2**-24


def test_it_is_the_finite_difference():
    options = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}

    def solve(y0, a, t):
        return exact(lambda t, y: torch.sin(y @ a) * (1 + t * t), y0, t, options=options)

    inputs = [x.clone().requires_grad_() for x in (Y0[:1], tensor(0.3, 1.0, -2.0, 0.1).view(2, 2), T[:3])]
    assert torch.autograd.gradcheck(solve, inputs, rtol=1e-6, atol=1e-7)


def test_rejected_steps_cost_nothing_and_a_step_its_stages():
    field, stats = Field(), pyode.Stats()
    jump = {"first_step": 1.0, "stats": stats, "graph_bytes": 0}  # too long: rejected
    y = exact(field, Y0.clone().requires_grad_(), T, options=jump, rtol=1e-8, atol=1e-8)
    assert stats.n_rejected > 0
    field.calls = 0
    y.sum().backward()
    assert field.calls == 6 * stats.n_accepted + 1  # and the end of the last step, for dense output
    y = exact(field, Y0.clone().requires_grad_(), T, rtol=1e-8, atol=1e-8)
    field.calls = 0
    y.sum().backward()
    assert field.calls == 0  # all graphs were kept


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_may_be_taken_again_but_not_differentiated(mode):
    y0 = Y0.clone().requires_grad_()
    y = exact(Field(), y0, T, options=mode)
    first, second = (torch.autograd.grad(y.sum(), y0, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(pyode.InvalidValue, match="can't be differentiated"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


def test_parameters_changed_in_between_are_noticed():
    field = Field()
    y = exact(field, Y0, T)
    with torch.no_grad():
        field.matrix.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "chekpoint"}, "must be one of direct, adjoint, checkpoint"),
        ({"gradient": "checkpoint", "checkpoints": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(pyode.InvalidValue, match=message):
        pyode.odeint(Field(), Y0, T, options=options)


@pytest.mark.parametrize("method", ["adams", "explicit_adams", "implicit_adams", "scipy_solver"])
def test_it_needs_a_method_of_one_step(method):
    with pytest.raises(pyode.InvalidValue, match="state at their start alone, a Runge-Kutta method"):
        exact(Field(), Y0, T, method=method)


def test_the_adjoint_may_be_chosen_by_an_option():
    def by_option(*args, **kwargs):
        return pyode.odeint(*args, options={"gradient": "adjoint"}, **kwargs)

    assert_close(gradients(by_option, **ROUGH), gradients(pyode.odeint_adjoint, **ROUGH), 0.0)


class Stops(nn.Module):
    """Raises when asked to."""

    def __init__(self):
        super().__init__()
        self.rate, self.left = nn.Parameter(tensor(-1.0)), math.inf

    def forward(self, t, y):
        self.left -= 1
        if self.left < 0:
            raise KeyError("mine")
        return self.rate * y


def by_samples(gradient, control="per_sample"):
    def solve(func, y0, t):
        options = {"graph_bytes": 0} if gradient == "checkpoint" else {}
        return pyode.solve_ivp(func, y0, t, gradient=gradient, control=control, options=options).ys

    return solve


RECOMPUTING = {
    "checkpoint": partial(exact, options={"graph_bytes": 0}),
    "few checkpoints": partial(exact, options={"checkpoints": 2}),
    "implicit checkpoint": partial(exact, method="trapezoid", options={"step_size": 0.1}),
    "adjoint": pyode.odeint_adjoint,
    "adjoint with fixed steps": partial(pyode.odeint_adjoint, method="rk4", options={"step_size": 0.1}),
    "checkpoint by samples": by_samples("checkpoint"),
    "adjoint by samples": by_samples("adjoint"),
    "joint solve_ivp": by_samples("adjoint", "joint"),
}


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_an_exception_of_func_in_the_backward_pass_passes_through(mode):
    # The next pass is right, with its hook, and what was under way has gone.
    func, solve = Stops(), RECOMPUTING[mode]
    func.rate.register_hook(lambda g: 2 * g)

    def interrupted():
        y = solve(func, Y0, T)
        func.left = 9
        with pytest.raises(KeyError, match="mine"):
            y.sum().backward(retain_graph=True)
        func.left = math.inf
        return y

    y = interrupted()
    assert func.rate.grad is None
    y.sum().backward()
    reference = Stops()
    pyode.odeint(reference, Y0, T).sum().backward()
    tolerance = 1e-2 if "samples" in mode or "solve_ivp" in mode or mode.startswith("implicit") else 1e-5
    assert torch.allclose(func.rate.grad, 2 * reference.rate.grad, rtol=tolerance)
    counts = []
    for _ in range(3):
        interrupted()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] <= counts[1] + 3  # a step's graph would be dozens


def test_a_conserved_quantity_has_its_gradient():
    # q = y1^4 + y2^4 stays as it is, so its gradient with respect to y0 is that at y0, to the solve's accuracy.
    y0 = tensor(1.1, -0.4).requires_grad_()
    y = exact(undamped_spiral, y0, tensor(0.0, 3.0), rtol=1e-9, atol=1e-11)
    (gradient,) = torch.autograd.grad((y[-1] ** 4).sum(), y0)
    assert torch.allclose(gradient, 4 * y0.detach() ** 3, rtol=1e-6, atol=1e-7)
