"""C++ to a library: the compiler of this machine, and a cache on disk.

The cache is a folder of the user's own, ~/.cache/pyode or PYODE_CACHE_DIR. A library's name is the digest of all that
it depends on: source, headers, flags, compiler and processor. It is written under another name and moved to its place,
and beside it lies its own digest, so that one that was cut off is built again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..errors import CompileError

# -O3 compiles for twice as long and adds nothing but what -fpeel-loops does: to unroll loops of a few turns completely.
FLAGS = (
    "-std=c++17", "-O2", "-fpeel-loops", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi", "-DPYODE_LEVEL=native",
)  # fmt: skip
_NO_SPACE = os.strerror(errno.ENOSPC)
COMPILERS = ("c++", "g++", "clang++")
MOST_LIBRARIES = 500  # in the cache; those unused for longest make room
SILENCE = 1.0  # seconds, after which it is said what takes so long

_log = logging.getLogger("pyode")


@cache
def headers() -> Path:
    """The folder of pyode's C++ headers: in the package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "compiled").is_dir():
            return folder
    raise CompileError("pyode's C++ headers are missing; install pyode again")


@cache
def compiler() -> tuple[tuple[str, ...], str]:
    """The compiler's command and its version.

    Raises:
        CompileError: there is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in ([wanted] if wanted else []) + [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return tuple(command), done.stdout
    raise CompileError(f"no C++ compiler was found: {', '.join(COMPILERS)}, or the one that CXX names; install g++")


@cache
def _surroundings() -> bytes:
    """What a library depends on beside its source."""
    digest = hashlib.sha256("\0".join([*FLAGS, *compiler()[0], compiler()[1], _processor()]).encode())
    for header in sorted(headers().rglob("*.h")):
        digest.update(header.read_bytes())
    return digest.digest()


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


def cache_folder() -> Path:
    """Where libraries are kept; made if need be, readable by its owner only.

    Raises:
        OSError: it can't be made, or belongs to someone else.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyode"
    folder = Path(os.environ.get("PYODE_CACHE_DIR") or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{folder} can be written by others; code from there would not be safe to run")
    return folder


def clear_cache() -> None:
    """Removes all compiled dynamics from the disk; those in use go on."""
    with contextlib.suppress(OSError):
        for path in cache_folder().glob("f_*"):
            path.unlink(missing_ok=True)


def build(source: str) -> tuple[Path, bool]:
    """A library of the source, from the cache or the compiler.

    Returns:
        Its path, and whether it may be removed when it has been loaded.

    Raises:
        CompileError: there is no compiler, or it failed.
    """
    name = "f_" + hashlib.sha256(_surroundings() + source.encode()).hexdigest()[:32]
    try:
        folder = cache_folder()
        library = folder / f"{name}.so"
        if not _is_whole(library):
            with tempfile.TemporaryDirectory(dir=folder) as private:
                made = _compile(source, Path(private), name)
                digest = Path(private) / "digest"
                digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
                for path, target in ((made.with_suffix(".cpp"), ".cpp"), (made, ".so"), (digest, ".digest")):
                    os.replace(path, folder / f"{name}{target}")
            with contextlib.suppress(OSError):  # another process may be at it too
                _make_room(folder)
        return library, False
    except OSError as error:  # a full disk, or a folder that can't be written
        _log.warning("compiled dynamics are not kept: %s", error)
        return _compile(source, Path(tempfile.mkdtemp(prefix="pyode")), name), True


def _is_whole(library: Path) -> bool:
    try:
        content, digest = library.read_bytes(), library.with_suffix(".digest").read_text()
    except OSError:
        return False
    with contextlib.suppress(OSError):  # where nothing can be written
        library.touch()
    return hashlib.sha256(content).hexdigest() == digest


def _make_room(folder: Path) -> None:
    libraries = sorted(folder.glob("f_*.so"), key=lambda path: path.stat().st_mtime)
    for library in libraries[:-MOST_LIBRARIES]:
        for suffix in (".so", ".cpp", ".digest"):
            library.with_suffix(suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def _announced(what: str) -> Iterator[None]:
    """Says what is going on, if it takes longer than SILENCE."""
    timer = threading.Timer(SILENCE, _log.warning, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _compile(source: str, folder: Path, name: str) -> Path:
    command, _ = compiler()
    text, library = folder / f"{name}.cpp", folder / f"{name}.so"
    text.write_text(source)
    with _announced("compiling the dynamics (once; the next process finds them in the cache)"):
        done = subprocess.run(
            [*command, *FLAGS, f"-I{headers()}", str(text), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0 or not library.exists():
        said = done.stderr.splitlines()
        if _NO_SPACE in done.stderr:
            raise OSError(errno.ENOSPC, f"{_NO_SPACE} for {library}")
        first = next((line.partition("error: ")[2] for line in said if "error: " in line), "".join(said[:1]))
        raise CompileError(f"{command[0]} failed with status {done.returncode}: {first}\n{done.stderr[:2000]}")
    return library
