"""What gradient="checkpoint" and the other modes keep: states and graphs that are alive at once, and objects after."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from problems import tensor
from test_budget import BIG, Live
from torch import nn

import pyode


class Decay(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.full((BIG,), -1.0))

    def forward(self, t, y):
        return self.rate * y


def most_states_alive(n: int, **options) -> int:
    """In a forward and a backward pass of n steps."""
    func, y0 = Decay(), torch.ones(BIG, requires_grad=True)
    gc.collect()
    t = torch.tensor([0.0, 0.4712, 0.9713])  # both within a step
    step = {"first_step": 1 / n, "min_step": 1 / n, "max_step": 1 / n}
    options = {**step, "gradient": "checkpoint", "graph_bytes": 0, **options}
    with Live() as live:
        pyode.odeint(func, y0, t, options=options, rtol=1e-3, atol=1e-4)[1:].square().sum().backward()
    assert func.rate.grad is not None
    return live.most


def test_memory_of_direct_mode_grows_by_all_stages_and_that_of_the_adjoint_is_flat():
    direct, adjoint = ([most_states_alive(n, gradient=kind) for n in (10, 30)] for kind in ("direct", "adjoint"))
    assert direct[1] - direct[0] >= 20 * 6
    assert abs(adjoint[1] - adjoint[0]) <= 4  # states that wait to be used again


def test_memory_grows_by_a_state_a_step():
    few, many = most_states_alive(10), most_states_alive(30)
    assert abs(many - few - 20) <= 4  # states that wait to be used again


def test_graphs_are_kept_as_long_as_there_is_room():
    # An evaluation's takes the state that func was given: room for three steps, whose first states are on the tape.
    room = 3 * 6 + 1
    for n in (10, 30):
        more = most_states_alive(n, graph_bytes=room * 4 * BIG) - most_states_alive(n)
        assert 3 * 5 - 4 <= more <= room  # without, up to four states wait to be used again


def test_memory_is_flat_with_a_number_of_checkpoints():
    most = [most_states_alive(n, checkpoints=5) for n in (12, 30, 100)]
    # At the peak of one all checkpoints are in use, at another's only the first; and up to four states wait to be used.
    assert max(most) - min(most) <= 4 + 4


@pytest.mark.parametrize(
    "mode",
    [{"gradient": "checkpoint", "checkpoints": 100}, {"gradient": "checkpoint"}, {}, {"gradient": "adjoint"}],
    ids=["few checkpoints", "checkpoint", "direct", "adjoint"],
)
def test_ten_thousand_steps(mode):
    # Against the closed form of the rotation, and nothing is left behind.
    steps, size = 10_000, 1e-3  # of a method of two stages

    def run(n):
        y0, rate = tensor(1.0, 0.0).requires_grad_(), tensor(1.0).requires_grad_()
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        options, times = {"step_size": size, **mode}, tensor(0.0, n * size)
        y = pyode.odeint(lambda t, y: rate * (y @ turn), y0, times, options=options, method="midpoint")
        return torch.autograd.grad(y[-1, 1], (y0, rate))

    by_start, by_rate = run(steps)
    end = steps * size
    assert torch.allclose(by_start, tensor(math.sin(end), math.cos(end)), atol=1e-4)  # of order size^2 end
    assert float(by_rate) == pytest.approx(end * math.cos(end), abs=1e-3)
    gc.collect()
    before = len(gc.get_objects())
    run(100)
    gc.collect()
    assert len(gc.get_objects()) <= before + 10
