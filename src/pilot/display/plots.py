"""Plot curves to PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pilot.common.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable with every kind of colour vision, and in print (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (3, 2)), (0, (1, 1)))  # dashed curves let the one below show through
_INK = "#333333"
_FAINT = "#D9D9D9"
_FEW_POINTS = 40  # mark each point of curves that have at most so many


def loss_plot(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    logarithmic: bool = False,
) -> None:
    """Draw series of (x, y) points, by name, into one plot, and write it atomically. Uses no global state.

    Points that are not finite are left out, and so is a series without others. `logarithmic` refers to the x axis.
    """
    figure = _figure(height=4.5)
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(series.items()):
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if not finite:
            continue
        xs, ys = zip(*finite, strict=True)
        few = len(xs) <= _FEW_POINTS
        axes.plot(
            xs,
            ys,
            label=f"{name}  {ys[-1]:.3f}",
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[0 if index < 2 else 1 if index < len(_COLOURS) else 2],
            linewidth=1.8 if few else 1.0,
            alpha=1.0 if few else 0.6,  # a curve of many points is noisy: keep it in the background
            marker="o" if few else "",
            markersize=5 if index < 2 else 3,
        )
    if logarithmic:
        axes.set_xscale("log")
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=12)
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.margins(x=0.02)
    _style(axes)
    if axes.lines:
        axes.legend(frameon=False, labelcolor=_INK, loc="upper right")
    _save(figure, path)


class Panel(NamedTuple):
    """One of several plots that share the x axis."""

    label: str
    values: Sequence[float]
    steps: bool = False  # draw each value from the x before it
    from_zero: bool = True  # whether the y axis begins at 0


def panel_plot(path: Path, xs: Sequence[float], panels: Sequence[Panel], title: str, xlabel: str) -> None:
    """Draw panels one below the other over the same `xs`, and write them atomically."""
    figure = _figure(height=2.0 * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        style = "steps-pre" if panel.steps else "default"
        axes.plot(xs, panel.values, color=_COLOURS[not panel.from_zero], linewidth=1.2, drawstyle=style)
        axes.set_ylabel(panel.label, color=_INK, fontsize=8)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        _style(axes, labelsize=8)
    grid[0].set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    grid[-1].set_xlabel(xlabel, color=_INK)
    _save(figure, path)


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, labelsize: float = 10) -> None:
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0, labelsize=labelsize)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", facecolor="white")
