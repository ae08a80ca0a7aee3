"""The OpenMP threads that torch's own ops run on."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch


def address_of_team() -> int:
    """Where GOMP_parallel of the OpenMP library that torch has loaded is, or 0 where torch has none on Linux."""
    if sys.platform != "linux":
        return 0
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value or 0  # searched for in what torch is linked to
    except (OSError, AttributeError):
        return 0
