"""The loop with a step-size controller for every sample: together equals apart, and nobody disturbs anybody."""

from __future__ import annotations

import math

import pytest
import torch
from factories import BACKENDS, layout_for, loop_for
from problems import spiral
from torch import Tensor

from pyode import SolveError, Status
from pyode._ops import native, reference
from pyode._ops.contract import Grid
from pyode.methods import TABLEAUS

METHODS = pytest.mark.parametrize("method", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
NAMES = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__.rsplit(".")[-1])
RATES = torch.logspace(-1, 1.5, 7, dtype=torch.float64)[:, None]
T = torch.linspace(0, 3, 6, dtype=torch.float64)


def rotate(t: Tensor, y: Tensor) -> Tensor:
    """Every row turns with its own speed, kept in its last number; only exactly rounded operations on single rows."""
    speed = y[:, 2:]
    return torch.cat([-speed * y[:, 1:2], speed * y[:, :1], torch.zeros_like(speed)], 1)


def start(device, dtype=torch.float64) -> Tensor:
    return torch.cat([torch.ones(7, 1), torch.zeros(7, 1), RATES], 1).to(device, dtype)


@NAMES
@METHODS
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_together_equals_apart_to_the_bit(ops, method, sign, device):
    y0, t, rtol = start(device), (sign * T).to(device), 1e-3
    with torch.no_grad():
        loop = loop_for(rotate, y0, t, samples=7, method=method, rtol=rtol, ops=ops)
        together = loop.solve(y0)
        for b in range(7):
            row = y0[b : b + 1]
            alone = loop_for(rotate, row, t, method=method, rtol=rtol, ops=ops)
            apart = alone.solve(row)
            if ops is native:
                assert torch.equal(together[:, b : b + 1], apart), b
            assert torch.allclose(together[:, b : b + 1], apart, rtol=1e-12, atol=1e-12)
            for name in ("n_accepted", "n_rejected", "t"):
                assert float(loop.controller.field(name)[b]) == pytest.approx(float(alone.controller.field(name)[0]))
    assert len(set(loop.controller.field("n_accepted").tolist())) > 3  # they did go their own ways


