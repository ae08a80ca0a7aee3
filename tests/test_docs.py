"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "solving.md"


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.7, 0.4]))

    def forward(self, t, y):
        return -self.rate * y


def programs_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="an installed package without its sources")
def test_the_programs_of_the_readme_run_one_behind_the_other(capsys):
    names: dict = {}
    for program in programs_of(ROOT / "README.md"):
        exec(program.replace("range(100)", "range(1)"), names)  # one step of training will do
    assert names["y"].shape == names["solution"].ys.shape == (20, 1024, 3)
    assert "1024 of 1024 samples" in capsys.readouterr().out


def test_the_programs_of_the_guide_run():
    given = {"module": Decay(), "y0": torch.tensor([1.0, 0.3]), "t0": torch.tensor(0.0), "t": torch.linspace(0, 1, 5)}
    names = {**given, "func": given["module"]}
    programs = programs_of(PAGE)
    assert len(programs) >= 4
    for program in programs:
        exec(program, names)
    assert names["y"].shape == (2, 2)  # at the start and at the event
    assert names["solution"](torch.zeros(4, 5)).shape == (4, 5, 2)
    assert names["stats"].n_accepted > 0
