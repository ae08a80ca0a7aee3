"""Writes a CUDA source as C++ for cuda_runtime.h beside this file: `python translate.py SOURCE TARGET`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LAUNCH = re.compile(r"(\w+)((?:<(?:[^<>;]|<[^<>;]*>)*>)?)\s*<<<(.*?)>>>\(", re.DOTALL)
KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(.*?^\}", re.DOTALL | re.MULTILINE)


def arguments(text: str) -> list[str]:
    """The arguments of a call, of which this is what its parentheses hold."""
    found, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            found.append(text[begin:i].strip())
            begin = i + 1
    return [*found, text[begin:].strip()]


def closing(text: str, at: int) -> int:
    """Where the parenthesis before `at` is closed."""
    depth = 1
    while depth:
        depth += (text[at] == "(") - (text[at] == ")")
        at += 1
    return at - 1


def translate(source: str) -> str:
    """A source without the launch syntax."""
    synchronising = {match[1] for match in KERNEL.finditer(source) if "__syncthreads" in match[0]}
    out, at = [], 0
    for match in LAUNCH.finditer(source):
        kernel, types, shape = match.groups()
        grid, threads, _, stream = arguments(shape)
        end = closing(source, match.end())
        call = f"{kernel}{types}({source[match.end() : end]})"
        synchronises = "true" if kernel in synchronising else "false"
        launch = f"::cuda_on_host::launch({synchronises}, {grid}, {threads}, {stream}, [&] {{ {call}; }})"
        out += [source[at : match.start()], launch]
        at = end + 1
    return "".join([*out, source[at:]])


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(f'#line 1 "{source}"\n' + translate(source.read_text()))
