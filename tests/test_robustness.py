"""After an error or an interrupt, in threads, after a fork: the next solve is right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import tensor, van_der_pol
from torch import Tensor

import pyode
from pyode import SolveError, Stats
from pyode._ops import native
from pyode._ops.openmp import address_of_team
from pyode.methods import METHODS

N = 70_000  # enough numbers for several threads to take part, of torch's or of the pool


def solve(n: int = N, seed: int = 0, f: Callable | None = None, grad: bool = False) -> Tensor:
    """A solve of n numbers in float32, the same ones for the same seed."""
    y0 = torch.randn(n, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)
    y = pyode.odeint(f or (lambda t, y: torch.cos(y) - t * y), y0, torch.tensor([0.0, 0.3, 1.0]), rtol=1e-4, atol=1e-5)
    if not grad:
        return y
    (gradient,) = torch.autograd.grad(y[1:].square().sum(), y0)
    return gradient


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, int], Tensor]:
    """What solves give that nothing has disturbed."""
    with torch.no_grad():
        return {(n, seed): solve(n, seed) for n, seed in ((50, 1), (N, 0))}


def assert_as_good_as_new(expected: dict[tuple[int, int], Tensor]) -> None:
    with torch.no_grad():
        for (n, seed), y in expected.items():
            assert torch.equal(solve(n, seed), y)


class Mine(Exception):
    """Nobody else's."""


def raising_at(call: int, error: BaseException) -> Callable:
    """A func that raises at its call-th call."""
    calls = iter(range(10**9))

    def f(t, y):
        if next(calls) == call:
            raise error
        return torch.cos(y) - t * y

    return f


@pytest.mark.parametrize("call", [0, 1, 2, 9])
@pytest.mark.parametrize("n", [50, N])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_an_exception_in_func_passes_through_unchanged(call, n, method, expected):
    error = Mine("as it was")
    options = {"step_size": 0.1} if method == "rk4" else {}
    with pytest.raises(Mine) as caught:
        pyode.odeint(raising_at(call, error), torch.randn(n), torch.tensor([0.0, 1.0]), 1e-4, 1e-5, method, options)
    assert caught.value is error
    assert error.__cause__ is None
    assert error.__context__ is None
    assert traceback.extract_tb(error.__traceback__)[-1].name == "f"
    assert_as_good_as_new(expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [0, 1, 30])
def test_in_every_method_it_passes_through_and_what_was_done_is_counted(call, method, backend):
    adaptive, counts = METHODS[method].adaptive, []
    y0, t = torch.linspace(-1, 1, 5, dtype=torch.float64), tensor(0.0, 0.3, 2.0)
    for watched in (False, True):  # many steps are one call of native code, or a call each
        error, stats, begun = Mine("as it was"), Stats(), []
        f, options = raising_at(call, error), {"stats": stats} if adaptive else {"stats": stats, "step_size": 0.05}
        if watched and method != "scipy_solver":
            f.callback_step = lambda t0, y0, dt, begun=begun: begun.append(t0)
        with pytest.raises(Mine) as caught, pyode.backend(backend), torch.no_grad():
            pyode.odeint(f, y0, t, 1e-4, 1e-5, method, options)
        assert caught.value is error
        assert error.__cause__ is None
        assert error.__context__ is None
        assert stats.n_f_evals == call + 1
        counts.append(stats.n_accepted)
        if watched and not adaptive:
            assert stats.n_accepted == len(begun) - 1
    assert counts[0] == counts[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError("no"), StopIteration()])
def test_no_kind_of_exception_is_swallowed(error, expected):
    with pytest.raises(type(error)) as caught:
        solve(f=raising_at(9, error))
    assert caught.value is error
    assert_as_good_as_new(expected)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c_in_the_middle_ends_the_solve_and_does_no_harm(expected, request):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores the signal
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))

    def f(t, y):
        if float(t) > 0.1:
            signal.raise_signal(signal.SIGINT)
        return torch.cos(y) - t * y

    with pytest.raises(KeyboardInterrupt):
        solve(f=f)
    assert_as_good_as_new(expected)


def test_after_a_failed_solve_the_next_one_is_right(expected):
    for f in (lambda t, y: y * float("nan"), lambda t, y: torch.where(t > 0.1, float("nan"), y), lambda t, y: y[:1]):
        with pytest.raises((SolveError, pyode.DynamicsError)):
            solve(f=f)
        assert_as_good_as_new(expected)


