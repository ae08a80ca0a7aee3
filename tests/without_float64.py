"""A device of its own, made of the CPU, and solves on it: a script, for a device can't be taken back.

It has no float64; or, if the script is given `--like-cuda` first, it has, and times live on it, as they do on CUDA.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import pyode
from pyode._ops import contract
from pyode.methods import METHODS

DEVICE = "single"
LIKE_CUDA = "--like-cuda" in sys.argv


class Single(Tensor):
    """A tensor of that device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Single:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=f"{DEVICE}:0"
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return carry_out(op, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        return self.held.tolist()


def carry_out(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator on the CPU; its result belongs to the device that was asked for, or its arguments'."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    wanted = kwargs.get("device")
    here = any(isinstance(x, Single) for x in tensors) if wanted is None else torch.device(wanted).type == DEVICE
    if any(isinstance(x, Single) for x in tensors) and wanted is None and "copy" not in op.name():
        strangers = [x for x in tensors if not isinstance(x, Single) and x.dim() > 0]
        assert not strangers, f"{op} of tensors on two devices"

    def taken(x: Any) -> Any:
        if isinstance(x, Single):
            return x.held
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == DEVICE else x

    def given(x: Any) -> Any:
        if not isinstance(x, Tensor) or not here:
            return x
        if x.dtype in (torch.float64, torch.complex128) and not LIKE_CUDA:
            raise TypeError(f"the device has no {x.dtype}: {op}")
        return Single(x)

    return pytree.tree_map(given, op(*pytree.tree_map(taken, args), **pytree.tree_map(taken, kwargs)))


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


def register() -> None:
    _setup_privateuseone_for_python_backend(DEVICE, Module())
    for name, op in (
        ("empty.memory_format", torch.ops.aten.empty.memory_format),
        ("empty_strided", torch.ops.aten.empty_strided.default),
        ("eye", torch.ops.aten.eye.default),
        ("arange", torch.ops.aten.arange.default),
        ("arange.start", torch.ops.aten.arange.start),
        ("_to_copy", torch.ops.aten._to_copy.default),
    ):
        torch.library.impl(f"aten::{name}", "PrivateUse1")(lambda *a, op=op, **k: carry_out(op, *a, **k))


def keep_time_there() -> None:
    """Puts the device where pyode asks for CUDA's clock."""
    replaced = {contract.clock_device: lambda device: device, contract.wide_dtype: lambda device: torch.float64}
    for module in [module for name, module in sys.modules.items() if name.startswith("pyode")]:
        for name, value in [*vars(module).items()]:
            if inspect.isfunction(value) and value in replaced:
                setattr(module, name, replaced[value])


class Field(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.3, 2.0], [-2.0, 0.1]]).to(device))

    def forward(self, t, y):
        return torch.tanh(y @ self.matrix) + torch.cos(t).reshape(-1, 1)


def options_of(method: str) -> dict:
    if METHODS[method].adaptive:
        return {"method": method, "options": {}}
    return {"method": method, "rtol": 1e-3, "options": {"step_size": 0.25}}


def close(on_device: Tensor, on_cpu: Tensor, tolerance: float = 1e-3) -> None:
    assert on_device.device.type == DEVICE, on_device.device
    found = on_device.detach().cpu()
    assert torch.allclose(found, on_cpu.detach(), rtol=tolerance, atol=tolerance), (found, on_cpu)


def solve(device: str, interface: str, **kwargs: Any) -> list[Tensor]:
    """A solution, and the gradients of a sum of it."""
    y0 = torch.tensor([[1.0, -0.5]]).to(device).requires_grad_()
    t, func = torch.tensor([0.0, 0.55, 1.0]).to(device), Field(device)
    leaves = [y0, func.matrix]
    if METHODS[kwargs["method"]].adaptive:  # a device of this kind has no streams, and no graph that leaves it
        leaves.append(t.requires_grad_())
    y = getattr(pyode, interface)(func, y0, t, **{"rtol": 1e-3, "atol": 1e-4, **kwargs})
    if not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad(y.sum(), leaves)]


