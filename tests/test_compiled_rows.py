"""What depends on the number of rows, or chooses by it, is what func does for each number: never frozen in."""

from __future__ import annotations

import pytest
import torch

import pyode

T = torch.tensor([0.0, 1.0], dtype=torch.float64)
W = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3).sin()

FUNCS = {
    "divided": lambda t, y: y / y.shape[0],
    "times": lambda t, y: y * len(y),
    "filled": lambda t, y: torch.full_like(y, y.shape[0]),
    "full": lambda t, y: torch.full((3,), y.shape[0], dtype=y.dtype).expand_as(y),
    "clamped": lambda t, y: y.clamp(max=0.1 * y.shape[0]),
    "selected": lambda t, y: y[:, (y.shape[0] - 1) % 3].unsqueeze(1).expand_as(y),
    "rolled": lambda t, y: y.roll(y.shape[0], 1),
    "one or more": lambda t, y: -y if y.shape[0] == 1 else y,
    "few or many": lambda t, y: -y if y.shape[0] > 4 else y,
    "exactly": lambda t, y: -y if y.shape[0] == 6 else y,
    "squeezed": lambda t, y: y.squeeze().reshape(y.shape) * 2,
    "mean of rows": lambda t, y: y - y.mean(0),
    "sizes": lambda t, y: y * torch.ones(y.shape[0], 1, dtype=y.dtype) + y.new_zeros(y.shape),
    "all rows": lambda t, y: y[: y.shape[0]],
    "einsum": lambda t, y: torch.einsum("bi,ij,bj->b", y, W, y)[:, None].expand_as(y),
}
SIDE_BY_SIDE = ("selected", "one or more", "few or many", "exactly", "squeezed", "sizes", "all rows", "einsum")


@pytest.mark.parametrize("name", FUNCS)
def test_any_number_of_rows(name):
    f = FUNCS[name]
    compiled = pyode.compile(f, strict=True)
    for rows in (1, 4, 6, 5, 1):
        y0 = torch.randn(rows, 3, dtype=torch.float64).requires_grad_()
        ours, theirs = (pyode.odeint(g, y0, T, method="midpoint") for g in (compiled, f))
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
        gradients = [torch.autograd.grad(y.sin().sum(), y0)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", FUNCS)
def test_it_is_told_why_rows_are_not_side_by_side(name):
    f = pyode.compile(FUNCS[name], strict=True)
    pyode.odeint(f, torch.randn(7, 3, dtype=torch.float64), T, method="euler")
    if name in SIDE_BY_SIDE:
        assert "rows side by side" in str(f)
    else:
        assert any(reason in str(f) for reason in ("the number of rows", "mixes rows"))


def test_samples_with_steps_of_their_own_can_not_be_one_row():
    f = pyode.compile(lambda t, y: y / y.shape[0])
    with pytest.warns(UserWarning, match=r"div at .*test_compiled_rows.py:\d+: computes with the number of rows"):
        ours = pyode.solve_ivp(f, torch.ones(3, 2), T, control="per_sample")
    assert torch.equal(ours.ys, pyode.solve_ivp(f.func, torch.ones(3, 2), T, control="per_sample").ys)


def test_a_single_sample_with_steps_of_its_own_is_a_row_like_others():
    f = pyode.compile(lambda t, y: y[:, :1] * torch.cos(t)[:, None] - y, strict=True)
    for rows in (1, 7, 17, 1000, 1):
        y0 = torch.randn(rows, 3, dtype=torch.float64)
        ours, theirs = (pyode.solve_ivp(g, y0, T, control="per_sample") for g in (f, f.func))
        torch.testing.assert_close(ours.ys, theirs.ys, rtol=1e-10, atol=1e-12)
    assert str(f).count("tensors read") == 1
