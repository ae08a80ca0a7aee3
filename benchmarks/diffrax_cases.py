"""The workloads for diffrax: the same weights, states and tolerances, jitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from .cases import TOLERANCES, Case, Mlp
from .timing import Contender

ADJOINTS = {
    "RecursiveCheckpoint": diffrax.RecursiveCheckpointAdjoint,
    "Direct": diffrax.DirectAdjoint,
    "Backsolve": diffrax.BacksolveAdjoint,
}
MAX_STEPS = 4096  # what the adjoints that differentiate the loop make room for


def _van_der_pol(t: Any, y: Any, parameters: Any) -> Any:
    x, v = y[..., 0], y[..., 1]
    return jnp.stack([v, 5 * (1 - x * x) * v - x], -1)


def _lorenz(t: Any, y: Any, parameters: Any) -> Any:
    x, v, z = y[..., 0], y[..., 1], y[..., 2]
    return jnp.stack([10 * (v - x), x * (28 - z) - v, x * v - 8 / 3 * z], -1)


def _mlp(module: Mlp) -> tuple[Callable[..., Any], list[Any]]:
    """A network as a function of (t, y, parameters), and its parameters in torch's order."""
    parameters = [jnp.asarray(p.detach().numpy()) for p in module.parameters()]

    def f(t: Any, y: Any, parameters: Any) -> Any:
        if module.cubed:
            y = y**3
        if module.timed:
            y = jnp.concatenate([y, jnp.broadcast_to(t, (y.shape[0], 1)).astype(y.dtype)], 1)
        for i in range(0, len(parameters), 2):
            y = y @ parameters[i].T + parameters[i + 1]
            y = jnp.tanh(y) if i + 2 < len(parameters) else y
        return y

    return f, parameters


def solver(case: Case, adjoint: Any, **arguments: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """The states at the output times as a function of the start and the parameters, and these; not jitted yet."""
    if isinstance(case.f, nn.Module):
        f, parameters = _mlp(case.f)  # type: ignore[arg-type]
    else:
        f, parameters = {"vdp256": _van_der_pol, "lorenz1024": _lorenz}[case.name], []
    tolerances = TOLERANCES | arguments
    controller = diffrax.PIDController(rtol=tolerances["rtol"], atol=tolerances["atol"])
    times = jnp.asarray(case.t.numpy())

    def solve(y0: Any, parameters: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(f), diffrax.Dopri5(), case.t[0].item(), case.t[-1].item(), None, y0, parameters,
            saveat=diffrax.SaveAt(ts=times), stepsize_controller=controller, adjoint=adjoint, max_steps=MAX_STEPS,
        ).ys  # fmt: skip

    return solve, parameters


def contenders(case: Case, task: str, **arguments: Any) -> dict[str, Contender]:
    """Those of a task; one for each adjoint where gradients are wanted."""
    y0 = jnp.asarray(case.y0.numpy())
    if task == "gradient":
        return {f"diffrax {name}": run for name, make in ADJOINTS.items() if (run := _gradient(case, make, y0))}
    solve, parameters = solver(case, diffrax.RecursiveCheckpointAdjoint(), **arguments)
    if task == "per sample":
        solve = jax.vmap(solve, (0, None), 1)
    compiled = jax.jit(solve)
    return {"diffrax": lambda: compiled(y0, parameters).block_until_ready()}


def _gradient(case: Case, make: Any, y0: Any) -> Contender | None:
    solve, parameters = solver(case, make())
    compiled = jax.jit(jax.grad(lambda p: jnp.mean(solve(y0, p) ** 2)))
    try:
        compiled(parameters)
    except Exception:  # an adjoint that does not take this case
        return None
    return lambda: [g.block_until_ready() for g in compiled(parameters)]


def as_torch(x: Any) -> Any:
    """What a contender returns, as it would be from torch: a tensor, or one for each parameter."""
    return [as_torch(part) for part in x] if isinstance(x, list) else torch.from_numpy(np.array(x))
