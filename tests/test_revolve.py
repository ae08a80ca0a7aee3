"""The order in which steps are undone: all of them, never more states than allowed, as few steps again as possible."""

from __future__ import annotations

from functools import cache

import pytest

from pyode.gradients.revolve import backwards, recomputed


@cache
def least(steps: int, snapshots: int) -> int:
    """By trying all places for the next snapshot."""
    if steps <= 1:
        return 0
    if snapshots == 1:
        return steps * (steps - 1) // 2
    return min(m + least(steps - m, snapshots - 1) + least(m, snapshots) for m in range(1, steps))


@pytest.mark.parametrize("snapshots", [1, 2, 3, 5, 8])
def test_as_few_steps_again_as_possible(snapshots):
    for steps in range(1, 70):
        taken = []

        def advance(state, begin, end, taken=taken):
            assert state == begin
            taken.append(end - begin)
            return end

        undone = list(backwards(0, steps, 0, snapshots, advance))
        assert undone == [(n, n) for n in reversed(range(steps))]
        assert sum(taken) == recomputed(steps, snapshots) == least(steps, snapshots)


def test_griewank_and_walthers_numbers():
    # With s snapshots and r repetitions, C(s + r, s) steps; from their table 1 and by t = r l - C(s + r, r - 1).
    assert recomputed(10, 3) == 15
    assert recomputed(35, 3) == 4 * 35 - 35
    assert recomputed(1000, 1000) == 999


def test_no_more_states_than_snapshots():
    class State:
        alive = most = 0

        def __init__(self):
            State.alive += 1
            State.most = max(State.most, State.alive)

        def __del__(self):
            State.alive -= 1

    for _, state in backwards(0, 100, State(), 4, lambda state, begin, end: State()):
        del state
    assert State.most <= 4 + 1  # and the one under way
