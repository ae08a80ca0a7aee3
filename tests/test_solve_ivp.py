"""solve_ivp: every sample as if it were alone, whoever else is in the batch, and every argument does what it says."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from ensembles import counts, decay, oscillators, van_der_pol

import pyode
from pyode import DynamicsError, InvalidType, InvalidValue, SolveError, Stats, Status, solve_ivp
from pyode.methods import TABLEAUS

METHODS = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
Y0 = torch.tensor([[1.0], [2.0], [-3.0]], dtype=F64)


# Together equals apart.


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_has_the_bits_and_counts_of_its_solve_alone(method):
    y0 = oscillators(7, stiffest=8.0)
    with torch.no_grad():
        together = solve_ivp(van_der_pol, y0, T, method=method)
        for b in range(7):
            alone = solve_ivp(van_der_pol, y0[b : b + 1], T, method=method)
            assert torch.equal(together.ys[:, b], alone.ys[:, 0])
            assert torch.equal(counts(together)[:, b], counts(alone)[:, 0])
    assert len(set(together.stats.n_accepted.tolist())) > 3


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("grad", [False, True])
def test_a_thousand_samples_have_the_same_bits_in_any_company(dtype, grad):
    y0 = oscillators(1000, dtype, stiffest=20.0)
    y0[::100, 0] = torch.tensor([math.nan, math.inf, math.sqrt(torch.finfo(dtype).max) * 2] * 3 + [-math.inf]).to(dtype)
    healthy, order = torch.ones(1000, dtype=torch.bool), torch.randperm(1000)
    healthy[::100] = False
    t = torch.tensor([0.0, 0.3, 1.0], dtype=dtype)
    with torch.set_grad_enabled(grad):
        y0 = y0.requires_grad_(grad)
        company = solve_ivp(van_der_pol, y0, t, throw=False)
        without = solve_ivp(van_der_pol, y0[healthy], t)
        shuffled = solve_ivp(van_der_pol, y0[order], t, throw=False)
    assert (company.status[~healthy] != Status.SUCCESS).all()
    assert (company.status[healthy] == Status.SUCCESS).all()
    assert torch.equal(company.ys[:, healthy], without.ys)
    assert torch.equal(shuffled.ys.nan_to_num(), company.ys[:, order].nan_to_num())
    assert torch.equal(counts(company)[:, healthy], counts(without))
    assert torch.equal(shuffled.status, company.status[order])
    with torch.no_grad():
        for b in (1, 555, 999):
            assert torch.equal(solve_ivp(van_der_pol, y0[b : b + 1], t).ys[:, 0], company.ys[:, b])


def test_a_row_wise_network_gives_the_same_to_rounding():
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    y0 = torch.randn(50, 3, dtype=F64)
    together = solve_ivp(lambda t, y: net(y), y0, T)
    for b in (0, 17, 49):
        assert torch.allclose(solve_ivp(lambda t, y: net(y), y0[b : b + 1], T).ys[:, 0], together.ys[:, b], rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("controller", ["I", "PID"])
def test_one_sample_has_the_bits_of_the_joint_solve(method, controller):
    y0 = oscillators(1)
    per_sample = solve_ivp(van_der_pol, y0, T, method=method, controller=controller)
    joint = solve_ivp(van_der_pol, y0, T, method=method, controller=controller, control="joint")
    assert torch.equal(per_sample.ys, joint.ys)
    assert torch.equal(counts(per_sample), counts(joint))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex128])
def test_the_twin_in_plain_torch_takes_the_same_steps(dtype):
    y0, t = oscillators(4).to(dtype), torch.linspace(0, 1, 5, dtype=F64)
    ends = torch.tensor([1.0, -0.5, 0.2, 1.0], dtype=F64)
    native = solve_ivp(van_der_pol, y0, t[:, None] * ends, rtol=1e-4)
    with pyode.backend("reference"):
        twin = solve_ivp(van_der_pol, y0, t[:, None] * ends, rtol=1e-4)
    assert torch.allclose(native.ys, twin.ys, rtol=1e-3 if dtype == torch.float32 else 1e-9)
    if dtype == F64:
        assert torch.equal(native.stats.n_steps, twin.stats.n_steps)


def test_odeint_has_the_same_control():
    y0 = oscillators(5)
    whole = pyode.odeint(van_der_pol, y0, T, rtol=1e-6, atol=1e-8, options={"control": "per_sample"})
    for b in range(5):
        alone = pyode.odeint(van_der_pol, y0[b : b + 1], T, rtol=1e-6, atol=1e-8, options={"control": "per_sample"})
        joint = pyode.odeint(van_der_pol, y0[b : b + 1], T, rtol=1e-6, atol=1e-8)
        assert torch.equal(whole[:, b], alone[:, 0])
        assert torch.equal(alone, joint)


# What func is given.


def test_func_gets_a_time_for_every_sample_or_one_for_all():
    shapes = set()

    def f(t, y):
        shapes.add((tuple(t.shape), t.dtype))
        return -y

    for y0, control in ((Y0, "per_sample"), (Y0[:1].float(), "per_sample"), (Y0, "joint"), (Y0[:1], "joint")):
        shapes.clear()
        solve_ivp(f, y0, T, control=control)
        assert shapes == {((len(y0),) if control == "per_sample" else (), y0.dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64, torch.complex64])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3), (1, 5)])
def test_samples_of_every_shape_and_dtype(shape, dtype):
    y0 = torch.linspace(1, 2, math.prod(shape)).reshape(shape).to(dtype)
    solution = solve_ivp(decay, y0, torch.tensor([0.0, 1.0]), rtol=1e-2, atol=1e-2)
    assert solution.ys.shape == (2, *shape)
    assert solution.ys.dtype == dtype
    assert torch.allclose(solution.ys[1].abs().double(), y0.abs().double() * math.exp(-1), atol=0.05)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("grad", [False, True])
def test_no_samples_and_samples_of_no_numbers(shape, grad):
    with torch.set_grad_enabled(grad):
        solution = solve_ivp(
            decay, torch.zeros(shape), T.float(), dense_output=True, event_fn=lambda t, y: 1.0 + t, progress=False
        )
    assert solution.ys.shape == (5, *shape)
    assert solution.success
    assert len(solution.status) == shape[0]
    assert repr(solution)
    assert solution.interpolant(T).shape == (5, *shape)


def test_nested_states_are_solved_like_the_tensor_of_their_parts():
    def f(t, state):
        assert t.shape == (3,)
        return {"a": -state["a"], "b": (state["b"][0] * t[:, None, None],)}

    y0 = {"a": Y0[:, 0], "b": (torch.ones(3, 2, 2, dtype=F64),)}
    solution = solve_ivp(f, y0, T, rtol=1e-8, atol=1e-10, dense_output=True)
    exact = {"a": Y0[:, 0] * torch.exp(-T)[:, None], "b": torch.exp(T * T / 2)}
    for found in (solution.ys, solution.interpolant(T)):
        assert torch.allclose(found["a"], exact["a"], rtol=1e-6)
        assert found["b"][0].shape == (5, 3, 2, 2)
        assert torch.allclose(found["b"][0], exact["b"][:, None, None, None].expand(5, 3, 2, 2), rtol=1e-6)


def test_each_part_of_a_structure_has_a_share_in_its_samples_norm():
    y0 = oscillators(4)
    parts = solve_ivp(lambda t, y: (van_der_pol(t, y[0]), 0 * y[1]), (y0, torch.zeros(4, 1000, dtype=F64)), T)
    assert torch.equal(parts.ys[0], solve_ivp(van_der_pol, y0, T).ys)  # and does not dilute the others'


def test_tolerances_are_those_of_one_sample():
    y0 = (torch.ones(3, 2, dtype=F64), torch.ones(3, dtype=F64))
    f = lambda t, y: (-y[0], -y[1])  # noqa: E731
    each = solve_ivp(f, y0, T, rtol=(torch.tensor([1e-4, 1e-4], dtype=F64), 1e-4), atol=1e-6)
    one = solve_ivp(f, y0, T, rtol=1e-4, atol=1e-6)
    assert torch.equal(each.ys[0], one.ys[0])
    with pytest.raises(InvalidValue, match=r"rtol\[0\] has shape \(6,\)"):
        solve_ivp(f, y0, T, rtol=(torch.full((6,), 1e-4), 1e-4))


def test_a_norm_of_the_users_judges_each_sample():
    y0 = oscillators(5)
    rms = lambda error: error.square().mean(-1).sqrt()  # noqa: E731
    for backend in ("auto", "reference"):
        with pyode.backend(backend):
            theirs, ours = solve_ivp(van_der_pol, y0, T, options={"norm": rms}), solve_ivp(van_der_pol, y0, T)
            assert torch.equal(theirs.stats.n_steps, ours.stats.n_steps)
            assert torch.allclose(theirs.ys, ours.ys, rtol=1e-9)
    with pytest.raises(InvalidValue, match=r"must return a number for each sample, \[5\]"):
        solve_ivp(van_der_pol, y0, T, options={"norm": lambda error: error.abs().max()})


def test_args_are_passed_to_func_and_event():
    solution = solve_ivp(
        lambda t, y, a, b: a * y + b, Y0, T, args=(-1.0, 0.5), event_fn=lambda t, y, a, b: y[:, 0] - b - 0.2
    )
    assert solution.event_index.tolist() == [0, -1, -1]


# The other arguments.


def test_max_num_steps_counts_the_whole_solve():
    y0, t = oscillators(3, stiffest=5.0), torch.linspace(0, 2, 50, dtype=F64)
    needed = solve_ivp(van_der_pol, y0, t).stats.n_steps
    most = int(needed.max())
    assert solve_ivp(van_der_pol, y0, t, max_num_steps=most).success
    cut = solve_ivp(van_der_pol, y0, t, max_num_steps=most - 1, throw=False)
    expected = torch.where(needed == most, int(Status.TOO_MANY_STEPS), int(Status.SUCCESS))
    assert torch.equal(cut.status, expected)
    with pytest.raises(SolveError, match="max_num_steps"):
        solve_ivp(van_der_pol, y0, t, max_num_steps=most - 1)
    joint = int(solve_ivp(van_der_pol, y0, t, control="joint").stats.n_steps)
    with pytest.raises(SolveError):
        solve_ivp(van_der_pol, y0, t, max_num_steps=joint - 1, control="joint")


def test_the_first_step_is_the_one_given():
    stats = solve_ivp(decay, Y0, T, first_step=1e-3, max_num_steps=1, throw=False).stats
    assert stats.last_dt.tolist() == [1e-3] * 3
    assert stats.n_f_evals.tolist() == [7] * 3
    assert solve_ivp(decay, Y0, -T, first_step=1e-3, max_num_steps=1, throw=False).stats.last_dt[0] == -1e-3


def test_counts_are_added_to_options_stats():
    stats = Stats()
    solution = solve_ivp(van_der_pol, oscillators(4), T, options={"stats": stats})
    assert (stats.n_accepted, stats.n_rejected) == (
        int(solution.stats.n_accepted.sum()),
        int(solution.stats.n_rejected.sum()),
    )
    assert stats.n_f_evals == int(solution.stats.n_f_evals.max())  # func is called for all at once


@pytest.mark.parametrize("method", ["rk4", "adams", "scipy_solver", "implicit_adams"])
def test_joint_control_is_for_all_methods(method):
    t = torch.linspace(0, 2, 41, dtype=F64)
    solution = solve_ivp(decay, Y0, t, method=method, control="joint", rtol=1e-6, atol=1e-8, progress=True)
    assert torch.allclose(solution.ys, Y0 * torch.exp(-t)[:, None, None], atol=1e-3)
    assert solution.success
    assert solution.stats.n_f_evals.shape == (1,)
    with pytest.raises(InvalidValue, match="per_sample"):
        solve_ivp(decay, Y0, T, method=method)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"control": "each"}, InvalidValue, "control must be one of 'joint', 'per_sample'"),
        ({"gradient": "magic"}, InvalidValue, "gradient must be one of"),
        ({"controller": "PD"}, InvalidValue, "'PID'"),
        ({"controller": ()}, InvalidValue, "one to five"),
        ({"controller": (1, 2, 3, 4, 5, 6)}, InvalidValue, "one to five"),
        ({"controller": ("a",)}, InvalidValue, "one to five"),
        ({"controller": "PI", "method": "adams", "control": "joint"}, InvalidValue, "controller"),
        ({"options": {"tolerance": 1}}, InvalidValue, "tolerance"),
        ({"options": {"step_size": 1}}, InvalidValue, "step_size"),
        ({"options": {"control": "joint"}}, InvalidValue, "argument control"),
        ({"options": {"first_step": 0.1}}, InvalidValue, "argument first_step"),
        ({"options": {"max_num_steps": 10}}, InvalidValue, "argument max_num_steps"),
        ({"options": {"on_failure": "return"}}, InvalidValue, "argument throw"),
        ({"method": "rk4", "control": "joint", "first_step": 0.1}, InvalidValue, "first_step"),
        ({"method": "rk4"}, InvalidValue, "per_sample"),
        ({"method": "rk4", "control": "joint", "dense_output": True}, InvalidValue, "no dense output"),
        ({"compact": True, "control": "joint"}, InvalidValue, "compact"),
        ({"t": T[:, None].expand(5, 2)}, InvalidValue, r"\[T, 3\]"),
        ({"t": T[:, None].expand(5, 3), "control": "joint"}, InvalidValue, "1-D"),
        ({"t": torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 2, 1], [1, 1, 1]])}, InvalidValue, r"t\[2, 1\] = 2"),
        ({"t": torch.tensor([[0.0, 0, 0], [0, 1, 1], [1, 2, 2]])}, InvalidValue, r"t\[0, 0\] = 0 is followed"),
        ({"t": torch.tensor([[0.0, 0, 0], [1, math.nan, 1]])}, InvalidValue, "finite"),
        ({"y0": torch.tensor(1.0)}, InvalidValue, "first axis"),
        ({"y0": (Y0, Y0[:2])}, InvalidValue, "first axis"),
        ({"y0": (Y0, Y0.float())}, InvalidType, "one dtype"),
        ({"event_fn": 3}, InvalidType, "event_fn"),
        ({"event_fn": lambda t, y: y.sum()}, DynamicsError, r"\[B\] or \[B, E\]"),
        ({"event_fn": lambda t, y: 1.0}, DynamicsError, "tensor"),
        ({"event_fn": lambda t, y: y[:, 0] * 1j}, DynamicsError, "real"),
    ],
)
def test_what_is_wrong_is_told(wrong, error, match):
    arguments = {"y0": Y0, "t": T} | wrong
    y0, t = arguments.pop("y0"), arguments.pop("t")
    with pytest.raises(error, match=match):
        solve_ivp(lambda t, y: y, y0, t, **arguments)


def test_callbacks_are_for_joint_control():
    class Field:
        calls = 0

        def __call__(self, t, y):
            return -y

        def callback_step(self, t, y, dt):
            self.calls += 1

    field = Field()
    steps = int(solve_ivp(field, Y0, T, control="joint").stats.n_steps)
    assert field.calls == steps
    with pytest.warns(UserWarning, match="per_sample"):
        solve_ivp(field, Y0, T)
    assert field.calls == steps


def test_an_exception_of_funcs_passes_through_a_progress_bar_unchanged():
    def f(t, y):
        raise KeyError("mine")

    for backend in ("auto", "reference"):
        with pyode.backend(backend), pytest.raises(KeyError, match="mine"):
            solve_ivp(f, Y0, T, progress=True)


def test_progress_without_tqdm_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(InvalidValue, match="pip install tqdm"):
        solve_ivp(decay, Y0, T, progress=True)


@pytest.fixture
def shown(monkeypatch):
    """What a progress bar has shown: fractions, and what is beside them."""
    tqdm = pytest.importorskip("tqdm")
    shown = []

    class Bar(tqdm.tqdm):
        def refresh(self, *args, **kwargs):
            shown.append((self.n, self.postfix))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr("pyode.progress.INTERVAL", 0.0)
    return shown


@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_progress_shows_the_slowest_samples_time(shown, control):
    ends = torch.tensor([1.0, 4.0, -0.1], dtype=F64)
    t = torch.stack([0 * ends, ends]) if control == "per_sample" else torch.tensor([0.0, 4.0], dtype=F64)
    solution = solve_ivp(van_der_pol, oscillators(3, stiffest=5.0), t, control=control, progress=True)
    fractions = [n for n, beside in shown if beside]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert 0 < fractions[0] < 0.5
    assert len(fractions) > int(solution.stats.n_steps.max())
    assert f"rejected {int(solution.stats.n_rejected.sum())}" in shown[-1][1]
    assert "dt " in shown[-1][1]


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_progress_is_shown_with_any_gradient(shown, gradient):
    y0 = Y0.clone().requires_grad_()
    solution = solve_ivp(decay, y0, T, gradient=gradient, params=(), progress=True)
    assert shown[-1][0] == 1.0
    (found,) = torch.autograd.grad(solution.ys[-1].sum(), y0)
    assert torch.allclose(found, torch.exp(-T[-1]).expand(3, 1), rtol=1e-2)


def test_progress_of_a_solve_that_fails_stands_still(shown):
    y0 = torch.tensor([[0.1], [2.0]], dtype=F64)
    solution = solve_ivp(lambda t, y: y * y, y0, torch.tensor([0.0, 1.0], dtype=F64), progress=True, throw=False)
    assert not solution.success
    assert shown[-1][0] == pytest.approx(0.5, abs=1e-3)  # where it blows up
    options = {"control": "joint", "method": "trbdf2", "options": {"step_size": 0.01}}
    solve_ivp(lambda t, y: y * y, y0, torch.tensor([0.0, 1.0], dtype=F64), progress=True, throw=False, **options)
    assert 0.4 < shown[-1][0] < 0.55
