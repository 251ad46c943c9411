"""Write docs/width.md and its plot from the results of benchmarks/width.py, or check the page.

python -m benchmarks.width_table           # rewrite docs/width.md and docs/width.svg
python -m benchmarks.width_table --check   # exit with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pages import update
from benchmarks.width import (
    ENSEMBLE,
    MATCHED,
    MEMBER,
    MEMBER_MATCHED,
    PRUNED,
    PRUNED_MATCHED,
    REFITTED,
    RESULTS,
    ROOT,
)

PAGE = ROOT / "docs" / "width.md"
PLOT = PAGE.with_suffix(".svg")
COLUMNS = (REFITTED, MATCHED, PRUNED, PRUNED_MATCHED)
COLOURS = dict(zip(COLUMNS, ("#56B4E9", "#0072B2", "#E69F00", "#D55E00"), strict=True))


class Block(NamedTuple):
    """All seeds of one network in one setting: each row's measurements by (row, width)."""

    network: str
    data: str
    setting: str
    n: int
    seeds: int
    rows: dict[tuple[str, float], list[dict[str, Any]]]

    @property
    def title(self) -> str:
        return f"{self.network} on {self.data}, {self.setting}, N = {self.n}"

    @property
    def widths(self) -> list[float]:
        return sorted({width for name, width in self.rows if name == REFITTED})

    def mean(self, name: str, width: float, key: str = "accuracy") -> float:
        return statistics.mean(row[key] for row in self.rows[name, width])

    def spread(self, name: str, width: float) -> str:
        values = [row["accuracy"] for row in self.rows.get((name, width), ())]
        if not values:
            return ""
        return f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


class Wanted(NamedTuple):
    """One figure that was to be reached: what is compared, and by how much it may stay behind."""

    what: str
    block: Block
    name: str
    width: float
    reference: tuple[str, float]
    slack: float

    @property
    def difference(self) -> float:
        return self.block.mean(self.name, self.width) - self.block.mean(*self.reference)

    @property
    def reached(self) -> bool:
        # Means of equal accuracies may differ by rounding.
        return self.difference >= -self.slack - 1e-6


def blocks_of(results: dict[str, Any]) -> list[Block]:
    """The cases, seeds together."""
    found: dict[tuple[str, str, str, int], Block] = {}
    cases = sorted(results["cases"], key=lambda c: (c["setting"], c["n"], c["network"], c["seed"]))
    for case in cases:
        key = case["network"], case["data"], case["setting"], case["n"]
        block = found.get(key) or Block(*key, 0, {})
        found[key] = block._replace(seeds=block.seeds + 1)
        for row in case["rows"]:
            block.rows.setdefault((row["row"], row["width"]), []).append(row)
    return list(found.values())


def figures_of(blocks: list[Block]) -> Iterator[Wanted]:
    """The figures of the issue that asked for them, for each block that they speak of."""
    for block in blocks:
        ensemble, member = (ENSEMBLE, float(block.n)), (MEMBER, 1.0)
        if block.setting == "specialists":
            yield Wanted("width 1 within 0.2 of the ensemble", block, MATCHED, 1, ensemble, 0.2)
            yield Wanted("width 1.25 at the ensemble", block, MATCHED, 1.25, ensemble, 0)
        else:
            what = "width 0.75 within 0.1 of the best member"
            yield Wanted(what, block, MATCHED, 0.75, member, 0.1)
            wide = 1.5 if block.n == 2 else 2.0
            what = f"width {wide:g} within 0.2 of the ensemble"
            yield Wanted(what, block, MATCHED, wide, ensemble, 0.2)
        for width in (w for w in block.widths if (PRUNED, w) in block.rows):
            what = f"width {width:g} at or ahead of the pruned member, matched as long"
            yield Wanted(what, block, MATCHED, width, (PRUNED_MATCHED, width), 0)


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    blocks = blocks_of(results)
    about = results["cases"][0]["conditions"]
    commits = sorted({case["conditions"]["commit"] for case in results["cases"]})
    counts = {block.seeds for block in blocks}
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    figures = list(figures_of(blocks))
    lines = [
        "# What each width reaches",
        "",
        "Units are chosen by `obs` and refitted in closed form. The networks are then matched to "
        f"the ensemble for {results['steps']} steps of {results['batch']} inputs. Both take at "
        f"most {results['calibration']:,} training inputs without labels. There are two controls. "
        "One is the member that validates best, the other is that member after torch-pruning "
        "(group L2 magnitude) to the same width. Both are matched to the ensemble for as long. "
        "Numbers are test accuracies in percent: mean [least, greatest] over the seeds. "
        "Parameters and floating-point operations are in units of a member.",
        "",
        f"`python -m benchmarks.width`; {seeds} seeds, torch "
        f"{about['torch']}, torch-pruning {about['torch-pruning']}, python {about['python']}, "
        f"{about['threads']} thread on {about['device']} ({about['machine']}), commit "
        f"{', '.join(commits)}.",
        "",
        f"![Accuracy against operations]({PLOT.name})",
        "",
        "## Figures that were to be reached",
        "",
        f"{sum(f.reached for f in figures)} of {len(figures)} are, by the means over the seeds.",
        "",
        "| figure | reached | difference, **where it is not reached** |",
        "| --- | ---: | --- |",
    ]
    for what, found in itertools.groupby(sorted(figures, key=_order), _order):
        each = list(found)
        told = (
            f"{'' if f.reached else '**'}{f.block.network} N = {f.block.n} {f.difference:+.2f}"
            f"{'' if f.reached else '**'}"
            for f in each
        )
        reached = f"{sum(f.reached for f in each)} of {len(each)}"
        lines.append(f"| {': '.join(what)} | {reached} | {', '.join(told)} |")
    for block in blocks:
        lines += ["", f"## {block.title}", "", *_table(block)]
    return "\n".join(lines) + "\n"


