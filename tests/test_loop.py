"""The adaptive loop, scripted: which steps it takes, what func sees, how a solve ends, what it tells about itself."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from problems import CLOSED_FORMS, growth, tensor
from torch import Tensor

import pyode
from pyode import SolveError, Stats, Status
from pyode.methods import TABLEAUS

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
ABSCISSAE = TABLEAUS["dopri5"].abscissae
UNIT = tensor(0.0, 1.0)


class Recorder:
    """A func that notes the times it is called with."""

    def __init__(self, f):
        self.f, self.times = f, []

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(float(t))
        return self.f(t, y)

    def steps(self, sign: float = 1.0) -> list[tuple[float, float]]:
        """Start and end of every dopri5 step tried, from the stages at 1/5 and 1, in the tensors' dtype."""
        later = self.times[len(self.times) % 6 :]
        ends = later[5::6]
        sizes = [(end - early) / 0.8 for early, end in zip(later[::6], ends)]
        return [(end - size, end) for end, size in zip(ends, sizes)]

    def sizes(self) -> list[float]:
        return [end - start for start, end in self.steps()]


def constant(t: Tensor, y: Tensor) -> Tensor:
    return torch.ones_like(y)


@pytest.mark.parametrize("problem", CLOSED_FORMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5"])
def test_closed_forms_are_met(problem, backward, method, device):
    t = problem.times(7, backward)
    exact = problem.at(t)
    # dopri8's steps are too long for its dense output, a quartic: they have to end at the outputs.
    options = {"step_t": t[1:]} if method == "dopri8" else {}
    y = pyode.odeint(
        problem.f, exact[0].to(device), t.to(device), rtol=1e-8, atol=1e-10, method=method, options=options
    )
    # A global error is the sum of the local ones, some hundred, and their growth, some hundredfold at most.
    assert torch.allclose(y.cpu(), exact, rtol=1e-6, atol=1e-6)


def test_a_known_sequence_of_steps(device):
    # No error: every step is 10 times the last one. 0.001, 0.01, 0.1, 1 reach 1.111 and pass t = 1.
    f, stats = Recorder(constant), Stats()
    y0 = torch.zeros(1, dtype=torch.float64, device=device)
    y = pyode.odeint(f, y0, UNIT.to(device), options={"first_step": 0.001, "stats": stats})
    assert stats == Stats(n_f_evals=1 + 4 * 6, n_accepted=4, n_rejected=0)
    assert len(f.times) == stats.n_f_evals
    assert y[-1].item() == pytest.approx(1.0, rel=1e-15)


def test_choosing_the_first_step_costs_one_evaluation():
    f, stats = Recorder(constant), Stats()
    pyode.odeint(f, tensor(1.0), UNIT, options={"stats": stats})
    assert len(f.times) == stats.n_f_evals == 2 + 6 * stats.n_steps
    assert f.times[0] == 0.0 < f.times[1]


def test_a_step_that_is_not_finite_is_tried_again_smaller_by_dfactor():
    f = Recorder(lambda t, y: y if len(f.times) > 1 + 3 * 6 or len(f.times) == 1 else y * math.nan)
    stats = Stats()
    options = {"first_step": 0.5, "dfactor": 0.25, "max_step": 0.5, "stats": stats}
    pyode.odeint(f, tensor(1.0), UNIT, rtol=1e-3, options=options)
    assert f.sizes()[:4] == pytest.approx([0.5, 0.125, 0.03125, 0.0078125], rel=1e-9)
    assert stats.n_rejected == 3


def test_growth_and_shrinking_are_bounded_by_the_options():
    f = Recorder(lambda t, y: -50 * y)
    options = {"first_step": 1e-4, "ifactor": 3.0, "dfactor": 0.5, "safety": 0.8}
    pyode.odeint(f, tensor(1.0), tensor(0.0, 5.0), rtol=1e-4, atol=1e-6, options=options)
    ratios = [b / a for a, b in zip(f.sizes(), f.sizes()[1:])]
    assert ratios[0] == pytest.approx(3.0, rel=1e-6)
    assert min(ratios) >= 0.5 - 1e-6
    assert max(ratios) <= 3.0 + 1e-6


def test_max_step_and_min_step_bound_every_step():
    f = Recorder(lambda t, y: torch.sin(40 * t) * 30 * y)
    options = {"max_step": 0.05, "min_step": 0.01}
    pyode.odeint(f, tensor(1.0), UNIT, options=options)
    assert min(f.sizes()) >= 0.01 - 1e-9
    assert max(f.sizes()) <= 0.05 + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_ends_exactly_at_step_t(dtype, sign):
    f = Recorder(lambda t, y: -y)
    t = sign * torch.tensor([0.0, 2.0], dtype=dtype)
    stops = sign * tensor(0.3, 1.1)
    pyode.odeint(f, torch.ones(1, dtype=dtype), t, rtol=1e-4, options={"step_t": stops})
    for stop in stops.to(dtype):
        before = torch.nextafter(stop, torch.tensor(-sign * math.inf, dtype=dtype))
        assert float(before) in f.times  # the stage at c = 1
        assert float(torch.nextafter(stop, torch.tensor(sign * math.inf, dtype=dtype))) not in f.times


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_func_never_looks_across_a_jump_before_it_is_there(sign):
    jump, seen = sign * 0.7, []

    def f(t, y):
        seen.append(float(t))
        return sign * (torch.ones_like(y) if sign * float(t) < 0.7 else -3 * torch.ones_like(y))

    stats = Stats()
    options = {"jump_t": tensor(jump), "stats": stats, "first_step": 0.1}
    y = pyode.odeint(f, tensor(0.0), sign * tensor(0.0, 0.7, 1.5), options=options)
    assert torch.allclose(y.flatten(), tensor(0.0, 0.7, 0.7 - 3 * 0.8), rtol=1e-14)
    assert stats.n_rejected == 0
    behind = math.nextafter(jump, sign * math.inf)
    assert seen.count(behind) == 1  # evaluated afresh, just behind the jump
    assert stats.n_f_evals == 1 + 6 * stats.n_steps + 1
    crossed = [sign * t > 0.7 for t in seen]
    assert crossed == sorted(crossed)


# Where the next number of the state's dtype is further away than 1.
@pytest.mark.parametrize(
    ("dtype", "jump"), [(torch.float32, 2.0**25), (torch.bfloat16, 2.0**9), (torch.float16, 2.0**12)]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("solve", [
    {}, {"method": "adams"}, {"options": {"control": "per_sample"}},
    {"method": "heun2", "options": {"perturb": True, "grid_constructor": lambda f, y0, t: t}},
], ids=["dopri5", "adams", "per sample", "perturbed steps"])  # fmt: skip
def test_so_it_is_at_times_as_large_as_there_are(dtype, jump, sign, solve):
    seen = []

    def f(t, y):
        seen.extend(t.detach().double().reshape(-1).tolist()[:1])
        return 0 * y

    t = sign * (jump + (jump / 64) * tensor(-1.0, 0.0, 1.0))
    options = {"jump_t": sign * tensor(jump), **solve.get("options", {})}
    options = options if solve.get("method") != "heun2" else solve["options"]
    pyode.odeint(f, torch.ones(2, 1, dtype=dtype), t, **{**solve, "options": options})
    there = torch.tensor(sign * jump, dtype=dtype)
    around = [float(torch.nextafter(there, torch.tensor(side * math.inf, dtype=dtype))) for side in (-sign, sign)]
    assert set(around) <= set(seen)


def test_a_discontinuity_nobody_announced_is_found():
    def f(t, y):
        return torch.where(t < 0.7, 1.0, -3.0) + 0 * y

    stats = Stats()
    y = pyode.odeint(f, tensor(0.0), tensor(0.0, 1.5), rtol=1e-6, atol=1e-6, options={"stats": stats})
    assert y[-1].item() == pytest.approx(0.7 - 3 * 0.8, abs=1e-3)
    # A jump between the stages at 3/10 and 4/5 costs up to 0.24 of its size, of which the estimate sees 1/80.
    assert stats.n_rejected > 0


def test_jumps_outside_the_interval_change_nothing():
    y, with_jumps = (
        pyode.odeint(growth.f, growth.y0, tensor(0.0, 1.0), options=options)
        for options in ({}, {"jump_t": tensor(-1.0, 0.0, 50.0), "step_t": tensor(-2.0, 51.0)})
    )
    assert torch.equal(y, with_jumps)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_backwards_is_the_mirror_image_to_the_bit(method):
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    kwargs = {"rtol": 1e-5, "atol": 1e-7, "method": method}
    back = pyode.odeint(growth.f, growth.y0, -t, **kwargs)
    mirrored = pyode.odeint(lambda s, z: -growth.f(-s, z), growth.y0, t, **kwargs)
    assert torch.equal(back, mirrored)


def test_output_times_do_not_change_the_steps():
    ends, many = Stats(), Stats()
    y = pyode.odeint(growth.f, growth.y0, tensor(0.0, 2.0), options={"stats": ends})
    dense = pyode.odeint(growth.f, growth.y0, growth.times(60)[:1].clone().new_tensor([0.02 * i for i in range(101)]),
                         options={"stats": many})  # fmt: skip
    assert ends == many
    assert torch.allclose(dense[-1], y[-1], rtol=1e-14)


@pytest.mark.parametrize("n", [4, 5])
def test_max_num_steps_counts_between_two_outputs(n):
    # Steps of 0.25: four to t = 1, and the fourth, which reaches it, starts the count anew.
    options = {"first_step": 0.25, "max_step": 0.25, "max_num_steps": n}
    t = torch.arange(0, 5, dtype=torch.float64)
    assert pyode.odeint(constant, tensor(0.0), t, options=options).shape == (5, 1)
    with pytest.raises(SolveError) as caught:
        pyode.odeint(constant, tensor(0.0), tensor(0.0, 4.0), options=options)
    assert caught.value.status is Status.TOO_MANY_STEPS
    assert caught.value.n_steps == n


def test_a_jump_does_not_start_the_count_of_steps_anew():
    options = {"first_step": 0.25, "max_step": 0.25, "max_num_steps": 6, "jump_t": tensor(0.5)}
    with pytest.raises(SolveError, match="max_num_steps"):
        pyode.odeint(constant, tensor(0.0), tensor(0.0, 2.0), options=options)


def blow_up(t, y):
    return y * y


def not_finite_from_half(t, y):
    return torch.where(t > 0.5, math.nan, 1.0) * y


@pytest.mark.parametrize(
    ("f", "y0", "status", "where"),
    [
        (lambda t, y: y * math.nan, 1.0, Status.NON_FINITE, 0.0),
        (lambda t, y: y + math.inf, 1.0, Status.NON_FINITE, 0.0),
        (lambda t, y: y, math.nan, Status.NON_FINITE, 0.0),
        (lambda t, y: y, math.inf, Status.NON_FINITE, 0.0),
        (not_finite_from_half, 1.0, Status.NON_FINITE, 0.5),
        (lambda t, y: 200 * y, 1.0, Status.NON_FINITE, math.log(sys.float_info.max / 200) / 200),
        (blow_up, 1.0, Status.STEP_TOO_SMALL, 1.0),
        (lambda t, y: 1 / (t - 0.5) ** 2 + 0 * y, 1.0, Status.STEP_TOO_SMALL, 0.5),
    ],
    ids=["nan at t0", "inf at t0", "y0 nan", "y0 inf", "nan later", "overflow", "blow-up", "pole"],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_why_and_where_a_solve_could_not_go_on(f, y0, status, where, backend, device):
    stats = Stats()
    y0 = torch.tensor([y0], dtype=torch.float64, device=device)
    with pyode.backend(backend), pytest.raises(SolveError) as caught:
        pyode.odeint(f, y0, tensor(0.0, 4.0).to(device), rtol=1e-6, atol=1e-8, options={"stats": stats})
    error = caught.value
    assert error.status is status
    assert error.t == pytest.approx(where, abs=0.02)  # stage sums, with weights up to 12, overflow a little earlier
    assert error.n_steps == stats.n_steps
    for part in (f"{error.t:.9g}", f"{error.dt:.3g}", str(error.n_steps), status.sentence):
        assert part in str(error)


@pytest.mark.parametrize("status", [Status.STEP_TOO_SMALL, Status.TOO_MANY_STEPS, Status.NON_FINITE])
def test_every_failure_names_a_remedy(status):
    remedies = ("loosen", "jump_t", "float64", "Raise", "shorten", "scale")
    assert sum(word in status.sentence for word in remedies) >= 2


def test_a_state_outside_funcs_domain_is_avoided_by_smaller_steps():
    f = Recorder(lambda t, y: -y / torch.sqrt(y))  # nan below 0, where a first step of 1.9 leads
    y = pyode.odeint(f, tensor(1.0), tensor(0.0, 1.5), rtol=1e-6, atol=1e-9, options={"first_step": 1.9})
    assert y[-1].item() == pytest.approx(0.0625, rel=1e-4)  # (1 - t / 2)^2


def test_stats_add_up_over_solves_and_errors():
    stats = Stats()
    for _ in range(2):
        pyode.odeint(growth.f, growth.y0, UNIT, options={"stats": stats})
    once = Stats()
    pyode.odeint(growth.f, growth.y0, UNIT, options={"stats": once})
    assert stats == once + once
    with pytest.raises(SolveError):
        pyode.odeint(blow_up, tensor(1.0), tensor(0.0, 2.0), options={"stats": stats})
    assert stats.n_steps > once.n_steps * 2


@pytest.mark.parametrize("method", ADAPTIVE)
def test_stats_count_every_evaluation(method):
    f, stats = Recorder(growth.f), Stats()
    pyode.odeint(f, growth.y0, UNIT, method=method, rtol=1e-4, atol=1e-4, options={"stats": stats})
    assert stats.n_f_evals == len(f.times)
    assert stats.n_f_evals == 2 + stats.n_steps * len(TABLEAUS[method].rows)


@pytest.mark.parametrize("t0", [0.0, -3.0])
def test_one_time_is_the_start(t0):
    y0, f = tensor(1.0, 2.0), Recorder(constant)
    y = pyode.odeint(f, y0, tensor(t0))
    assert torch.equal(y, y0[None])
    assert y.shape == (1, 2)
    y += 1  # a tensor of its own
    assert torch.equal(y0, tensor(1.0, 2.0))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3,), (2, 1, 3)])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_every_shape(shape, method, dtype, device):
    y0 = torch.ones(shape, dtype=dtype, device=device)
    tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    t = torch.linspace(0, 1, 5, device=device)
    y = pyode.odeint(lambda t, y: -y, y0, t, rtol=tolerance, atol=tolerance, method=method)
    assert y.shape == (5, *shape)
    assert y.dtype == dtype
    assert y.device == y0.device
    exact = torch.exp(-t).reshape(5, *[1] * len(shape)).expand(y.shape)
    assert torch.allclose(y, exact.to(dtype), atol=10 * tolerance, rtol=0)  # some steps, each within the tolerance
