"""What a solve tells about itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import Status
from .tree import Tree


@dataclass
class Stats:
    """Counts of one or several solves.

    Give one to a solve as `options={"stats": stats}`; it adds its counts when it ends, also when it ends with an error.

    Attributes:
        n_f_evals: evaluations of func.
        n_accepted: steps that were accurate enough.
        n_rejected: steps that were not, and were tried again with a smaller size.
        n_newton: iterations of Newton's method, of all stages of implicit methods; each evaluates func at one stage, or
            at all stages that are solved for together.
        n_krylov: iterations of GMRES in them, for large states: each is a product with the Jacobian, a derivative of an
            evaluation that was made, and counts as none.
        n_events: solves by `odeint` that ended at an event.
    """

    n_f_evals: int = 0
    n_accepted: int = 0
    n_rejected: int = 0
    n_newton: int = 0
    n_krylov: int = 0
    n_events: int = 0

    @property
    def n_steps(self) -> int:
        """All steps, accepted and rejected."""
        return self.n_accepted + self.n_rejected

    def __add__(self, other: Stats) -> Stats:
        """The sum of both."""
        return Stats(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def add(self, other: Stats) -> None:
        """Adds the other's counts to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(eq=False)
class SampleStats:
    """What each sample of a solve has taken, as if it had been solved alone.

    Attributes:
        n_f_evals: [B] int64, evaluations of func.
        n_accepted, n_rejected: [B] int64, steps.
        last_dt: [B] float64, the size of the step accepted last, signed; 0 before there is one.
    """

    n_f_evals: Tensor
    n_accepted: Tensor
    n_rejected: Tensor
    last_dt: Tensor

    @property
    def n_steps(self) -> Tensor:
        """[B] int64, all steps, accepted and rejected."""
        return self.n_accepted + self.n_rejected


@dataclass(eq=False)
class Solution:
    """What `solve_ivp` returns. B is the number of samples, 1 where one step size serves the whole state.

    Attributes:
        ts: [T] or [T, B], the output times.
        ys: [T, *y0.shape], or y0's structure of such: the states; nan behind a sample's failure or event.
        status: [B] int64, a `Status` each. After a solve by the device's loop with throw=False it is read, and waited
            for, when it or stats are looked at for the first time.
        stats: counts of each sample.
        interpolant: of times, [m] or [m, B], the states there; None unless dense_output was asked for.
        event_t: [B] float64, the time of each sample's event; nan where there is none.
        event_index: [B] int64, which of several event functions it was; -1.
        event_y: the states at the events, with B in front where it is not the first axis anyway; nan.
    """

    ts: Tensor
    ys: Any
    status: Tensor
    stats: SampleStats
    interpolant: Callable[[Tensor], Any] | None
    event_t: Tensor
    event_index: Tensor
    event_y: Any

    def read_later(self, read: Callable[[], tuple[Tensor, SampleStats]]) -> Solution:
        """The same with status and stats to be read when one of them is looked at for the first time."""
        del self.status, self.stats
        self.__dict__["_read"] = read
        return self

    if not TYPE_CHECKING:  # for which any name would be an attribute

        def __getattr__(self, name: str) -> Any:
            read = self.__dict__.get("_read") if name in ("status", "stats") else None
            if read is None:
                raise AttributeError(f"a Solution has no {name!r}")
            self.status, self.stats = read()
            self.__dict__.pop("_read", None)
            return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        """For copies; what has not been read is read."""
        return {"status": self.status, "stats": self.stats, **self.__dict__}

    @property
    def success(self) -> bool:
        """Whether every sample has reached its last time or its event."""
        return bool(((self.status == Status.SUCCESS) | (self.status == Status.EVENT)).all())

    @property
    def message(self) -> str:
        """What happened and what may help, for each status that occurs."""
        B = len(self.status)
        return " ".join(s.sentence if B == 1 else f"{n} of {B} samples: {s.sentence}" for s, n in self._counts())

    def _counts(self) -> list[tuple[Status, int]]:
        """How many samples have which status, the most frequent first."""
        return Counter(map(Status, self.status.tolist())).most_common()

    def __repr__(self) -> str:
        """A short table: the statuses' first sentences, shapes, and from where to where counts reach."""
        rows: list[tuple[str, Any]] = [("success", self.success)]
        for i, (status, n) in enumerate(self._counts()):
            sentence = status.sentence.partition(". ")[0].rstrip(".")
            rows.append(("" if i else "status", f"{n} {status.name}: {sentence}"))
        rows.append(("ts", _shape(self.ts)))
        tree = Tree(self.ys)
        rows += [(name, _shape(part)) for name, part in zip(tree.names("ys"), tree.leaves(self.ys))]
        stats = self.stats
        counts = {name: getattr(stats, name) for name in ("n_f_evals", "n_accepted", "n_rejected", "last_dt")}
        rows += [(name, _range(values)) for name, values in counts.items()]
        if bool((self.event_index >= 0).any()):
            rows.append(("event_t", _range(self.event_t[self.event_index >= 0])))
        return "Solution\n" + "\n".join(f"  {name:>10}  {value}" for name, value in rows)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Solution:
        def all_of(value: Any) -> Any:
            tree = Tree(value)
            return tree.build(map(change, tree.leaves(value)))

        states = {name: all_of(getattr(self, name)) for name in ("ys", "event_y")}
        others = {name: change(getattr(self, name)) for name in ("ts", "status", "event_t", "event_index")}
        stats = SampleStats(*(change(getattr(self.stats, field.name)) for field in fields(self.stats)))
        interpolant: Any = self.interpolant
        if interpolant is not None:
            interpolant = interpolant._map(change)
        return replace(self, **states, **others, stats=stats, interpolant=interpolant)

    def to(self, *args: Any, **kwargs: Any) -> Solution:
        """The same with tensors moved to a device; as `Tensor.to`, floating ones also to a dtype."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() or x.is_complex() else None, non_blocking)

        return self._map(move)

    def detach(self) -> Solution:
        """The same without a graph behind it."""
        return self._map(Tensor.detach)


def _shape(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _range(values: Tensor) -> str:
    if values.numel() == 0:
        return "none"
    low, high = values.min().item(), values.max().item()
    digits = "" if not values.is_floating_point() else ".6g"
    if low == high:
        return format(low, digits)
    return f"{low:{digits}} to {high:{digits}}, mean {values.double().mean().item():.4g}"
