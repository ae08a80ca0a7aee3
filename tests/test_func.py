"""What func is given, what it may do with it, and what it may return."""

from __future__ import annotations

import math
from itertools import cycle

import numpy as np
import pytest
import torch
from factories import inspector_by_attributes
from problems import growth, kepler, kepler_start, linear, tensor
from torch import Tensor, nn

import pyode
from pyode import DynamicsError, state
from pyode.methods import TABLEAUS

UNIT = tensor(0.0, 1.0)
Y0 = torch.tensor([[1.0, -0.5, 0.25], [0.1, 2.0, -3.0]], dtype=torch.float64)
METHODS = pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])


def solve(f, y0: Tensor = Y0, t: Tensor = UNIT, **kwargs) -> Tensor:
    return pyode.odeint(f, y0, t, **{"rtol": 1e-6, "atol": 1e-8, **kwargs})


@METHODS
def test_t_is_a_0_dim_tensor_of_the_states_real_dtype_and_device(method, dtype, device):
    seen = []

    def f(t, y):
        seen.append((t.shape, t.dtype, t.device, t.requires_grad))
        return -y

    y0 = torch.ones(3, dtype=dtype, device=device)
    for t in (torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.0]), tensor(0.0, 1.0)):
        solve(f, y0, t.to(device), rtol=1e-2, atol=1e-2, method=method)
    assert set(seen) == {((), y0.real.dtype if dtype.is_complex else dtype, y0.device, False)}


@METHODS
def test_y_has_the_states_shape_dtype_and_device(method, dtype, device):
    seen = []

    def f(t, y):
        seen.append((y.shape, y.dtype, y.device, y.is_contiguous()))
        return -y

    y0 = torch.ones(4, 3, dtype=dtype, device=device).T
    solve(f, y0, torch.tensor([0.0, 0.5], device=device), rtol=1e-2, atol=1e-2, method=method)
    assert {s[:3] for s in seen} == {(y0.shape, dtype, y0.device)}


@METHODS
@pytest.mark.parametrize("grad", [False, True])
def test_everything_func_is_given_may_be_kept(method, grad):
    kept, copies = [], []

    def f(t, y):
        kept.append((t, y))
        copies.append((t.clone(), y.detach().clone()))
        return torch.sin(t) * y

    with torch.set_grad_enabled(grad):
        solve(f, method=method, t=torch.linspace(0, 2, 5, dtype=torch.float64))
    assert len(kept) > 10
    for (t, y), (t_then, y_then) in zip(kept, copies):
        assert torch.equal(t, t_then)
        assert torch.equal(y, y_then)


RETURNS = {
    "its input": (lambda t, y: y, lambda t, y: y.clone()),
    "a view of its input": (lambda t, y: y.view(-1).view(y.shape), lambda t, y: y.clone()),
    "a flipped copy": (lambda t, y: y.flip(0), lambda t, y: y.flip(0).clone()),
    "transposed memory": (lambda t, y: (2 * y).T.contiguous().T, lambda t, y: 2 * y),
    "every second number": (lambda t, y: torch.cat([y, y], -1)[:, ::2], lambda t, y: torch.cat([y, y], -1)[:, ::2] * 1),
    "an expanded number": (lambda t, y: torch.ones((), dtype=y.dtype).expand(y.shape), lambda t, y: torch.ones_like(y)),
    "an expanded row": (lambda t, y: y[:1].expand(y.shape), lambda t, y: y[:1].repeat(2, 1)),
    "integers": (lambda t, y: torch.ones_like(y, dtype=torch.int64), lambda t, y: torch.ones_like(y)),
    "another shape's transpose": (lambda t, y: (2 * y.T.contiguous()).T, lambda t, y: 2 * y),
    "booleans": (lambda t, y: y > 0, lambda t, y: (y > 0).double()),
    "lower precision": (lambda t, y: y.float(), lambda t, y: y.float().double()),
    "half precision": (lambda t, y: y.bfloat16(), lambda t, y: y.bfloat16().double()),
    "a parameter": (lambda t, y, p=nn.Parameter(Y0.clone()): p, lambda t, y: Y0.clone()),  # noqa: B008
    "an inference tensor": (torch.inference_mode()(lambda t, y: -y), lambda t, y: -y),
}


