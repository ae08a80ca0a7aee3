"""Revolve: undoing a sequence of steps, from the last to the first, with few of the states between them in memory.

Notation of Griewank and Walther, Algorithm 799: revolve, ACM Trans. Math. Softw. 26 (2000): with s states in memory
and no step taken more than r times, C(s + r, s) steps can be undone, and not one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import comb
from typing import TypeVar

State = TypeVar("State")


def backwards(
    begin: int, end: int, state: State, snapshots: int, advance: Callable[[State, int, int], State]
) -> Iterator[tuple[int, State]]:
    """Yields the steps from end - 1 to begin, each with the state at its start, and takes as few as possible again.

    Args:
        begin, end: the steps, numbered.
        state: at the start of step `begin`.
        snapshots: how many states may be kept at a time, this one counted; at least 1.
        advance: takes the steps from the second of its arguments to the third, and returns the state behind them.
    """
    while end - begin > 1:
        middle = begin + distance(end - begin, snapshots)
        # With one snapshot the state in the middle is that of the last step, which needs no other.
        yield from backwards(middle, end, advance(state, begin, middle), snapshots - 1, advance)
        end = middle
    yield begin, state


def distance(steps: int, snapshots: int) -> int:
    """How far from the first snapshot the second one is best placed."""
    r = repetitions(steps, snapshots)
    return min(comb(snapshots + r - 1, snapshots), steps - comb(snapshots + r - 2, snapshots - 1))


def repetitions(steps: int, snapshots: int) -> int:
    """The least number of times that a step must be taken again."""
    r = 0
    while comb(snapshots + r, snapshots) < steps:
        r += 1
    return r


def recomputed(steps: int, snapshots: int) -> int:
    """How many steps have to be taken again, at least, to undo so many."""
    r = repetitions(steps, snapshots)
    return r * steps - comb(snapshots + r, r - 1) if r else 0
