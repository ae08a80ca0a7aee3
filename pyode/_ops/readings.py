"""The compiled controller's words, read."""

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

    def flags(self) -> list[int]:
        """Those that calls have left, by turn; this waits for the device."""
        flags: list[int] = self._words[self._flags : self._flags + 2].view(torch.int64).tolist()
        return flags
