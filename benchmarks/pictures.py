"""python -m benchmarks.pictures: how the time of a solve grows, and what accuracy costs, compiled and beside the peers.

Each picture is measured by itself, in less than two minutes, and kept as numbers beside the other results; `--draw`
makes the files of docs/pictures from these. Times are medians of interleaved runs, without gradients and compilation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyode

from .__main__ import RESULTS, machine
from .bench_compiled import diffrax_cases, solution
from .cases import Case, Mlp, cases, van_der_pol
from .timing import Contender, interleaved

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
LONGEST = 4.0  # seconds; what took longer is left out of what is larger
STYLES = {
    "compiled": ("pyode, compiled", "o-", "#c0392b"),
    "eager": ("pyode, eager", "s-", "#2471a3"),
    "torchdiffeq": ("torchdiffeq", "^--", "#7d8a91"),
    "diffrax": ("diffrax (jit)", "d--", "#8e6bbf"),
}


def network(width: int, depth: int, rows: int) -> Case:
    """dy/dt by `depth` linear layers with tanh between them."""
    torch.manual_seed(0)
    return Case(f"network{rows}x{width}x{depth}", Mlp([width] * (depth + 1)), torch.randn(rows, width), UNIT)


UNIT = torch.tensor([0.0, 1.0])


def oscillators(rows: int) -> Case:
    """So many of van der Pol's oscillators; diffrax knows them by the name."""
    torch.manual_seed(0)
    return Case("vdp256", van_der_pol, torch.randn(rows, 2), UNIT)


