"""Many gradients at once (is_grads_batched=True) are those that come one by one, in every gradient mode."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fields import Y0, T
from torch import Tensor, nn

import pyode


class Network(nn.Module):
    """Of time and state; of a time for each row, too."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.5, 1.0], [-2.0, 0.1]], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.matrix) * torch.cos(t).reshape(-1, 1)


LOOSE = {"rtol": 1e-4, "atol": 1e-6}
SOLVES = {
    "checkpoint": partial(pyode.odeint, options={"gradient": "checkpoint"}),
    "few checkpoints": partial(pyode.odeint, options={"gradient": "checkpoint", "checkpoints": 2}),
    "checkpoint by samples": partial(pyode.odeint, options={"gradient": "checkpoint", "control": "per_sample"}),
    "adjoint": pyode.odeint_adjoint,
    "adjoint by samples": partial(pyode.odeint_adjoint, options={"control": "per_sample"}),
}
IMPLICIT = {
    "implicit": partial(pyode.odeint, method="gl4"),
    "implicit, checkpoint": partial(pyode.odeint, method="gl4", options={"gradient": "checkpoint"}),
}
CASES = [(name, False) for name in SOLVES | IMPLICIT]
CASES += [(name, True) for name in ("checkpoint", "checkpoint by samples", "adjoint")]


def both_ways(solve, create_graph: bool = False) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients at once and one by one, and of what."""
    func, t = Network(), T.clone().requires_grad_()
    y0 = Y0.clone().requires_grad_()
    ys = solve(func, y0, t)
    vectors = torch.randn(3, *ys.shape, dtype=ys.dtype)
    grad = partial(torch.autograd.grad, ys, (y0, t, func.matrix), retain_graph=True, create_graph=create_graph)
    apart = [torch.stack(column) for column in zip(*map(grad, vectors))]
    return list(grad(vectors, is_grads_batched=True)), apart, [y0, func.matrix]


@pytest.mark.parametrize(("name", "compiled"), CASES)
def test_at_once_as_one_by_one(name, compiled):
    def solve(func, y0, t):
        return (SOLVES | IMPLICIT)[name](pyode.compile(func, strict=True) if compiled else func, y0, t, **LOOSE)

    at_once, apart, _ = both_ways(solve)
    torch.testing.assert_close(at_once, apart, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adjoint", "adjoint by samples"])
def test_they_can_be_differentiated_where_one_can(name):
    *both, inputs = both_ways(partial(SOLVES[name], **LOOSE), create_graph=True)
    seconds = [
        torch.autograd.grad(sum(g.square().sum() for g in gs), inputs, retain_graph=True)  # that of the solve is common
        for gs in both
    ]
    torch.testing.assert_close(*seconds, rtol=1e-12, atol=1e-12)
