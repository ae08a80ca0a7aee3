"""Solves by the device's loop beside host-driven ones: on a GPU, or with the kernels on the host (cuda_on_host)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import pyode
from pyode import captures
from pyode._ops import native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON = {"device_loop": True}
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU here")
MARKS = [
    pytest.mark.cuda,
    pytest.mark.skipif(not native.on_gpu(DEVICE), reason="neither a GPU nor its kernels on the host here"),
    pytest.mark.usefixtures("_nothing_captured"),
]


def n_captures() -> int:
    return captures.captured_solves.n_captures


class Field(nn.Module):
    """Row-wise; t is [] or [B]."""

    def __init__(self, width: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)).to(DEVICE, dtype)
        self.rate = 1.0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * self.net(y) - 0.5 * y + torch.sin(t)[..., None]


def both(func, y0, t, **kwargs):
    """Solutions and counts, host-driven and by the device's loop, of odeint without gradients."""
    found = []
    for more in ({}, ON):
        stats = pyode.Stats()
        given = {"rtol": 1e-4, "atol": 1e-6, **kwargs}
        given["options"] = {**kwargs.get("options", {}), **more, "stats": stats}
        with torch.no_grad():
            found.append((pyode.odeint(func, y0, t, **given), stats))
    return found


def check_same(func, y0, t, **kwargs):
    before = n_captures()
    (theirs, their_stats), (ours, our_stats) = both(func, y0, t, **kwargs)
    assert n_captures() == before + 1
    for a, b in zip(tree_leaves(theirs), tree_leaves(ours)):
        assert torch.equal(a, b)
    assert our_stats == their_stats


def times(n: int = 7, dtype=torch.float32) -> Tensor:
    return torch.linspace(0, 2, n, dtype=dtype, device=DEVICE)


def normal(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


@contextlib.contextmanager
def nobody_waits() -> Iterator[None]:
    """Within it what would make the host wait for the GPU fails; without one, what reads a number off any tensor."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def wait(x: Tensor, *_: Any) -> None:
        raise AssertionError("somebody waits")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, name, wait)
        patch.setattr(torch, "equal", wait)
        yield


class HostRead(nn.Module):
    """Can't be captured."""

    def forward(self, t, y):
        return -y if float(t.detach()) >= 0 else y


def both_gradients(solve, func, y0, t, wanted=(), options=None, backwards=None, forwards=True, **kwargs):
    """Gradients to y0, those wanted, and t if it wants one, and the backward solve's counts; without and with ON.

    Args:
        solve: a function of func, y0, t, options and adjoint_options.
        wanted: the tensors of func's.
        options: of both solves; `backwards` are further ones of the backward solve.
        forwards: whether the forward solve is to have ON, too.
    """
    found = []
    for more in ({}, ON):
        stats, y = pyode.Stats(), tree_map(lambda part: part.clone().requires_grad_(), y0)
        adjoint_options = {**(options or {}), **(backwards or {}), **more, "stats": stats}
        with torch.enable_grad():
            out = solve(func, y, t, {**(options or {}), **(more if forwards else {})}, adjoint_options, **kwargs)
            inputs = (*tree_leaves(y), *wanted, *([t] if t.requires_grad else []))
            loss = sum(part.abs().square().sum() for part in tree_leaves(out))
            found.append((torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True), stats))
    return found


def check_same_gradients(*given, captures=2, **kwargs):
    """Of what both_gradients is given: the bits and counts are the host's."""
    before = n_captures()
    (theirs, their_stats), (ours, our_stats) = both_gradients(*given, **kwargs)
    assert n_captures() == before + captures
    assert all(map(torch.equal, theirs, ours))
    assert all(gradient.isfinite().all() for gradient in ours)
    assert our_stats == their_stats
    assert their_stats.n_f_evals > 0


class Scaled(Field):
    """With a factor in args."""

    def forward(self, t, y, scale):
        return super().forward(t, y) * scale


def check_training(solve):
    """Steps of training, without and with ON, in which args change: to the same bits, from two captures.

    Args:
        solve: a function of func, y0, the options, scale, and the number of the step.
    """
    finals, y0, before = [], normal(4, 3), n_captures()
    for more in ({}, ON):
        torch.manual_seed(0)
        func, scale = Scaled(), torch.ones(3, device=DEVICE)
        optimizer = torch.optim.SGD(func.parameters(), lr=0.1)
        for i in range(4):
            optimizer.zero_grad(set_to_none=False)
            with torch.enable_grad():
                (solve(func, y0, more, scale, i)[-1] - 1).square().mean().backward()
            optimizer.step()
            scale = scale * 0.9
        finals.append([p.detach().clone() for p in func.parameters()])
    assert all(map(torch.equal, *finals))
    assert n_captures() == before + 2
