"""Where compiled dynamics are kept, and what can go wrong with a compiler and a disk."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from problems import van_der_pol
from torch import Tensor

import pyode
from pyode.compiled import build


def strict(f):
    return pyode.compile(f, strict=True)


def fresh():
    """A func that nobody has compiled before."""
    number = random.SystemRandom().random()
    return lambda t, y: -number * y


class TestBuild:
    y0, t = torch.ones(2, 1), torch.tensor([0.0, 1.0])

    def solve(self, f) -> Tensor:
        return pyode.odeint(f, self.y0, self.t, method="euler")

    def test_a_library_that_was_cut_off_is_built_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        number = random.SystemRandom().random()
        first = self.solve(strict(lambda t, y: number * y))
        (library,) = tmp_path.glob("*.so")
        content = library.read_bytes()
        library.unlink()  # it is in use
        library.write_bytes(content[: len(content) // 2])
        assert torch.equal(self.solve(strict(lambda t, y: number * y)), first)
        assert library.stat().st_size > len(content) // 2
        pyode.clear_cache()
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path / "file"))
        (tmp_path / "file").write_text("not a folder")
        f = fresh()
        torch.testing.assert_close(self.solve(strict(f)), self.solve(f))
        assert "not kept" in caplog.text

    @pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
    def test_a_folder_that_others_can_write_is_not_used(self, tmp_path, monkeypatch, caplog):
        tmp_path.chmod(0o777)
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        self.solve(strict(fresh()))
        assert not list(tmp_path.iterdir())
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path / "own"))
        self.solve(strict(fresh()))
        assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("command", ["false", "no-such-compiler"])
    def test_a_compiler_that_fails(self, command, tmp_path, monkeypatch):
        monkeypatch.setattr(build, "compiler", lambda: ((command,), "") if command == "false" else _no_compiler())
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        f = fresh()
        with pytest.warns(UserWarning, match="failed with status 1|no C\\+\\+ compiler"):
            ours = self.solve(pyode.compile(f))
        assert torch.equal(ours, self.solve(f))

    def test_two_threads_compile_the_same_at_once(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        shared, number, results = strict(van_der_pol), random.SystemRandom().random(), []

        def run(f):
            with torch.no_grad():
                results.append(pyode.odeint(f, torch.ones(3, 2) * number, self.t))

        threads = [threading.Thread(target=run, args=(f,)) for f in (shared, shared, strict(van_der_pol))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 3
        assert all(torch.equal(result, results[0]) for result in results)
        assert len(list(tmp_path.glob("*.so"))) == 1

    def test_the_next_process_finds_it(self, tmp_path):
        code = (
            "import torch, pyode; from pyode.compiled import build\n"
            "f = pyode.compile(lambda t, y: -1.25 * y, strict=True)\n"
            "n = []; make = build._compile; build._compile = lambda *a: n.append(1) or make(*a)\n"
            "pyode.odeint(f, torch.ones(2, 1), torch.tensor([0., 1.]), method='euler'); print(len(n))"
        )
        environment = {**os.environ, "PYODE_CACHE_DIR": str(tmp_path)}
        runs = [
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
            for _ in range(2)
        ]
        assert [run.stdout.strip() for run in runs] == ["1", "0"]


def _no_compiler():
    raise pyode.CompileError("no C++ compiler was found")
