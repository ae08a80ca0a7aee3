"""odeint_adjoint with a step size for each sample: exact for each of them, in any company."""

from __future__ import annotations

import pytest
import torch
from ensembles import blow_up, oscillators, van_der_pol
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyode
from pyode import InvalidValue, odeint, odeint_adjoint, solve_ivp

F64 = torch.float64
SAMPLES = {"control": "per_sample"}
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
T = torch.tensor([0.0, 0.4, 0.5, 1.3], dtype=F64)
OWN = torch.tensor([[0.0, 0.3, 1.0], [0.4, -0.4, 1.2], [1.3, -1.0, 2.2], [1.3, -1.0, 2.5]], dtype=F64)
Y0 = torch.tensor([[1.0, -2.0], [0.5, 0.3], [2.0, 1.0]], dtype=F64)


class Field(nn.Module):
    """Nonlinear, dependent on time, with parameters for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.a) * (1 + torch.sin(t))[:, None]


def gradients(solver, t: Tensor, **kwargs) -> list[Tensor]:
    field, y0, t = Field(), Y0.clone().requires_grad_(), t.clone().requires_grad_()
    ys = solver(field, y0, t, options=dict(SAMPLES), **TIGHT, **kwargs)
    weights = torch.linspace(-1, 2, ys.numel(), dtype=F64).reshape(ys.shape)
    return list(torch.autograd.grad((weights * ys).sum(), (y0, t, field.a)))


@pytest.mark.parametrize("t", [T, OWN], ids=["shared", "own"])
@pytest.mark.parametrize("options", [None, {}, {"norm": "seminorm"}])
def test_gradients_are_those_of_direct_mode(t, options):
    found = gradients(odeint_adjoint, t, adjoint_options=options)
    # The direct gradient of an output's time is the slope of dense output, which is an order less accurate.
    for ours, direct, tolerance in zip(found, gradients(odeint, t), (1e-6, 1e-4, 1e-6)):
        assert torch.allclose(ours, direct, rtol=tolerance, atol=1e-2 * tolerance)


def test_odeints_option_is_the_same():
    def by_option(func, y0, t, options, **kwargs):
        return odeint(func, y0, t, options={**options, "gradient": "adjoint"}, **kwargs)

    for ours, theirs in zip(gradients(by_option, T), gradients(odeint_adjoint, T)):
        assert torch.equal(ours, theirs)


def test_the_forward_solve_is_odeints_and_a_sample_does_not_depend_on_the_others():
    y0 = oscillators(5, stiffest=8.0).requires_grad_()
    ys = odeint_adjoint(van_der_pol, y0, T, options=SAMPLES, adjoint_params=())
    assert torch.equal(ys, odeint(van_der_pol, y0, T, options=SAMPLES))
    (together,) = torch.autograd.grad(ys.sum(), y0)
    for b in range(5):
        row = y0.detach()[b : b + 1].requires_grad_()
        alone = odeint_adjoint(van_der_pol, row, T, options=SAMPLES, adjoint_params=())
        assert torch.allclose(torch.autograd.grad(alone.sum(), row)[0][0], together[b], rtol=1e-6)


def test_nested_states_methods_tolerances_and_a_single_time():
    y0 = {"a": Y0.clone().requires_grad_(), "b": (torch.ones(3, dtype=F64),)}
    f = lambda t, y: {"a": -y["a"] * y["b"][0][:, None], "b": (0 * y["b"][0],)}  # noqa: E731
    backward = {"adjoint_rtol": 1e-8, "adjoint_atol": 1e-8, "adjoint_method": "tsit5", "adjoint_options": {}}
    ys = odeint_adjoint(f, y0, T, options=SAMPLES, adjoint_params=(), **TIGHT, **backward)
    (found,) = torch.autograd.grad(ys["a"][-1].sum(), y0["a"])
    assert torch.allclose(found, torch.exp(-T[-1]).expand(3, 2), rtol=1e-6)
    start = odeint_adjoint(f, y0, T[:1], options=SAMPLES, adjoint_params=())
    assert torch.equal(start["a"][0], y0["a"])
    assert start["a"].requires_grad


def test_without_samples():
    func, y0, t = nn.Linear(3, 3), torch.zeros(0, 3, requires_grad=True), torch.linspace(0, 1, 3)
    ys = odeint_adjoint(
        lambda t, y: func(y), y0, t, options={"control": "per_sample"}, adjoint_params=tuple(func.parameters())
    )
    (ys.sum() + solve_ivp(lambda t, y: func(y), y0, t, gradient="adjoint").ys.sum()).backward()
    assert y0.grad.shape == (0, 3)
    assert not func.weight.grad.any()


@pytest.mark.filterwarnings("ignore:the solve failed")
def test_behind_a_failure_gradients_are_those_of_the_last_state():
    y0 = torch.tensor([[0.1], [2.0]], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    options = {**SAMPLES, "on_failure": "return", "max_num_steps": 40}
    found = []
    for solver in (odeint, odeint_adjoint):
        kwargs = {} if solver is odeint else {"adjoint_params": (), "adjoint_options": {}}
        ys = solver(blow_up, y0, t, options=options, **TIGHT, **kwargs)
        found.append((ys, torch.autograd.grad(ys[:, 0].sum() + ys[1].sum(), y0)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5)
    # The last state, too: y(t) = y0 / (1 - y0 t) at a fixed time.
    ys = odeint_adjoint(blow_up, y0, t, options=options, adjoint_params=(), adjoint_options={}, **TIGHT)
    (by_last,) = torch.autograd.grad(ys[2, 1].log().sum(), y0)
    last = float(ys[2, 1].detach())
    assert float(by_last[1]) == pytest.approx(last / 4, rel=1e-4)  # d log y / d y0 = y / y0^2


def test_stats_count_both_solves():
    stats, backward = pyode.Stats(), pyode.Stats()
    y0 = oscillators(4, stiffest=2.0).requires_grad_()
    options = {**SAMPLES, "stats": stats}
    ys = odeint_adjoint(
        van_der_pol, y0, T, options=options, adjoint_params=(), adjoint_options={**SAMPLES, "stats": backward}
    )
    forward = stats.n_f_evals
    ys.sum().backward()
    assert stats.n_f_evals == forward > 0
    assert backward.n_f_evals > 0


def test_the_parameters_integral_costs_one_product_a_stage_of_accepted_steps():
    calls, field, backward = [0], Field(), pyode.Stats()

    def counted(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return field(t, y)

    y0 = Y0[:1].clone().requires_grad_()
    ys = odeint_adjoint(
        counted, y0, 5 * T[[0, -1]], options=SAMPLES, adjoint_params=(field.a,), adjoint_options={"stats": backward}
    )
    calls[0] = 0
    torch.autograd.grad(ys.sum(), (y0, field.a))
    weights = sum(w != 0 for w in pyode.methods.TABLEAUS["dopri5"].weights)
    assert backward.n_rejected > 0
    assert calls[0] == backward.n_f_evals == 1 + 6 * backward.n_steps + weights * backward.n_accepted


def test_parameters_are_not_replicated_for_samples():
    B, width = 64, 500
    net = nn.Sequential(nn.Linear(2, width, dtype=F64), nn.Tanh(), nn.Linear(width, 2, dtype=F64))
    y0 = torch.linspace(-1, 1, 2 * B, dtype=F64).view(B, 2).requires_grad_()
    ys = solve_ivp(lambda t, y: net(y), y0, T, gradient="adjoint", params=net.parameters()).ys

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
            return out

    with Largest() as largest:
        torch.autograd.grad(ys.sum(), [y0, *net.parameters()])
    assert (
        largest.numel == B * width
    )  # what the network itself makes; a copy of its weights for each sample is 4 times it


def test_the_backward_solve_has_the_forward_solves_tolerances_and_none_of_its_options():
    steps = []
    for options, backward in (({}, {}), ({"max_step": 0.01}, {}), ({}, {"max_step": 0.01}), ({}, {"rtol": 1e-9})):
        y0, stats = Y0.clone().requires_grad_(), pyode.Stats()
        arguments = {"options": options, "adjoint_options": {**backward, "stats": stats}}
        ys = solve_ivp(Field(), y0, T, gradient="adjoint", **arguments).ys
        torch.autograd.grad(ys.sum(), y0)
        steps.append(stats.n_steps / 3)
    assert steps[1] < 1.5 * steps[0] < 40
    assert steps[2] >= 130
    assert steps[3] > 2 * steps[0]


class TestTwice:
    """Gradients of gradients."""

    def test_they_are_the_finite_differences(self):
        def solve(y0, a, t):
            field = lambda t, y: torch.sin(y @ a) * (1 + t * t)[:, None]  # noqa: E731
            return odeint_adjoint(field, y0, t, 1e-7, 1e-8, options=SAMPLES, adjoint_params=(a,))

        a = torch.tensor([[0.3, 1.0], [-1.2, 0.1]], dtype=F64)
        inputs = [x.clone().requires_grad_() for x in (Y0[:2], a, OWN[1:3, :2])]
        assert gradgradcheck(solve, inputs, fast_mode=True, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("control", ["per_sample", "joint"])
    @pytest.mark.parametrize("event", [None, lambda t, y: y[..., 0] - 0.8], ids=["no event", "event"])
    def test_a_hessian_vector_product_is_that_of_backpropagation(self, control, event):
        def product(gradient):
            field, y0 = Field(), Y0.clone().requires_grad_()
            f = field if control == "per_sample" else lambda t, y: field(t.reshape(1), y)
            met = event if event is None or control == "per_sample" else lambda t, y: event(t, y)[2]
            solution = solve_ivp(f, y0, T, event_fn=met, control=control, gradient=gradient, params=[field.a], **TIGHT)
            loss = solution.ys.nan_to_num().square().sum()
            if event is not None:
                assert int((solution.event_index >= 0).sum()) > 0
                loss = loss + solution.event_y.nan_to_num().square().sum()
            first = torch.autograd.grad(loss, (y0, field.a), create_graph=True)
            along = sum((torch.linspace(-1, 1, g.numel(), dtype=F64).view(g.shape) * g).sum() for g in first)
            return [*first, *torch.autograd.grad(along, (y0, field.a))]

        for ours, exact in zip(product("adjoint"), product("direct")):
            assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_in_single_precision(self, dtype):
        def product(dtype, tolerance):
            y0 = (Y0 * (1 + 0.3j) if dtype.is_complex else Y0).to(dtype).requires_grad_()
            t = OWN.to(dtype.to_real()).requires_grad_()
            field = lambda t, y: y * (0.5 - 0.2 * y.abs()) * torch.cos(t)[:, None]  # noqa: E731
            ys = odeint_adjoint(field, y0, t, tolerance, tolerance, options=SAMPLES, adjoint_params=())
            first = torch.autograd.grad(ys.abs().square().sum(), (y0, t), create_graph=True)
            along = sum(g.abs().square().sum() for g in first)
            return [x.detach() for x in (*first, *torch.autograd.grad(along, (y0, t)))]

        wide = {torch.float32: F64, torch.complex64: torch.complex128}[dtype]
        for ours, exact in zip(product(dtype, 1e-6), product(wide, 1e-8)):
            assert float((ours - exact).norm() / exact.norm()) < 1e-3

    def test_there_is_no_third(self):
        y0 = Y0.clone().requires_grad_()
        (first,) = torch.autograd.grad(odeint_adjoint(Field(), y0, T, options=SAMPLES).sum(), y0, create_graph=True)
        with pytest.raises(InvalidValue, match="prepares for a third"):
            torch.autograd.grad(first.square().sum(), y0, create_graph=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"adjoint_method": "rk4", "adjoint_options": {}},
        {"adjoint_options": {"norm": lambda whole: whole[1].abs().max()}},
        {"adjoint_options": {"restart": True}},
    ],
)
def test_what_is_not_for_samples_is_told(wrong):
    with pytest.raises(InvalidValue, match="per_sample"):
        odeint_adjoint(van_der_pol, oscillators(2), T, options=SAMPLES, adjoint_params=(), **wrong)


class TestTimes:
    def test_a_discontinuity_is_met_on_the_way_back(self):
        rate = torch.tensor(1.0, dtype=F64, requires_grad=True)

        def growth(t: Tensor, y: Tensor) -> Tensor:  # dy/dt = -y, then 2 y
            return rate * y * torch.where(t < 0.5, -1.0, 2.0)[:, None]

        y0, t = Y0.clone().requires_grad_(), torch.tensor([0.0, 1.0], dtype=F64)
        steps = []
        for jumps in ({}, {"jump_t": torch.tensor([0.5], dtype=F64)}):
            backward = pyode.Stats()
            options = {"adjoint_options": {"stats": backward}, "adjoint_params": (rate,)}
            ys = odeint_adjoint(growth, y0, t, options={**SAMPLES, **jumps}, **TIGHT, **options)
            found, by_rate = torch.autograd.grad(ys[-1].sum(), (y0, rate))
            factor = torch.tensor(0.5, dtype=F64).exp()
            assert torch.allclose(found, factor.expand(3, 2), rtol=1e-5)
            assert torch.allclose(by_rate, 0.5 * factor * Y0.sum(), rtol=1e-5)
            steps.append(backward.n_rejected)
        assert steps[1] == 0 < steps[0]

    @pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
    def test_a_sample_with_no_way_to_go_does_not_move_with_its_times(self, gradient):
        t = torch.tensor([[0.0, 0.7], [0.5, 0.7], [1.0, 0.7]], dtype=F64, requires_grad=True)
        y0 = Y0[:2].clone().requires_grad_()
        ys = pyode.solve_ivp(Field(), y0, t, gradient=gradient, params=None, **TIGHT).ys
        by_t, by_y0 = torch.autograd.grad(ys.sum(), (t, y0))
        assert (by_t[:, 1] == 0).all()
        assert (by_t[:, 0] != 0).all()
        assert torch.equal(by_y0[1], torch.full((2,), 3.0, dtype=F64))
