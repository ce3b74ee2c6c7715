"""The loss curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pilot.common.files import replacing

# Told apart by every kind of colour vision, and in print (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (3, 2)), (0, (1, 1)))  # dashed, so that a curve under it shows through
_INK = "#333333"
_FAINT = "#D9D9D9"
_FEW_POINTS = 40  # up to here each point gets a dot


def loss_plot(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    logarithmic: bool = False,
) -> None:
    """Draw each series of (x, y) points, named by its key, to a PNG that appears at once. Takes no global state.

    `logarithmic` is the axis of x.

    Points that are not finite are left out; a series without any gets no curve.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
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
            alpha=1.0 if few else 0.6,  # many points are a noisy curve: the background of the others
            marker="o" if few else "",
            markersize=5 if index < 2 else 3,
        )
    if logarithmic:
        axes.set_xscale("log")
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=12)
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    axes.margins(x=0.02)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    if axes.lines:
        axes.legend(frameon=False, labelcolor=_INK, loc="upper right")
    with replacing(path) as file:
        figure.savefig(file, format="png", facecolor="white")