@METHODS
@pytest.mark.parametrize("name", RETURNS)
@pytest.mark.parametrize("exchange", [True, False])
def test_what_func_may_return(exchange, name, method, monkeypatch):
    if not exchange:
        monkeypatch.setattr(state, "inspector", inspector_by_attributes())
    f, plain = RETURNS[name]
    with torch.no_grad():
        assert torch.equal(solve(f, method=method), solve(plain, method=method))


@METHODS
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_lazy_conjugate_is_a_conjugate(method, dtype):
    y0 = torch.tensor([[1 + 2j, -0.5j, 3.0]], dtype=dtype)
    expected = solve(lambda t, y: torch.complex(y.real, -y.imag), y0, method=method)
    assert torch.equal(solve(lambda t, y: y.conj(), y0, method=method), expected)
    negated = solve(lambda t, y: torch.complex(y.imag, -y.real), y0, method=method)
    assert torch.equal(solve(lambda t, y: -1j * y, y0, method=method), negated)
    assert torch.equal(
        solve(lambda t, y: -y, y0.conj(), method=method), solve(lambda t, y: -y, y0, method=method).conj()
    )


@METHODS
def test_a_lazy_negation_is_a_negation(method):
    y0 = tensor(3.0)

    def lazily_negated(t, y):
        k = torch.complex(torch.zeros_like(y), y).conj().imag
        assert k.is_neg()
        return k

    assert torch.equal(solve(lazily_negated, y0, method=method), solve(lambda t, y: -y, y0, method=method))


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "dopri8", "rk4", "implicit_adams", "adams"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 13])
@pytest.mark.parametrize("kind", ["tensors", "views", "numpy"])
def test_buffers_that_func_returns_in_turn_do_not_spoil_what_they_held(method, n, kind):
    buffers = [torch.empty_like(Y0) for _ in range(n)]
    turns = cycle(buffers)

    def f(t, y):
        out = next(turns)
        if kind == "numpy":
            return torch.from_numpy(np.multiply(y.numpy(), 0.5, out=out.numpy()))
        torch.mul(y, 0.5, out=out)
        return out.view(Y0.shape) if kind == "views" else out

    assert torch.equal(solve(f, method=method), solve(lambda t, y: 0.5 * y, method=method))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "implicit_adams"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_buffer_that_func_returns_from_some_evaluation_on_does_not_either(method, n):
    buffer, calls = torch.empty_like(Y0), []

    def f(t, y):
        calls.append(t)
        return 0.5 * y if len(calls) <= n else torch.mul(y, 0.5, out=buffer)

    assert torch.equal(solve(f, method=method), solve(lambda t, y: 0.5 * y, method=method))


@METHODS
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_buffers_with_a_graph_do_not_either(method, n, gradient):
    w = tensor(0.7).requires_grad_()
    turns = cycle([torch.zeros_like(Y0) for _ in range(n)])

    def f(t, y):
        k = next(turns)
        k[:, 1:] = w * y[:, 1:].sin()
        k[:, :1] = -w * y[:, :1]
        return k

    def anew(t, y):
        return torch.cat([-w * y[:, :1], w * y[:, 1:].sin()], 1)

    arguments = {"method": method, "rtol": 1e-4, "atol": 1e-5, "options": {"gradient": gradient}}
    found, expected = (torch.autograd.grad(solve(g, **arguments).square().sum(), w)[0] for g in (f, anew))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@METHODS
@pytest.mark.parametrize("grad", [False, True])
def test_writing_into_the_input_is_reported(method, grad):
    def f(t, y):
        y.mul_(0.5)
        return y.clone()

    with torch.set_grad_enabled(grad), pytest.raises(DynamicsError, match="wrote into its input"):
        solve(f, Y0.clone(), method=method)

    def f_of_parts(t, parts):
        parts[1].add_(1)
        return parts

    with pytest.raises(DynamicsError, match="wrote into its input"):
        pyode.odeint(f_of_parts, (Y0.clone(), Y0.clone()), UNIT, method=method)


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3).double()

    def forward(self, t, y):
        return torch.tanh(self.inner(y))


