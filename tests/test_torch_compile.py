"""torch.compile around a solve, and inside: a graph break at the solve, and a compiled func that is seldom compiled."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from fields import Y0, T, assert_close, loss_of
from test_company import ALL, GRADIENTS, ROUGH, Model, Net, gradients_of
from torch import nn

import pyode

# By the compiler itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@GRADIENTS
def test_torch_compile_of_a_model_that_holds_a_solve(odeint):
    # A graph break at the solve; what is around it is compiled once, whatever the number of steps.
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = Model(odeint)
    compiled = torch.compile(model, backend=counter)
    assert_close(gradients_of(model, compiled), gradients_of(model), 1e-12)
    frames = counter.frame_count
    model.times = 2 * T  # more steps
    assert_close(gradients_of(model, compiled), gradients_of(model), 1e-12)
    assert counter.frame_count == frames


def variant(name: str, odeint=pyode.odeint, **kwargs):
    """A solver of this name with further arguments."""
    solve = partial(odeint, **kwargs)
    solve.__name__ = name
    return solve


def joint(func, y0, t):
    return pyode.solve_ivp(func, y0, t, gradient="adjoint", control="joint", **ROUGH).ys


OTHERS = (
    joint,
    variant("adams", method="adams", **ROUGH),
    variant("adams adjoint", pyode.odeint_adjoint, method="adams", **ROUGH),
    variant("jumps", options={"jump_t": T[1:2] / 2}, **ROUGH),
    variant("jumps adjoint", pyode.odeint_adjoint, options={"jump_t": T[1:2] / 2}, **ROUGH),
    variant("rk4", method="rk4"),
    variant("trapezoid", method="trapezoid"),
    variant("trapezoid checkpoint", method="trapezoid", options={"gradient": "checkpoint"}),
)


@pytest.mark.parametrize("odeint", [*ALL, *OTHERS], ids=lambda solve: solve.__name__)
@pytest.mark.parametrize(
    ("encoded", "dtype"),
    [(False, torch.float32), (True, torch.float64)],
    ids=["y0 is data", "y0 is computed"],
)
def test_a_compiled_func_is_compiled_at_most_twice_for_a_training_run(odeint, encoded, dtype):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    func, encoder, times = Net(dtype), nn.Linear(2, 2, dtype=dtype), T.to(dtype)
    func.drop = nn.Dropout(0.0)
    func.outer.register_forward_pre_hook(lambda module, inputs: func.drop(*inputs))
    compiled = torch.compile(func, backend=counter)
    optimiser = torch.optim.SGD([*func.parameters(), *encoder.parameters()], 1e-3)

    def train(batch):
        y0 = torch.linspace(-1, 1, 2 * batch, dtype=dtype).view(batch, 2)
        optimiser.zero_grad()
        odeint(compiled, encoder(y0) if encoded else y0, times).square().mean().backward()
        optimiser.step()

    def evaluate(batch):
        func.eval()
        with torch.no_grad():
            odeint(compiled, torch.ones(batch, 2, dtype=dtype), times)
        func.train()

    for _ in range(4):
        train(16)
    assert 1 <= counter.frame_count <= 2  # where y requires a gradient, and where it does not
    # Each once more for sizes that change, and one for evaluation; then it is enough, and less than torch puts up with.
    for _ in range(2):
        before = counter.frame_count
        for batch in (7, 16, 5):
            train(batch)
            evaluate(batch)
    assert counter.frame_count == before < torch._dynamo.config.recompile_limit

    def gradients(f):
        y0 = Y0.to(dtype, copy=True).requires_grad_()
        y = odeint(f, 2 * y0, times)
        return list(torch.autograd.grad(loss_of(y), [y0, *func.parameters()]))

    assert_close(gradients(compiled), gradients(func), 1e-5)
