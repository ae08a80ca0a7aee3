"""odeint_adjoint: against odeint's gradients, finite differences and torchdiffeq's adjoint."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from problems import tensor
from torch import Tensor, nn

import pyode
from pyode import SolveError, Stats

Y0 = torch.tensor([[1.0, -2.0], [0.5, 0.3]], dtype=torch.float64)
T = tensor(0.0, 0.4, 0.5, 1.3)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
RESTART = {"restart": True}


class Field(nn.Module):
    """Nonlinear, dependent on time; a vector, a matrix, a 0-dim parameter, one that is not used, one that is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=dtype))
        self.bias = nn.Parameter(torch.tensor([0.1, -0.2], dtype=dtype))
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.tensor(1.5, dtype=dtype), requires_grad=False)
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.frozen * torch.tanh(y @ self.matrix + self.bias) * (1 + torch.sin(self.rate * t))

    def trained(self) -> list[nn.Parameter]:
        return [self.matrix, self.bias, self.rate]


def loss_of(y: Tensor) -> Tensor:
    """With a different gradient for every output."""
    return (torch.linspace(-1, 2, y.numel(), dtype=y.real.dtype).view(y.shape) * y).abs().square().sum()


def gradients(solve, sign: float = 1.0, time: bool = True, **kwargs) -> list[Tensor]:
    """Of y0, t if wanted, and the parameters."""
    field, y0, t = Field(), Y0.clone().requires_grad_(), (sign * T).requires_grad_(time)
    y = solve(field, y0, t, **kwargs)
    loss_of(y).backward()
    return [y0.grad, *([t.grad] if time else []), *(p.grad for p in field.trained()), field.unused.grad]