def test_func_may_be_a_module_a_method_a_partial_or_a_callable_object():
    module = Module()
    expected = solve(module.forward)

    class Callable:
        def __call__(self, t, y):
            return module(t, y)

    for f in (module, Callable(), lambda t, y: module(t, y), torch.no_grad()(module.forward)):
        assert torch.equal(solve(f), expected)


@pytest.mark.parametrize("inner", ["dopri5", "rk4"])
def test_func_may_solve_itself(inner):
    # y' = z(1) where z' = -z, z(0) = y: y = y0 exp(t / e).
    def f(t, y):
        return pyode.odeint(lambda s, z: -z, y, UNIT, rtol=1e-8, atol=1e-10, method=inner,
                            options={"step_size": 0.01} if inner == "rk4" else {})[-1]  # fmt: skip

    y = solve(f)
    assert torch.allclose(y[-1], Y0 * math.exp(math.exp(-1)), rtol=1e-6)


def test_func_may_call_backward_inside():
    def force(t, y):
        with torch.enable_grad():
            x = y.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((x**2).sum() / 2, x)
        return -gradient

    assert torch.equal(solve(force), solve(lambda t, y: -y))


def test_tensor_subclasses_are_solved_by_the_reference():
    class Labelled(torch.Tensor):
        pass

    y = solve(lambda t, y: -y, Y0.as_subclass(Labelled))
    assert torch.allclose(torch.as_tensor(y).as_subclass(Tensor), solve(lambda t, y: -y), rtol=1e-14)


PARTS = (
    torch.linspace(0, 1, 6, dtype=torch.float64).reshape(2, 3),
    tensor(1.0),
    torch.tensor(2.0, dtype=torch.float64),
)


def coupled(t, parts):
    a, b, c = parts
    return -a * c, b * torch.cos(t), a.sum() - c


@METHODS
def test_a_tuple_is_solved_as_its_parts_together(method):
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    whole = pyode.odeint(coupled, PARTS, t, method=method)
    assert [part.shape for part in whole] == [(4, *part.shape) for part in PARTS]

    def flat(t, y):
        a, b, c = coupled(t, (y[:6].reshape(2, 3), y[6:7], y[7]))
        return torch.cat([a.reshape(-1), b, c.reshape(1)])

    def norm(e):
        return torch.stack([part.square().mean().sqrt() for part in (e[:6], e[6:7], e[7:])]).max()

    options = {"norm": norm} if TABLEAUS[method].adaptive else {}
    y = pyode.odeint(flat, torch.cat([part.reshape(-1) for part in PARTS]), t, method=method, options=options)
    # The two norms differ by the order of summation.
    assert torch.allclose(torch.cat([part.reshape(4, -1) for part in whole], -1), y, rtol=1e-12)


