"""What the documentation shows runs as it stands, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyode

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.7, 0.4]))

    def forward(self, t, y):
        return -self.rate * y


def reader() -> dict[str, Any]:
    """What pages take for granted that their reader has."""
    module = Decay()
    start = {"y0": torch.tensor([[1.0, 0.3]]), "t0": torch.tensor(0.0), "t": torch.linspace(0, 1, 5)}
    return {"torch": torch, "pyode": pyode, **vars(pyode), "module": module, "func": module, **start}


def run(page: Path) -> dict[str, Any]:
    """The names at the end of a page's programs; a block of text behind one is what it prints."""
    names, printed = reader(), ""
    for language, block in BLOCK.findall(page.read_text()):
        if language == "text":
            assert printed == block
            continue
        once = block.replace("range(100)", "range(1)")  # a turn of a training loop stands for all
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(once, page.name, "exec"), names)
        printed = out.getvalue()
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_programs_of_a_page_run(page):
    run(page)
