"""What a simulation was like, over time, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.common.files import replacing

if TYPE_CHECKING:
    from pilot.simulation.world import Moment

INK, FAINT, BLUE, ORANGE = "#333333", "#D9D9D9", "#0072B2", "#D55E00"


def plot_moments(path: Path, moments: Sequence[Moment], unit: str, title: str) -> None:
    """Four panels over the hours: miners up, utilisation, accepted work an hour, loss. A PNG that appears at once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    spans = list(zip([None, *moments[:-1]], moments, strict=True))
    hours = [m.time / 3600 for m in moments]
    panels: dict[str, tuple[list[float], str]] = {
        "miners up": ([m.up for m in moments], BLUE),
        "utilisation of those up": ([m.utilisation(before) for before, m in spans], BLUE),
        f"accepted {unit}, a second": (
            [(m.work - (b.work if b else 0)) / max(m.time - (b.time if b else 0.0), 1e-9) for b, m in spans],
            BLUE,
        ),
        "loss, as the miners saw it": ([m.loss for m in moments], ORANGE),
    }
    grid = figure.subplots(len(panels), 1, sharex=True)
    for axes, (name, (values, colour)) in zip(grid, panels.items(), strict=True):
        axes.plot(
            hours, values, color=colour, linewidth=1.2, drawstyle="steps-pre" if name == "miners up" else "default"
        )
        axes.set_ylabel(name, color=INK, fontsize=8)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.tick_params(colors=INK, length=0, labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
        if name != "loss, as the miners saw it":
            axes.set_ylim(bottom=0)
    grid[0].set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    grid[-1].set_xlabel("hours", color=INK)
    with replacing(path) as file:
        figure.savefig(file, format="png", facecolor="white")
