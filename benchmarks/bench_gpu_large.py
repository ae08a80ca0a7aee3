"""The same as bench_large on a GPU, driven by the host and by the device itself."""

from __future__ import annotations

from typing import Any

import torch

from .bench_large import COLUMNS as MEASURED
from .bench_large import arrays_moved, check, contenders, traffic
from .timing import device_seconds_of, interleaved

COLUMNS = {**MEASURED, "missed": "targets missed"}
TITLE = "Large states on the GPU (100 million float32 numbers, dopri5, dy/dt = -y): memory traffic"
NUMBERS = 100_000_000
LEAST_OF_COPY = 0.85


def measure(seconds: float = 10.0) -> list[dict[str, Any]]:
    """A row for each loop's ops and one for a copy; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    y0 = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)).to("cuda")
    check(y0)
    alike = contenders(y0)
    alike["solve on device"] = contenders(y0, device_loop=True)["solve"]
    with torch.no_grad():
        times = interleaved(alike, rounds=9, seconds=seconds, warm_up=1, clock=device_seconds_of)
    copy_rate = 8e-9 * NUMBERS / times["copy"]
    rows = [
        traffic("the host-driven loop's ops", arrays_moved(), times["solve"] - times["f"], copy_rate, NUMBERS),
        traffic(
            "the device loop's", arrays_moved(on_device=True), times["solve on device"] - times["f"], copy_rate, NUMBERS
        ),
        traffic("copy_", 2, times["copy"], copy_rate, NUMBERS),
    ]
    return [{**row, "missed": f"{LEAST_OF_COPY:g} of copy_" if row["of_copy"] < LEAST_OF_COPY else ""} for row in rows]
