"""Captured solves one after the other and side by side: memory, streams, threads, training, Ctrl-C."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading

import pytest
import torch
from device_loops import DEVICE, MARKS, ON, Field, check_same, n_captures, normal, on_gpu, times

import pyode

pytestmark = MARKS

ON_GPU = DEVICE.type == "cuda"


def in_use() -> int:
    """Bytes of the GPU's memory; where the kernels run on the host, Python's objects."""
    gc.collect()
    if not ON_GPU:
        return len(gc.get_objects())
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() + torch.cuda.memory_reserved()


@pytest.mark.parametrize(
    "options", [{}, {"jump_t": [0.7]}, {"control": "per_sample"}, {"method": "rk4"}, {"restart": True}]
)
def test_many_solves_and_gradients_keep_no_memory(options):
    func, y, t = Field(), normal(50, 3).requires_grad_(), times(4)
    backwards = {name: value for name, value in options.items() if name != "method"}
    forwards = {name: value for name, value in backwards.items() if name != "restart"}

    def solves(n):
        for _ in range(n):
            with torch.no_grad():
                pyode.odeint(func, y, t, 1e-3, 1e-3, options.get("method"), {**forwards, **ON})
            with torch.enable_grad():
                out = pyode.odeint_adjoint(
                    func, y, t, 1e-3, 1e-3, options.get("method"), {**forwards, **ON},
                    adjoint_options={**backwards, **ON},
                )  # fmt: skip
                torch.autograd.grad(out.sum(), (y, *func.parameters()))
        return in_use()

    before, n = solves(10), 100 if ON_GPU else 10
    assert solves(n) < before + n  # less than a byte, or an object, each


@on_gpu
def test_ten_thousand_solves_keep_no_memory():
    func, y0, t = Field(), normal(50, 3), times()

    def solves(n):
        for _ in range(n):
            pyode.odeint(func, y0, t, 1e-3, 1e-3, options=ON)
        return in_use()

    before = solves(10)
    assert solves(10_000) <= before


def test_training_captures_once_and_follows_the_host_driven_loop():
    func, y0, before = Field(), normal(8, 3), n_captures()
    optimizer, params = torch.optim.Adam(func.parameters(), lr=0.01), tuple(func.parameters())
    n, losses = 1000 if ON_GPU else 20, []
    for i in range(n):
        gradients = []
        for more in (ON, {}) if i in (0, n // 2, n - 1) else (ON,):
            with torch.enable_grad():
                out = pyode.odeint_adjoint(func, y0, times(), rtol=1e-4, atol=1e-6, options=more)
                loss = (out[-1] - 1).square().mean()
                gradients.append(torch.autograd.grad(loss, params))
        for ours, *theirs, param in zip(*gradients, params):
            assert all(torch.equal(ours, host) for host in theirs)
            param.grad = ours
        optimizer.step()
        losses.append(loss)
    assert n_captures() == before + 2  # forwards and backwards
    assert losses[-1] < losses[0]


@on_gpu
def test_two_streams():
    func, starts = Field(), [normal(50, 3) for _ in range(8)]
    expected = [pyode.odeint(func, y0, times(), options={}) for y0 in starts]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(3):
        found = []
        for i, y0 in enumerate(starts):
            with torch.cuda.stream(streams[i % 4]):
                found.append(pyode.odeint(func, y0, times(), options=ON))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))


def test_two_threads():
    func, starts = Field().requires_grad_(False), [normal(50, 3) for _ in range(8)]
    expected = [pyode.odeint(func, y0, times(), options={}) for y0 in starts]
    barrier, results = threading.Barrier(2), {}

    def work(i):
        barrier.wait()
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream() if ON_GPU else None):
            found = [pyode.odeint(func, y0, times(), options=ON) for y0 in starts]
            results[i] = all(map(torch.equal, found, expected))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: True, 1: True}


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_ctrl_c_during_a_solve_does_no_harm(control, request):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores the signal
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    options = {"max_step": 4e-5, "control": control}  # 50 000 steps: about a second of a GPU's
    func, y0, ended = Field(), normal(4, 3), []
    check_same(func, y0, times() / 1000, options=options)
    before = n_captures()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))

    def interrupted():
        timer.start()
        pyode.odeint(func, y0, times(), 1e-4, 1e-6, options={**options, **ON})
        ended.append(True)
        timer.join()  # the signal is not to come behind the test

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not ended
    expected = pyode.odeint(func, y0, times() / 1000, 1e-4, 1e-6, options=options)
    for _ in range(2):
        assert torch.equal(pyode.odeint(func, y0, times() / 1000, 1e-4, 1e-6, options={**options, **ON}), expected)
    assert n_captures() == before
