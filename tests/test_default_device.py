"""torch.set_default_device(): of no concern to a solve, whose device is its state's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import pyode
from pyode.methods import METHODS
from pyode.solution import Solution

CPU = {"device": "cpu", "dtype": torch.float64}
METHODS_WITH_GRADIENTS = [name for name in METHODS if name not in ("fixed_adams", "scipy_solver")]


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], **CPU))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.matrix)


def solve(odeint=pyode.odeint, **kwargs):
    def run(func, y0, t):
        return odeint(func, y0, t, **{"rtol": 1e-4, "atol": 1e-5, **kwargs})

    return run


def event(t, y):
    return y[..., 0] - 0.5 if y.dim() == 2 and t.dim() else y[0, 0] - 0.5


def of_parts(func, y0, t):
    parts = (y0, y0[0])
    return pyode.odeint(
        lambda t, y: (func(t, y[0]), func(t, y[1])),
        parts,
        t,
        rtol=(1e-3, 1e-4),
        atol=(1e-4, torch.full((2,), 1e-5, **CPU)),
    )


def dense(func, y0, t, **kwargs):
    solution = pyode.odeint_dense(func, y0, 0.0, 1.0, **kwargs)
    return solution(0.3), solution(torch.tensor([0.9, 0.1], **CPU))


def by_the_twin(func, y0, t, solver=pyode.odeint, **kwargs):
    with pyode.backend("reference"):
        return solver(func, y0, t, rtol=1e-3, **kwargs)


def interpolated(func, y0, t):
    return pyode.solve_ivp(func, y0, t, dense_output=True).interpolant(0.3)


def by_numbers(func, y0, t):
    options = {"step_t": torch.tensor([0.2], **CPU), "jump_t": [0.3], "norm": lambda e: float(e.abs().max())}
    return pyode.odeint_adjoint(func, y0, t, rtol=torch.full((2,), 1e-4, **CPU), options=options)


def twice(func, y0, t, **options):
    y = pyode.odeint_adjoint(func, y0, t[:2], rtol=1e-4, atol=1e-5, options=options)
    return torch.autograd.grad(y.square().sum(), y0, create_graph=True)


STEPS = {"step_size": 0.1}
CASES = {
    **{f"odeint {name}": solve(method=name, options=STEPS if name == "rk4" else {}) for name in METHODS_WITH_GRADIENTS},
    **{
        f"odeint_adjoint {name}": solve(pyode.odeint_adjoint, method=name) for name in ("dopri5", "rk4", "adams", "gl4")
    },
    **{
        f"checkpoint {name}": solve(method=name, options={"gradient": "checkpoint", "checkpoints": n})
        for name in ("dopri5", "rk4", "gl4")
        for n in (None, 2)
    },
    "scipy_solver": solve(pyode.odeint_adjoint, method="scipy_solver"),
    "restart": solve(pyode.odeint_adjoint, adjoint_options={"restart": True}),
    "per sample": solve(pyode.odeint_adjoint, options={"control": "per_sample"}),
    "parts": of_parts,
    "numbers": by_numbers,
    "dense": dense,
    "dense rk4": partial(dense, method="rk4", options=STEPS),
    "odeint_event": lambda func, y0, t: pyode.odeint_event(func, y0, 0.0, event_fn=event),
    "odeint_event rk4": lambda func, y0, t: pyode.odeint_event(
        func, y0, t[0], event_fn=event, method="rk4", options=STEPS
    ),
    **{
        f"solve_ivp {gradient} {control} {event_fn is not None}": solve(
            pyode.solve_ivp, gradient=gradient, control=control, event_fn=event_fn
        )
        for gradient in ("direct", "checkpoint", "adjoint")
        for control in ("per_sample", "joint")
        for event_fn in (None, event)
    },
    "twin": by_the_twin,
    "twin by samples": partial(by_the_twin, solver=pyode.solve_ivp, event_fn=event),
    "compact": solve(pyode.solve_ivp, compact=True),
    "interpolant": interpolated,
    "compiled": solve(options={"compile": True}),
    "compiled by samples": solve(pyode.solve_ivp, compile=True),
    "vmap": lambda func, y0, t: torch.func.vmap(lambda y: pyode.odeint(func, y, t))(y0),
    "second derivatives": twice,
    "second derivatives by samples": partial(twice, control="per_sample"),
}


def tensors_of(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors_of(part)
    elif isinstance(result, Solution):
        print(result)
        yield from (x for x in (result.ys, result.status, result.event_t, result.event_y) if x is not None)


@pytest.mark.parametrize("case", CASES)
def test_a_default_device_is_of_no_concern(case):
    def run():
        func, y0, t = Field(), torch.tensor([[1.0, -2.0], [0.5, 0.3]], **CPU), torch.linspace(0, 1, 3, **CPU)
        inputs = [*func.parameters(), y0.requires_grad_(), t.requires_grad_()]
        found = list(tensors_of(CASES[case](func, y0, t)))
        losses = [x.nan_to_num().sum() for x in found if x.requires_grad]
        gradients = torch.autograd.grad(losses, inputs, allow_unused=True) if losses else ()
        return [*found, *(g for g in gradients if g is not None)]

    expected = run()
    torch.set_default_device("meta")  # where nothing can be computed
    try:
        found = run()
    finally:
        torch.set_default_device(None)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
