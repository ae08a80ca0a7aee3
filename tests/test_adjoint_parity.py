"""odeint_adjoint against torchdiffeq's: the same steps with adjoint_options={"restart": True}, the same gradients."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from fields import TIGHT, Y0, Field, T, assert_close, gradients, loss_of
from parity_cases import ADJOINTS

import pyode

RESTART = {"restart": True}


@pytest.mark.filterwarnings("ignore:An adjoint parameter was passed:UserWarning")
@pytest.mark.parametrize("name", ADJOINTS)
@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize(("method", "rtol"), [("dopri5", 1e-6), ("bosh3", 1e-5)])
def test_with_restart_they_are_torchdiffeqs(name, time, method, rtol):
    found, calls = [], []
    for module, restart in ((pyode, RESTART), (torchdiffeq, {})):
        kwargs = {**ADJOINTS[name], "rtol": rtol, "atol": rtol / 10, "method": method}
        adjoint_options = kwargs.get(
            "adjoint_options", {k: v for k, v in kwargs.get("options", {}).items() if k != "norm"}
        )
        kwargs["adjoint_options"] = {**adjoint_options, **restart}
        field, y0, t = Field(), Y0.clone().requires_grad_(), T.clone().requires_grad_(time)
        loss_of(module.odeint_adjoint(field, y0, t, **kwargs)).backward()
        found.append([y0.grad, t.grad, *(p.grad for p in field.parameters())])
        calls.append(field.calls)
    # torchdiffeq integrates the time's gradient also where t wants none, and has its error in the norm.
    assert calls[0] == calls[1] or not time
    # The same steps; their sizes have the noise of the error estimate, as in test_parity.py.
    assert_close(*found, 1e-7 if time else 1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.07}, {"step_size": 0.1, "perturb": True}], ids=str)
def test_of_fixed_steps_they_are_torchdiffeqs(method, sign, options):
    ours, theirs = (
        gradients(module.odeint_adjoint, sign, method=method, options=options) for module in (pyode, torchdiffeq)
    )
    assert_close(ours, theirs, 1e-11)


def test_in_float32_the_error_is_no_larger_than_torchdiffeqs():
    t, errors = torch.linspace(0, 1.3, 10), {}
    field, y0 = Field(), Y0.clone().requires_grad_()
    loss_of(pyode.odeint(field, y0, t.double(), **TIGHT)).backward()
    exact = torch.cat([y0.grad.flatten(), *(p.grad.flatten() for p in field.trained())])
    for module in (pyode, torchdiffeq):
        field, y0 = Field(torch.float32), Y0.float().requires_grad_()
        loss_of(module.odeint_adjoint(field, y0, t, rtol=1e-5, atol=1e-7)).backward()
        found = torch.cat([y0.grad.flatten(), *(p.grad.flatten() for p in field.trained())])
        errors[module] = float((found - exact).norm() / exact.norm())
    assert errors[pyode] <= max(2 * errors[torchdiffeq], 1e-5)  # both are some roundings of float32
