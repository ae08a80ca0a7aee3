"""python -m pyode run: a script or module that imports torchdiffeq, on pyode."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from typing import Any

from ..patch import patch_torchdiffeq


def add_to(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "run",
        help="run a script or module as python does, with pyode in torchdiffeq's place",
        description="Runs a script, or with -m a module, as python does, with pyode in torchdiffeq's place: whatever "
        "it or a library imports from torchdiffeq is pyode's (see pyode.patch_torchdiffeq). Processes that it starts "
        "afresh are not patched; forked ones are.",
        usage="python -m pyode run [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        epilog="Examples: python -m pyode run train.py --lr 1e-3;  python -m pyode run -m package.train",
    )
    parser.add_argument("-m", dest="as_module", action="store_true", help="run a module by its name, as python -m does")
    parser.add_argument("target", metavar="SCRIPT | MODULE", help="what to run")
    rest = parser.add_argument(
        "arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="passed on to it, all of them"
    )
    rest.required = False  # before Python 3.12 its absence would be complained of
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Runs it in this process; its exceptions and its exit pass through."""
    target: str = chosen.target
    if not chosen.as_module and not os.path.exists(target):
        print(f"python -m pyode run: can't open file {target!r}", file=sys.stderr)
        return 2
    patch_torchdiffeq()
    sys.argv = [target, *chosen.arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if chosen.as_module else os.path.dirname(os.path.realpath(target))
    if chosen.as_module and not _exists(target):
        print(f"python -m pyode run: no module named {target!r}", file=sys.stderr)
        return 1  # as from python -m
    if chosen.as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(os.path.abspath(target), run_name="__main__")  # as __file__ is under python
    return 0


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:  # of a package that it is in, or of what that imports
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return False
