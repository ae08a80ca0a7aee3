"""python -m pyode: what it prints, and what it says to wrong arguments before it does anything."""

from __future__ import annotations

import pytest
import torch

import pyode
from pyode.__main__ import main
from pyode.commands import demo


def test_without_a_command_it_shows_all(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "info", "run"))


def test_info_says_what_runs(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["pyode"].strip() == pyode.__version__
    assert torch.__version__ in lines["torch"]
    assert {"compiler", "SIMD level", "threads", "CUDA build", "Python"} <= set(lines)


def test_the_help_writes_names_as_they_are_written(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    text = capsys.readouterr().out
    assert "SIMD" in text
    assert "CUDA" in text


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "many"])
def test_the_demo_takes_a_positive_number_of_steps(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", f"--steps={wrong}"])
    assert caught.value.code == 2
    assert f"must be a whole number from 1 on, not {wrong}" in capsys.readouterr().err


def test_the_demo_says_before_it_trains_that_its_picture_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("it trains"))
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "picture.doc", ".png"), (tmp_path / "file" / "picture.png", "file")):
        assert main(["demo", "--output", str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert why in error


def test_the_demo_trains_draws_and_reports(capsys, tmp_path):
    path = tmp_path / "new" / "picture.png"
    assert main(["demo", "--steps", "2", "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    report = capsys.readouterr().out
    assert "training steps 1 to 1" in report
    assert str(path) in report
