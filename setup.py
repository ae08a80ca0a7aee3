"""Builds the extension: finds nvcc, then lets CMakeLists.txt do the work. Metadata is in pyproject.toml.

PYODE_CUDA=auto|1|0         build the CUDA part: where nvcc is found (default), always, never
PYODE_CUDA_ARCHITECTURES    as CMAKE_CUDA_ARCHITECTURES; default 75-real;80-real;86-real;89-real;90,
                            which runs on newer GPUs too, through PTX
"""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def find_nvcc():
    """The CUDA compiler to build with, or None. Whether a GPU is in the machine does not matter."""
    wanted = os.environ.get("PYODE_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"PYODE_CUDA must be auto, 1 or 0, not {wanted!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if wanted == "1" and nvcc is None:
        sys.exit("PYODE_CUDA=1, but nvcc was found neither on PATH nor in CUDA_HOME; install the CUDA toolkit")
    decision = f"with CUDA ({nvcc})" if nvcc and wanted != "0" else "without CUDA"
    reason = f"PYODE_CUDA={wanted}" + ("" if nvcc else ", no nvcc found")
    print(f"pyode: building {decision}: {reason}", flush=True)
    return nvcc if wanted != "0" else None


class CMakeBuild(build_ext):
    """Configures, builds, and puts the module where setuptools wants it."""

    def build_extension(self, ext):
        """Runs CMake for the one extension there is."""
        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # A build in place is kept, for the next one. Any other is made afresh: cmake and ninja may come from an
        # environment that pip has thrown away since.
        with nullcontext(source / "build" / "inplace") if self.inplace else TemporaryDirectory() as build:
            self.run_cmake(source, Path(build), target.parent)
        # In a clone, `python -m pyode` and pytest import the clone's folder, not what pip installed: it gets one too.
        if not self.inplace:
            shutil.copy2(target, source / "pyode")

    def run_cmake(self, source, build, target):
        """Configures and builds in one folder, for another."""
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PYODE_CUDA": "OFF",
            "PYODE_WERROR": os.environ.get("PYODE_WERROR", "OFF"),
        }
        nvcc = find_nvcc()
        if nvcc:
            options |= {"PYODE_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}
            if architectures := os.environ.get("PYODE_CUDA_ARCHITECTURES"):
                options["CMAKE_CUDA_ARCHITECTURES"] = architectures
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run(["cmake", "--build", build, "-j", jobs], check=True)


setup(ext_modules=[Extension("pyode._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
