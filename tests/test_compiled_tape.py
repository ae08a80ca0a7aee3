"""What a compiled solve notes for its way back: as good as computed again, nobody else's while it is needed."""

from __future__ import annotations

import pytest
import torch
from fields import T, assert_close, loss_of
from problems import tensor
from torch import nn

import pyode
from pyode.compiled import plan, struct


def network() -> nn.Module:
    """With what is cheap to compute again, and what is not."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 3)
    return nn.Sequential(*layers).double()


def dynamics(net: nn.Module):
    return pyode.compile(lambda t, y: net(y**3 / 9) * (1 + t.sin()), strict=True)


def gradient(f, net: nn.Module, y0: torch.Tensor, **arguments) -> list[torch.Tensor]:
    y0 = y0.clone().requires_grad_()
    arguments = {"rtol": 1e-4, "atol": 1e-6, "method": "bosh3"} | arguments
    return list(torch.autograd.grad(loss_of(pyode.odeint(f, y0, T, **arguments)), [y0, *net.parameters()]))


CASES = [{}, {"options": {"jump_t": tensor(0.2, 0.8)}}, {"method": "rk4", "options": {"step_size": 0.1}}]
CUBICS = {"method": "midpoint", "options": {"step_size": 0.15, "interp": "cubic"}}


@pytest.mark.parametrize("arguments", [*CASES, CUBICS])
def test_what_is_noted_has_the_bits_of_what_is_computed_again(arguments, monkeypatch):
    net, y0 = network(), torch.randn(11, 3, dtype=torch.float64)
    found = [gradient(dynamics(net), net, y0, **arguments)]
    monkeypatch.setattr(plan, "MOST_RECORDED", 0)
    found.append(gradient(dynamics(net), net, y0, **arguments))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_what_an_evaluation_keeps_is_the_same_computed_again_for_lack_of_room(control, monkeypatch):
    net, y0, found = network(), torch.randn(11, 3, dtype=torch.float64), []
    for most in (struct.MOST_KEPT, 0):
        monkeypatch.setattr(struct, "MOST_KEPT", most)
        f = pyode.compile(lambda t, y: net(y**3 / 9), strict=True)
        found.append(gradient(f, net, y0, options={"control": control}))
        kept = f.source.partition("struct Kept {")[2].partition("}")[0]
        assert bool(kept.strip()) == (most > 0)
    assert_close(*found, 1e-13)


def test_a_graph_that_lives_on_keeps_its_notes():
    net, y0 = network(), torch.randn(11, 3, dtype=torch.float64)
    f = dynamics(net)
    gradient(f, net, y0)  # leaves a tape
    early = loss_of(pyode.odeint(f, y0, T))
    expected = torch.autograd.grad(early, [*net.parameters()], retain_graph=True)
    late = loss_of(pyode.odeint(f, -2 * y0, T))
    for _ in range(2):
        gradient(f, net, 3 * y0)
        assert all(map(torch.equal, torch.autograd.grad(early, [*net.parameters()], retain_graph=True), expected))
    assert not torch.equal(torch.autograd.grad(late, [*net.parameters()])[0], expected[0])


def test_a_tape_serves_again_when_its_graph_has_gone():
    net, y0 = network(), torch.randn(11, 3, dtype=torch.float64)
    f = dynamics(net)
    for _ in range(2):  # the second knows how many steps there are
        loss_of(pyode.odeint(f, y0, T)).backward()
    spare = f.last.plan._spare
    kept = list(spare)
    assert kept
    ys = pyode.odeint(f, y0, T)
    assert len(spare) == len(kept) - 1
    del ys
    assert {id(tape) for tape in spare} == {id(tape) for tape in kept}


def test_args_of_another_solve_get_their_own_gradients_and_no_new_plan(monkeypatch):
    made, make = [], plan.Plan.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(plan.Plan, "__init__", counted)
    y0, t = torch.randn(5, 2, dtype=torch.float64), tensor(0.0, 0.5, 1.0)

    def func(t, y, a, n):
        return torch.sin(a * y) * n

    f = pyode.compile(func, strict=True)
    for seed in range(3):
        torch.manual_seed(seed)
        a = torch.randn(2, dtype=torch.float64, requires_grad=True)
        found = []
        for g in (f, func):
            (first,) = torch.autograd.grad(loss_of(pyode.odeint(g, y0, t, args=(a, 2))), a, create_graph=True)
            found.append([first.detach(), *torch.autograd.grad(first.sum(), a)])
        assert_close(*found, 1e-8)
    assert len(made) == 1
