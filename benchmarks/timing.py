"""Times that can be compared: contenders take turns in one process, and medians count."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Contender = Callable[[], Any]


def seconds_of(contender: Contender) -> float:
    """One run, in seconds."""
    began = time.perf_counter()
    contender()
    return time.perf_counter() - began


def processor_seconds_of(contender: Contender) -> float:
    """One run, in seconds of this thread on the processor: other programs count little. For one thread only."""
    began = time.thread_time()
    contender()
    return time.thread_time() - began


def device_seconds_of(contender: Contender) -> float:
    """One run on the current GPU, in seconds between two events of its stream."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    contender()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


def interleaved(
    contenders: Mapping[str, Contender],
    rounds: int = 51,
    seconds: float = 20.0,
    warm_up: int = 3,
    clock: Callable[[Contender], float] = seconds_of,
) -> dict[str, float]:
    """The median time of each, in seconds.

    Every round runs every contender once, so that a disturbance hits them alike, and in an order of its own: whoever
    runs behind the others' code begins with cold caches.

    Args:
        rounds: at most so many, at least 3.
        seconds: no further round begins after so many.
        warm_up: runs of each before the first round.
    """
    for _ in range(warm_up):
        for contender in contenders.values():
            contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    began = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - began > seconds:
            break
        shuffle(order)
        for name in order:
            times[name].append(clock(contenders[name]))
    return {name: median(values) for name, values in times.items()}


def repeated(f: Callable[..., Any], n: int, *arguments: Any) -> Contender:
    """Calls f(*arguments) n times, and keeps no result."""

    def run() -> None:
        for _ in range(n):
            f(*arguments)

    return run
