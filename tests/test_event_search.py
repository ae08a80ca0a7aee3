"""Where the search for an event begins and ends: a start on it, several, bounds, none at all, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq
from problems import leaf, line, tensor
from torch import nn

import pyode
from pyode import InvalidValue, SolveError, Stats, Status
from pyode.stepping import fixed_grid

SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
INTERFACES = pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


class AsModule(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t, y):
        return self.net(y)


@INTERFACES
@pytest.mark.parametrize("solve", [{}, {"method": "rk4", "options": {"step_size": 0.1}}], ids=["dopri5", "rk4"])
def test_a_start_on_the_event_ends_there_at_once(interface, solve):
    extra = {"odeint_interface": getattr(pyode, interface)}
    if interface == "odeint_adjoint":
        extra["adjoint_params"] = ()
    calls, y0, t0 = [], leaf(tensor(0.0, 2.0)), leaf(torch.tensor(0.3, dtype=torch.float64))

    def func(t, y):
        calls.append(t)
        return torch.stack([y[1], -1.0 - 0 * y[0]])

    time, states = pyode.odeint_event(func, y0, t0, event_fn=lambda t, y: y[0] - 0.5 * (t - 0.3), **extra, **solve)
    assert float(time.detach()) == 0.3
    assert torch.equal(states, torch.stack([y0, y0]))
    assert len(calls) <= 1
    # With x' = 2 the event x = (t - 0.3) / 2 of the solve from (t0, x0) is at t0 - (x0 - (t0 - 0.3) / 2) / (2 - 1/2).
    found = torch.autograd.grad(time + 0 * states.sum(), (y0, t0))
    assert torch.allclose(found[0], tensor(-1 / 1.5, 0.0))
    assert float(found[1]) == pytest.approx(1 + 0.5 / 1.5)


def test_a_start_on_an_event_may_be_skipped():
    # A ball thrown up from the ground; SciPy and torchdiffeq would stop at once.
    def throw(t, y):
        return torch.stack([y[1], -9.81 + 0 * y[0]])

    options = {"skip_initial_event": True}
    for more in ({}, {"first_step": 5.0}, {"first_step": 1e-6}):
        y0 = leaf(tensor(0.0, 5.0))
        time, states = pyode.odeint_event(
            throw, y0, tensor(1.0), event_fn=lambda t, y: y[0], options={**options, **more}
        )
        assert float(time.detach()) == pytest.approx(1 + 10 / 9.81, abs=1e-8)
        (gradient,) = torch.autograd.grad(time, y0)
        assert torch.allclose(gradient, tensor(1 / 5, 2 / 9.81))
    assert states.shape == (2, 2)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("solve", [{}, {"first_step": 20.0}], ids=["small steps", "one step"])
def test_of_two_events_one_may_be_skipped_and_the_other_counts(order, solve):
    options = {"skip_initial_event": True, **solve}
    # y = t from 0: the first leaves its zero at once and comes back at 6; the second is at 2.
    time, _ = pyode.odeint(
        line, tensor(0.0), tensor(0.0, 1.0), options=options,
        event_fn=lambda t, y: torch.cat([y * (6 - y), y - 2])[order],
    )  # fmt: skip
    assert float(time) == pytest.approx(2.0, abs=1e-8)


@pytest.mark.parametrize("method", [{}, {"method": "rk4", "options": {"step_size": 0.1}}], ids=["dopri5", "rk4"])
def test_an_event_that_stays_zero_does_not_hide_another(method):
    options = {**method.get("options", {}), "skip_initial_event": True}
    for leaves in (1.0, 50.0):  # from when on the first is no longer zero

        def event_fn(t, y, leaves=leaves):
            return torch.cat([(y - leaves).clamp(min=0), y - 2.5])

        time, _ = pyode.odeint(line, tensor(0.0), tensor(0.0, 1.0), **{**method, "options": options}, event_fn=event_fn)
        assert float(time) == pytest.approx(2.5, abs=1e-8)
        if not method:  # of each sample likewise
            y0 = tensor(0.0, 1.0, 2.0)[:, None]
            solution = pyode.solve_ivp(
                line,
                y0,
                tensor(0.0, 9.0),
                event_fn=lambda t, y, f=event_fn: f(t, y.T).reshape(2, -1).T,
                options=options,
            )
            assert torch.allclose(solution.event_t, tensor(2.5, 1.5, 0.5), atol=1e-5)
            assert solution.event_index.tolist() == [1, 1, 1]


@pytest.mark.parametrize("solve", [{}, {"method": "rk4"}, {"method": "implicit_adams", "rtol": 1e-3}], ids=str)
@SIGNS
class TestAnEndOfTheSearch:
    def options(self, solve, **more):
        return {**more, **({"step_size": 0.05} if solve else {})}

    def test_an_event_before_it_is_found(self, solve, sign):
        options = self.options(solve, event_t_max=sign * 2.1)
        time, states = pyode.odeint(
            line, tensor(0.0), sign * tensor(0.0, 1.0), **solve, options=options, event_fn=lambda t, y: y - sign * 2.0
        )
        assert float(time) == pytest.approx(sign * 2.0, abs=1e-8)
        assert torch.allclose(states[:, 0], sign * tensor(0.0, 2.0), atol=1e-8)

    @pytest.mark.parametrize("last", [0.2, 1.99])
    def test_one_behind_it_is_not(self, solve, sign, last):
        options = self.options(solve, event_t_max=sign * last)
        with pytest.raises(SolveError, match="event_t_max") as caught:
            pyode.odeint(
                line, tensor(0.0), sign * tensor(0.0, 1.0), **solve, options=options,
                event_fn=lambda t, y: y - sign * 2.0,
            )  # fmt: skip
        assert caught.value.status is Status.NO_EVENT
        assert caught.value.t == sign * last
        assert caught.value.n_steps >= 1

    def test_it_has_to_lie_ahead(self, solve, sign):
        for wrong in (0.0, -1.0, math.nan):
            options = self.options(solve, event_t_max=sign * wrong)
            with pytest.raises(InvalidValue, match="event_t_max"):
                pyode.odeint(
                    line, tensor(0.0), sign * tensor(0.0, 1.0), **solve, options=options, event_fn=lambda t, y: y
                )

    @INTERFACES
    def test_where_there_is_none_the_state_at_the_end_may_be_returned(self, solve, sign, interface):
        y0, options = leaf(tensor(1.0)), self.options(solve, event_t_max=sign * 1.5, on_failure="return")
        extra = {"adjoint_params": ()} if interface == "odeint_adjoint" else {}
        with pytest.warns(UserWarning, match="no event"):
            time, states = getattr(pyode, interface)(
                lambda t, y: -sign * y, y0, sign * tensor(0.0, 1.0), **solve, options=options, **extra,
                event_fn=lambda t, y: y,
            )  # fmt: skip
        assert float(time.detach()) == sign * 1.5
        assert torch.allclose(states[:, 0], tensor(1.0, math.exp(-1.5)), rtol=1e-3)
        (gradient,) = torch.autograd.grad(states[-1].sum(), y0)
        assert torch.allclose(gradient, states[-1].detach(), rtol=1e-3)


@INTERFACES
@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "implicit_adams", "radauIIA5", "trbdf2"])
def test_a_grid_that_is_prepared_in_parts_gives_what_the_whole_gives(method, interp, interface, monkeypatch):
    found = []
    for part in (7, 10**6):
        monkeypatch.setattr(fixed_grid, "PART", part)
        func, stats = AsModule(nn.Linear(2, 2, dtype=torch.float64)), Stats()
        with torch.no_grad():
            func.net.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, -0.1]]))
            func.net.bias.zero_()
        y0, t0 = leaf(tensor(1.0, 0.0)), leaf(torch.tensor(0.3, dtype=torch.float64))
        time, states = pyode.odeint_event(
            func, y0, t0, event_fn=lambda t, y: y[0] + 0.5, odeint_interface=getattr(pyode, interface), method=method,
            rtol=1e-4, atol=1e-6, options={"step_size": 0.05, "interp": interp, "stats": stats},
        )  # fmt: skip
        gradients = torch.autograd.grad(time + states[-1, 1], (y0, t0, func.net.weight))
        found.append((time, states, stats, gradients))
    (time, states, stats, gradients), whole = found
    assert stats.n_accepted > 4 * 7
    assert stats == whole[2]
    assert torch.equal(time, whole[0])
    assert torch.equal(states, whole[1])
    for ours, theirs in zip(gradients, whole[3]):  # of which other parts are added up first
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@INTERFACES
@pytest.mark.parametrize("solve", [
    {}, {"method": "rk4", "options": {"step_size": 0.1}}, {"method": "adams"},
    {"method": "trbdf2", "options": {"step_size": 0.1}},
], ids=["dopri5", "rk4", "adams", "trbdf2"])  # fmt: skip
@pytest.mark.parametrize("given", [False, True], ids=["", "with stats"])
def test_without_an_event_odeint_event_returns_a_fixed_time_and_the_state_there(interface, solve, given):
    func, level, stats = nn.Linear(1, 1, bias=False, dtype=torch.float64), leaf(tensor(5.0)), Stats()
    with torch.no_grad():
        func.weight.fill_(-0.5)
    found = []
    for end in (2.0, 3.0):  # at t = log(2) / 0.5 it falls to 1/2; to 5 never
        y0, t0 = leaf(tensor(1.0)), leaf(torch.tensor(0.0, dtype=torch.float64))
        options = {**solve.get("options", {}), "on_failure": "return", "event_t_max": end}
        options |= {"stats": stats} if given else {}
        module = AsModule(func)

        def run(event_fn, y0=y0, t0=t0, module=module, options=options):
            return pyode.odeint_event(
                module, y0, t0, event_fn=event_fn, odeint_interface=getattr(pyode, interface),
                **{**solve, "options": options},
            )  # fmt: skip

        with pytest.warns(UserWarning, match="no event"):
            time, states = run(lambda t, y: y - level)
        assert (float(time), time.requires_grad) == (end, False)
        # exp(-(end - t0) / 2) y0
        expected = math.exp(-end / 2)
        of_y0, of_t0, of_weight = torch.autograd.grad(states[1].sum(), (y0, t0, func.weight))
        for ours, exact in ((states[1], 1), (of_y0, 1), (of_t0, 0.5), (of_weight, end)):
            assert float(ours.detach()) == pytest.approx(exact * expected, rel=5e-3)
        time, _ = run(lambda t, y: y - level / 10)  # an event still moves
        found.append(float(torch.autograd.grad(time, level)[0]))
    assert found == pytest.approx([-1 / 10 / 0.25] * 2, rel=1e-3)
    assert stats.n_events == 2 * given


@pytest.mark.parametrize("solve", [
    {"options": {"max_num_steps": 50}}, {"method": "rk4", "options": {"step_size": 0.1}},
    {"method": "explicit_adams", "options": {"step_size": 0.1}},
])  # fmt: skip
@pytest.mark.parametrize("gradients", [False, True])
def test_an_event_that_never_comes(solve, gradients, monkeypatch):
    monkeypatch.setattr(fixed_grid, "MOST_STEPS", 60)

    def never():
        return pyode.odeint(
            lambda t, y: torch.cos(t) + 0 * y, tensor(0.0).requires_grad_(gradients), tensor(0.0, 1.0),
            event_fn=lambda t, y: y + 2, **solve,
        )  # fmt: skip

    # torchdiffeq raises AssertionError with adaptive methods and RuntimeError with the others.
    for kind in (AssertionError, RuntimeError, SolveError):
        with pytest.raises(kind, match="no event"):
            never()
    solve = {**solve, "options": {**solve["options"], "on_failure": "return"}}
    with pytest.warns(UserWarning, match="no event"):
        time, states = never()
    assert math.isfinite(float(time))
    assert states.shape == (2, 1)
    assert float(states[1].detach()) == pytest.approx(math.sin(float(time)), abs=1e-3)


@pytest.mark.parametrize("t", [tensor(0.0, 1.0), torch.tensor([0.0, -1.0])], ids=str)
@pytest.mark.parametrize("f", [lambda t, y: 0 * y, lambda t, y: -y, line], ids=["at rest", "coming to rest", "away"])
def test_a_solve_that_gets_nowhere_or_too_far_says_that_there_is_no_event(f, t):
    with pytest.raises(SolveError) as caught:
        pyode.odeint(f, tensor(1.0), t, event_fn=lambda t, y: y**2 + 2, options={"max_num_steps": 1000})
    assert caught.value.status is Status.NO_EVENT


def test_times_have_to_be_two():
    for t in (tensor(0.0), tensor(0.0, 1.0, 2.0)):
        for module in (pyode, torchdiffeq):
            with pytest.raises(ValueError, match=r"len\(t\) == 2|two entries"):
                module.odeint(line, tensor(0.0), t, event_fn=lambda t, y: y - 1)


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams"])
def test_fixed_steps_need_their_size(method):
    for module in (pyode, torchdiffeq):
        with pytest.raises(AssertionError, match="step_size"):
            module.odeint(line, tensor(0.0), tensor(0.0, 1.0), method=method, event_fn=lambda t, y: y - 1)


@pytest.mark.parametrize("solve", [{}, {"method": "rk4", "options": {"step_size": 0.1}}], ids=["dopri5", "rk4"])
def test_a_function_that_becomes_nan_is_an_event_as_in_torchdiffeq(solve):
    # The first would be zero at 3, the second becomes nan behind 2.
    def event_fn(t, y):
        return torch.cat([y - 3, torch.sqrt(2 - y) + 1])

    ours, theirs = (
        module.odeint(line, tensor(0.0), tensor(0.0, 1.0), event_fn=event_fn, **solve)
        for module in (pyode, torchdiffeq)
    )
    assert float(ours[0]) == pytest.approx(2.0, abs=1e-8)
    assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=1e-8)
    time, _ = pyode.odeint_event(line, leaf(tensor(0.0)), 0.0, event_fn=event_fn, **solve)
    assert float(time.detach()) == float(ours[0])
