"""The command line: python -m pyode demo|info|run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__
from .commands import demo, info, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pyode", description="pyode: fast ODE solvers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"pyode {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (demo, info, run):
        command.add_to(commands)
    chosen = parser.parse_args(arguments)
    if not hasattr(chosen, "run"):
        parser.print_help()
        return 0
    status: int = chosen.run(chosen)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
