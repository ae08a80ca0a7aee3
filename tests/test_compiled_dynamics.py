"""Compiled dynamics against func run eagerly: steps, results, statistics, errors; what is read anew; refusals."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time
import warnings
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fields import Field
from problems import CLOSED_FORMS, kepler, kepler_start, tensor, van_der_pol
from torch import Tensor, nn

import pyode
from pyode.methods import TABLEAUS

TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def strict(f):
    return pyode.compile(f, strict=True)


def counted(f, y0, t, **arguments) -> tuple[Tensor, pyode.Stats]:
    stats = pyode.Stats()
    options = {**arguments.pop("options", {}), "stats": stats}
    return pyode.odeint(f, y0, t, **{**TIGHT, **arguments}, options=options), stats


def assert_same(f, y0, t, tolerance: float = 1e-11, **arguments) -> Tensor:
    """The same steps, and results but for rounding; returns them."""
    with torch.no_grad():
        (ours, our_stats), (theirs, their_stats) = (counted(g, y0, t, **arguments) for g in (strict(f), f))
    assert our_stats == their_stats
    for a, b in zip(ours, theirs) if isinstance(y0, tuple) else [(ours, theirs)]:
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return ours


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=lambda case: case.name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_steps_are_those_of_the_eager_solve(case, backward):
    t = case.times(backward=backward)
    assert_same(case.f, case.solution(float(t[0])), t)


@pytest.mark.filterwarnings("ignore:.*runs eagerly")
def test_a_state_like_the_last_one_but_on_another_device(device):
    f = pyode.compile(van_der_pol)
    y0, t = torch.randn(3, 2, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        here, again, there = (pyode.odeint(f, y, t, rtol=1e-6, atol=1e-8) for y in (y0, y0, y0.to(device)))
    assert torch.equal(here, again)
    assert there.device.type == device.type
    torch.testing.assert_close(there.cpu(), here, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", TABLEAUS)
def test_every_method(method):
    y0, t = torch.randn(19, 2, dtype=torch.float64), torch.linspace(0, 1.1, 8, dtype=torch.float64)
    tolerances = {"rtol": 1e-4, "atol": 1e-6}
    assert_same(van_der_pol, y0, t, method=method, **tolerances)
    if not TABLEAUS[method].adaptive:
        for options in ({}, {"perturb": True}, {"interp": "cubic"}, {"interp": "cubic", "perturb": True}):
            assert_same(van_der_pol, y0, t, method=method, options={"step_size": 0.07, **options})


def test_every_option_of_the_controller():
    y0, t = torch.randn(5, 2, dtype=torch.float64), tensor(0.0, 0.4, 0.5, 1.7)
    each = torch.logspace(-9, -4, 10, dtype=torch.float64).reshape(5, 2)
    for options in (
        {"first_step": 0.1},
        {"min_step": 0.05},
        {"max_step": 0.02, "safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
        {"step_t": tensor(0.1, 0.45, 1.7), "jump_t": tensor(0.5, 0.9)},
    ):
        assert_same(van_der_pol, y0, t, options=options)
        assert_same(
            van_der_pol, y0, -0.3 * t, options={k: -0.3 * v if isinstance(v, Tensor) else v for k, v in options.items()}
        )
    assert_same(van_der_pol, y0, t, rtol=each, atol=each.flip(0))
    assert_same(van_der_pol, y0, t, atol=each[0])


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 33])
def test_any_number_of_rows_has_one_entry(rows):
    f = strict(van_der_pol)
    t = tensor(0.0, 0.3, 1.0)
    for n in (rows, rows + 3):
        y0 = torch.randn(n, 2, dtype=torch.float64)
        torch.testing.assert_close(pyode.odeint(f, y0, t), pyode.odeint(van_der_pol, y0, t), rtol=1e-11, atol=1e-11)
    assert len({entry.library.path for entry in f._distinct}) == 1


def test_a_state_whose_rows_are_mixed_is_one_row():
    y0 = kepler_start(0.5)
    assert_same(kepler, y0, tensor(0.0, 1.0, 3.0))
    assert_same(lambda t, y: y - y.mean(0), torch.randn(6, 2, dtype=torch.float64), tensor(0.0, 1.0))


def test_tuples_have_a_norm_for_each_part():
    def f(t, y):
        a, b = y
        return b.sum(-1, keepdim=True) - a, torch.sin(t) * b * a.unsqueeze(-1)

    y0 = torch.randn(9, 1, dtype=torch.float64), torch.randn(9, 1, 2, dtype=torch.float64)
    assert_same(lambda t, y: (f(t, (y[0], y[1].squeeze(1)))[0], -y[1]), y0, tensor(0.0, 0.7, 2.0))


def test_time_and_parameters_are_computed_where_they_belong():
    class Driven(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
            self.register_buffer("w", torch.randn(3, dtype=torch.float64))

        def forward(self, t, y):
            skew = self.a - self.a.T  # once a solve
            return y @ skew + torch.sin(self.w * t) * torch.where(t < 0.5, t, 1 - t)  # once a stage

    assert_same(Driven(), torch.randn(4, 3, dtype=torch.float64), tensor(0.0, 1.0, 3.0))


def test_wide_networks():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(33, 70), nn.SiLU(), nn.LayerNorm(70), nn.Linear(70, 33)).double()
    assert_same(lambda t, y: net(y), torch.randn(40, 33, dtype=torch.float64), tensor(0.0, 1.0))


def test_results_have_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    y0, t, f = torch.randn(2000, 16), torch.linspace(0, 1, 3), strict(lambda t, y: net(y))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(pyode.odeint(f, y0, t, rtol=1e-5, atol=1e-6))
    assert all(torch.equal(result, results[0]) for result in results)


def test_in_place_construction_is_allowed():
    def f(t, y):
        k = torch.zeros_like(y)
        k[:, 0] = y[:, 1]
        k[..., 1] -= y[:, 0] * t
        return k

    assert_same(f, torch.randn(5, 2, dtype=torch.float64), tensor(0.0, 1.0))


class TestErrors:
    def test_are_those_of_the_eager_solve(self):
        cases = (
            (lambda t, y: y**2, {}),  # blows up at t = 1
            (lambda t, y: -y, {"options": {"max_num_steps": 3}}),
            (lambda t, y: y / 0, {}),
            (lambda t, y: 1 - y, {"atol": 0.0}),  # finite, but not to be scaled at y = 0
        )
        for f, arguments in cases:
            y0 = (
                torch.zeros(3, 1, dtype=torch.float64)
                if arguments.get("atol") == 0
                else torch.ones(3, 1, dtype=torch.float64)
            )
            errors = []
            for g in (strict(f), f):
                with pytest.raises(pyode.SolveError) as caught:
                    counted(g, y0, tensor(0.0, 0.5, 2.0), **arguments)
                errors.append(caught.value)
            ours, theirs = errors
            assert (ours.status, ours.n_steps) == (theirs.status, theirs.n_steps)
            assert ours.t == pytest.approx(theirs.t, rel=1e-9)

    def test_a_failed_solve_may_return(self):
        results = []
        for f in (strict(lambda t, y: y**2), lambda t, y: y**2):
            with pytest.warns(UserWarning, match="the solve failed"):
                results.append(
                    counted(f, torch.ones(2, 1).double(), tensor(0.0, 0.5, 2.0, 3.0), options={"on_failure": "return"})[
                        0
                    ]
                )
        torch.testing.assert_close(*results, rtol=1e-6, atol=0)

    def test_interrupts_stop_a_long_solve(self, request):
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores the signal
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
        f = strict(lambda t, y: torch.cos(1e6 * t) * y)
        t = tensor(0.0, 1e6)
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        pyode.odeint(f, torch.ones(1, 1).double(), tensor(0.0, 1e-6))
        began = time.perf_counter()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pyode.odeint(f, torch.ones(1, 1).double(), t)
        assert time.perf_counter() - began < 0.5 + 1


FACTOR = 1.0


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2).double()

    def forward(self, t, y):
        return self.net(y)


class TestWhatIsReadAnew:
    y0, t = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), tensor(0.0, 1.0)

    def check(self, f, g=None):
        with torch.no_grad():
            torch.testing.assert_close(pyode.odeint(f, self.y0, self.t), pyode.odeint(g or f.func, self.y0, self.t))

    def test_parameters_changed_in_place_need_no_new_trace(self):
        f = strict(Linear())
        self.check(f)
        library = f._distinct[0].library
        with torch.no_grad():
            f.func.net.weight.mul_(2)
        f.func.net.bias.data = torch.randn(2, dtype=torch.float64)
        self.check(f)
        assert f._distinct[0].library is library

    def test_parameters_replaced(self):
        f = strict(Field())
        self.check(f)
        f.func.rate = nn.Parameter(f.func.rate.detach() + 1)
        self.check(f)
        f.func.matrix = f.func.matrix  # the same one
        self.check(f)

    def test_a_module_moved_to_another_dtype(self):
        net = nn.Linear(2, 2).double()
        f = strict(lambda t, y: net(y))
        self.check(f)
        net.float()
        y0, t = self.y0.float(), self.t.float()
        with torch.no_grad():
            torch.testing.assert_close(pyode.odeint(f, y0, t), pyode.odeint(f.func, y0, t))
        net.double()
        self.check(f)

    def test_plain_attributes_training_flags_and_closures(self):
        class Scaled(nn.Module):
            scale = 1.0

            def forward(self, t, y):
                return y * (self.scale if self.training else -self.scale)

        module = Scaled()
        f = strict(module)
        self.check(f)
        module.scale = 0.5
        self.check(f)
        module.eval()
        self.check(f)
        factor, tensors = 1.0, [torch.ones(2, dtype=torch.float64)]

        def closure(t, y):
            return factor * y * tensors[0]

        g = strict(closure)
        self.check(g)
        factor = 2.0
        self.check(g)
        tensors[0] = -tensors[0]
        self.check(g)
        tensors[0].mul_(3)
        self.check(g)

    def test_slots_keyword_defaults_and_queues(self):
        @dataclass(slots=True)
        class Scaled:
            scale: float
            factor: torch.Tensor

            def __call__(self, t, y):
                return self.scale * self.factor * y

        scaled = Scaled(1.0, torch.ones(2, dtype=torch.float64))
        f = strict(scaled)
        self.check(f, scaled)
        scaled.scale = 0.5
        self.check(f, scaled)
        scaled.factor = -scaled.factor
        self.check(f, scaled)

        queue, linear = deque([1.0]), Linear()

        def with_default(t, y, *, module=linear):
            return module(t, y) * queue[0]

        g = strict(with_default)
        self.check(g)
        queue[0] = 2.0
        self.check(g)
        linear.net.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        self.check(g)

    def test_a_functions_defaults_and_code_replaced(self):
        def scaled(t, y, rate=torch.tensor(1.0, dtype=torch.float64), *, sign=1.0):  # noqa: B008
            return sign * rate * y

        f = strict(scaled)
        self.check(f)
        scaled.__defaults__ = (torch.tensor(1.0, dtype=torch.float64),)  # equal, but read at another place
        scaled.__defaults__[0].mul_(2)
        self.check(f)
        scaled.__kwdefaults__ = {"sign": -1.0}
        self.check(f)
        scaled.__code__ = (lambda t, y, rate, *, sign: rate - y).__code__
        self.check(f)

    def test_global_variables_are_not(self, monkeypatch):
        f = strict(lambda t, y: FACTOR * y)
        before = pyode.odeint(f, self.y0, self.t, method="euler")
        monkeypatch.setitem(globals(), "FACTOR", 2.0)
        assert torch.equal(pyode.odeint(f, self.y0, self.t, method="euler"), before)

    def test_times_written_in_place(self):
        f, t = strict(lambda t, y: -y), tensor(0.0, 1.0)
        first = pyode.odeint(f, self.y0, t)
        t[1] = 2.0
        assert not torch.equal(first, pyode.odeint(f, self.y0, t))


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_inference_mode(control):
    f, y0 = Linear(), torch.rand(5, 2, dtype=torch.float64)
    compiled = strict(f)
    with torch.inference_mode():
        for t in (tensor(0.0, 1.0), tensor(0.0, 0.3)):
            for _ in range(2):
                t *= 0.5
                found = [pyode.solve_ivp(g, y0, t, control=control).ys for g in (compiled, f)]
                torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


class TestRefusals:
    y0, t = torch.ones(3, 2), torch.tensor([0.0, 0.5])

    def check(self, f, reason: str) -> None:
        """One warning, the eager result, and an error if strict."""
        compiled = pyode.compile(f)
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match=reason) as caught:
            ours = pyode.odeint(compiled, self.y0, self.t)
        assert caught[0].filename == __file__
        torch.manual_seed(0)
        assert torch.equal(ours, pyode.odeint(f, self.y0, self.t))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyode.odeint(compiled, self.y0, self.t)
        with pytest.raises(pyode.CompileError, match=reason):
            pyode.odeint(strict(f), self.y0, self.t)
        assert "not compiled" in str(compiled)

    def test_a_branch_on_a_value(self):
        self.check(lambda t, y: y if t < 0.25 else -y, r"value.*test_compiled_dynamics.py:\d+")

    def test_a_conversion_to_a_number(self):
        w = torch.tensor(2.0)
        self.check(lambda t, y: y * float(w), r"value is read at .*test_compiled_dynamics.py:\d+")
        self.check(lambda t, y: y * w.item(), "value is read")
        self.check(lambda t, y: y * w.tolist(), "tolist is called")
        self.check(lambda t, y: y * float(w.numpy()), "numpy is called")

    def test_random_numbers(self):
        self.check(lambda t, y: -y + 0 * torch.rand_like(y), "random numbers")
        self.check(lambda t, y: -y + 0 * nn.functional.dropout(y, 0.5), "random numbers")

    def test_writing_into_what_func_has_closed_over(self):
        calls = torch.zeros(1)

        def f(t, y):
            calls.add_(1)
            return -y

        self.check(f, "writes into a tensor")
        assert calls > 0

    def test_writing_into_the_state(self):
        for f in (lambda t, y: y.mul_(-1), lambda t, y: (y[:, 0].add_(1), -y)[1]):
            with pytest.raises(pyode.CompileError, match="func writes into its input"):
                pyode.odeint(strict(f), self.y0, self.t)
            with (
                pytest.raises(pyode.DynamicsError, match="wrote into its input"),
                pytest.warns(UserWarning, match="func writes into its input"),
            ):
                pyode.odeint(pyode.compile(f), self.y0, self.t)

    def test_batch_norm_in_training(self):
        norm = nn.BatchNorm1d(2)
        self.check(lambda t, y: norm(y), r"add_ writes into a tensor that func has closed over at .*:\d+")
        f = pyode.compile(lambda t, y: nn.functional.batch_norm(y, None, None, training=True) - y)
        with pytest.warns(UserWarning, match="mixes rows"):
            ours = pyode.solve_ivp(f, self.y0, self.t, control="per_sample")
        assert torch.equal(ours.ys, pyode.solve_ivp(f.func, self.y0, self.t, control="per_sample").ys)

    def test_what_depends_on_whether_gradients_are_wanted(self):
        w = torch.tensor(0.5, requires_grad=True)

        def f(t, y):
            z = y * w
            if z.requires_grad:
                z.register_hook(lambda g: 2 * g)
            return -z

        with torch.no_grad():
            self.check(f, r"requires_grad is read at .*test_compiled_dynamics.py:\d+")

    def test_an_unknown_operator(self):
        self.check(lambda t, y: torch.special.i0(y) * -1, "i0 at .*is not known")

    def test_complex_states(self):
        y0 = torch.ones(2, dtype=torch.complex64)
        with pytest.warns(UserWarning, match="complex64"):
            pyode.odeint(pyode.compile(lambda t, y: 1j * y), y0, self.t)

    def test_an_exception_of_the_users_passes_through(self):
        def f(t, y):
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"), pytest.warns(UserWarning, match="mine"):
            pyode.odeint(pyode.compile(f), self.y0, self.t)


class TestStandsForFunc:
    def test_as_a_module_with_the_parameters(self):
        field = Field()
        f = pyode.compile(field)
        assert list(f.parameters()) == list(field.parameters())
        y = torch.randn(2, 2).double()
        assert torch.equal(f(tensor(0.5)[0], y), field(tensor(0.5)[0], y))

    def test_events_callbacks_and_norms_take_the_eager_path(self):
        f = strict(lambda t, y: -y)
        y0, t = torch.ones(1, dtype=torch.float64), tensor(0.0, 5.0)
        time, _ = pyode.odeint(f, y0, t, event_fn=lambda t, y: y - 0.5)
        assert float(time) == pytest.approx(0.6931471805599453)
        pyode.odeint(f, y0, t, options={"norm": lambda x: x.abs().max()})
        called = []
        f.func.callback_step = lambda t, y, dt: called.append(t)
        pyode.odeint(f, y0, t)
        assert called
        assert not f.source

    def test_as_an_option(self):
        y0, t = torch.randn(4, 2, dtype=torch.float64), tensor(0.0, 1.0)
        ours = pyode.odeint(van_der_pol, y0, t, options={"compile": True})
        torch.testing.assert_close(ours, pyode.odeint(van_der_pol, y0, t), rtol=1e-10, atol=1e-10)

    def test_print_tells_what_was_made_of_it(self):
        f = strict(Field())
        with torch.no_grad():
            pyode.odeint(f, torch.ones(2, 2).double(), tensor(0.0, 1.0))
        told = str(f)
        assert "operators: mm, add, tanh, mul, sin" in told
        assert "tensors read: 4, 8 numbers" in told  # matrix, bias, rate, and the frozen one
        assert "rows side by side" in told
        assert re.search(r"traced and compiled in \d+\.\d\d s", told)
        (path,) = re.findall(r"^  (.*\.cpp)$", told, re.MULTILINE)
        assert Path(path).read_text() == f.source
        assert "struct Dynamics" in f.source

    def test_it_can_be_freed(self):
        f = strict(Field())
        with torch.no_grad():
            pyode.odeint(f, torch.ones(2, 2).double(), tensor(0.0, 1.0))
        gone = weakref.ref(f)
        del f
        gc.collect()
        assert gone() is None