@pytest.mark.parametrize("n", [50, N])
@pytest.mark.parametrize("grad", [False, True])
def test_several_threads_may_solve_at_once(n, grad):
    torch.set_num_threads(2)
    seeds = range(4)
    alone = [solve(n, seed, grad=grad) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        for _ in range(2):
            together = list(pool.map(lambda seed: solve(n, seed, grad=grad), seeds))
            assert all(map(torch.equal, together, alone))


def test_threads_may_differ_in_their_number_of_threads():
    alone = solve()
    done: list[Tensor] = []

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        done.extend(solve() for _ in range(3))

    workers = [threading.Thread(target=run, args=(threads,)) for threads in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(done) == 9
    assert all(torch.equal(y, alone) for y in done)


def test_the_choice_of_backend_is_each_threads_own():
    inside, outside = [], []

    def watch(where: list) -> Callable:
        from pyode._ops import backend_for

        return lambda t, y: (where.append(backend_for(y).__name__.rsplit(".")[-1]), -y)[1]

    with pyode.backend("reference"):
        worker = threading.Thread(target=lambda: pyode.odeint(watch(outside), tensor(1.0), tensor(0.0, 1.0)))
        worker.start()
        pyode.odeint(watch(inside), tensor(1.0), tensor(0.0, 1.0))
        worker.join(60)
    assert set(inside) == {"reference"}
    assert set(outside) == {"native"}


def in_a_child(work: Callable[[], bool]) -> None:
    """Forks, does the work in the child, and asserts that it returns True there, within 20 seconds."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:  # no pytest, no cleaning up: leave at once
        signal.alarm(20)
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def grow(y0: Tensor, method: str) -> Tensor:
    """y' = y: func uses none of torch's threads, which do not survive a fork. pyode must not use them either."""
    with torch.no_grad():
        t, options = torch.tensor([0.0, 1.0]), {"step_size": 0.1} if method == "rk4" else {}
        return pyode.odeint(lambda t, y: y, y0, t, 1e-4, 1e-5, method, options)


def is_right(y: Tensor) -> bool:
    return all(abs(float(y[1, i]) - 2.71828) < 1e-3 for i in (0, N // 2, N - 1)) and float(y[0, N - 1]) == 1.0


FORKS = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


class TestAfterAFork:
    pytestmark = FORKS

    @pytest.mark.parametrize("method", ["dopri5", "rk4"])
    def test_the_child_solves_right_with_threads_of_its_own(self, method, expected):
        torch.set_num_threads(2)
        y0 = torch.ones(N)
        assert is_right(grow(y0, method))  # now the parent has its threads
        for _ in range(3):
            in_a_child(lambda: is_right(grow(y0, method)))
        assert_as_good_as_new(expected)

    def test_it_does_not_matter_what_other_threads_were_doing(self, expected):
        torch.set_num_threads(2)
        y0, stop, seen = torch.ones(N), threading.Event(), []

        def keep_solving() -> None:
            while not stop.is_set():
                seen.append(is_right(grow(y0, "dopri5")))

        worker = threading.Thread(target=keep_solving)
        worker.start()
        try:
            for _ in range(5):
                in_a_child(lambda: is_right(grow(y0, "dopri5")))
        finally:
            stop.set()
            worker.join(60)
        assert seen
        assert all(seen)
        assert_as_good_as_new(expected)


def test_a_solve_may_be_started_inside_anothers_func(expected):
    def f(t, y):
        assert torch.equal(solve(50, 1), expected[50, 1])
        return van_der_pol(t, y)

    with torch.no_grad():
        outer = pyode.odeint(f, tensor(2.0, 0.0), tensor(0.0, 1.0), rtol=1e-5, atol=1e-5)
        assert torch.equal(outer, pyode.odeint(van_der_pol, tensor(2.0, 0.0), tensor(0.0, 1.0), rtol=1e-5, atol=1e-5))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinities")
def test_helpers_keep_off_the_processor_of_the_thread_that_waits_for_them():
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("there is one processor")

    y0, t = torch.ones(N), torch.tensor([0.0, 1.0])
    before = set(os.listdir("/proc/self/task"))
    torch.set_num_threads(3)  # other tests have another number, so that the pool is made anew
    native._C.join_team(0)
    try:
        with torch.no_grad():
            pyode.odeint(lambda t, y: y, y0, t, method="euler")  # without an op of torch, which has threads of its own
    finally:
        native._C.join_team(address_of_team())
    helpers = set(os.listdir("/proc/self/task")) - before
    assert len(helpers) == 2
    for helper in helpers:
        allowed = os.sched_getaffinity(int(helper))
        assert allowed < mine
        assert len(allowed) == len(mine) - 1
    assert os.sched_getaffinity(0) == mine


AMONG_TORCHS_THREADS = """
import os

import torch

import pyode

torch.set_num_threads(3)
y0, t = torch.ones(70_000), torch.tensor([0.0, 1.0])
(y0 + y0).sum()
before = set(os.listdir("/proc/self/task"))
with torch.no_grad():
    y = pyode.odeint(lambda t, y: y, y0, t)
assert set(os.listdir("/proc/self/task")) == before
assert (y[1] == y[1, 0]).all() and abs(float(y[1, 0]) - 2.718282) < 1e-5
"""


@pytest.mark.skipif(not address_of_team(), reason="torch has no OpenMP threads that others could use")
def test_ops_run_on_the_threads_that_torch_has():
    done = subprocess.run([sys.executable, "-c", AMONG_TORCHS_THREADS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
