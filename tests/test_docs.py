"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

PAGE = Path(__file__).parents[1] / "docs" / "solving.md"


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.7, 0.4]))

    def forward(self, t, y):
        return -self.rate * y


def test_the_programs_of_the_guide_run():
    given = {"module": Decay(), "y0": torch.tensor([1.0, 0.3]), "t0": torch.tensor(0.0), "t": torch.linspace(0, 1, 5)}
    names = {**given, "func": given["module"]}
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(programs) >= 4
    for program in programs:
        exec(program, names)
    assert names["y"].shape == (2, 2)  # at the start and at the event
    assert names["solution"](torch.zeros(4, 5)).shape == (4, 5, 2)
    assert names["stats"].n_accepted > 0
