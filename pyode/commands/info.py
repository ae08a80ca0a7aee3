"""python -m pyode info: what was built, and what it runs on."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

from .._ops.native import build_info
from .._version import __version__


def add_to(commands: Any) -> None:
    """Adds the command to the parser's."""
    text = "print version, compiler, SIMD level, threads, CUDA build and devices"
    parser = commands.add_parser("info", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run)


def describe() -> dict[str, str]:
    """Label and value of every line."""
    build = build_info()
    lines = {
        "pyode": __version__,
        "compiler": str(build["compiler"]),
        "SIMD level": f"{build['simd']} (of those compiled, the best that this processor has)",
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads()), {build['threads']}",
        "CUDA build": str(build["cuda"] or "none; tensors on a GPU are solved for with plain torch operations"),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
    }
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return lines | {"devices": "cpu"}
    for i in range(count):
        device = torch.cuda.get_device_properties(i)
        lines[f"cuda:{i}"] = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
    return lines


def run(chosen: argparse.Namespace) -> int:
    """Prints the table."""
    lines = describe()
    width = max(map(len, lines))
    for label, value in lines.items():
        print(f"{label:<{width}}  {value}")
    return 0
