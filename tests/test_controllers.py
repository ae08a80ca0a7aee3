"""Digital filters as step-size controllers: each meets the tolerance, and rejects less than elementary control."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torchdiffeq
from ensembles import oscillators, van_der_pol
from factories import BACKENDS, controller_for, layout_for, steps_for
from hypothesis import given

import pyode
from pyode import solve_ivp
from pyode._ops.contract import Phase, Policy
from pyode.control import CONTROLLERS

F64 = torch.float64
FILTERS = [name for name in CONTROLLERS if name != "I"]
T = torch.linspace(0, 12, 4, dtype=F64)
TOLERANCES = {"rtol": 1e-5, "atol": 1e-7}
SOFT = {**TOLERANCES, "method": "dopri5"}


def test_elementary_control_takes_torchdiffeqs_steps():
    y0 = oscillators(1, stiffest=1.0)
    theirs = []

    class Field(torch.nn.Module):
        def forward(self, t, y):
            return van_der_pol(t, y)

        def callback_accept_step(self, t, y, dt):
            theirs.append(float(dt))

    torchdiffeq.odeint(Field(), y0, T, method="dopri5", **TOLERANCES)
    solution = pyode.odeint(van_der_pol, y0, T, options={"stats": (stats := pyode.Stats())}, **TOLERANCES)
    assert solution.isfinite().all()
    assert stats.n_accepted == len(theirs)
    # solve_ivp does not grow right after a rejection, and clips its last step.
    ours = solve_ivp(van_der_pol, y0, T, **TOLERANCES).stats
    assert abs(int(ours.n_accepted) - len(theirs)) <= 0.05 * len(theirs) + 2


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_every_controller_meets_the_tolerance(controller, control):
    y0 = oscillators(6, stiffest=10.0)
    found = solve_ivp(van_der_pol, y0, T, controller=controller, control=control, **TOLERANCES)
    exact = solve_ivp(van_der_pol, y0, T, rtol=1e-11, atol=1e-12, method="dopri8").ys
    assert torch.allclose(found.ys, exact, atol=2e-2)
    assert found.stats.n_steps.max() < 3000


@pytest.mark.parametrize("controller", FILTERS)
def test_filters_reject_less_where_stability_limits_the_step(controller):
    # A relaxation on which the step settles at the stability limit: elementary control runs into it again and again.
    f = lambda t, y: -200.0 * (y - torch.cos(t)[:, None])  # noqa: E731
    y0, t = torch.zeros(3, 1, dtype=F64), torch.tensor([0.0, 6.0], dtype=F64)
    elementary, filtered = (solve_ivp(f, y0, t, controller=c).stats for c in ("I", controller))
    assert (filtered.n_rejected < 0.5 * elementary.n_rejected).all()
    assert (filtered.n_steps < 1.1 * elementary.n_steps).all()


@pytest.mark.parametrize("controller", FILTERS)
def test_step_sizes_settle_where_the_problem_does(controller):
    # On y' = i y in a rotating frame all steps look the same.
    f = lambda t, y: torch.stack([-y[:, 1], y[:, 0]], 1)  # noqa: E731
    y0 = torch.tensor([[1.0, 0.0]], dtype=F64)
    sizes = []

    class Field:
        def __call__(self, t, y):
            return f(t, y)

        def callback_accept_step(self, t, y, dt):
            sizes.append(float(dt))

    t = torch.tensor([0.0, 100.0], dtype=F64)
    solve_ivp(Field(), y0, t, controller=controller, control="joint", rtol=0.0, atol=1e-6)
    settled = torch.tensor(sizes[len(sizes) // 2 : -1])
    assert settled.std() < 0.02 * settled.mean()


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_name_stands_for_its_exponents(name):
    (b1, b2, b3), (a2, a3) = CONTROLLERS[name]
    y0 = oscillators(3, stiffest=5.0)
    by_name, by_exponents = (solve_ivp(van_der_pol, y0, T, controller=c) for c in (name, (b1, b2, b3, a2, a3)))
    assert torch.equal(by_name.ys, by_exponents.ys)
    if not any((b3, a2, a3)):
        assert torch.equal(solve_ivp(van_der_pol, y0, T, controller=[b1, b2]).ys, by_name.ys)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_joint_and_per_sample_control_are_the_same(controller):
    y0 = oscillators(1, stiffest=1.0)
    joint, single = (solve_ivp(van_der_pol, y0, T, controller=controller, control=c) for c in ("joint", "per_sample"))
    assert torch.equal(joint.ys, single.ys)


@given(
    errors=st.lists(st.floats(0, 3) | st.sampled_from([0.0, 1.0, 1e-14, 1e6, float("nan")]), min_size=2, max_size=12),
    controller=st.sampled_from(list(CONTROLLERS)),
    cautious=st.booleans(),
)
def test_factors_stay_between_their_bounds_in_both_backends(errors, controller, cautious):
    beta, alpha = CONTROLLERS[controller]
    policy = Policy(5.0, beta=beta, alpha=alpha, cautious=cautious, ifactor=10.0, dfactor=0.2)
    y, found = torch.zeros(1, 1, dtype=F64), []
    for ops in BACKENDS:
        layout = layout_for(ops, y)
        machine = controller_for(ops, layout, (0.0, 1e9), policy)
        machine.run(Phase.GIVEN_FIRST, 1.0)
        sizes, rejected = [1.0], False
        for error in errors:
            k = torch.tensor([[error]], dtype=F64)
            machine.error_norm((1.0,), y, y, [k], steps_for(layout, [1.0]), 0.0, 1.0)
            machine.run(Phase.JUDGE)
            sizes.append(float(machine.field("dt_whole")))
            factor = sizes[-1] / sizes[-2] if sizes[-2] else 1.0
            assert 0.2 * (1 - 1e-12) <= factor <= 10 * (1 + 1e-12) or sizes[-1] == 0
            if rejected and cautious:
                assert factor <= 1
            rejected = not int(machine.field("accepted"))
            if rejected:
                assert factor < 1
        found.append(sizes)
    assert found[0] == pytest.approx(found[1], rel=1e-12)