@pytest.mark.parametrize("stops", ["step_t", "jump_t"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_together_equals_apart_also_at_prescribed_times(stops, sign, device):
    # Each sample arrives at them with another step; the field depends on time, and jumps there.
    def f(t, y):
        t = t.reshape(-1, 1)
        return rotate(t, y) * (1 + t * t) * torch.where(sign * t < 1.0, 1.0, 0.5)

    y0, t = start(device), (sign * T).to(device)
    prescribed = {stops: torch.tensor([sign * 1.0, sign * 2.2], dtype=torch.float64, device=device)}
    with torch.no_grad():
        loop = loop_for(f, y0, t, samples=7, rtol=1e-3, grid=Grid(t.clone(), **prescribed))
        together = loop.solve(y0)
        for b in range(7):
            row = y0[b : b + 1]
            apart = loop_for(f, row, t, rtol=1e-3, grid=Grid(t.clone(), **prescribed)).solve(row)
            assert torch.equal(together[:, b : b + 1], apart), b


@METHODS
def test_every_sample_is_solved_to_its_tolerance(method, device):
    y0 = start(device)
    with torch.no_grad():
        y = loop_for(rotate, y0, T.to(device), samples=7, method=method, rtol=1e-5, atol=1e-7).solve(y0).cpu()
    angle = RATES[None] * T[:, None, None]
    exact = torch.cat([angle.cos(), angle.sin()], -1)
    # The fastest goes through 95 radians in some hundred to some thousand steps, whose errors add up. fehlberg2's
    # estimate is 1/512 of a difference of slopes, and its error so much larger.
    tolerances = 1e4 if method == "fehlberg2" else 200
    assert torch.allclose(y[..., :2], exact, atol=1e-5 * tolerances)


@NAMES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_fails_harms_no_other(ops, value, device):
    y0 = start(device)
    broken = y0.clone()
    broken[3, 0] = value
    with torch.no_grad():
        whole = loop_for(rotate, y0, T.to(device), samples=7, ops=ops)
        expected = whole.solve(y0)
        loop = loop_for(rotate, broken, T.to(device), samples=7, ops=ops)
        outputs = []

        class Ops:
            def __getattr__(self, name):
                return getattr(ops, name)

            def new_states(self, y0, n):
                outputs.append(ops.new_states(y0, n))
                return outputs[-1]

        loop.ops = Ops()
        with pytest.raises(SolveError) as caught:
            loop.solve(broken)
    assert caught.value.status is Status.NON_FINITE
    status = loop.controller.field("status").tolist()
    assert status == [Status.NON_FINITE if b == 3 else Status.SUCCESS for b in range(7)]
    others = [b for b in range(7) if b != 3]
    assert torch.equal(outputs[0][1:, others], expected[1:, others])


def test_a_done_sample_costs_the_others_nothing(device):
    y0 = start(device)
    with torch.no_grad():
        loop = loop_for(rotate, y0, T.to(device), samples=7)
        loop.solve(y0)
    steps = loop.controller.field("n_accepted") + loop.controller.field("n_rejected")
    # f is called for the slowest sample's steps, not for everybody's.
    assert loop.dynamics.n_evals == 2 + 6 * int(steps.max())


@METHODS
def test_both_backends_take_the_same_steps(method, device):
    y0 = torch.tensor([[2.0, 0.0], [1.0, 0.5], [0.1, 0.1]], dtype=torch.float64, device=device)
    found = []
    for ops in (native, reference):
        with torch.no_grad():
            loop = loop_for(spiral, y0, T.to(device), samples=3, method=method, rtol=1e-4, atol=1e-5, ops=ops)
            found.append((loop.solve(y0, 0.01), loop.controller.field("n_accepted").cpu()))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    assert torch.equal(found[0][1], found[1][1])


def test_samples_may_have_output_times_of_their_own(device):
    # One of them goes backwards.
    ends = torch.tensor([[0.0, 1.0], [1.5, 0.5], [3.0, -1.0]], dtype=torch.float64)
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64, device=device)

    def f(t, y):
        assert t.shape in ((), (2,))
        return -y

    with torch.no_grad():
        loop = loop_for(f, y0, T.to(device), samples=2, rtol=1e-8, grid=Grid(ends.to(device)))
        loop.times.tensor = ends.to(device)
        loop.times.values = ends.tolist()
        y = loop.solve(y0).cpu()
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64) * torch.exp(ends[:1] - ends)
    assert torch.allclose(y[..., 0], exact, rtol=1e-6)


def test_one_sample_of_many_is_the_joint_case(device):
    # Joint control is B = 1: the whole tensor is one sample, whatever its shape.
    y0 = start(device)
    with torch.no_grad():
        joint = loop_for(rotate, y0, T.to(device), samples=1)
        y = joint.solve(y0)
        flat = loop_for(lambda t, y: rotate(t, y.view(7, 3)).view(-1), y0.view(-1), T.to(device), samples=1)
        assert torch.equal(flat.solve(y0.view(-1)).view(y.shape), y)
    assert layout_for(native, y0).samples == 1
    assert joint.controller.dt.shape == (1,)


@pytest.mark.parametrize("samples", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
def test_many_samples_of_every_dtype(samples, dtype, device):
    y0 = torch.linspace(0.5, 2, samples, device=device)[:, None].expand(samples, 3).to(dtype).contiguous()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    t = torch.tensor([0.0, 1.0], device=device)
    with torch.no_grad():
        y = loop_for(lambda t, y: -y, y0, t, samples=samples, rtol=tolerance, atol=tolerance).solve(y0)
    assert torch.allclose(y[1].abs().float(), math.exp(-1) * y0.abs().float(), atol=5 * tolerance)
