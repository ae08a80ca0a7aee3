"""Against the PyPI package torchdiffeq: the same steps accepted and rejected, the same results, for every option.

For dopri5, dopri8 and bosh3. torchdiffeq's fehlberg2 and adaptive_heun reuse as a step's first stage a last one that is
not f(t1, y1), and PyPI's has no tsit5: those are tested against closed forms (test_loop.py) and their order
(test_methods.py) only.
"""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from parity_cases import NOISE, OPTIONS, PARTS, PROBLEMS, TENSOR_TOLERANCES, TOLERANCES, coupled
from problems import tensor, van_der_pol
from torch import nn

import pyode
from pyode import Stats
from pyode.methods import TABLEAUS

METHODS = pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
SIGNS = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])


class Recorder(nn.Module):
    """A func that notes torchdiffeq's steps: start, signed size, whether accepted."""

    def __init__(self, f, sign: float = 1.0) -> None:
        super().__init__()
        self.f, self.sign, self.steps, self.calls = f, sign, [], 0

    def forward(self, t, y):
        self.calls += 1
        return self.f(t, y)

    def callback_accept_step(self, t0, y0, dt):
        self.steps.append((float(t0), self.sign * float(dt), True))

    def callback_reject_step(self, t0, y0, dt):
        self.steps.append((float(t0), self.sign * float(dt), False))


class Watcher:
    """The same for pyode, from the times that func sees: the first stage's and the last's of every step."""

    def __init__(self, f, method: str, chosen: bool = True) -> None:
        self.f, self.c, self.times, self.chosen = f, TABLEAUS[method].abscissae, [], chosen

    def __call__(self, t, y):
        self.times.append(float(t))
        return self.f(t, y)

    @property
    def steps(self) -> list[tuple[float, float, bool]]:
        n, times = len(self.c), self.times[2 if self.chosen else 1 :]
        assert len(times) % n == 0
        ends = times[n - 1 :: n]
        sizes = [(end - first) / (1 - self.c[0]) for first, end in zip(times[::n], ends)]
        starts = [end - size for end, size in zip(ends, sizes)]
        accepted = [abs(later - end) < abs(later - start) for start, end, later in zip(starts, ends, starts[1:])]
        return list(zip(starts, sizes, [*accepted, True]))  # the last one passes t[-1]


def compare_steps(ours: list, theirs: list, noise: float) -> None:
    assert [accepted for *_, accepted in ours] == [accepted for *_, accepted in theirs]
    for column in (0, 1):
        actual, expected = (tensor(*(step[column] for step in steps)) for steps in (ours, theirs))
        assert torch.allclose(actual, expected, rtol=noise, atol=noise * max(abs(step[0]) for step in theirs))


@METHODS
@SIGNS
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_the_same_steps_are_accepted_and_rejected(method, sign, name, rtol):
    f, y0, end = PROBLEMS[name]
    if sign < 0:
        f = lambda t, y, forward=f: -forward(-t, y)  # noqa: E731
    start = 1.0 if name == "sine" else 0.0
    t = sign * torch.linspace(start, end, 8, dtype=torch.float64)
    # Of a method of order 8 the estimate in a tiny first step is nothing but rounding noise: begin with a sensible one.
    options = {"first_step": 0.05} if method == "dopri8" else {}
    watcher, recorder, stats = Watcher(f, method, chosen=not options), Recorder(f, sign), Stats()
    tolerances = {"rtol": rtol, "atol": rtol / 100, "method": method}
    with torch.no_grad():
        ours = pyode.odeint(watcher, y0, t, **tolerances, options={**options, "stats": stats})
        theirs = torchdiffeq.odeint(recorder, y0, t, **tolerances, options=options)
    compare_steps(watcher.steps, recorder.steps, NOISE[method])
    assert (stats.n_accepted, stats.n_steps) == (sum(s[2] for s in recorder.steps), len(recorder.steps))
    assert stats.n_f_evals == recorder.calls == len(watcher.times)
    # That noise times the tolerance; van der Pol's corners and the spiral amplify it.
    assert torch.allclose(ours, theirs, rtol=0, atol=100 * rtol * NOISE[method] * float(theirs.abs().max()))