def assert_close(ours: list, theirs: list, tolerance: float) -> None:
    """Relative to each gradient's largest number."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        if b is None:
            assert a is None or not a.any()
        else:
            assert torch.allclose(a, b, rtol=0, atol=tolerance * max(float(b.abs().max()), 1e-3)), (a, b)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
@SIGNS
@pytest.mark.parametrize("restart", [False, True])
def test_direct_is_adjoint(method, sign, restart):
    # dopri8 and bosh3 have to end steps at the outputs: their dense output is less accurate than their steps.
    tight = {"rtol": 1e-8, "atol": 1e-9} if method == "bosh3" else TIGHT
    step_t = {"step_t": sign * T} if method in ("dopri8", "bosh3") else {}
    direct = gradients(pyode.odeint, sign, method=method, options=step_t, **tight)
    adjoint = gradients(pyode.odeint_adjoint, sign, method=method, options=step_t, **tight,
                        adjoint_options={"restart": restart, **step_t})  # fmt: skip
    assert_close(adjoint, direct, 1e-6)
    assert torch.equal(adjoint[-1], torch.zeros(3, dtype=torch.float64))  # not used: zeros, as torchdiffeq's


@SIGNS
def test_both_are_the_finite_differences(sign):
    adjoint = gradients(pyode.odeint_adjoint, sign, **TIGHT)
    step, field = 1e-5, Field()

    def loss(y0, t, *params):
        with torch.no_grad():
            for own, value in zip(field.trained(), params):
                own.copy_(value)
            return float(loss_of(pyode.odeint(field, y0, t, **TIGHT)))

    inputs = [Y0.clone(), sign * T, *(p.detach().clone() for p in field.trained())]
    for position, (x, gradient) in enumerate(zip(inputs, adjoint)):
        for i in range(x.numel()):
            moved = []
            for direction in (step, -step):
                changed = [y.clone() for y in inputs]
                changed[position].view(-1)[i] += direction
                moved.append(loss(*changed))
            # The difference's error: step^2 times a third derivative, and 1e-10 / step.
            assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(
                float(gradient.reshape(-1)[i]), rel=2e-4, abs=2e-4
            )


ADJOINTS = {
    "nothing": {},
    "other tolerances": {"adjoint_rtol": 1e-4, "adjoint_atol": 1e-5},
    "another method": {"adjoint_method": "dopri5"},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "an option": {"adjoint_options": {"max_step": 0.05}},
    "a norm": {"adjoint_options": {"norm": lambda parts: torch.stack([part.abs().max() for part in parts]).max()}},
    "no parameters": {"adjoint_params": ()},
    "options that are inherited": {"options": {"max_step": 0.05, "first_step": 0.01}},
    "a norm of the forward solve": {"options": {"norm": lambda e: e.abs().max()}},
    "a jump": {"options": {"jump_t": tensor(0.45)}},
    "a step's end": {"options": {"step_t": tensor(0.45)}},
}


@pytest.mark.filterwarnings("ignore:An adjoint parameter was passed:UserWarning")
@pytest.mark.parametrize("name", ADJOINTS)
@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_with_restart_they_are_torchdiffeqs(name, time, method):
    found, calls = [], []
    for module, restart in ((pyode, RESTART), (torchdiffeq, {})):
        kwargs = {**ADJOINTS[name], "rtol": 1e-6, "atol": 1e-7, "method": method}
        adjoint_options = kwargs.get(
            "adjoint_options", {k: v for k, v in kwargs.get("options", {}).items() if k != "norm"}
        )
        kwargs["adjoint_options"] = {**adjoint_options, **restart}
        field, y0, t = Field(), Y0.clone().requires_grad_(), T.clone().requires_grad_(time)
        loss_of(module.odeint_adjoint(field, y0, t, **kwargs)).backward()
        found.append([y0.grad, t.grad, *(p.grad for p in field.parameters())])
        calls.append(field.calls)
    # torchdiffeq integrates the time's gradient also where t wants none, and has its error in the norm.
    assert calls[0] == calls[1] or not time
    # The same steps; their sizes have the noise of the error estimate, as in test_parity.py.
    assert_close(*found, 1e-8 if time else 1e-3)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
@SIGNS
@pytest.mark.parametrize("options", [{}, {"step_size": 0.07}, {"step_size": 0.1, "perturb": True}], ids=str)
def test_of_fixed_steps_they_are_torchdiffeqs(method, sign, options):
    ours, theirs = (
        gradients(module.odeint_adjoint, sign, method=method, options=options) for module in (pyode, torchdiffeq)
    )
    assert_close(ours, theirs, 1e-11)


def test_carrying_the_step_size_on_saves_evaluations_and_no_accuracy():
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    exact, calls, errors = None, {}, {}
    for name, solve, kwargs in (
        ("exact", pyode.odeint, TIGHT),
        ("restart", pyode.odeint_adjoint, {"rtol": 1e-6, "atol": 1e-7, "adjoint_options": RESTART}),
        ("carry", pyode.odeint_adjoint, {"rtol": 1e-6, "atol": 1e-7}),
    ):
        field, y0 = Field(), Y0.clone().requires_grad_()
        y = solve(field, y0, t, **kwargs)
        before = field.calls
        loss_of(y).backward()
        calls[name] = field.calls - before
        found = torch.cat([y0.grad.flatten(), *(p.grad.flatten() for p in field.trained())])
        exact = found if exact is None else exact
        errors[name] = float((found - exact).norm() / exact.norm())
    assert calls["carry"] <= calls["restart"] - 2 * 15  # of 20 intervals; the first one has to choose a step
    assert errors["carry"] <= max(10 * errors["restart"], 1e-6)


@pytest.mark.parametrize("restart", [False, True])
def test_of_tuples(restart):
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(tensor(0.7, -0.4))

        def forward(self, t, y):
            return self.rate * y[1] * y[0], torch.cos(t) - y[0].sum() * self.rate[0]

    found = []
    for solve in (pyode.odeint, pyode.odeint_adjoint, torchdiffeq.odeint_adjoint):
        options = {"adjoint_options": {"restart": restart}} if solve is pyode.odeint_adjoint else {}
        func, t = Coupled(), T.clone().requires_grad_()
        y0 = (tensor(1.0, 0.5).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True))
        y = solve(func, y0, t, **TIGHT, **options)
        assert [part.shape for part in y] == [(4, 2), (4,)]
        (loss_of(y[0]) + loss_of(y[1])).backward()
        found.append([y0[0].grad, y0[1].grad, t.grad, func.rate.grad])
    assert_close(found[1], found[0], 1e-6)
    assert_close(found[1], found[2], 1e-6)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_of_complex_states(dtype):
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.3 - 1j, dtype=dtype))
            self.real = nn.Parameter(torch.tensor(0.4, dtype=dtype).real.clone())

        def forward(self, t, y):
            return self.factor * y + self.real * t * y.conj()

    found = []
    tight = TIGHT if dtype == torch.complex128 else {"rtol": 1e-5, "atol": 1e-6}
    for solve in (pyode.odeint, pyode.odeint_adjoint):
        func, y0 = Wave(), torch.tensor([1 + 1j, 0.3 - 2j], dtype=dtype).requires_grad_()
        t = T.to(func.real.dtype, copy=True).requires_grad_()
        loss_of(solve(func, y0, t, **tight)).backward()
        found.append([y0.grad, t.grad, func.factor.grad, func.real.grad])
    assert_close(*found, 1e-6 if dtype == torch.complex128 else 1e-3)


@pytest.mark.parametrize("i", [0, 1, 3])
@pytest.mark.parametrize("restart", [False, True])
def test_a_gradient_that_arrives_at_one_output_only(i, restart):
    found = []
    for solve in (pyode.odeint, pyode.odeint_adjoint):
        options = {"adjoint_options": {"restart": restart}} if solve is pyode.odeint_adjoint else {}
        field, y0 = Field(), Y0.clone().requires_grad_()
        solve(field, y0, T, **TIGHT, **options)[i].sum().backward()
        found.append([y0.grad, *(p.grad for p in field.trained())])
    assert_close(found[1], found[0], 1e-6)


def test_parameters_may_be_given_for_any_callable():
    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    other = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = pyode.odeint_adjoint(lambda t, y: factor * y + other, tensor(1.0), tensor(0.0, 1.0), adjoint_params=(factor,))
    y[-1].sum().backward()
    assert other.grad is None
    # y = (1 + 1) exp(t / 2) - 1; dy/dfactor by the variation of constants.
    exact = pyode.odeint(
        lambda t, z: torch.stack([0.5 * z[0] + 0.5, 0.5 * z[1] + z[0]]), tensor(1.0, 0.0), tensor(0.0, 1.0)
    )
    assert float(factor.grad) == pytest.approx(float(exact[-1, 1]), rel=1e-6)
    params = (p for p in (factor,))  # a generator will do
    assert pyode.odeint_adjoint(
        lambda t, y: factor * y, tensor(1.0), tensor(0.0, 1.0), adjoint_params=params
    ).requires_grad


def test_a_frozen_parameter_is_left_out_of_a_users_norm_with_a_warning():
    shapes = set()

    def norm(parts):
        shapes.add(tuple(tuple(part.shape) for part in parts))
        return max(part.abs().max() for part in parts)

    y0 = Y0.clone().requires_grad_()
    with pytest.warns(UserWarning, match="without requiring gradient"):
        y = pyode.odeint_adjoint(Field(), y0, T, adjoint_options={"norm": norm})
    y.sum().backward()
    assert shapes == {
        ((), (2, 2), (2, 2), (2, 2), (2,), (), (3,))
    }  # t, y, adj_y, and the parameters but the frozen one


@pytest.mark.parametrize("wanted", ["y0", "params", "nothing"])
def test_what_is_not_wanted_is_not_computed(wanted):
    field, y0 = Field(), Y0.clone().requires_grad_(wanted == "y0")
    for p in field.parameters():
        p.requires_grad_(wanted == "params")
    y = pyode.odeint_adjoint(field, y0, T)
    assert y.requires_grad == (wanted != "nothing")
    assert torch.allclose(y, pyode.odeint(field, Y0, T), rtol=1e-12)
    if wanted != "nothing":
        y.sum().backward()
        assert (y0.grad is None) == (wanted != "y0")
        assert (field.matrix.grad is None) == (wanted != "params")


def test_a_parameter_keeps_its_dtype_and_strides():
    weight = torch.randn(2, 3).T[:2, :].requires_grad_()
    y0 = Y0.clone().requires_grad_()
    pyode.odeint_adjoint(lambda t, y: y @ weight.double(), y0, T, adjoint_params=(weight,)).sum().backward()
    expected = weight.detach().clone().requires_grad_()
    pyode.odeint(lambda t, y: y @ expected.double(), Y0, T).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.allclose(weight.grad, expected.grad, rtol=1e-4)


def test_they_cannot_be_differentiated_again():
    y0 = Y0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pyode.odeint_adjoint(Field(), y0, T).sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), y0)


def test_one_time_and_its_gradient():
    y0 = Y0.clone().requires_grad_()
    field = Field()
    pyode.odeint_adjoint(field, y0, T[:1]).sum().backward()
    assert torch.equal(y0.grad, torch.ones_like(Y0))


def test_a_backward_solve_that_fails_says_so_and_harms_nobody():
    field, y0 = Field(), Y0.clone().requires_grad_()
    y = pyode.odeint_adjoint(field, y0, T, adjoint_options={"max_num_steps": 2})
    with pytest.raises(SolveError, match="max_num_steps"):
        y.sum().backward()
    assert_close(gradients(pyode.odeint_adjoint, **TIGHT), gradients(pyode.odeint, **TIGHT), 1e-6)


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("restart", [False, True])
def test_counts_of_both_solves(time, restart):
    forward, backward, field = Stats(), Stats(), Field()
    adjoint_options, t = {"stats": backward, "restart": restart}, T.clone().requires_grad_(time)
    y = pyode.odeint_adjoint(field, Y0, t, options={"stats": forward}, adjoint_options=adjoint_options)
    assert forward.n_f_evals == field.calls
    assert backward.n_steps == 0
    y.sum().backward()
    assert backward.n_f_evals == field.calls - forward.n_f_evals
    assert backward.n_accepted > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_both_backends_have_the_same_gradients(backend, device):
    with pyode.backend(backend):
        field, y0 = Field().to(device), Y0.to(device, copy=True).requires_grad_()
        loss_of(pyode.odeint_adjoint(field, y0, T.to(device), **TIGHT).cpu()).backward()
    assert_close([y0.grad.cpu(), field.matrix.grad.cpu()], gradients(pyode.odeint, time=False, **TIGHT)[:2], 1e-6)


def test_in_float32_the_error_is_no_larger_than_torchdiffeqs():
    t, errors = torch.linspace(0, 1.3, 10), {}
    field, y0 = Field(), Y0.clone().requires_grad_()
    loss_of(pyode.odeint(field, y0, t.double(), **TIGHT)).backward()
    exact = torch.cat([y0.grad.flatten(), *(p.grad.flatten() for p in field.trained())])
    for module in (pyode, torchdiffeq):
        field, y0 = Field(torch.float32), Y0.float().requires_grad_()
        loss_of(module.odeint_adjoint(field, y0, t, rtol=1e-5, atol=1e-7)).backward()
        found = torch.cat([y0.grad.flatten(), *(p.grad.flatten() for p in field.trained())])
        errors[module] = float((found - exact).norm() / exact.norm())
    assert errors[pyode] <= max(2 * errors[torchdiffeq], 1e-5)  # both are some roundings of float32