SCALES: dict[str, tuple[str, Callable[[int], Case], tuple[int, ...]]] = {
    "rows": ("rows of van der Pol's oscillators", oscillators, (1, 10, 100, 1000, 10_000, 100_000, 1_000_000)),
    "width": ("width of two layers, 128 rows", lambda n: network(n, 2, 128), (2, 4, 8, 16, 32, 64, 128, 256, 512)),
    "depth": ("layers of width 32, 128 rows", lambda n: network(32, n, 128), (1, 2, 4, 6, 8)),
}
WORK = ("spiral20x2", "vdp256")
EVALUATIONS = 40  # by ten steps of rk4
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def contenders(case: Case, **arguments: Any) -> dict[str, Contender]:
    """Those who solve a case."""
    import torchdiffeq

    compiled = Case(case.name, pyode.compile(case.f, strict=True), case.y0, case.t)

    def run(case: Case, odeint: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return case.solve(odeint, **arguments)

    found: dict[str, Contender] = {
        "compiled": lambda: run(compiled, pyode.odeint),
        "eager": lambda: run(case, pyode.odeint),
        "torchdiffeq": lambda: run(case, torchdiffeq.odeint),
    }
    return found | (diffrax_cases.contenders(case, "solve", **arguments) if diffrax_cases else {})


def measure_scale(name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The time of each for every size, and what "auto" chooses."""
    _, make, sizes = SCALES[name]
    slow: set[str] = set()
    for size in sizes:
        case = make(size)
        timed = {key: run for key, run in contenders(case).items() if key not in slow}
        times = interleaved(timed, rounds=30, seconds=seconds, warm_up=1)
        slow |= {key for key, value in times.items() if value > LONGEST / 10}
        auto = pyode.compile(case.f, auto=True)
        solution(Case(case.name, auto, case.y0, case.t), pyode.odeint)
        ((native, eager),) = auto.costs.values()
        yield {"size": size, **times, "auto": "compiled" if native <= eager else "eager"}


def measure_work(name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The time and the error of each for every tolerance; errors against a solve in float64 at 1e-12."""
    case = cases()[name]
    with torch.no_grad():
        exact = case.to(torch.float64).solve(pyode.odeint, rtol=1e-12, atol=1e-12)
    for rtol in TOLERANCES:
        timed = contenders(case, rtol=rtol, atol=rtol / 100)
        times = interleaved(timed, rounds=100, seconds=seconds, warm_up=1)
        row: dict[str, Any] = {"rtol": rtol, **times}
        for key, run in timed.items():
            found = run()
            found = found if isinstance(found, Tensor) else diffrax_cases.as_torch(found)
            row[f"{key}_error"] = float((found.double() - exact).abs().mean() / exact.abs().mean())
        yield row


def measure_matrix(seconds: float) -> Iterator[dict[str, Any]]:
    """Multiply-adds of 256 rows and a square matrix: within a compiled solve, stages and all, and torch's alone."""
    for width in (16, 32, 64, 128, 256, 512):
        torch.manual_seed(0)
        layer, y0 = nn.Linear(width, width, bias=False), torch.randn(256, width)
        f = pyode.compile(lambda t, y, layer=layer: layer(y), strict=True)

        def solve(f: Any = f, y0: Tensor = y0) -> None:
            with torch.no_grad():
                pyode.odeint(f, y0, UNIT, method="rk4", options={"step_size": 0.1})

        def multiply(layer: nn.Linear = layer, y0: Tensor = y0) -> None:
            with torch.no_grad():
                for _ in range(EVALUATIONS):
                    layer(y0)

        times = interleaved({"compiled": solve, "torch": multiply}, rounds=200, seconds=seconds, warm_up=2)
        operations = 2 * 256 * width**2 * EVALUATIONS
        yield {"width": width, **{f"{key}_gflops": 1e-9 * operations / value for key, value in times.items()}}


def draw(results: dict[str, Any]) -> None:
    """Writes scaling.png and work-precision.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    PICTURES.mkdir(exist_ok=True)
    figure, axes = plt.subplots(1, len(SCALES), figsize=(13, 4), layout="constrained", sharey=True)
    for ax, (name, (label, _, sizes)) in zip(axes, SCALES.items()):
        for key, (who, style, color) in STYLES.items():
            points = [(row["size"], 1e6 * row[key]) for row in results.get(name, ()) if key in row]
            ax.plot([x for x, _ in points], [y for _, y in points], style, color=color, label=who, markersize=5)
        ax.set(xscale="log" if name != "depth" else "linear", yscale="log", xlabel=label)
        if name != "rows":
            ax.set_xticks(sizes, map(str, sizes))
            ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("microseconds a solve")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(PICTURES / "scaling.png", dpi=110)

    figure, axes = plt.subplots(1, len(WORK), figsize=(9.5, 4), layout="constrained")
    for ax, name in zip(axes, WORK):
        ax.set(xscale="log", yscale="log", xlabel=f"relative error, {name}")
        for key, (who, style, color) in STYLES.items():
            points = [(row[f"{key}_error"], 1e6 * row[key]) for row in results.get(name, ()) if key in row]
            ax.plot([x for x, _ in points], [y for _, y in points], style, color=color, label=who, markersize=5)
        ax.invert_xaxis()
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("microseconds a solve")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(PICTURES / "work-precision.png", dpi=110)


def main() -> None:
    """Measures what was asked for, and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*SCALES, *WORK, 'matrix'])}")
    parser.add_argument("--threads", type=int, default=2, help="of torch and pyode (default: 2)")
    parser.add_argument("--seconds", type=float, default=1.5, help="at most, for one point's rounds (default: 1.5)")
    parser.add_argument("--draw", action="store_true", help="draw the pictures from what has been measured")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    path = RESULTS / "pictures.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen.names:
        if name in SCALES:
            rows = measure_scale(name, chosen.seconds)
        else:
            rows = measure_matrix(chosen.seconds) if name == "matrix" else measure_work(name, chosen.seconds)
        results[name] = []
        for row in rows:
            print(name, row, flush=True)
            results[name].append(row)
        results["machine"] = machine()
        path.write_text(json.dumps(results, indent=1) + "\n")
    if chosen.draw:
        draw(results)


if __name__ == "__main__":
    main()