def solve_samples(device: str, method: str, control: str, gradient: str, events: bool) -> list[Tensor]:
    """A solution of solve_ivp, and the gradients of a sum of it."""
    y0 = torch.tensor([[1.0, -0.5], [0.2, 0.4], [-1.0, 0.3]]).to(device).requires_grad_()
    t, func = torch.tensor([0.0, 0.55, 1.0]).to(device), Field(device)
    level = func.matrix.detach()[0, 0] + 1.6  # 1.3: the first sample gets there
    how = {"dense_output": True} if gradient == "direct" else {}
    if events:
        per_sample = control == "per_sample"
        how["event_fn"] = lambda t, y: (y[:, 0] if per_sample else y[0, 0]) - level + 0 * t.to(torch.float32)
    solution = pyode.solve_ivp(
        func, y0, t, rtol=1e-3, atol=1e-4, method=method, control=control, gradient=gradient, **how
    )
    found = [solution.ys.nan_to_num(), solution.event_y.nan_to_num()]
    if how.get("dense_output") and not events:
        found.append(solution.interpolant(torch.tensor([0.3, 0.7])))
    loss = sum(x.sum() for x in found)
    assert bool((solution.status == pyode.Status.EVENT).any()) == events
    return [*found, *torch.autograd.grad(loss, [y0, func.matrix])]


def check(name: str) -> None:
    """Compares what is computed there with what the CPU computes."""
    method, _, interface = name.partition(" by ")
    if interface == "checkpoint":
        options = options_of(method)
        options["options"] = {**options["options"], "gradient": "checkpoint"}
        for there, here in zip(*(solve(device, "odeint", **options) for device in (DEVICE, "cpu"))):
            close(there, here)
        return
    if interface == "per_sample":
        for solver in ("odeint", "odeint_adjoint"):
            options = {"method": method, "options": {"control": "per_sample", "step_t": torch.tensor([0.3])}}
            for there, here in zip(*(solve(device, solver, **options) for device in (DEVICE, "cpu"))):
                close(there, here)
        return
    if interface.startswith("solve_ivp"):
        _, control, gradient, *events = interface.split()
        results = (solve_samples(device, method, control, gradient, bool(events)) for device in (DEVICE, "cpu"))
        for there, here in zip(*results):
            close(there, here)
        return
    if interface in ("odeint", "odeint_adjoint"):
        for there, here in zip(*(solve(device, interface, **options_of(method)) for device in (DEVICE, "cpu"))):
            close(there, here)
        return
    results = []
    for device in (DEVICE, "cpu"):
        y0, func = torch.tensor([[1.0, -0.5]]).to(device), Field(device)
        kwargs = {"rtol": 1e-3, "atol": 1e-4, **options_of(method)}
        if interface == "odeint_event":
            t0 = torch.tensor(0.0).to(device)
            time, states = pyode.odeint_event(func, y0, t0, event_fn=lambda t, y: y[0, 0] - 0.5 + 0 * t, **kwargs)
            results.append((time, states))
        elif interface == "odeint_dense":
            results.append((pyode.odeint_dense(func, y0, 0.0, 1.0, **kwargs)(torch.tensor([0.3, 0.7])),))
        else:
            assert interface == "options"
            kwargs["options"] = {
                **kwargs["options"], "dtype": torch.float32, "step_t": torch.tensor([0.25]).to(device),
                "jump_t": torch.tensor([0.5]).to(device),
            }  # fmt: skip
            kwargs["atol"] = torch.tensor([1e-5, 1e-4]).to(device)
            results.append((pyode.odeint(func, y0, torch.tensor([0.0, 1.0]).to(device), **kwargs),))
    for there, here in zip(*results):
        close(there, here)


if __name__ == "__main__":
    register()
    if LIKE_CUDA:
        keep_time_there()
    for case in sys.argv[1 + LIKE_CUDA :]:
        try:
            check(case)
        except Exception as error:
            raise RuntimeError(case) from error
    os._exit(0)  # autograd's thread of such a device does not end by itself
