"""odeint's gradients, by backpropagation through the steps: against finite differences and torchdiffeq's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torchdiffeq
from problems import leaf, tensor
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import pyode
from pyode.methods import TABLEAUS

METHODS = pytest.mark.parametrize("method", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
A = torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=torch.float64)
Y0 = torch.tensor([[1.0, -2.0], [0.5, 0.3]], dtype=torch.float64)
# Steps of one size, so that moving an input moves no step: 0, 0.25, ... from the start; no output at a step's end.
FORCED = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}
T = tensor(0.0, 0.1, 0.6, 0.9)
TIGHT = {"rtol": 1e-6, "atol": 1e-7}  # a difference with steps of 1e-6 is right to 1e-9 or so


def field(matrix: Tensor):
    return lambda t, y: torch.sin(y @ matrix) * (1 + t * t)


@METHODS
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
def test_first_and_second_derivatives_are_the_finite_differences(method, sign):
    def solve(y0, matrix, t):
        return pyode.odeint(field(matrix), y0, t, method=method, options=FORCED)

    inputs = (leaf(Y0[:1]), leaf(A), leaf(sign * T[:3]))
    assert gradcheck(solve, inputs, **TIGHT)
    assert gradgradcheck(solve, inputs, fast_mode=True, **TIGHT)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_of_complex_states(backend):
    y0, factor = (
        torch.tensor([1 + 1j, 0.3 - 2j], dtype=torch.complex128),
        torch.tensor(0.3 - 1j, dtype=torch.complex128),
    )

    def solve(y0, factor, t):
        with pyode.backend(backend):
            return pyode.odeint(lambda t, y: factor * y * y.abs() + t * y.conj(), y0, t, options=FORCED)

    assert gradcheck(solve, (leaf(y0), leaf(factor), leaf(T[:3])), **TIGHT)
    assert gradgradcheck(solve, (leaf(y0[:1]), leaf(factor), leaf(T[:2])), fast_mode=True, **TIGHT)
    assert gradcheck(lambda *inputs: solve(*inputs).conj(), (leaf(y0), leaf(factor), leaf(T[:3])), **TIGHT)


def test_of_tuples():
    def solve(a, b, rate, t):
        def f(t, y):
            return rate * y[1] * y[0], torch.cos(t) - y[0].sum()

        return pyode.odeint(f, (a, b), t, options=FORCED)

    inputs = (leaf(tensor(1.0, 0.5)), leaf(torch.tensor(0.3, dtype=torch.float64)), leaf(tensor(0.7)), leaf(T[:3]))
    assert gradcheck(solve, inputs, **TIGHT)


def test_an_output_at_a_steps_end_has_the_fields_slope_as_its_gradient():
    # From both sides: the interpolant's slope at x = 1 is f(t1, y1).
    t = leaf(tensor(0.0, 0.25, 0.5))
    y = pyode.odeint(field(A), Y0, t, options=FORCED)
    (gradient,) = torch.autograd.grad(y[1].sum(), t)
    assert float(gradient[1]) == pytest.approx(float(field(A)(t[1], y[1]).sum().detach()), rel=1e-12)


@METHODS
def test_the_gradients_are_those_of_the_solution(method):
    # y = exp(p t) y0, to the accuracy of the solve: times of a rough solve are never far off their limits.
    p, y0, t = leaf(tensor(0.7)), leaf(tensor(2.0)), leaf(tensor(0.2, 1.0))
    tolerance = 1e-5 if TABLEAUS[method].order == 2 else 1e-9
    # dopri8's and bosh3's dense output is less accurate than their steps.
    options = {"step_t": tensor(1.0)} if method in ("dopri8", "bosh3") else {}
    y = pyode.odeint(lambda t, y: p * y, y0, t, rtol=tolerance, atol=tolerance, method=method, options=options)[-1]
    gradients = torch.autograd.grad(y.sum(), (y0, p, t))
    e = torch.exp(tensor(0.7 * 0.8))
    slope = 0.7 * 2 * e
    exact = (e, 0.8 * 2 * e, torch.cat([-slope, slope]))
    for actual, expected in zip(gradients, exact):
        assert torch.allclose(actual, expected, rtol=1e4 * tolerance)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
@pytest.mark.parametrize("options", [{}, {"step_t": tensor(0.4)}, {"jump_t": tensor(0.4)}], ids=str)
def test_they_are_torchdiffeqs(method, sign, options):
    # With a first step that is given: a chosen one is to torchdiffeq a function of y0, and to us a constant.
    options = {name: sign * value for name, value in options.items()} | {"first_step": 0.05}
    found = []
    for module in (pyode, torchdiffeq):
        inputs = y0, matrix, t = leaf(Y0), leaf(A), leaf(sign * T)
        y = module.odeint(field(matrix), y0, t, rtol=1e-6, atol=1e-8, method=method, options=options)
        loss = (torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape) * y).sum()
        found.append(torch.autograd.grad(loss, inputs))
    for ours, theirs, name in zip(*found, ("y0", "matrix", "t")):
        if name == "t" and len(options) > 1:
            # Which steps move with t[0], and which stay where step_t has them, is a choice; see the next test.
            ours, theirs = ours[1:], theirs[1:]
        # dopri8's step sizes carry more of the noise of its error estimate; see test_parity.py.
        tolerance = 1e-5 if method == "dopri8" else 1e-9
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
def test_a_jump_stays_where_it_is_when_the_start_moves(sign):
    # y' = 2 before the jump, 5 after it: y(1) = 2 (1/2 - t0) + 5 / 2.
    def f(t, y):
        return torch.where(sign * t < 0.5, 2.0, 5.0) * torch.ones_like(y)

    t = leaf(sign * tensor(0.0, 0.3, 1.0))
    for i, exact in ((1, (-2.0, 2.0, 0.0)), (2, (-2.0, 0.0, 5.0))):
        y = pyode.odeint(f, tensor(0.0), t, options={"jump_t": sign * tensor(0.5)})
        (gradient,) = torch.autograd.grad(y[i].sum(), t)
        assert torch.allclose(gradient, tensor(*exact), atol=1e-12)


@pytest.mark.parametrize("which", [("y0",), ("matrix",), ("t",), ("y0", "t"), ("matrix", "t")])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_each_gradient_may_be_wanted_alone(which, method):
    inputs = {"y0": Y0.clone(), "matrix": A.clone(), "t": T.clone()}
    everything = {name: leaf(x) for name, x in inputs.items()}
    some = {name: leaf(x) if name in which else x for name, x in inputs.items()}
    options = FORCED if method == "dopri5" else {"step_size": 0.3}

    def gradients(inputs, wanted):
        y = pyode.odeint(field(inputs["matrix"]), inputs["y0"], inputs["t"], method=method, options=options)
        return torch.autograd.grad(y.square().sum(), [inputs[name] for name in wanted])

    expected = dict(zip(inputs, gradients(everything, list(inputs))))
    for name, gradient in zip(which, gradients(some, which)):
        assert torch.allclose(gradient, expected[name], rtol=1e-12, atol=1e-14)


def test_both_backends_have_the_same_gradients(dtype, device):
    found = []
    y0 = torch.linspace(-1, 1, 6, device=device).reshape(2, 3).to(dtype)
    matrix = torch.linspace(-1, 1, 9, device=device).reshape(3, 3).to(dtype)
    for backend in ("auto", "reference"):
        inputs = leaf(y0), leaf(matrix)
        with pyode.backend(backend):
            y = pyode.odeint(lambda t, y, m=inputs[1]: torch.tanh(y @ m), inputs[0], T.to(device), options=FORCED)
        found.append(torch.autograd.grad((y * y.conj()).real.sum(), inputs))
    # Sums of some ten roundings in the dtype.
    tolerance = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float16: 2e-2, torch.bfloat16: 2e-1}.get(
        dtype, 1e-5
    )
    for ours, reference in zip(*found):
        assert torch.allclose(ours, reference, rtol=tolerance, atol=tolerance)


def nodes_behind(y: Tensor) -> dict[str, int]:
    """How many nodes of each kind the graph of y has."""
    seen, todo, count = set(), [y.grad_fn], {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count[node.name()] = count.get(node.name(), 0) + 1
        todo += [parent for parent, _ in node.next_functions]
    return count


@METHODS
def test_a_stage_is_one_node(method):
    rows = len(TABLEAUS[method].rows)
    counts = [
        nodes_behind(pyode.odeint(lambda t, y: y.sin(), leaf(Y0), tensor(0.0, end), method=method, options=FORCED))
        for end in (1.9, 2.9)
    ]
    more = {name: counts[1][name] - counts[0].get(name, 0) for name in counts[1]}
    assert {name: n for name, n in more.items() if n} == {"_StageCombineBackward": 4 * rows, "SinBackward0": 4 * rows}


def test_gradients_may_be_taken_again_and_again():
    y0 = leaf(Y0)
    y = pyode.odeint(field(A), y0, T)
    first, second = (torch.autograd.grad(y.sum(), y0, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_graph_is_made_where_nothing_wants_one():
    assert not pyode.odeint(field(A), Y0, T).requires_grad
    with torch.no_grad():
        assert not pyode.odeint(field(A), leaf(Y0), T).requires_grad
    assert not pyode.odeint(lambda t, y: field(A)(t, y).detach(), Y0, T).requires_grad


def test_the_start_is_part_of_the_output_and_of_the_graph():
    for t in (T, T[:1]):
        y0 = leaf(Y0)
        (gradient,) = torch.autograd.grad(pyode.odeint(field(A), y0, t)[0].sum(), y0)
        assert torch.equal(gradient, torch.ones_like(Y0))


def test_a_func_that_does_not_depend_on_the_state_passes_the_gradient_on():
    y0, rate = leaf(Y0), leaf(tensor(0.5))
    y = pyode.odeint(lambda t, y: (rate * t).expand(y.shape), y0, tensor(0.0, 2.0))
    gradients = torch.autograd.grad(y[-1].sum(), (y0, rate))
    assert torch.allclose(gradients[0], torch.ones_like(Y0), rtol=1e-14)
    assert torch.allclose(gradients[1], tensor(4 * 2.0), rtol=1e-9)


def test_a_neural_ode_learns():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        target = pyode.odeint(lambda t, y: y @ A, Y0, t)
    optimiser, losses = torch.optim.Adam(net.parameters(), 0.02), []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (pyode.odeint(lambda t, y: net(y), Y0, t, rtol=1e-4, atol=1e-4) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


class TestTransforms:
    """torch.func and forward mode: right, or refused; never silently wrong."""

    def test_torch_func_grad_over_the_parameters(self):
        def loss(matrix, y0):
            return pyode.odeint(field(matrix), y0, T, options=FORCED).square().sum()

        inputs = leaf(A), leaf(Y0)
        expected = torch.autograd.grad(loss(*inputs), inputs)
        for argnums in (0, 1, (0, 1)):
            found = torch.func.grad(loss, argnums=argnums)(A, Y0)
            for i, gradient in zip(argnums, found) if isinstance(argnums, tuple) else [(argnums, found)]:
                assert torch.allclose(gradient, expected[i], rtol=1e-12)

    def test_vmap_over_a_fixed_step_solve(self):
        def solve(y0):
            return pyode.odeint(field(A), y0, T, method="rk4")

        batch = torch.stack([Y0, 2 * Y0, -Y0])
        together = torch.func.vmap(solve)(batch)
        assert torch.allclose(together, torch.stack([solve(y0) for y0 in batch]), rtol=1e-13)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("method", ["dopri5", "rk4"])
    @pytest.mark.parametrize("which", ["y0", "matrix"])
    def test_forward_mode_has_its_tangent(self, method, which):
        options = FORCED if method == "dopri5" else {}

        def solve(x):
            y0, matrix = (x, A) if which == "y0" else (Y0, x)
            return pyode.odeint(field(matrix), y0, T, method=method, options=options)

        x = Y0 if which == "y0" else A
        direction = torch.ones_like(x)
        step = 1e-6
        expected = (solve(x + step * direction) - solve(x - step * direction)) / (2 * step)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(solve(forward_ad.make_dual(x, direction))).tangent
        assert tangent is not None
        assert torch.allclose(tangent, expected, rtol=1e-7, atol=1e-8)  # the difference's own error


class Cubic(nn.Module):
    """A spiral, which notes its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64))
        self.steps: list[float] = []

    def forward(self, t, y):
        return y**3 @ self.matrix

    def callback_step(self, t0, y0, dt):
        self.steps.append(float(dt.detach()))


