"""The loop with a controller for every sample, scripted: each step's error is prescribed, and so all counts known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import pyode
from pyode import Status, solve_ivp
from pyode.methods import TABLEAUS

F64 = torch.float64
THIRD = 2  # of dopri5's stages, which the scripted func differs from 0 at
ERROR_WEIGHT = abs(TABLEAUS["dopri5"].error_weights[THIRD])
STAGES = len(TABLEAUS["dopri5"].rows)


@dataclass
class Fate:
    """What becomes of a sample that starts at 1, by the text book (Hairer, Norsett, Wanner I, II.4), step by step."""

    status: Status = Status.RUNNING
    n_accepted: int = 0
    n_rejected: int = 0
    last_dt: float = 0.0
    slopes: list[float] = field(default_factory=list)  # at the third stage of each step tried, for its error

    @property
    def n_steps(self) -> int:
        return self.n_accepted + self.n_rejected

    @classmethod
    def of(cls, errors: list[float], rest: float, end: float, first: float, most: int) -> Fate:
        fate, t, sign, size, cautious = cls(), 1.0, math.copysign(1.0, end - 1.0), first, False
        why = Status.STEP_TOO_SMALL
        for error in itertools.chain(errors, itertools.repeat(rest)):
            if t == end:
                fate.status = Status.SUCCESS
            elif fate.n_steps == most:
                fate.status = Status.TOO_MANY_STEPS
            elif size < 10 * 2.0**-52 * abs(t):
                fate.status = why
            if fate.status is not Status.RUNNING:
                return fate
            clipped = sign * (t + sign * size - end) > 0
            dt = end - t if clipped else sign * size
            finite = math.isfinite(error)
            factor = 0.2
            if finite:
                factor = 10.0 if error == 0 else min(10.0, max(0.9 * error**-0.2, 1.0 if error < 1 else 0.2))
            size = abs(dt) * (min(factor, 1.0) if cautious else factor)
            why = Status.STEP_TOO_SMALL if finite else Status.NON_FINITE
            fate.slopes.append(error / (abs(dt) * ERROR_WEIGHT))
            if cautious := not (finite and error <= 1):
                fate.n_rejected += 1
            else:
                t, fate.last_dt, fate.n_accepted = end if clipped else t + dt, dt, fate.n_accepted + 1
        raise AssertionError("endless")


class Script:
    """A func that makes each row's steps have their errors, |dt e_3 k_3|, where atol is 1 and rtol 0."""

    def __init__(self, fates: list[Fate]) -> None:
        self.fates, self.calls = fates, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        step, stage = divmod(self.calls - 1, STAGES)  # the first call is at the start, stages begin with the second
        self.calls += 1
        if stage != THIRD - 1:
            return torch.zeros_like(y)
        slopes = [fate.slopes[step] if step < fate.n_steps else math.nan for fate in self.fates]
        return torch.tensor(slopes, dtype=F64)[:, None].expand_as(y)


# Clear of 1, up to which a step is accepted; 0 lets the next one grow tenfold.
ERRORS = st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.5, 20.0, 1e6, math.nan, math.inf])
SAMPLES = st.lists(
    st.tuples(
        st.lists(ERRORS, max_size=12),
        st.sampled_from([0.0, 0.3, math.nan, 40.0]),  # of all further steps: with the last two it fails
        st.sampled_from([1.0, 1.0101, 2.2345, 7.13, 0.618, -1.77]),  # where it ends
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(
    samples=SAMPLES,
    first=st.sampled_from([0.0123, 0.31]),
    most=st.sampled_from([5, 60]),
    watched=st.booleans(),
    backend=st.sampled_from(["auto", "reference"]),
)
def test_every_sample_has_the_status_the_counts_and_the_steps_of_the_text_book(samples, first, most, watched, backend):
    fates = [Fate.of(*sample, first, most) for sample in samples]
    script, ends = Script(fates), torch.tensor([end for *_, end in samples], dtype=F64)
    t, y0 = torch.stack([torch.ones_like(ends), ends]), torch.ones(len(samples), 2, dtype=F64)
    with pyode.backend(backend), torch.no_grad():
        found = solve_ivp(
            script, y0, t, rtol=0.0, atol=1.0, first_step=first, max_num_steps=most, throw=False, dense_output=watched
        )
    assert [Status(status) for status in found.status.tolist()] == [fate.status for fate in fates]
    assert found.stats.n_accepted.tolist() == [fate.n_accepted for fate in fates]
    assert found.stats.n_rejected.tolist() == [fate.n_rejected for fate in fates]
    assert found.stats.n_f_evals.tolist() == [1 + STAGES * fate.n_steps for fate in fates]
    assert found.stats.last_dt.tolist() == pytest.approx([fate.last_dt for fate in fates], rel=1e-9)
    # func is called until the last is done, and no longer.
    assert script.calls == 1 + STAGES * max(fate.n_steps for fate in fates)
    failed = torch.tensor([fate.status is not Status.SUCCESS for fate in fates])
    assert torch.equal(found.ys[1].isnan().all(1), failed)
    assert not found.ys[0].isnan().any()
