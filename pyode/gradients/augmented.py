"""The adjoint state as one tensor, for methods that can't carry its integrals beside the solve.

A step of a one-step method is a weighted sum of its own evaluations, and so is that of an integral (`Quadrature`). A
multistep method keeps derivatives from step to step, SciPy keeps its own: there the integrals are part of the state.
"""

from __future__ import annotations

from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .._ops.autograd import plain
from .._ops.contract import Layout, RightHandSide


class AugmentedState:
    """(y, a) and the integrals of the parameters and of time, one behind the other in a flat tensor.

    Args:
        z: y and a, stacked.
        integrals: real or complex, of any shape.
    """

    def __init__(self, z: Tensor, integrals: list[Tensor]) -> None:
        self.parts = [z, *integrals]
        self.sizes = [part.numel() for part in self.parts]

    def pack(self, parts: list[Tensor]) -> Tensor:
        """The flat tensor; parts of different dtypes are promoted."""
        return torch.cat([part.reshape(-1) for part in parts])

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """The parts, each of its own shape and dtype."""
        return [
            (piece if like.is_complex() or not flat.is_complex() else piece.real).reshape(like.shape).to(like.dtype)
            for piece, like in zip(torch.split(flat, self.sizes), self.parts)
        ]

    def layout(self, ops: Any, half: Layout) -> Layout:
        """That of the flat tensor: the segments of (y, a), then one for each integral."""
        dtype = reduce(torch.promote_types, (part.dtype for part in self.parts))
        _, *ends = accumulate(self.sizes)
        return ops.Layout(1, sum(self.sizes), (*half.segments, *ends), dtype, half.device)  # type: ignore[no-any-return]


class AugmentedDynamics:
    """The adjoint dynamics on an augmented state.

    Args:
        dynamics: of (y, a); notes its integrands in its attribute `quadrature`.
        state: the form of the augmented state.
    """

    calls = func = None
    wanted = True

    def __init__(self, dynamics: Any, state: AugmentedState) -> None:
        self.dynamics, self.state = dynamics, state
        self.integrands: list[Tensor] = []
        dynamics.quadrature = self

    def note(self, integrands: list[Tensor]) -> None:
        """What the dynamics tell of an evaluation."""
        self.integrands = integrands

    @property
    def n_evals(self) -> int:
        """How often func has been evaluated."""
        evals: RightHandSide = self.dynamics
        return evals.n_evals

    def accept(self, k: Any, y: Tensor) -> Tensor:
        """See RightHandSide."""
        raise NotImplementedError("calls is None")

    def trial(self, t: Tensor, flat: Tensor, /) -> Tensor:
        """See RightHandSide; one-step methods alone need it, and those carry their integrals beside the state."""
        raise NotImplementedError

    def __call__(self, t: Tensor, flat: Tensor, /) -> Tensor:
        """The derivative of the whole."""
        z = self.state.unpack(flat)[0]
        return plain(self.state.pack([self.dynamics(t, z), *self.integrands]).to(flat.dtype))
