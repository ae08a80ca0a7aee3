"""The compiled controller's memory: the words of all samples' step state, flags, and the means that norms leave."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import INTEGER_FIELDS, N_FIELDS, REAL_FIELDS


class Readings:
    """The step state of all samples, as it is or was.

    Args:
        words: rows of one word of each sample, and behind them the flags.
        stride: from row to row.
        samples: how many.
    """

    def __init__(self, words: Tensor, stride: int, samples: int) -> None:
        self._words, self._stride, self._samples = words, stride, samples
        self._flags = N_FIELDS * stride

    def field(self, name: str) -> Tensor:
        """A field of the step state, [B]: a view."""
        start = (REAL_FIELDS + INTEGER_FIELDS).index(name) * self._stride
        row = self._words[start : start + self._samples]
        return row if name in REAL_FIELDS else row.view(torch.int64)

    @property
    def words(self) -> Tensor:
        """[N_FIELDS, B] all fields: a view."""
        return self._words[: self._flags].view(N_FIELDS, self._stride)[:, : self._samples]

    def flags(self) -> list[int]:
        """Those that calls have left, by turn; this waits for the device."""
        flags: list[int] = self._words[self._flags : self._flags + 2].view(torch.int64).tolist()
        return flags


class Words(Readings):
    """The same as it is now, where the controller keeps it, and behind it the means of a first step or of any other.

    Args:
        samples: how many.
        segments: of all norms together.
        parts: that a mean is left in, for every segment and sample.
        device: of the state.

    Attributes:
        dt: [B] float64, the step to take, signed; 0 for a sample that stands still.
    """

    def __init__(self, samples: int, segments: int, parts: int, device: torch.device) -> None:
        # Long rows begin an odd number of cache lines apart, for a power of two has them all in the same few places.
        stride = samples if samples < 64 else 8 * (-(-samples // 8) | 1)
        self._means, self._slot = N_FIELDS * stride + 3, parts * samples  # where they begin, and numbers for a segment
        n = self._means + 2 * segments * self._slot
        super().__init__(torch.zeros(n, dtype=torch.float64, device=device), stride, samples)
        self.dt = self._words[stride : stride + samples]
        self._address = self._words.data_ptr()

    def address_of_means(self, slot: int = 0) -> int:
        """Where those of segment `slot` and of all behind it are to be left."""
        return self._address + 8 * (self._means + slot * self._slot)

    @property
    def address_of_flags(self) -> int:
        """Where they are to be left."""
        return self._address + 8 * self._flags

    def put_norm(self, norm: Tensor | float, slot: int = 0) -> None:
        """Notes a norm that someone else has computed: a number, or for several samples [B]."""
        i = self._means + slot * self._slot
        self._words[i : i + self._samples] = norm * norm

    def restart(self) -> None:
        """All samples at rest, before a solve."""
        self._words[: self._means].zero_()

    def readings(self) -> Readings:
        """A copy of how all samples stand."""
        return Readings(self._words[: self._means].clone(), self._stride, self._samples)

    def finish(self, which: Tensor, status: int) -> None:
        """Ends the solve of some samples: `which` is [B] bool."""
        which = which.to(self._words.device)
        self.field("status").masked_fill_(which, status)
        self.dt.masked_fill_(which, 0.0)
