"""What an event function may be: several events at once, jumps; what it is given, and what it may not return."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from problems import leaf, line, tensor

import pyode
from pyode import DynamicsError, InvalidType

SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])


ONE_STEP = [
    {"options": {"first_step": 50.0}},
    {"method": "bosh3", "options": {"first_step": 50.0}},
    {"method": "euler", "options": {"step_size": 50.0}},
    {"method": "rk4", "options": {"step_size": 50.0, "interp": "cubic"}},
]


@SIGNS
@pytest.mark.parametrize("solve", ONE_STEP, ids=str)
@pytest.mark.parametrize("levels", [(3.0, 7.0), (7.0, 3.0), (9.0, 5.0, 3.0, 40.0)])
def test_the_earliest_of_several_events_wins_also_within_one_step(levels, solve, sign):
    # In torchdiffeq too: it takes the least of all, each with its sign at the start.
    levels = leaf(tensor(*levels))
    signs = torch.arange(len(levels)) % 2 * 2 - 1  # some rise, some fall

    def event_fn(t, y):
        return signs * (sign * y - levels)

    time, states = pyode.odeint_event(line, tensor(0.0), tensor(0.0), event_fn=event_fn, reverse_time=sign < 0, **solve)
    assert float(time.detach()) == pytest.approx(sign * 3.0, abs=1e-8)
    # Its time is that level; the others have no part in it.
    (found,) = torch.autograd.grad(time + 0 * states.sum(), levels)
    assert torch.allclose(found, sign * (levels == 3.0).double(), atol=1e-9)


def test_which_event_it_was_does_not_depend_on_their_scales():
    # The second is nearly zero all the time, the first far from it even where it is located.
    level, far = leaf(tensor(3.0)), leaf(tensor(5.0))

    def event_fn(t, y):
        return torch.cat([1e8 * (y - level), 1e-8 * (far - y)])

    for first_step in (0.7, 0.9, 1.3, 2.1):
        options = {"first_step": first_step}
        time, _ = pyode.odeint_event(line, tensor(0.0), tensor(0.0), event_fn=event_fn, options=options)
        assert torch.allclose(torch.cat(torch.autograd.grad(time, (level, far))), tensor(1.0, 0.0))


@pytest.mark.parametrize(
    "solve",
    [{"rtol": 1e-9, "atol": 1e-10}, {"method": "rk4", "atol": 1e-10, "options": {"step_size": 0.07}}],
    ids=["dopri5", "rk4"],
)
def test_vector_events_and_tuples_are_torchdiffeqs(solve):
    y0 = (tensor(1.0, 0.5), torch.tensor([[0.3]], dtype=torch.float64))

    def func(t, y):
        a, b = y
        return torch.stack([a[1], -a[0]]), -0.5 * b + a[0]

    def event_fn(t, y):
        a, b = y
        return torch.stack([a[0] + 0.4, b.sum() + 0.2, t - 8.0])

    found = []
    for module in (pyode, torchdiffeq):
        inputs = [leaf(part) for part in y0]
        time, states = module.odeint_event(
            func, tuple(inputs), torch.tensor(0.1, dtype=torch.float64), event_fn=event_fn, **solve
        )
        assert [part.shape for part in states] == [(2, 2), (2, 1, 1)]
        loss = time + states[0][-1].sum() - states[1][-1].sum()
        found.append([time, *states, *torch.autograd.grad(loss, inputs)])
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_function_that_jumps_or_only_touches_zero_has_a_time_without_gradient():
    for event_fn in (lambda t, y: torch.where(y < 2, -1.0, 1.0), lambda t, y: (y - 2) ** 3):
        y0 = leaf(tensor(0.0))
        time, states = pyode.odeint_event(line, y0, tensor(0.0), event_fn=event_fn, atol=1e-12)
        assert float(time.detach()) == pytest.approx(2.0, abs=1e-9)
        (gradient,) = torch.autograd.grad(states[-1].sum() + time, y0)
        assert gradient.isfinite().all()


def test_what_is_no_event_function_is_an_error():
    for wrong in (lambda t, y: 1.0, lambda t, y: None, lambda t, y: y[:0], lambda t, y: y > 1):
        with pytest.raises(DynamicsError, match="event_fn must return a tensor"):
            pyode.odeint(line, tensor(0.0), tensor(0.0, 1.0), event_fn=wrong)
        with pytest.raises(DynamicsError, match="event_fn must return a tensor"):
            pyode.solve_ivp(line, tensor(0.0), tensor(0.0, 1.0), event_fn=wrong)
    with pytest.raises(InvalidType, match="event_fn must be callable"):
        pyode.odeint(line, tensor(0.0), tensor(0.0, 1.0), event_fn=3.0)


def test_an_exception_of_the_event_function_passes_through():
    def event_fn(t, y):
        if float(t) > 0:
            raise KeyError("mine")
        return y - 1

    with pytest.raises(KeyError, match="mine"):
        pyode.odeint(line, tensor(0.0), tensor(0.0, 1.0), event_fn=event_fn)


def test_a_complex_value_is_no_event():
    y0 = torch.tensor([1.0 + 1.0j], dtype=torch.complex128)
    with pytest.raises(DynamicsError, match="event_fn must return a tensor of one or several real numbers"):
        pyode.odeint(lambda t, y: 1j * y, y0, tensor(0.0, 1.0), event_fn=lambda t, y: y.sum())


@pytest.mark.parametrize("solve", [{}, {"method": "rk4", "options": {"step_size": 0.1}}], ids=["dopri5", "rk4"])
@SIGNS
def test_the_event_function_is_given_a_time_and_a_state_as_torchdiffeq_does(solve, sign):
    seen = {pyode: set(), torchdiffeq: set()}
    for module, found in seen.items():

        def event_fn(t, y, found=found):
            assert sign * float(t) >= 0
            found.add((t.dtype, t.shape, y.dtype, y.shape))
            return y.sum() - 2 * sign

        y0 = torch.zeros(1, dtype=torch.float64)
        module.odeint(line, y0, sign * tensor(0.0, 1.0), **solve, event_fn=event_fn)
    assert seen[pyode] == seen[torchdiffeq]
