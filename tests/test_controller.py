"""The step-size controller: the compiled one against its twin, field by field, and both against what they promise."""

from __future__ import annotations

import math
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from factories import BACKENDS, ROUNDOFF, controller_for, layout_for
from hypothesis import given, settings

from pyode._ops import native, reference
from pyode._ops.contract import INTEGER_FIELDS, N_FIELDS, REAL_FIELDS, Flag, Phase, Policy
from pyode.errors import Status

STEP_STATE_H = Path(__file__).parents[1] / "csrc" / "core" / "step_state.h"
NAMES = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__.rsplit(".")[-1])
F64 = torch.float64
TIMES = (0.0, 0.5, 0.625, 2.0)

# The reference keeps no index of prescribed times: it looks for the next one.
COMMON = [name for name in (*REAL_FIELDS, *INTEGER_FIELDS) if name not in ("next_step_t", "next_jump_t")]
PLANNED = ("dt_whole", "slope")  # of no meaning where no step is planned
# Norms on both sides of every decision, with the rare values among them.
NORMS = st.one_of(st.floats(0, 3), st.floats(1e-12, 1e12), st.sampled_from([0.0, 1.0, math.inf, math.nan, 1e-300]))


def test_the_fields_are_those_of_the_struct_in_their_order():
    struct = re.search(r"struct Samples \{(.*?)\n\};", STEP_STATE_H.read_text(), re.S)[1]
    assert tuple(re.findall(r"^  R (\w+);", struct, re.M)) == REAL_FIELDS
    assert tuple(re.findall(r"^  counts_t<R> (\w+);", struct, re.M)) == INTEGER_FIELDS
    assert native._C.STATE_WORDS == N_FIELDS


def test_statuses_flags_and_phases_are_those_of_the_header():
    header = STEP_STATE_H.read_text()
    statuses = dict(re.findall(r"k(\w+) = (\d)", re.search(r"enum Status.*?\{(.*?)\}", header)[1]))
    ours = {name.title().replace("_", ""): str(s.value) for name, s in Status.__members__.items()}
    assert statuses.items() <= ours.items()  # the others are of Python's own making
    flags = dict(re.findall(r"constexpr int64_t kAny(\w+) = (\d+);", header))
    assert {flag.name.title(): str(flag.value) for flag in Flag} == flags
    phases = re.search(r"enum class Phase : int32_t \{(.*?)\};", (STEP_STATE_H.parents[1] / "ops.h").read_text(), re.S)
    assert [phase.name.lower() for phase in Phase] == re.findall(r"^  (\w+),", phases[1], re.M)