def test_func_may_return_a_list_and_the_parts_may_be_anything_a_tensor_may():
    expected = pyode.odeint(coupled, PARTS, UNIT)
    for f in (
        lambda t, y: list(coupled(t, y)),
        lambda t, y: (coupled(t, y)[0].T.contiguous().T, coupled(t, y)[1], coupled(t, y)[2]),
    ):
        for a, b in zip(pyode.odeint(f, PARTS, UNIT), expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("part", [torch.zeros(0), torch.zeros(2, 0, dtype=torch.float64)])
def test_a_part_may_be_empty(part):
    y, empty = pyode.odeint(lambda t, y: (-y[0], y[1]), (Y0, part), UNIT)
    assert empty.shape == (2, *part.shape)
    assert torch.equal(y, pyode.odeint(lambda t, y: -y, Y0, UNIT))


def test_parts_of_mixed_dtypes_are_promoted():
    parts = (torch.ones(2), torch.ones(3, dtype=torch.float64))
    seen = set()

    def f(t, y):
        seen.add((y[0].dtype, y[1].dtype, t.dtype))
        return -y[0], y[1]

    y = pyode.odeint(f, parts, UNIT)
    assert seen == {(torch.float64,) * 3}
    assert {part.dtype for part in y} == {torch.float64}


@pytest.mark.parametrize("device_t", ["cpu", "cuda"])
def test_t_on_another_device_is_taken_with_a_warning(device_t, device):
    if not torch.cuda.is_available() or device_t == device.type:
        pytest.skip("needs another device")
    with pytest.warns(UserWarning, match="same device"):
        y = pyode.odeint(lambda t, y: -y, Y0.to(device), UNIT.to(device_t))
    assert y.device.type == device.type


def test_the_state_may_be_made_and_solved_in_inference_mode():
    with torch.no_grad():
        expected = solve(lambda t, y: -y)
    with torch.inference_mode():
        made = Y0.clone()
        assert torch.equal(solve(lambda t, y: -y, made), expected)
        assert torch.equal(solve(lambda t, y: -y), expected)
    with torch.no_grad():
        assert torch.equal(solve(lambda t, y: -y, made), expected)


@pytest.mark.parametrize("problem", [growth, linear], ids=lambda problem: problem.name)
@pytest.mark.parametrize("method", list(TABLEAUS))
@pytest.mark.parametrize("grad", [False, True])
def test_the_pure_python_solver_takes_the_same_steps(problem, method, grad, device):
    t = torch.linspace(problem.t0, problem.t1, 9, dtype=torch.float64, device=device)
    stats = {"auto": pyode.Stats(), "reference": pyode.Stats()}
    y, tolerance = {}, 10.0 ** -min(TABLEAUS[method].order + 1, 6)
    # Given: chosen from the error of a tiny step, which for a method of order 8 is rounding noise.
    options = {"first_step": 0.05} if TABLEAUS[method].adaptive else {}
    for name, counts in stats.items():
        with pyode.backend(name), torch.set_grad_enabled(grad):
            y0 = problem.y0.to(device)
            y[name] = pyode.odeint(problem.f, y0, t, tolerance, tolerance, method, {**options, "stats": counts})
    assert stats["auto"] == stats["reference"]
    assert torch.allclose(y["auto"], y["reference"], rtol=1e-12, atol=1e-13)


def test_an_orbit_closes(device):
    # Kepler's ellipse closes; its error after one round is the local ones', amplified some hundredfold.
    y0 = kepler_start(0.3).to(device)
    y = pyode.odeint(kepler, y0, tensor(0.0, 2 * math.pi).to(device), rtol=1e-9, atol=1e-9, method="tsit5")
    assert torch.allclose(y[-1], y0, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
@pytest.mark.parametrize("size", [7, 1 << 17])
@pytest.mark.parametrize("keep", ["the tensor", "a view", "a detached one", "an array", "a graph's leaf"])
def test_func_may_keep_what_it_is_given_whose_memory_serves_again(keep, size, method):
    # The memory of a stage's input and times is given out again, unless somebody holds on to it.
    kept, copies = [], []

    def hold(x):
        if keep == "the tensor":
            return x
        if keep == "a view":
            return x[...]
        if keep == "a detached one":
            return x.detach()
        return x.numpy()

    def f(t, y):
        copies.append((t.clone(), y.clone()))
        if keep == "a graph's leaf":
            with torch.enable_grad():
                kept.append((t, y.requires_grad_().square()))
        else:
            kept.append((hold(t), hold(y)))
        return -y.detach()

    y0 = torch.linspace(1, 2, size)
    options = {"first_step": 0.25} if method == "dopri5" else {"step_size": 0.125}
    with torch.no_grad():
        pyode.odeint(f, y0, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3, method=method, options=options)
    for (t, y), (t_copy, y_copy) in zip(kept, copies, strict=True):
        assert torch.equal(torch.as_tensor(t), t_copy)
        if keep == "a graph's leaf":
            (gradient,) = torch.autograd.grad(y.sum(), y.grad_fn.next_functions[0][0].variable)
            assert torch.equal(gradient, 2 * y_copy)
        else:
            assert torch.equal(torch.as_tensor(y), y_copy)


@pytest.mark.parametrize("size", [7, 1 << 19])
def test_the_memory_of_states_serves_again_where_nobody_keeps_it(size):
    addresses = set()

    def f(t, y):
        addresses.add(y.data_ptr())
        return -y

    with torch.no_grad():
        solve(f, torch.linspace(1, 2, size), rtol=1e-3, atol=1e-3, options={"first_step": 0.1, "max_step": 0.1})
    assert len(addresses) <= 4  # y0 and three more, for 10 steps of 6 evaluations
