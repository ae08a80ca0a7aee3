"""Work-precision of gradients: how far a training step's gradient is off, and what it costs, over tolerances."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyode

from .bench_training import exact_gradient, relative_error
from .cases import Case, cases
from .timing import Contender, interleaved, processor_seconds_of, seconds_of

TITLE = "The gradient's error (relative, against float64 at 1e-10) and time, over tolerances (dopri5, float32)"
COLUMNS = {
    "case": "case",
    "rtol": "rtol",
    "solver": "solver and gradient",
    "ms": "[ms]",
    "error": "error",
    "rounding": "against backpropagation through the same steps in float64",
}
CASES = ("spiral20x2", "big256x64")
RTOLS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "pyode, direct": pyode.odeint,
    "pyode, checkpoint": partial(pyode.odeint, options={"gradient": "checkpoint"}),
    "pyode, adjoint": pyode.odeint_adjoint,
    "torchdiffeq, direct": torchdiffeq.odeint,
    "torchdiffeq, adjoint": torchdiffeq.odeint_adjoint,
}


def through_the_same_steps(case: Case, **tolerances: float) -> Tensor:
    """The gradient by backpropagation in float64 through the steps that the solve in float32 takes."""
    ends: list[Tensor] = []

    class Noting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = case.f

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.f(t, y)  # type: ignore[no-any-return]

        def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            ends.append(t0 + dt)

    with torch.no_grad():
        pyode.odeint(Noting(), case.y0, case.t, **tolerances)
    # Tolerances that accept every step, and steps that end where those did.
    options = {"step_t": torch.stack(ends), "first_step": 1e3, "min_step": 1e-12}
    return case.to(torch.float64).gradient(pyode.odeint, rtol=1e12, atol=1e12, options=options)


def measure(seconds: float = 20.0, clock: Callable[[Contender], float] = seconds_of) -> list[dict[str, Any]]:
    """A row for each case, tolerance and solver."""
    rows = []
    for name in CASES:
        case = cases()[name]
        exact = exact_gradient(case)
        for rtol in RTOLS:
            tolerances = {"rtol": rtol, "atol": rtol / 100}
            contenders: dict[str, Contender] = {
                solver: partial(case.gradient, solve, **tolerances) for solver, solve in SOLVERS.items()
            }
            same_steps = through_the_same_steps(case, **tolerances)
            for solver, time in interleaved(contenders, seconds=seconds / len(RTOLS), clock=clock).items():
                gradient = contenders[solver]()
                rows.append(
                    {
                        "case": name,
                        "rtol": rtol,
                        "solver": solver,
                        "ms": 1e3 * time,
                        "error": relative_error(gradient, exact),
                        "rounding": relative_error(gradient, same_steps),
                    }
                )
    return rows


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._seen:
            self._seen.add(address)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


MEMORY_MODES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "direct": (pyode.odeint, {}),
    "checkpoint": (pyode.odeint, {"gradient": "checkpoint"}),
    "checkpoint, checkpoints=10": (pyode.odeint, {"gradient": "checkpoint", "checkpoints": 10}),
    "adjoint": (pyode.odeint_adjoint, {}),
    "torchdiffeq, direct": (torchdiffeq.odeint, {}),
}


def states_alive(name: str, n_steps: int, size: int) -> float:
    """At the peak of a forward and a backward pass, in states: rk4 with an elementwise func, float32."""
    solve, options = MEMORY_MODES[name]
    rate, y0 = torch.full((size,), -1.0, requires_grad=True), torch.ones(size, requires_grad=True)
    func = _Decay(rate)
    with LiveBytes() as live:
        y = solve(func, y0, torch.tensor([0.0, 1.0]), method="rk4", options={**options, "step_size": 1 / n_steps})
        y[-1].sum().backward()
    return live.most / (4 * size)


class _Decay(torch.nn.Module):
    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(rate)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y


def measure_memory(size: int = 1_000_000, most_direct: int = 100) -> list[dict[str, Any]]:
    """A row for each gradient: states alive at the peak for 10, 100 and 1000 steps."""
    rows = []
    for name in MEMORY_MODES:
        row: dict[str, Any] = {"gradient": name}
        for n in (10, 100, 1000):
            small = name.endswith("direct") and n > most_direct  # a hundredth of it, to have room
            row[str(n)] = states_alive(name, n, size // 100 if small else size)
        rows.append(row)
    return rows


def best(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those than which no other is both as fast and as accurate, the fastest first."""
    kept: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["ms"], p["error"])):
        if not kept or point["error"] < kept[-1]["error"]:
            kept.append(point)
    return kept


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The picture: error against time, for each solver a line through its best points; the others are faint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(CASES), figsize=(10, 4.4), constrained_layout=True)
    for axis, name in zip(axes, CASES):
        for solver in SOLVERS:
            points = [row for row in rows if row["case"] == name and row["solver"] == solver]
            style = "--" if solver.startswith("torchdiffeq") else "-"
            at = [[p[of] for p in best(points)] for of in ("error", "ms")]
            (line,) = axis.loglog(*at, style, marker="o", label=solver)
            at = [[p[of] for p in points] for of in ("error", "ms")]
            axis.loglog(*at, "o", color=line.get_color(), alpha=0.3, zorder=1)
        axis.set(title=name, xlabel="error of the parameters' gradient", ylabel="forward and backward, one thread [ms]")
        axis.invert_xaxis()
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SOLVERS))
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    import argparse
    import json

    parser = argparse.ArgumentParser(description="Draw the work-precision picture of gradients.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("docs/gradients.png"))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case (default: 20)")
    parser.add_argument("--draw", action="store_true", help="draw what was measured last")
    chosen = parser.parse_args()
    numbers = Path(__file__).parent / "results" / "gradients.json"
    if not chosen.draw:
        torch.set_num_threads(1)
        numbers.write_text(json.dumps(measure(chosen.seconds, processor_seconds_of), indent=1) + "\n")
    draw(json.loads(numbers.read_text()), chosen.path)
