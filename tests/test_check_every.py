"""options={"check_every": n}: samples are asked after every n-th step whether they are done; all else is the same."""

from __future__ import annotations

import pytest
import torch
from ensembles import counts, nan_above, oscillators, van_der_pol
from factories import BACKENDS

import pyode
from pyode import InvalidValue, Stats, solve_ivp

F64 = torch.float64
T = torch.linspace(0, 2, 9, dtype=F64)


def own_times(n: int) -> torch.Tensor:
    """Ends, directions and paddings of their own."""
    ends = torch.linspace(-1, 2, n, dtype=F64)
    return torch.cat([T[:, None] / 2 * ends, ends.expand(2, n)])


class Reads:
    """Counts how often controllers are asked for their flags."""

    def __init__(self, monkeypatch, ops) -> None:
        self.n, read = 0, ops.Controller.read

        def counted(controller, flags):
            self.n += 1
            return read(controller, flags)

        monkeypatch.setattr(ops.Controller, "read", counted)


@pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__.rsplit(".")[-1])
@pytest.mark.parametrize("n", [2, 3, 7, 1000])
@pytest.mark.parametrize("fails", [False, True])
def test_results_are_the_same_bits_and_flags_are_read_every_nth_step(n, fails, ops, monkeypatch, device):
    reads, y0 = Reads(monkeypatch, ops), oscillators(6, stiffest=8.0).to(device)
    f = nan_above(2.001, van_der_pol) if fails else van_der_pol
    t = own_times(6).to(device)
    with pyode.backend("reference" if ops is BACKENDS[1] else "auto"), torch.no_grad():
        every = solve_ivp(f, y0, t, throw=False)
        reads.n = 0
        stats = Stats()
        rarely = solve_ivp(f, y0, t, throw=False, options={"check_every": n, "stats": stats})
    assert torch.equal(every.ys.nan_to_num(), rarely.ys.nan_to_num())
    assert torch.equal(every.status, rarely.status)
    assert torch.equal(counts(every), counts(rarely))
    slowest = int(every.stats.n_steps.max())
    rounds = -(-slowest // n)
    assert reads.n == 1 + rounds  # once for the first step
    assert stats.n_f_evals == 2 + 6 * n * rounds  # finished batches idle


def test_steps_that_have_to_be_looked_at_are(monkeypatch):
    y0 = oscillators(4, stiffest=4.0).requires_grad_()
    options = {"check_every": 5}
    plain, found = solve_ivp(van_der_pol, y0, T), solve_ivp(van_der_pol, y0, T, options=options)
    assert torch.equal(plain.ys, found.ys)
    gradients = [torch.autograd.grad(s.ys.sum(), y0)[0] for s in (plain, found)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        event = lambda t, y: y[:, 0] - 1.0  # noqa: E731
        jumps = {"jump_t": [0.5], **options}
        for arguments in ({"event_fn": event, "options": options}, {"options": jumps}, {"compact": True}):
            without = {**arguments, "options": {k: v for k, v in arguments.get("options", {}).items() if k == "jump_t"}}
            a, b = solve_ivp(van_der_pol, y0, T, **arguments), solve_ivp(van_der_pol, y0, T, **without)
            assert torch.equal(a.ys.nan_to_num(), b.ys.nan_to_num())
            assert torch.equal(counts(a), counts(b))


def test_joint_control_takes_it_and_nonsense_is_told():
    y0 = oscillators(2, stiffest=2.0)
    with torch.no_grad():
        a, b = (pyode.odeint(van_der_pol, y0, T, options=o) for o in ({}, {"check_every": 3}))
    assert torch.equal(a, b)
    with pytest.raises(InvalidValue, match="check_every"):
        solve_ivp(van_der_pol, y0, T, options={"check_every": 0})
