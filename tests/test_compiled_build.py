"""Where compiled dynamics are kept, and what can go wrong with a compiler and a disk."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

    @pytest.mark.parametrize("missing", [".digest", ".so"])
    def test_one_of_which_a_part_is_missing_is_built_again(self, missing, tmp_path, monkeypatch):
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        number = random.SystemRandom().random()
        first = self.solve(strict(lambda t, y: number * y))
        for path in tmp_path.glob(f"*{missing}"):
            path.unlink()
        assert torch.equal(self.solve(strict(lambda t, y: number * y)), first)
        assert len(list(tmp_path.iterdir())) == 3

    def test_a_full_disk(self, tmp_path, monkeypatch, caplog):
        """A small file still fits, the library does not; there is room elsewhere."""
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path / "full"))
        script = tmp_path / "compiler"
        (command, *_), version = build.compiler()
        script.write_text(
            f'#!/bin/sh\ncase "$*" in *{tmp_path}/full*) echo "ld: final link failed: No space left on device" >&2; '
            f'exit 1;; esac\nexec {command} "$@"\n'
        )
        script.chmod(0o700)
        monkeypatch.setattr(build, "compiler", lambda: ((str(script),), version))
        f = fresh()
        assert torch.equal(self.solve(strict(f)), self.solve(f))
        assert "not kept: [Errno 28] No space left on device" in caplog.text
        assert not list((tmp_path / "full").iterdir())

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
    def test_a_disk_that_is_full_everywhere(self, tmp_path):
        """No file may have more than 20 kB: no compiler can work; func runs eagerly, after one warning."""
        code = (
            "import resource, signal, warnings, torch, pyode\n"
            "f = pyode.compile(lambda t, y: -1.5 * y)\n"
            "y0, t = torch.ones(2, 1), torch.tensor([0., 1.])\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always')\n"
            "    ys = [pyode.odeint(f, y0, t) for _ in range(2)]\n"
            "assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], pyode.odeint(f.func, y0, t))\n"
            "print(*(w.message for w in caught), sep='\\n')"
        )
        said = run(code, tmp_path).splitlines()
        assert len(said) == 1
        assert "is not compiled and runs eagerly" in said[0]
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_can_only_be_read(self, tmp_path, monkeypatch, caplog):
        """What is there is used; what is not is compiled for this process alone."""
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        number = random.SystemRandom().random()
        first = self.solve(strict(lambda t, y: number * y))
        before = sorted(tmp_path.iterdir())
        # Root may write anywhere: a folder's permissions alone would not show it.
        temporary = build.tempfile.TemporaryDirectory

        def refuse(*_: object, dir: object = None, **others: object) -> object:
            if dir is not None:
                raise OSError(30, "Read-only file system")
            return temporary(**others)

        monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
        monkeypatch.setattr(build.Path, "touch", lambda path: refuse(dir=path))
        assert torch.equal(self.solve(strict(lambda t, y: number * y)), first)
        assert "not kept" not in caplog.text
        f = fresh()
        assert torch.equal(self.solve(strict(f)), self.solve(f))
        assert "not kept: [Errno 30] Read-only file system" in caplog.text
        assert sorted(tmp_path.iterdir()) == before

    def test_those_unused_for_longest_make_room(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(build, "MOST_LIBRARIES", 2)
        funcs = [fresh() for _ in range(3)]
        kept = []
        for i, f in enumerate(funcs):
            self.solve(strict(f))
            kept.append(*(set(tmp_path.glob("*.so")) - set(kept)))
            os.utime(kept[-1], (i, i))
        assert set(tmp_path.glob("*.so")) == set(kept[1:])
        self.solve(strict(funcs[1]))  # now the last one in use
        self.solve(strict(fresh()))
        assert kept[1].exists()
        assert not kept[2].exists()
        assert len(list(tmp_path.iterdir())) == 6

    def test_a_long_compilation_is_announced_once(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(build, "SILENCE", 0.01)
        f = strict(fresh())
        for _ in range(2):
            self.solve(f)
        assert caplog.text.count("compiling the dynamics") == 1

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

    @pytest.mark.parametrize(
        ("command", "reason"),
        [
            (("false",), "false failed with status 1"),
            (("g++", "-U__GNUC__"), "need a compiler with vector extensions"),
            (("g++", "-no-such-flag"), "failed with status 1: unrecognized command-line option"),
            ((), r"no C\+\+ compiler was found"),
        ],
    )
    def test_a_compiler_that_fails(self, command, reason, tmp_path, monkeypatch):
        if command[:1] == ("g++",) and "g++" not in build.compiler()[0][0] and not shutil.which("g++"):
            pytest.skip("needs g++")
        monkeypatch.setattr(build, "compiler", lambda: (command, "") if command else _no_compiler())
        monkeypatch.setenv("PYODE_CACHE_DIR", str(tmp_path))
        f = fresh()
        compiled = pyode.compile(f)
        with pytest.warns(UserWarning, match=reason) as caught:
            ours = [self.solve(compiled) for _ in range(2)]
        assert len(caught) == 1
        assert all(torch.equal(y, self.solve(f)) for y in ours)
        with pytest.raises(pyode.CompileError, match=reason):
            self.solve(strict(f))
        assert not list(tmp_path.iterdir())

    def test_the_compiler_is_the_one_named_or_the_first_found(self, monkeypatch):
        find = build.compiler.__wrapped__
        (command, *_), _ = build.compiler()
        monkeypatch.setenv("CXX", f"{command} -DNAMED")
        assert find()[0] == (command, "-DNAMED")
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert find()[0][0] in build.COMPILERS
        monkeypatch.setenv("PATH", "")
        with pytest.raises(pyode.CompileError, match=r"no C\+\+ compiler was found: .* install"):
            find()

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

    def test_two_processes_compile_the_same_at_once_and_the_next_finds_it(self, tmp_path):
        code = (
            "import torch, pyode; from pyode.compiled import build\n"
            "f = pyode.compile(lambda t, y: -1.75 * y, strict=True)\n"
            "n = []; make = build._compile; build._compile = lambda *a: n.append(1) or make(*a)\n"
            "y0, t = torch.ones(2, 1), torch.tensor([0., 1.])\n"
            "print(len(n), pyode.odeint(f, y0, t, method='euler')[1].tolist(), len(n))"
        )
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(lambda _: run(code, tmp_path), range(2)))
        assert "0 [[-0.75], [-0.75]] 1" in said  # one may have come so late that it found the other's
        assert len(list(tmp_path.iterdir())) == 3  # source, library and its digest
        said.append(run(code, tmp_path))
        assert said[2] == "0 [[-0.75], [-0.75]] 0"
        assert set(said) <= {said[2], "0 [[-0.75], [-0.75]] 1"}


def run(code: str, cache: Path) -> str:
    """What a process of its own prints."""
    environment = {**os.environ, "PYODE_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _no_compiler():
    raise pyode.CompileError("no C++ compiler was found")