def test_some_of_these_problems_reject_steps():
    for f, y0, end in (PROBLEMS["van der Pol"], PROBLEMS["Kepler"]):
        stats = Stats()
        pyode.odeint(f, y0, tensor(0.0, end), 1e-4, 1e-6, options={"stats": stats})
        assert stats.n_rejected >= 5


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_in_float32_the_number_of_steps_is_theirs_within_2_percent(method, rtol):
    ours, theirs = 0, 0
    for name, (f, y0, end) in PROBLEMS.items():
        t = torch.linspace(1.0 if name == "sine" else 0.0, end, 5)
        stats, recorder = Stats(), Recorder(f)
        with torch.no_grad():
            pyode.odeint(f, y0.float(), t, rtol, rtol / 100, method, {"stats": stats})
            torchdiffeq.odeint(recorder, y0.float(), t, rtol=rtol, atol=rtol / 100, method=method)
        ours, theirs = ours + stats.n_steps, theirs + len(recorder.steps)
    assert theirs > 100  # so that 2 % is more than one step; of each problem alone it need not be
    assert abs(ours - theirs) <= 0.02 * theirs


@METHODS
@SIGNS
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_means_what_it_means_there(method, sign, name):
    options = {key: sign * value if key in ("step_t", "jump_t") else value for key, value in OPTIONS[name].items()}
    if method == "dopri8":
        options.setdefault("first_step", 0.05)
    calls = {pyode: 0, torchdiffeq: 0}
    y0 = torch.tensor([[1.5, 0.5], [0.2, -1.0]], dtype=torch.float64)
    t, results = sign * torch.linspace(0, 2, 6, dtype=torch.float64), {}
    for module in calls:

        def f(t, y, module=module):
            calls[module] += 1
            return van_der_pol(t, y, 3.0) + torch.cos(5 * t)

        results[module] = module.odeint(f, y0, t, rtol=1e-5, atol=1e-7, method=method, options=dict(options))
    assert calls[pyode] == calls[torchdiffeq]
    assert torch.allclose(results[pyode], results[torchdiffeq], rtol=1e-8, atol=1e-8)


@METHODS
@pytest.mark.parametrize("name", TOLERANCES)
def test_tuples_with_every_kind_of_tolerance(method, name):
    calls, results = {pyode: 0, torchdiffeq: 0}, {}
    for module in calls:

        def f(t, parts, module=module):
            calls[module] += 1
            return coupled(t, parts)

        kwargs = {"rtol": TOLERANCES[name], "atol": 1e-6, "method": method, "options": {"first_step": 0.05}}
        results[module] = module.odeint(f, PARTS, torch.linspace(0, 2, 5, dtype=torch.float64), **kwargs)
        module.odeint(f, PARTS, tensor(0.0, 1.0), **{**kwargs, "rtol": 1e-5, "atol": TOLERANCES[name]})
    assert calls[pyode] == calls[torchdiffeq]
    for ours, theirs in zip(results[pyode], results[torchdiffeq]):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)


@METHODS
@pytest.mark.parametrize("tolerance", TENSOR_TOLERANCES)
def test_tensor_tolerances(method, tolerance):
    y0 = torch.tensor([[1.5, 0.5], [0.2, -1.0]], dtype=torch.float64)
    for which in ("rtol", "atol"):
        kwargs = {"rtol": 1e-5, "atol": 1e-6, "method": method, "options": {"first_step": 0.05}, which: tolerance}
        ours, theirs = Stats(), Recorder(van_der_pol)
        y = pyode.odeint(
            van_der_pol, y0, tensor(0.0, 3.0), **{**kwargs, "options": {"first_step": 0.05, "stats": ours}}
        )
        expected = torchdiffeq.odeint(theirs, y0, tensor(0.0, 3.0), **kwargs)
        assert ours.n_f_evals == theirs.calls
        assert torch.allclose(y, expected, rtol=1e-3 * NOISE[method] * 100)