class Pair:
    """Both controllers, driven by the same norms."""

    def __init__(self, times, policy, device="cpu", samples=1, dtype=torch.float64, **stops):
        self.y = torch.zeros(samples, 1, dtype=dtype, device=device)
        layouts = [layout_for(ops, self.y, samples) for ops in BACKENDS]
        abscissae = (0.2, 8 / 9, 1.0)
        self.both = [controller_for(ops, at, times, policy, abscissae, **stops) for ops, at in zip(BACKENDS, layouts)]
        self.one = torch.ones(samples, dtype=torch.float64, device=device)

    def give(self, norms: list[float], slot: int = 0) -> None:
        """A norm for each sample: the error of a one-number state with tolerance 1."""
        k = torch.tensor(norms, dtype=self.y.dtype, device=self.y.device).reshape(self.y.shape)
        for controller in self.both:
            controller.error_norm((1.0,), self.y, self.y, [k], self.one, 0.0, 1.0, slot)

    def run(self, phase: Phase, first_step: float = 0.0) -> Flag:
        """Both carry it out; afterwards they agree in everything."""
        flags = [controller.run(phase, first_step) for controller in self.both]
        assert flags[0] == flags[1]
        compiled, twin = self.both
        for name in COMMON:
            if phase is not Phase.TRY_FIRST or name in ("t", "dt", "slope", "status"):
                wanted = twin.field("status") == Status.RUNNING if name in PLANNED else slice(None)
                self.agree(compiled.field(name).cpu()[wanted], twin.field(name)[wanted], name)
        self.agree(compiled.dt.cpu(), twin.dt, "dt")
        self.agree(compiled.stage_times.cpu(), twin.stage_times.cpu(), "stage_times")
        return Flag(flags[0])

    def agree(self, actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
        # The core's pow() and libm's may differ in the last place, in every one of up to 25 steps: by 25 * 2^-52. All
        # else is the same; the decisions here keep clear of so little.
        exact = {torch.int64: 0.0, F64: 1e-13}  # and in the dtype of func's times one place
        tolerance = exact[actual.dtype] if actual.dtype in exact else 2 * ROUNDOFF[actual.dtype]
        assert torch.allclose(actual, expected, rtol=tolerance, atol=0, equal_nan=True), (name, actual, expected)

    def field(self, name: str) -> list[float]:
        return self.both[0].field(name).tolist()


POLICIES = st.builds(
    Policy,
    order=st.sampled_from([2.0, 3.0, 5.0, 8.0]),
    safety=st.sampled_from([0.9, 0.8]),
    ifactor=st.sampled_from([10.0, 5.0, 1.0]),
    dfactor=st.sampled_from([0.2, 0.1, 1.0]),
    min_step=st.sampled_from([0.0, 0.0, 0.01]),
    max_step=st.sampled_from([math.inf, 0.3]),
    max_num_steps=st.sampled_from([2**31 - 1, 12, 3]),
    clip=st.booleans(),
    count_per_output=st.booleans(),
    resume=st.booleans(),
)


@settings(max_examples=150)
@given(
    POLICIES,
    st.lists(st.tuples(NORMS, NORMS, NORMS), min_size=4, max_size=25),
    st.sampled_from([1.0, -1.0]),
    st.sampled_from([(), (0.25,), (0.0, 0.3, 0.625), (2.0, 3.0)]),
    st.sampled_from([(), (0.1,), (0.5, 1.0), (2.5,)]),
    st.sampled_from([1, 3]),
    st.one_of(st.none(), st.sampled_from([0.01, 0.1, -0.5, 10.0])),
)
def test_both_controllers_agree_on_every_field(policy, norms, sign, step_t, jump_t, samples, first_step):
    times, step_t, jump_t = ([sign * t for t in ts] for ts in (TIMES, step_t, jump_t))
    pair = Pair(times, policy, samples=samples, step_t=step_t, jump_t=jump_t)
    norms = [list(some[:samples]) for some in norms]
    pair.give(norms[0])
    pair.give(norms[1], slot=1)
    if first_step is None:
        pair.run(Phase.TRY_FIRST)
        pair.give(norms[2])
        pair.run(Phase.CHOOSE_FIRST)
    else:
        pair.run(Phase.GIVEN_FIRST, first_step)
    for some in norms[3:]:
        pair.give(some)
        pair.run(Phase.JUDGE)


@pytest.mark.parametrize(("samples", "sign"), [(1, 1.0), (3, -1.0)])
def test_both_controllers_agree_on_a_solve(sign, samples, dtype, device):
    # Norms as a real solve has them; times in the dtype of the state.
    pair = Pair([sign * t for t in TIMES], Policy(5.0), device, samples, dtype)
    pair.give([1.0] * samples)
    pair.give([7.0] * samples, slot=1)
    pair.run(Phase.TRY_FIRST)
    pair.give([2.0] * samples)
    flags = pair.run(Phase.CHOOSE_FIRST)
    for n in range(200):
        if not flags & Flag.RUNNING:
            break
        pair.give([0.02 + abs(math.sin(n + b)) for b in range(samples)])
        flags = pair.run(Phase.JUDGE)
    assert set(pair.field("status")) == {Status.SUCCESS}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__.rsplit(".")[-1])
