"""Where a loop puts the states at the output times."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ops import reference
from .._ops.contract import Layout
from ..methods import Tableau

if TYPE_CHECKING:
    from .adaptive import AdaptiveLoop


@lru_cache(maxsize=64)
def interpolant_of(ops: ModuleType, tableau: Tableau) -> Any:
    """A tableau's dense output, as a backend takes it."""
    return ops.Interpolant(tableau.interpolant, tableau.end)


class Output:
    """The states at the output times, written in place as steps pass them."""

    def __init__(self, loop: AdaptiveLoop, y0: Tensor) -> None:
        self.loop = loop
        self.out: Tensor = loop.ops.new_states(len(loop.times.values), y0)
        times = loop.grid.times
        if times.dim() == 2 and bool((times[0] == times[-1]).any()):  # a sample whose outputs are all its start
            self.out[:] = y0
        else:
            loop.ops.copy(loop.layout, y0, self.out)

    def add(self, y: Tensor, ks: list[Tensor], dt: Tensor, shift: Tensor | None) -> None:
        """Adds the outputs which the step just accepted has passed."""
        loop = self.loop
        loop.ops.interpolate(loop.layout, loop.interpolant, loop.controller, y, ks, self.out)

    def repeat(self, y: Tensor) -> None:
        """Writes a state to all the places that are left."""
        left = self.loop.left()
        self.out = torch.where(column(left, self.out), y, self.out)

    def collect(self, y0: Tensor) -> Tensor:
        """All of them, [T, ...]."""
        return self.out


class RecordedOutput:
    """The same with a graph behind it: every output is a node of its own."""

    def __init__(self, loop: AdaptiveLoop, y0: Tensor) -> None:
        self.loop = loop
        self.rows: list[Tensor] = []

    def add(self, y: Tensor, ks: list[Tensor], dt: Tensor, shift: Tensor | None) -> None:
        """Adds the outputs which the step just accepted has passed."""
        loop, t, values = self.loop, self.loop.times.tensor, self.loop.times.values
        segment = loop.segment(loop.interpolant, y, ks, dt, shift)
        for i in range(*(int(loop.controller.field(name)) for name in ("output_begin", "output_end"))):
            self.rows.append(segment.at(values[i], t[i] - t[i].detach() if t.requires_grad else None))

    def repeat(self, y: Tensor) -> None:
        """Puts a state in all the places that are left."""
        self.rows += [y] * (len(self.loop.times.values) - 1 - len(self.rows))

    def collect(self, y0: Tensor) -> Tensor:
        """All of them, [T, ...]; the start where a sample has no way to go, or has ended at its event."""
        missing = len(self.loop.times.values) - 1 - len(self.rows)
        return torch.stack([y0, *self.rows, *[y0] * missing])


class RecordedBatchOutput:
    """The same for several samples, each of which passes other output times in a step.

    The numbers are those of Output, to the bit; the graph is that of plain torch.
    """

    def __init__(self, loop: AdaptiveLoop, y0: Tensor) -> None:
        self.loop, self.output = loop, Output(loop, y0.detach())
        self.rows: list[Tensor] = []
        self.places: list[tuple[Tensor, Tensor]] = []
        self.last: Tensor | None = None

    def add(self, y: Tensor, ks: list[Tensor], dt: Tensor, shift: Tensor | None) -> None:
        """Adds the outputs which the step just accepted has passed."""
        loop, t = self.loop, self.loop.times.tensor
        with torch.no_grad():  # the twin's ops would record
            self.output.add(y, ks, dt, shift)
        segment = loop.batch_segment(interpolant_of(reference, loop.tableau), y, ks, dt, shift)
        begin, end = (loop.controller.field(name) for name in ("output_begin", "output_end"))
        samples, t = torch.arange(loop.layout.samples, device=begin.device), t.to(begin.device)
        for j in range(int((end - begin).max())):
            some = samples[begin + j < end]
            which = torch.where(begin + j < end, begin + j, begin.clamp(max=len(t) - 1))
            when = t[which] if t.dim() == 1 else t[which, samples]
            row = segment.at(when.double(), some).reshape(len(some), *y.shape[1:])
            place = which[some].to(y.device), some.to(y.device)
            self.rows.append(self.output.out[place] + (row - row.detach()))
            self.places.append(place)

    def repeat(self, y: Tensor) -> None:
        """Puts a state in all the places that are left."""
        self.last = y

    def collect(self, y0: Tensor) -> Tensor:
        """All of them, [T, ...]."""
        out = y0.expand(len(self.loop.times.values), *y0.shape)
        if self.rows:
            i, b = (torch.cat(parts) for parts in zip(*self.places))
            out = out.index_put((i, b), torch.cat(self.rows))
        return out if self.last is None else torch.where(column(self.loop.left(), out), self.last, out)


class Collected:
    """The states at the output times, given one by one: copied to their place, or with a graph, kept until the end."""

    def __init__(self, ops: ModuleType, layout: Layout, n: int, y0: Tensor, recording: bool) -> None:
        self.ops, self.layout = ops, layout
        self.states = [y0]
        self.out: Tensor | None = None if recording else ops.new_states(n, y0)
        self.filled = 0  # so many rows of `out`
        if self.out is not None:
            self.add(y0)

    def add(self, y: Tensor) -> None:
        """Adds the next one."""
        if self.out is None:
            self.states.append(y)
        else:
            self.ops.copy(self.layout, y, self.out[self.filled])
            self.filled += 1

    def collect(self) -> Tensor:
        """All of them, [T, ...]."""
        return torch.stack(self.states) if self.out is None else self.out


def column(rows: Tensor, like: Tensor) -> Tensor:
    """[..., B] as a mask for [..., B, *]; for the only sample's state, which has no axis for it, [..., 1] likewise."""
    return rows.reshape(*rows.shape, *[1] * (like.dim() - rows.dim()))