@METHODS
@SIGNS
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_complex_states(method, sign, dtype):
    y0, t = torch.tensor([1 + 1j, 0.3 - 2j], dtype=dtype), sign * torch.linspace(0, 3, 5, dtype=torch.float64)

    def f(t, y):
        return 1j * y * y.abs() - 0.1 * y * torch.cos(t)

    stats, recorder = Stats(), Recorder(f)
    kwargs = {"rtol": 1e-5, "atol": 1e-6, "method": method}
    options = {"first_step": 0.1} if method == "dopri8" or dtype == torch.complex64 else {}
    y = pyode.odeint(f, y0, t, **kwargs, options={**options, "stats": stats})
    expected = torchdiffeq.odeint(recorder, y0, t, **kwargs, options=options)
    assert abs(stats.n_f_evals - recorder.calls) <= (0 if dtype == torch.complex128 else 0.02 * recorder.calls + 14)
    assert torch.allclose(y, expected, rtol=1e-8 if dtype == torch.complex128 else 1e-4)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize(("state", "time"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_times_and_states_of_different_dtypes(method, state, time):
    t = torch.linspace(0, 1, 4, dtype=time)
    kwargs = {"rtol": 1e-5, "atol": 1e-5, "method": method, "options": {"first_step": 0.1}}
    y, expected = (m.odeint(van_der_pol, tensor(2.0, 0.0).to(state), t, **kwargs) for m in (pyode, torchdiffeq))
    assert y.dtype == expected.dtype == state
    # In float32 the sizes of steps have noise, and results differ by up to the tolerance.
    assert torch.allclose(y, expected, atol=3e-5 if state == torch.float32 else 1e-8)


def test_a_user_norm_is_given_what_torchdiffeq_gives_it():
    seen = {}
    for module in (pyode, torchdiffeq):
        seen[module] = []

        def norm(e, found=seen[module]):
            found.append([(part.shape, part.dtype) for part in e])
            return torch.stack([part.abs().max() for part in e]).max()

        module.odeint(coupled, PARTS, tensor(0.0, 1.0), rtol=1e-5, atol=1e-6, options={"norm": norm})
    assert seen[pyode] == seen[torchdiffeq]


@METHODS
def test_a_user_norm_of_a_tuple_with_a_first_step_takes_torchdiffeqs_steps(method):
    calls = {pyode: 0, torchdiffeq: 0}
    for module in calls:

        def f(t, parts, module=module):
            calls[module] += 1
            return coupled(t, parts)

        options = {"first_step": 0.05, "max_num_steps": 1000, "norm": lambda e: max(part.abs().max() for part in e)}
        module.odeint(f, PARTS, tensor(0.0, 2.0), rtol=1e-3, atol=1e-4, method=method, options=options)
    assert calls[pyode] == calls[torchdiffeq]


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
def test_a_dtype_for_time_is_accepted_and_time_stays_float64(method, dtype, state):
    y0, t, seen = tensor(2.0, 0.0).to(state), tensor(0.0, 0.5, 1.0), set()

    def f(t, y):
        seen.add(t.dtype)
        return van_der_pol(t, y)

    kwargs = {"rtol": 1e-5, "atol": 1e-5, "method": method}
    y = pyode.odeint(f, y0, t, options={"first_step": 0.1, "dtype": dtype}, **kwargs)
    assert torch.equal(y, pyode.odeint(f, y0, t, options={"first_step": 0.1}, **kwargs))
    assert seen == {state}
    # Steps in float32 have noise, and dense output hands it on.
    theirs = torchdiffeq.odeint(f, y0, t, options={"first_step": 0.1, "dtype": dtype}, **kwargs)
    assert torch.allclose(y, theirs, atol=3e-4)


def test_defaults_are_torchdiffeqs():
    y, expected = (module.odeint(van_der_pol, tensor(2.0, 0.0), tensor(0.0, 1.0)) for module in (pyode, torchdiffeq))
    assert torch.allclose(y, expected, rtol=1e-11)


def test_the_middle_four_arguments_may_be_positional_as_in_2018():
    args = (van_der_pol, tensor(2.0, 0.0), tensor(0.0, 1.0))
    expected = pyode.odeint(*args, rtol=1e-3, atol=1e-4, method="bosh3", options={"first_step": 0.1})
    assert torch.equal(pyode.odeint(*args, 1e-3, 1e-4, "bosh3", {"first_step": 0.1}), expected)
