"""The five workloads, and who solves them. The same weights and states in every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Func = Callable[[Tensor, Tensor], Tensor]
TOLERANCES = {"rtol": 1e-5, "atol": 1e-7}


class Mlp(nn.Module):
    """A tanh network as dynamics: [B, sizes[0]] to [B, sizes[-1]].

    Args:
        sizes: of the layers.
        cubed: whether it sees y**3 instead of y; its weights are then small.
        timed: whether t is a further input.
    """

    def __init__(self, sizes: list[int], cubed: bool = False, timed: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [nn.Linear(i, o), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])
        self.cubed, self.timed = cubed, timed
        if cubed:
            for layer in layers[::2]:
                nn.init.normal_(layer.weight, std=0.1)
                nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        if self.cubed:
            y = y**3
        if self.timed:
            y = torch.cat([y, t.expand(y.shape[0], 1)], 1)
        return self.net(y)


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    """The van der Pol oscillator with mu = 5; [B, 2]."""
    x, v = y.unbind(-1)
    return torch.stack([v, 5 * (1 - x * x) * v - x], -1)


def lorenz(t: Tensor, y: Tensor) -> Tensor:
    """The Lorenz system; [B, 3]."""
    x, v, z = y.unbind(-1)
    return torch.stack([10 * (v - x), x * (28 - z) - v, x * v - 8 / 3 * z], -1)


@dataclass
class Case:
    """dy/dt = f(t, y) with y(t[0]) = y0, wanted at every t; float32."""

    name: str
    f: Func
    y0: Tensor
    t: Tensor

    def solve(self, odeint: Callable[..., Tensor], **arguments: Any) -> Tensor:
        """The states at every t, [T, *y0.shape], by any odeint; at TOLERANCES unless the arguments say else."""
        return odeint(self.f, self.y0, self.t, **(TOLERANCES | arguments))

    def gradients(self, odeint: Callable[..., Tensor], **arguments: Any) -> tuple[Tensor, ...]:
        """Of mean(y**2) with respect to f's parameters: what is timed."""
        return torch.autograd.grad(self.solve(odeint, **arguments).square().mean(), self.parameters)

    def gradient(self, odeint: Callable[..., Tensor], **arguments: Any) -> Tensor:
        """The same as one vector."""
        return flat(self.gradients(odeint, **arguments))

    def to(self, target: torch.device | torch.dtype | str) -> Case:
        """This case on another device, or in another dtype; a module is copied."""
        f = deepcopy(self.f).to(target) if isinstance(self.f, nn.Module) else self.f
        return Case(self.name, f, self.y0.to(target), self.t.to(target))

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Those of f, found once, as an optimizer does."""
        return list(self.f.parameters()) if isinstance(self.f, nn.Module) else []

    def count_evaluations(self, odeint: Callable[..., Tensor], **arguments: Any) -> int:
        """How often a solve evaluates f."""
        counted = Counted(self.f)
        Case(self.name, counted, self.y0, self.t).solve(odeint, **arguments)
        return counted.n


class Counted(nn.Module):
    """Dynamics that count their evaluations."""

    def __init__(self, f: Func) -> None:
        super().__init__()
        self.f, self.n = f, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y)."""
        self.n += 1
        return self.f(t, y)


def flat(found: Tensor | Sequence[Tensor]) -> Tensor:
    """All numbers of a solution or of gradients, as one vector."""
    return torch.cat([part.reshape(-1) for part in ([found] if isinstance(found, Tensor) else found)])


def cases() -> dict[str, Case]:
    """All five, by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spiral, toy, big = Mlp([2, 50, 2], cubed=True), Mlp([2, 20, 1], timed=True), Mlp([64, 256, 256, 64])
    states = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=states)

    unit = torch.tensor([0.0, 1.0])
    all_cases = (
        Case("spiral20x2", spiral, normal(20, 2), torch.linspace(0, 2, 10)),
        Case("toy10x1", toy, torch.linspace(-2, 2, 10)[:, None], unit),
        Case("vdp256", van_der_pol, normal(256, 2), torch.linspace(0, 5, 20)),
        Case("lorenz1024", lorenz, 0.1 * normal(1024, 3) + torch.tensor([1.0, 1.0, 25.0]), torch.linspace(0, 2, 20)),
        Case("big256x64", big, normal(256, 64), unit),
    )
    return {case.name: case for case in all_cases}
