"""A progress bar for a solve."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from .errors import InvalidValue, SolveError

INTERVAL = 0.1  # seconds between two looks


class Progress:
    """A tqdm bar over the fraction of time that the slowest sample has covered.

    Args:
        t0, t1: [B] where each sample starts and ends.

    Raises:
        InvalidValue: tqdm is not installed.
    """

    def __init__(self, t0: Tensor, t1: Tensor) -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise InvalidValue("progress=True needs tqdm: pip install tqdm") from error
        self.t0, self.span = t0.cpu(), (t1 - t0).cpu()
        self.next_look = 0.0
        self.failure: SolveError | None = None
        shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=1.0, desc="solve", bar_format=shape)

    def __call__(self, controller: Any) -> None:
        """Looks at the controller, if it is time to."""
        if time.monotonic() >= self.next_look:
            self._show(controller)
            self.next_look = time.monotonic() + INTERVAL

    def _show(self, controller: Any) -> None:
        t, dt, status = (controller.field(name).cpu() for name in ("t", "dt_prev", "status"))
        covered = ((t - self.t0) / self.span).nan_to_num(1.0)
        covered[status == 0] = 1.0
        self.bar.n = float(covered.min()) if len(covered) else 1.0
        rejected = int(controller.field("n_rejected").sum())
        running = dt[status == 1].abs()
        size = f"{float(running.min()):.3g}" if len(running) else "-"
        self.bar.set_postfix_str(f"rejected {rejected}, dt {size}", refresh=True)

    def step(self, t: float, y: Tensor, dt: float) -> None:
        """Looks at the start of a step, for a loop that has no such controller."""
        if time.monotonic() >= self.next_look:
            self.bar.n = self._covered(t)
            self.bar.set_postfix_str(f"dt {dt:.3g}", refresh=True)
            self.next_look = time.monotonic() + INTERVAL

    def _covered(self, t: float) -> float:
        """By the only sample."""
        return (t - float(self.t0)) / float(self.span)

    def fail(self, error: SolveError) -> None:
        """Takes note that the solve has failed."""
        self.failure = error

    def finish(self, controller: Any = None) -> None:
        """Shows how the solve has ended."""
        if controller is None:
            self.bar.n = 1.0 if self.failure is None else self._covered(self.failure.t)
            self.bar.refresh()
        else:
            self._show(controller)

    def close(self) -> None:
        """Leaves it as it is."""
        self.bar.close()
