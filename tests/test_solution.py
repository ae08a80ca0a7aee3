"""What solve_ivp returns: a table, a message, moved, pickled, detached; and the solution at any time."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from ensembles import blow_up, decay, oscillators, van_der_pol
from hypothesis import given
from torch import Tensor

from pyode import InvalidValue, Status, solve_ivp

F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
Y0 = torch.tensor([[1.0], [2.0], [-3.0]], dtype=F64)
FIELDS = ("ts", "ys", "status", "event_t", "event_index", "event_y")


@dataclass
class Pair:
    a: Tensor
    b: Tensor


@pytest.fixture(params=["tensor", "tuple", "dict", "dataclass", "joint"])
def solution(request):
    """With every field, of every kind of state."""
    states = {
        "tuple": ((Y0, Y0[:, 0]), lambda t, y: (-y[0], -y[1]), lambda t, y: y[1] - 0.5),
        "dict": ({"a": Y0}, lambda t, y: {"a": -y["a"]}, lambda t, y: y["a"][:, 0] - 0.5),
        "dataclass": (Pair(Y0, Y0[:, 0]), lambda t, y: Pair(-y.a, -y.b), lambda t, y: y.b - 0.5),
    }
    y0, f, event = states.get(request.param, (Y0, decay, lambda t, y: y[:, 0] - 0.5))
    control = "joint" if request.param == "joint" else "per_sample"
    return solve_ivp(f, y0, T, dense_output=True, event_fn=event, control=control)


def tensors_of(value) -> list[Tensor]:
    """Those of a state."""
    if isinstance(value, Pair):
        return [value.a, value.b]
    return [value] if isinstance(value, Tensor) else list(value.values() if isinstance(value, dict) else value)


def test_it_prints_as_a_short_table(solution):
    lines = repr(solution).splitlines()
    assert lines[0] == "Solution"
    assert 9 <= len(lines) <= 12
    assert max(map(len, lines)) < 120
    assert str(solution) == repr(solution)


def test_the_table_has_statuses_shapes_and_where_counts_lie():
    y0 = torch.tensor([[2.0], [0.1], [1.0], [4.0]], dtype=F64)
    solution = solve_ivp(blow_up, y0, T, throw=False, event_fn=lambda t, y: y[:, 0] - 3.0)
    stats, failed = solution.stats, Status(int(solution.status[3]))
    evals, accepted, rejected = (
        f"{min(x)} to {max(x)}, mean {sum(x) / 4:.4g}"
        for x in (stats.n_f_evals.tolist(), stats.n_accepted.tolist(), stats.n_rejected.tolist())
    )
    dt, event = stats.last_dt, solution.event_t
    assert repr(solution).splitlines() == [
        "Solution",
        "     success  False",
        "      status  2 EVENT: The solve ended at its event",
        f"              1 SUCCESS: {Status.SUCCESS.sentence[:-1]}",
        f"              1 {failed.name}: {failed.sentence.split('. ')[0]}",
        "          ts  [5] float64",
        "          ys  [5, 4, 1] float64",
        f"   n_f_evals  {evals}",
        f"  n_accepted  {accepted}",
        f"  n_rejected  {rejected}",
        f"     last_dt  {dt.min():.6g} to {dt.max():.6g}, mean {dt.mean():.4g}",
        f"     event_t  {event[0]:.6g} to {event[2]:.6g}, mean {(event[0] + event[2]) / 2:.4g}",
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own pytrees
def test_it_can_be_pickled_and_saved(solution):
    stream = io.BytesIO()
    torch.save(solution, stream)
    stream.seek(0)
    copies = pickle.loads(pickle.dumps(solution)), torch.load(stream, weights_only=False)
    for copy in copies:
        for name in FIELDS:
            for a, b in zip(tensors_of(getattr(copy, name)), tensors_of(getattr(solution, name))):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert torch.equal(copy.stats.n_steps, solution.stats.n_steps)
        found, expected = (tensors_of(s.interpolant(0.3)) for s in (copy, solution))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_it_moves_to_another_dtype(solution):
    moved = solution.to(torch.float32)
    for name in FIELDS:
        for part in tensors_of(getattr(moved, name)):
            assert part.dtype in (torch.float32, torch.int64)
    assert moved.status.dtype == torch.int64
    # Its times are found again all the same: 0.1 in float32 is not that in float64.
    found, expected = (tensors_of(s.interpolant(0.1)) for s in (moved, solution))
    assert all(a.dtype == torch.float32 and torch.allclose(a.double(), b) for a, b in zip(found, expected))
    assert torch.equal(solution.to("cpu").stats.n_f_evals, solution.stats.n_f_evals)


def test_it_is_detached_as_a_whole():
    y0 = Y0.clone().requires_grad_()
    t = T.clone().requires_grad_()
    solution = solve_ivp(decay, y0, t, dense_output=True, event_fn=lambda t, y: y[:, 0] - 0.5)
    assert solution.ys.requires_grad
    detached = solution.detach()
    assert not any(tensor.requires_grad for name in FIELDS for tensor in tensors_of(getattr(detached, name)))
    assert not detached.interpolant(0.3).requires_grad
    assert solution.interpolant(0.3).requires_grad


@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_its_fields_have_the_shapes_and_dtypes_that_are_promised(control):
    event = (lambda t, y: y[:, 0] - 0.5) if control == "per_sample" else (lambda t, y: y[0, 0] - 0.5)
    B, y0 = (3, Y0.float()) if control == "per_sample" else (1, Y0.float())
    solution = solve_ivp(decay, y0, T, control=control, event_fn=event)
    stats = solution.stats
    for counts in (stats.n_f_evals, stats.n_steps, stats.n_accepted, stats.n_rejected):
        assert (counts.shape, counts.dtype) == ((B,), torch.int64)
    assert torch.equal(stats.n_steps, stats.n_accepted + stats.n_rejected)
    for times in (stats.last_dt, solution.event_t):
        assert (times.shape, times.dtype) == ((B,), F64)
    for codes in (solution.status, solution.event_index):
        assert (codes.shape, codes.dtype) == ((B,), torch.int64)
    assert (solution.ys.shape, solution.ys.dtype) == ((5, 3, 1), torch.float32)
    assert solution.event_y.shape == ((3, 1) if control == "per_sample" else (1, 3, 1))
    assert isinstance(solution.success, bool)
    assert isinstance(solution.message, str)


def test_every_status_has_a_sentence():
    sentences = [status.sentence for status in Status]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.endswith(".") for sentence in sentences)
    assert int(Status.SUCCESS) == 0


def test_the_message_has_a_sentence_for_every_status():
    y0 = torch.tensor([[0.1], [1.0], [2.0]], dtype=F64)
    solution = solve_ivp(blow_up, y0, T, throw=False)
    failed = Status(int(solution.status[1]))
    assert solution.message == (
        f"2 of 3 samples: {failed.sentence} 1 of 3 samples: {Status.SUCCESS.sentence}"
    )  # fmt: skip
    assert not solution.success
    assert solve_ivp(decay, Y0, T, control="joint").message == Status.SUCCESS.sentence


# The interpolant.


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=8), st.booleans())
def test_the_interpolant_is_the_solution_at_any_times(fractions, shared):
    ends = torch.tensor([2.0, -1.0, 0.5], dtype=F64)
    fractions = torch.tensor(fractions, dtype=F64)
    t = T[:, None] / 2 * ends
    if shared:
        ends, t, fractions = torch.full((3,), 2.0, dtype=F64), T, fractions[:, 0]
    solution = solve_ivp(decay, Y0, t, rtol=1e-6, atol=1e-8, dense_output=True)
    times = fractions * ends[0] if shared else fractions * ends
    found = solution.interpolant(times)
    assert found.shape == (len(times), 3, 1)
    exact = Y0 * torch.exp(-times).reshape(len(times), -1, 1)
    assert torch.allclose(found, exact, rtol=1e-4)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_the_interpolant_is_as_accurate_as_the_steps(method, control):
    y0, tolerances = oscillators(5, stiffest=6.0), {"rtol": 1e-6, "atol": 1e-8}
    fine = torch.linspace(0, 2, 101, dtype=F64)
    solution = solve_ivp(van_der_pol, y0, T, method=method, control=control, dense_output=True, **tolerances)
    exact = solve_ivp(van_der_pol, y0, fine, rtol=1e-12, atol=1e-13, method="dopri8").ys
    assert torch.allclose(solution.interpolant(fine), exact, atol=3e-4)
    assert torch.allclose(solution.interpolant(T), solution.ys, atol=3e-4)
    assert torch.equal(solution.interpolant(0.0), y0)
    one = solution.interpolant(0.77)
    assert one.shape == y0.shape
    assert torch.equal(one, solution.interpolant(torch.tensor(0.77, dtype=F64)))


def test_the_interpolant_does_not_depend_on_the_others():
    y0 = oscillators(5, stiffest=6.0)
    fine = torch.linspace(0, 2, 33, dtype=F64)
    together = solve_ivp(van_der_pol, y0, T, dense_output=True).interpolant(fine)
    for b in range(5):
        alone = solve_ivp(van_der_pol, y0[b : b + 1], T, dense_output=True).interpolant(fine)
        assert torch.equal(alone[:, 0], together[:, b])


def test_behind_a_failure_or_an_event_the_interpolant_is_nan_and_before_it_is_not():
    def f(t, y):  # ones, but nan in the first row above 1.5: its first step is rejected, while the others go on
        return torch.where((y > 1.5) & (y < 100), torch.nan, torch.ones_like(y))

    y0 = torch.tensor([[1.0], [1e6], [200.0]], dtype=F64)
    solution = solve_ivp(
        f, y0, T, first_step=1.9, throw=False, dense_output=True, event_fn=lambda t, y: y[:, 0] - 200.75
    )
    assert solution.status.tolist() == [Status.NON_FINITE, Status.SUCCESS, Status.EVENT]
    found = solution.interpolant(torch.linspace(0, 2, 9, dtype=F64))[..., 0]
    assert torch.allclose(found[:2, 0], torch.tensor([1.0, 1.25], dtype=F64))
    assert found[3:, 0].isnan().all()
    assert torch.allclose(found[:, 1], 1e6 + torch.linspace(0, 2, 9, dtype=F64))
    assert found[:, 2].isnan().tolist() == [False] * 4 + [True] * 5
    here = solution.event_t.nan_to_num(0.0)[None]
    assert torch.allclose(solution.interpolant(here)[0, 2], solution.event_y[2])


def test_a_sample_with_no_way_to_go_stays_at_its_start():
    t = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=F64)
    solution = solve_ivp(decay, Y0[:2], t, dense_output=True)
    found = solution.interpolant(torch.tensor([[0.0, 1.0], [1.3, 1.0]], dtype=F64))
    assert torch.equal(found[:, 1], Y0[1:2].expand(2, 1))
    assert torch.equal(solution.ys[:, 1], Y0[1:2].expand(2, 1))


def test_times_outside_are_errors():
    solution = solve_ivp(decay, Y0, T, dense_output=True)
    for t in (-0.1, 2.1, torch.tensor([0.5, math.nan]), torch.zeros(2, 2), torch.zeros(2, 3, 1)):
        with pytest.raises(InvalidValue, match=r"t must be \[m\] or \[m, 3\].*from 0 to 2"):
            solution.interpolant(t)
    assert solve_ivp(decay, Y0, T).interpolant is None


def test_gradients_through_the_interpolant():
    # y = y0 exp(-a (t - t0)) of everything, the start and the times that are asked for among them.
    def at(y0, a, start, asked):
        t = torch.stack([start, start.detach() + 2.0])
        solution = solve_ivp(
            lambda t, y, a: -a * y * (1 + 0.1 * torch.sin(t))[:, None],
            y0, t, args=(a,), dense_output=True, rtol=1e-9, atol=1e-11,
        )  # fmt: skip
        return solution.interpolant(asked)

    y0, a = torch.tensor([[1.0, 0.5], [2.0, 1.0]], dtype=F64), torch.tensor(0.7, dtype=F64)
    start, asked = torch.tensor([0.0, 0.3], dtype=F64), torch.tensor([[0.4, 0.9], [1.3, 1.7]], dtype=F64)
    inputs = tuple(x.requires_grad_() for x in (y0, a, start, asked))
    assert torch.autograd.gradcheck(at, inputs, eps=1e-5, atol=1e-5, rtol=1e-4)


def test_solutions_are_equal_to_themselves_alone():
    one, other = (solve_ivp(lambda t, y: -y, torch.ones(3, 1), torch.tensor([0.0, 1.0])) for _ in range(2))
    assert one != other  # by identity: tensors have no single answer
    assert len({one, other, one}) == 2