@pytest.mark.parametrize("step", [1e-9, 0.25, 1.0, -1e-9, -0.25, -1.0])
def test_a_stage_at_the_end_sees_the_neighbour_of_t1_towards_t0(ops, dtype, step, device):
    y = torch.zeros(1, 1, dtype=dtype, device=device)
    for start in (0.0, 1.0, -1.0, 1000.0, -1e-3):
        end = start + math.copysign(5, step)
        controller = controller_for(ops, layout_for(ops, y), (start, end), abscissae=(0.2, 1.0))
        controller.run(Phase.GIVEN_FIRST, step)
        times, real = controller.stage_times.cpu(), layout_for(ops, y).real_dtype
        t1 = torch.tensor(start + step, dtype=torch.float64).to(real)
        towards = torch.tensor(-math.copysign(math.inf, step), dtype=real)
        assert times.dtype == real
        assert times[1] == torch.nextafter(t1, towards), (start, "also where dt is less than the last place of t")
        assert times[0] == torch.tensor(start + 0.2 * step, dtype=torch.float64).to(real)


def started(ops, dt: float, times=TIMES, **policy):
    """A controller with its first step planned."""
    stops = {name: policy.pop(name) for name in ("step_t", "jump_t") if name in policy}
    y = torch.zeros(1, 1, dtype=torch.float64)
    controller = controller_for(ops, layout_for(ops, y), times, Policy(5.0, **policy), **stops)
    controller.put_norm(1.0)
    controller.put_norm(1.0, 1)
    return controller, Flag(controller.run(Phase.GIVEN_FIRST, dt))


def judged(controller, norm: float) -> Flag:
    controller.put_norm(norm)
    return Flag(controller.run(Phase.JUDGE))


@NAMES
@pytest.mark.parametrize(
    ("norm", "factor"),
    [(0.0, 10.0), (1e-9, 10.0), (0.5, 0.9 * 0.5**-0.2), (0.99, 1.0), (1.0, 0.9), (2.0, 0.9 * 2**-0.2), (1e9, 0.2),
     (math.inf, 0.2), (math.nan, 0.2)],
)  # fmt: skip
def test_the_next_step_follows_from_the_error(ops, norm, factor):
    controller, _ = started(ops, 0.01)
    flags = judged(controller, norm)
    assert float(controller.dt) == pytest.approx(0.01 * factor, rel=1e-15)
    accepted = norm <= 1
    assert bool(flags & Flag.ACCEPTED) == accepted == (not flags & Flag.STAYED)
    assert float(controller.field("t")) == (0.01 if accepted else 0.0)
    assert (int(controller.field("n_accepted")), int(controller.field("n_rejected"))) == (accepted, not accepted)


@NAMES
def test_all_outputs_that_a_step_passes_are_due_at_once(ops):
    controller, _ = started(ops, 1.0)
    assert judged(controller, 0.5) & Flag.OUTPUT
    assert (int(controller.field("output_begin")), int(controller.field("output_end"))) == (1, 3)
    assert judged(controller, 0.5) & Flag.OUTPUT
    assert int(controller.field("status")) == Status.SUCCESS
    assert float(controller.field("t")) >= 2.0
    assert not judged(controller, 0.5) & (Flag.OUTPUT | Flag.RUNNING | Flag.ACCEPTED)  # it stands still now


@NAMES
def test_a_step_ends_exactly_at_prescribed_times(ops):
    controller, flags = started(ops, 0.4, step_t=(0.3,), jump_t=(0.7,))
    assert float(controller.field("t1")) == 0.3
    judged(controller, 0.99)
    assert float(controller.field("t")) == 0.3
    while float(controller.field("t")) < 0.7:
        flags = judged(controller, 0.99)
    assert float(controller.field("t")) == 0.7
    assert flags & Flag.JUMP


@NAMES
def test_a_step_cut_short_is_resumed_only_where_the_policy_says(ops):
    for resume, expected in ((True, 0.4), (False, 0.3)):
        controller, _ = started(ops, 0.4, step_t=(0.3,), resume=resume)
        judged(controller, 0.99)  # keeps its size
        assert float(controller.dt) == pytest.approx(expected)


@NAMES
def test_a_clipped_solve_ends_at_the_last_time(ops):
    controller, _ = started(ops, 5.0, clip=True)
    judged(controller, 0.5)
    assert float(controller.field("t")) == 2.0


