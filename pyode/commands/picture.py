"""The demo's picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Fields = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

# Dots and broad strokes are the data, lines and thin strokes the fit.
_BLUE, _ORANGE, _DARK, _QUIET = "#2f6db3", "#dd7a30", "#27313d", "#9aa3ad"
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#606873",
    "axes.labelcolor": _DARK,
    "xtick.color": "#606873",
    "ytick.color": "#606873",
    "legend.frameon": False,
}
_DOTS = {"marker": "o", "linestyle": "none", "markersize": 5, "markeredgewidth": 0, "alpha": 0.35}
_LEGEND = {  # above the panel, on the right
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "borderaxespad": 0.1,
    "handlelength": 1.3,
    "handletextpad": 0.5,
    "columnspacing": 1.3,
}
_SQUARE = {"xlabel": "y₁", "ylabel": "y₂", "xlim": (-2.2, 2.2), "ylim": (-2.2, 2.2), "aspect": "equal"}


def obstacle(path: Path) -> str | None:
    """Why no picture can be written there, if so: known before there is one. Makes its folder."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        return f"its suffix must be one of {', '.join(f'.{kind}' for kind in sorted(kinds))}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    return None


def draw(times: Tensor, data: Tensor, fit: Tensor, fields: Fields, losses: list[float], path: Path) -> None:
    """Writes the picture: data and fit over time, phase plane, vector field, loss.

    Args:
        times: [T].
        data, fit: [T, 2], two trajectories.
        fields: the true derivative and the learned one, [..., 2] to [..., 2].
        losses: of every training step.
        path: of the file; its suffix says of what kind.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(12, 7.6), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.3), hspace=0.06, wspace=0.06)
        _draw_times(figure.add_subplot(grid[0, :]), times, data, fit)
        _draw_plane(figure.add_subplot(grid[1, 0]), data, fit)
        _draw_field(figure.add_subplot(grid[1, 1]), fields)
        _draw_loss(figure.add_subplot(grid[1, 2]), losses)
        figure.savefig(path)


def _draw_times(axes: Any, times: Tensor, data: Tensor, fit: Tensor) -> None:
    for i, (color, name) in enumerate(((_BLUE, "y₁"), (_ORANGE, "y₂"))):
        axes.plot(times[::4], data[::4, i], **_DOTS, color=color, label=f"{name}, data")
        axes.plot(times, fit[:, i], color=color, lw=1.5, label=f"{name}, fit")
    axes.set(title="Data and fit over time", xlabel="t", xlim=(0, float(times[-1])))
    axes.legend(ncols=4, **_LEGEND)


def _draw_plane(axes: Any, data: Tensor, fit: Tensor) -> None:
    axes.plot(*data[::3].T, **_DOTS, color=_BLUE, label="data")
    axes.plot(*fit.T, color=_DARK, lw=1.1, label="fit")
    axes.set(title="Phase plane", **_SQUARE)
    axes.legend(ncols=2, **_LEGEND)


def _draw_field(axes: Any, fields: Fields) -> None:
    from matplotlib.patches import Patch

    ticks = torch.linspace(-2.0, 2.0, 14)
    points = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)
    with torch.no_grad():
        true, learned = (field(points) for field in fields)
    for arrows, color, width, alpha, head in ((true, _BLUE, 0.018, 0.35, 1.8), (learned, _DARK, 0.005, 1.0, 3.2)):
        axes.quiver(
            *points.unbind(-1), *nn.functional.normalize(arrows, dim=-1).unbind(-1), pivot="mid", scale=18, linewidth=0,
            color=color, alpha=alpha, width=width, headwidth=head, headlength=1.2 * head, headaxislength=1.1 * head,
        )  # fmt: skip
    axes.set(title="Vector field", **_SQUARE)
    legend = [Patch(color=_BLUE, alpha=0.35, lw=0, label="true"), Patch(color=_DARK, lw=0, label="learned")]
    axes.legend(handles=legend, ncols=2, **_LEGEND)


def _draw_loss(axes: Any, losses: list[float]) -> None:
    width = max(1, min(50, len(losses) // 4))
    smooth = torch.tensor(losses).unfold(0, width, 1).mean(1)
    steps = range(1, len(losses) + 1)
    axes.semilogy(steps, losses, color=_QUIET, lw=0.6, alpha=0.7, label="mini-batch")
    axes.semilogy(steps[width - 1 :], smooth, color=_DARK, lw=1.8, label=f"mean of {width}")
    axes.set(title="Loss", xlabel="training step", ylabel="mean |y - data|", xlim=(1, max(2, len(losses))))
    axes.set_box_aspect(1)
    axes.grid(axis="y", color="#e4e7eb", lw=0.8)
    axes.legend(ncols=2, **_LEGEND)
