"""python -m benchmarks: all suites, as tables of ratios."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import pyode
from pyode.commands.info import describe

SUITES = (
    "forward",
    "methods",
    "training",
    "gradients",
    "compiled",
    "large",
    "implicit",
    "batch",
    "oscillators",
    "ensemble",
    "twin",
    "gpu",
    "gpu_large",
)
RESULTS = Path(__file__).parent / "results"


def as_text(value: Any) -> str:
    """A cell."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def as_markdown(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table of the named columns of every row."""
    cells = [list(columns.values()), *([as_text(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {"processor": platform.processor() or platform.machine(), **describe()}


def save(results: dict[str, Any], where: str | None) -> None:
    """Writes them to a path.json, or to the NAME.json of our results."""
    if where is None:
        return
    path = Path(where) if where.endswith(".json") else RESULTS / f"{where}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Runs the suites that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time pyode against its peers.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--threads", type=int, default=2, help="of torch and pyode (default: 2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="at most, for one row's rounds (default: 10)")
    parser.add_argument(
        "--save", metavar="NAME", help=f"write {RESULTS.name}/NAME.json beside this file, or a path.json"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    torch.set_num_threads(chosen.threads)

    results: dict[str, Any] = {"machine": machine()}
    print(f"pyode {pyode.__version__}, torch {torch.__version__}, {chosen.threads} threads\n", flush=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"Something else is running (load {load:.1f}): torch's threads then wait for each other, in f too.\n")
    failed = []
    for name in chosen.suites or SUITES:
        try:
            suite = import_module(f"{__package__}.bench_{name}")
        except ModuleNotFoundError as missing:
            print(f'{name}: not run, {missing.name} is missing: pip install "pyode[bench]"\n')
            continue
        rows = results[name] = []
        try:
            for row in suite.measure(chosen.seconds):
                rows.append(row)
                save(results, chosen.save)  # what is measured stays if time runs out
        except Exception:  # the other suites are measured all the same
            traceback.print_exc()
            failed.append(name)
        if rows:
            print(f"{suite.TITLE}\n\n{as_markdown(rows, suite.COLUMNS)}\n", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