@NAMES
@pytest.mark.parametrize(("per_output", "n"), [(True, 5), (False, 3)])
def test_the_number_of_steps_is_bounded_between_outputs_or_altogether(ops, per_output, n):
    controller, flags = started(ops, 0.3, max_num_steps=3, max_step=0.3, count_per_output=per_output)
    taken = 0
    while flags & Flag.RUNNING:
        flags = judged(controller, 0.99 if taken < 2 else 1.0001)  # two steps pass t = 0.5, then all are rejected
        taken += 1
    assert int(controller.field("status")) == Status.TOO_MANY_STEPS
    assert taken == n


@NAMES
def test_the_smallest_step_is_accepted_whatever_its_error_unless_that_is_not_finite(ops):
    controller, _ = started(ops, 0.1, min_step=0.1)
    assert judged(controller, 1e6) & Flag.ACCEPTED
    judged(controller, math.nan)
    assert int(controller.field("status")) == Status.NON_FINITE


@NAMES
@pytest.mark.parametrize(("norm", "status"), [(2.0**60, Status.STEP_TOO_SMALL), (math.nan, Status.NON_FINITE)])
def test_a_step_that_does_not_move_t_ends_the_solve(ops, norm, status):
    controller, flags = started(ops, 0.1, times=(1.0, 2.0))
    while flags & Flag.RUNNING:
        flags = judged(controller, norm)
    assert flags & Flag.FAILED
    assert int(controller.field("status")) == status
    assert 1.0 + float(controller.field("dt_prev")) * 0.2 == 1.0


@NAMES
@pytest.mark.parametrize("norms", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_start_that_is_not_finite_ends_the_solve_at_once(ops, norms):
    y = torch.zeros(1, 1, dtype=torch.float64)
    controller = controller_for(ops, layout_for(ops, y), TIMES)
    for slot, norm in enumerate(norms):
        controller.put_norm(norm, slot)
    controller.run(Phase.TRY_FIRST)
    controller.put_norm(1.0)
    assert not controller.run(Phase.CHOOSE_FIRST) & Flag.RUNNING
    assert int(controller.field("status")) == Status.NON_FINITE


def test_every_sample_goes_its_own_way(device):
    pair = Pair([0.0, 1.0], Policy(5.0), device, samples=4)
    pair.give([1.0] * 4)
    pair.give([1.0] * 4, slot=1)
    pair.run(Phase.GIVEN_FIRST, 0.6)
    pair.give([0.5, 2.0, math.nan, 0.0])
    flags = pair.run(Phase.JUDGE)
    assert flags & Flag.ACCEPTED
    assert flags & Flag.STAYED
    assert pair.field("accepted") == [1, 0, 0, 1]
    assert pair.field("t") == [0.6, 0.0, 0.0, 0.6]
    pair.give([0.5, 0.5, 0.5, 0.5])
    pair.run(Phase.JUDGE)
    assert pair.field("status") == [Status.SUCCESS, Status.RUNNING, Status.RUNNING, Status.SUCCESS]
    assert pair.field("dt")[0] == 0


def test_every_sample_may_have_times_of_its_own(device):
    times = torch.tensor([[0.0, 5.0], [1.0, 4.0], [2.0, 3.0]], dtype=torch.float64)  # one goes backwards
    pair = Pair(times, Policy(5.0, max_step=0.5), device, samples=2)
    pair.give([1.0] * 2)
    pair.give([1.0] * 2, slot=1)
    flags = pair.run(Phase.GIVEN_FIRST, 0.5)
    while flags & Flag.RUNNING:
        pair.give([0.99] * 2)
        flags = pair.run(Phase.JUDGE)
    assert pair.field("t") == [2.0, 3.0]


def test_the_reference_module_offers_what_the_native_one_does():
    own = {"interpolate_at", "scaled_error", "scaled_step_error"}  # what only torch's own derivatives need
    assert all(callable(getattr(native, name)) for name in {*reference.__all__} - own)