def _order(figure: Wanted) -> tuple[str, str]:
    return figure.block.setting, figure.what


def _table(block: Block) -> Iterator[str]:
    references = {
        "best member": (MEMBER, 1.0),
        "matched as long": (MEMBER_MATCHED, 1.0),
        "ensemble": (ENSEMBLE, float(block.n)),
    }
    told = (f"{name} {block.spread(*key)}" for name, key in references.items())
    yield f"{block.seeds} seeds; {', '.join(told)}."
    yield ""
    yield f"| width | parameters | operations | {' | '.join(COLUMNS)} |"
    yield f"| ---: | ---: | ---: | {' | '.join('---:' for _ in COLUMNS)} |"
    for width in block.widths:
        costs = (
            block.mean(REFITTED, width, key) / block.mean(MEMBER, 1.0, key)
            for key in ("parameters", "flops")
        )
        cells = [f"{width:g}", *(f"{cost:.2f}" for cost in costs)]
        cells += [block.spread(name, width) for name in COLUMNS]
        yield f"| {' | '.join(cells)} |"


def draw(blocks: list[Block], path: Path) -> None:
    """The plot: accuracy over operations, one panel for each block."""
    # One column, which a telephone can show.
    figure = Figure(figsize=(4.8, 3 * len(blocks)), layout="constrained")
    axes = figure.subplots(len(blocks), squeeze=False)[:, 0]
    for ax, block in zip(axes, blocks, strict=True):
        _panel(ax, block)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize="small")
    # The same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "width", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(ax: Axes, block: Block) -> None:
    member = block.mean(MEMBER, 1.0, "flops")
    for name in COLUMNS:
        widths = sorted(width for row, width in block.rows if row == name)
        x = [block.mean(name, width, "flops") / member for width in widths]
        values = [[row["accuracy"] for row in block.rows[name, width]] for width in widths]
        ax.plot(x, [statistics.mean(v) for v in values], "o-", ms=3, label=name, c=COLOURS[name])
        least, most = [min(v) for v in values], [max(v) for v in values]
        ax.fill_between(x, least, most, color=COLOURS[name], alpha=0.15, linewidth=0)
    for name, width, marker in (
        (MEMBER, 1.0, "s"),
        (MEMBER_MATCHED, 1.0, "D"),
        (ENSEMBLE, float(block.n), "*"),
    ):
        x = block.mean(name, width, "flops") / member
        ax.plot([x], [block.mean(name, width)], marker, ms=8, mfc="none", c="black", label=name)
    # What is at chance would leave the rest no room.
    top = block.mean(ENSEMBLE, float(block.n))
    ax.set_ylim(bottom=min(block.mean(MEMBER, 1.0), top) - 0.15 * top)
    ax.set_xscale("log", base=2)
    ax.set_title(block.title, fontsize="small")
    ax.set_xlabel("operations, in units of a member")
    ax.set_ylabel("test accuracy, %")
    ax.grid(alpha=0.3)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the page, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    asked = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if not asked.check:
        draw(blocks_of(results), PLOT)
    return update({PAGE: page(results)}, "python -m benchmarks.width_table", check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
