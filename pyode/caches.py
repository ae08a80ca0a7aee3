"""What pyode keeps from one solve for the next."""

from __future__ import annotations

from .captures import captured_solves
from .compiled import build


def clear_cache() -> None:
    """Removes all compiled dynamics from the disk, and lets go of all solves captured for a GPU; those in use go on."""
    build.clear_cache()
    captured_solves.clear()
