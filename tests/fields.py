"""A neural ODE's field with every kind of parameter, and gradients of a loss on its solution."""

from __future__ import annotations

import torch
from problems import tensor
from torch import Tensor, nn

Y0 = torch.tensor([[1.0, -2.0], [0.5, 0.3]], dtype=torch.float64)
T = tensor(0.0, 0.4, 0.5, 1.3)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


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


class Driven(Field):
    """The same, with a time for each row or one for all."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.frozen * torch.tanh(y @ self.matrix + self.bias) * (1 + torch.sin(self.rate * t)).unsqueeze(-1)


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
