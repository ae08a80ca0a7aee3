"""func called with the rows that still run only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import Status
from ..state import Form, Func, State


class RunningRows:
    """A func that is called with the rows that still run only.

    Args:
        func: of times [B] and the user's state, for any B.
        form: of the state.
    """

    WORTHWHILE = 0.75  # of the rows called last: fewer running ones are gathered anew

    def __init__(self, func: Func, form: Form) -> None:
        self.func, self.form = func, form
        self.rows: Tensor | None = None
        self.count = form.samples

    def look(self, controller: Any) -> None:
        """Takes note of which samples still run."""
        running = controller.field("status") == Status.RUNNING
        count = int(running.sum())
        if 0 < count <= self.WORTHWHILE * self.count:
            self.rows, self.count = running.nonzero()[:, 0], count

    def only(self, running: Tensor) -> None:
        """The rows to call with from now on, [B] bool, where that pays."""
        rows = running.nonzero()[:, 0]
        self.rows = rows if len(rows) <= self.WORTHWHILE * len(running) else None

    def __call__(self, t: Tensor, y: State) -> State:
        """The derivatives, 0 in the other rows."""
        if self.rows is None:
            return self.func(t, y)
        rows = self.rows.to(t.device)
        parts = self.form.parts(y)
        some = self.form.parts(self.func(t[rows], self.form.build(part[rows] for part in parts)))
        return self.form.build(
            torch.zeros_like(part).index_copy(0, rows, k.to(part.dtype)) for part, k in zip(parts, some)
        )
