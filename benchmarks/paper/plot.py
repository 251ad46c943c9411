"""The plots of the experiments, as SVG: one panel for each table.

A line over x for each column, with a band from the least to the greatest seed, and controls as
dashed lines; where the lines of the table have no place on an axis, one dot for each cell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.experiment import Experiment
from benchmarks.paper.markdown import heading

_WIDTH, _HEIGHT, _LINE_HEIGHT = 6.4, 3.6, 0.28
#: Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Cell = dict[str, Any]


def draw(experiment: Experiment, results: dict[str, Any], path: Path) -> None:
    """Write the plot of an experiment's results.

    Args:
        experiment: What was run.
        results: As its JSON holds them.
        path: An SVG file; its folder is made.
    """
    panels = [(block, measure) for block in results["blocks"] for measure in experiment.measures]
    lines = max(len({cell["row"] for cell in block["rows"]}) for block, _ in panels)
    along = any(cell["x"] is not None for block, _ in panels for cell in block["rows"])
    height = _HEIGHT if along else 1.2 + _LINE_HEIGHT * lines
    figure = Figure(figsize=(_WIDTH, height * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (block, measure) in zip(axes, panels, strict=True):
        ax.set_title(heading(block), fontsize="medium")
        if along:
            _lines(ax, experiment, block["rows"], measure)
        else:
            _dots(ax, experiment, block["rows"], measure)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same results give the same file.
    with mpl.rc_context({"svg.hashsalt": experiment.name, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _lines(ax: Axes, experiment: Experiment, cells: list[Cell], measure: str) -> None:
    placed = [cell for cell in cells if cell["x"] is not None]
    columns = list(dict.fromkeys(cell["column"] for cell in placed))
    for number, column in enumerate(columns):
        own = sorted((c for c in placed if c["column"] == column), key=lambda cell: cell["x"])
        x = [cell["x"] for cell in own]
        spread = [cell["values"][measure] for cell in own]
        colour = _COLOURS[number % len(_COLOURS)]
        marker = "os^D"[number // len(_COLOURS) % 4]
        ax.plot(x, [s["mean"] for s in spread], color=colour, marker=marker, ms=4, label=column)
        least, greatest = [s["min"] for s in spread], [s["max"] for s in spread]
        ax.fill_between(x, least, greatest, color=colour, alpha=0.15, linewidth=0)
    rest = [cell for cell in cells if cell["x"] is None]
    for number, cell in enumerate(rest):
        style = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))[number % 4]
        name = f"{cell['row']}, {cell['column']}"
        mean = cell["values"][measure]["mean"]
        ax.axhline(mean, color="0.35", linestyle=style, linewidth=1, label=name)
    if "x" in experiment.logarithmic:
        ax.set_xscale("log", base=2)
    if "y" in experiment.logarithmic:
        ax.set_yscale("log")
    ax.set_xlabel(experiment.line)
    ax.set_ylabel(experiment.measures[measure])
    ax.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))


def _dots(ax: Axes, experiment: Experiment, cells: list[Cell], measure: str) -> None:
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    for number, column in enumerate(columns):
        own = [cell for cell in cells if cell["column"] == column]
        spread = [cell["values"][measure] for cell in own]
        # Side by side, since what training makes of two networks is often the same.
        y = [rows.index(cell["row"]) + 0.16 * (number - (len(columns) - 1) / 2) for cell in own]
        mean = [s["mean"] for s in spread]
        error = [[s["mean"] - s["min"] for s in spread], [s["max"] - s["mean"] for s in spread]]
        colour = _COLOURS[number % len(_COLOURS)]
        ax.errorbar(mean, y, xerr=error, fmt="o", ms=4, color=colour, lw=1, label=column)
    ax.set_yticks(range(len(rows)), rows, fontsize="small")
    ax.invert_yaxis()
    ax.set_xlabel(experiment.measures[measure])
    ax.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