@METHODS
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_many_gradients_at_once(method, control):
    def solve(y0):
        arguments = {"rtol": 1e-4, "atol": 1e-5, "method": method, "options": {"control": control}}
        return pyode.odeint(lambda t, y: torch.tanh(y @ A), y0, T, **arguments)

    jacobians = [torch.autograd.functional.jacobian(solve, Y0, vectorize=at_once) for at_once in (True, False)]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-14)


def first_step_and_gradients(odeint, method: str, options: dict) -> tuple[float, list[Tensor]]:
    func, y0 = Cubic(), tensor(1.2, 0.3).requires_grad_()
    y = odeint(func, y0, tensor(0.0, 0.4, 1.0), rtol=1e-4, atol=1e-4, method=method, options=options)
    return func.steps[0], list(torch.autograd.grad(y.square().sum(), (y0, func.matrix)))


@pytest.mark.parametrize(
    "odeint", [pyode.odeint, partial(pyode.odeint_adjoint, adjoint_options={})], ids=["odeint", "adjoint"]
)
@pytest.mark.parametrize("method", [*(name for name, tableau in TABLEAUS.items() if tableau.adaptive), "adams"])
def test_no_gradient_leaks_into_the_choice_of_the_first_step(method, odeint):
    size, chosen = first_step_and_gradients(odeint, method, {})
    _, given = first_step_and_gradients(odeint, method, {"first_step": size})
    assert all(map(torch.equal, chosen, given))


def test_of_torchdiffeq_one_does():
    size, chosen = first_step_and_gradients(torchdiffeq.odeint, "dopri5", {})
    _, given = first_step_and_gradients(torchdiffeq.odeint, "dopri5", {"first_step": size})
    assert not torch.allclose(chosen[0], given[0], rtol=1e-9, atol=0)
