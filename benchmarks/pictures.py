"""Draws the pictures of README and of the site: how a fusion works, and what was measured.

python -m benchmarks.pictures           # rewrite docs/pictures/*.svg and README's sentences
python -m benchmarks.pictures --check   # exit with 1 when one of them is out of date
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import run, with_tables

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
#: Colours that people with any colour vision can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73")
GREY = "#8A8F98"
#: The importance of each member's four units; the picture keeps the largest four of all.
IMPORTANCE = ((0.9, 0.3, 0.55, 0.2), (0.25, 0.8, 0.4, 0.6), (0.35, 0.15, 0.7, 0.5))
#: A panel of its own, so that the picture can be read on any page, light or dark.
_STYLE = """<style>
text { font: 16px system-ui, sans-serif; fill: #1f2328; }
.panel { fill: #ffffff; stroke: #d0d7de; }
.line { stroke: #8a8f98; }
.title { font-weight: 600; }
.small { font-size: 15px; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .panel { fill: #1c2128; stroke: #444c56; }
}
</style>"""


def pages() -> Mapping[Path, str]:
    """The pictures, and README with its sentences on what was measured."""
    rows = _results("real/mlps")["rows"]
    readme = with_tables(README.read_text(encoding="utf-8"), "figure", sentence(rows))
    ours, theirs = _results("cifar10")["rows"], _results("rivals/zip_it")["rows"]
    readme = with_tables(readme, "specialists", specialists(ours, theirs))
    return {
        FOLDER / "fusion.svg": fusion(),
        FOLDER / "mlps.svg": accuracies(rows),
        FOLDER / "latency.svg": latencies(_results("inference")),
        FOLDER / "fusing.svg": costs(_results("fusion")),
        README: readme,
    }


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def fusion() -> str:
    """Members, their units in order of importance, and the network made of the first ones."""
    parts = [_text(81, 34, "3 members", "title"), _text(262, 34, "Units, ranked", "title")]
    parts += [_text(449, 34, "1 network", "title")]
    for member, importance in enumerate(IMPORTANCE):
        parts += _network(16, 62 + 84 * member, [(member, size) for size in importance])
    units = [(size, m) for m, sizes in enumerate(IMPORTANCE) for size in sizes]
    units.sort(reverse=True)
    for place, (size, member) in enumerate(units):
        x, y = 208 + 36 * (place % 4), 95 + 84 * (place // 4)
        parts.append(_unit(x, y, size, member, 1 if place < 4 else 0.25))
    parts.append(
        '<rect x="186" y="68" width="152" height="54" rx="10" fill="none" class="line" '
        'stroke-dasharray="5 4"/>'
    )
    parts += [_text(262, 143, "kept", "small"), _text(262, 302, "dropped", "small")]
    parts += [_arrow(152, 179, 184), _arrow(342, 179, 374)]
    parts += _network(384, 146, [(member, size) for size, member in units[:4]])
    for x, lines in (
        (81, ("one architecture,", "trained apart")),
        (262, ("a unit: a channel and", "all that is tied to it")),
        (449, ("refitted, matched,", "checked")),
    ):
        parts += [_text(x, 336 + 20 * i, line, "small") for i, line in enumerate(lines)]
    title = "Units of three members are ranked; the most important ones form one network"
    return _svg(530, 374, title, parts)


def _network(x: float, y: float, units: Sequence[tuple[int, float]]) -> list[str]:
    """One layer of units between an input and an output, 130 wide and 66 high."""
    parts = []
    for place in range(4):
        at = x + 17 + 32 * place
        parts.append(f'<path d="M{x + 65} {y + 66} L{at} {y + 33} L{x + 65} {y}" {_LINE}/>')
    for place, (member, size) in enumerate(units):
        parts.append(_unit(x + 17 + 32 * place, y + 33, size, member))
    return [*parts, _circle(x + 65, y, 5, GREY), _circle(x + 65, y + 66, 5, GREY)]


def _unit(x: float, y: float, size: float, member: int, opacity: float = 1) -> str:
    return _circle(x, y, 6 + 9 * size, COLOURS[member], opacity)


_LINE = 'class="line" fill="none" stroke-width="1"'


def accuracies(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in percent for each number of members."""
    groups = {
        f"{count} members": [
            (label, colour, _mean(rows, count, name)) for name, (label, colour) in _NAMES.items()
        ]
        for count in dict.fromkeys(row["members"] for row in rows)
    }
    title = "Accuracy of MLPs that saw different digits, %"
    return dots(title, groups, (85, 90, 95, 100), ".2f")


def latencies(results: Mapping[str, Any]) -> str:
    """How long the fused network and the fastest ensemble take, in units of one member."""
    groups = {}
    for row in results["rows"]:
        fused = row["ratios"]["fused / member, passes"]
        ensemble = fused * row["ratios"]["best ensemble / fused, passes"]
        groups[f"{row['network']}, batch {row['batch']}"] = [
            ("fused network", COLOURS[0], fused),
            ("fastest ensemble", COLOURS[2], ensemble),
        ]
    title = f"Latency of the fused network and of {results['members']} members (1 is one member)"
    return dots(title, groups, (0, 1, 2, 3, 4, 5), ".2f")


def costs(results: Mapping[str, Any]) -> str:
    """How long fusing takes, in units of copying all members, on a logarithmic scale."""
    groups = {}
    names = {"transplant": COLOURS[0], "average": COLOURS[1], "reference": COLOURS[2]}
    for row in results["rows"]:
        seconds = {name: way.get("seconds") for name, way in row["ways"].items()}
        if row["n"] == 2 and all(seconds.get(name) for name in names):
            groups[f"{row['network']}, 2 members"] = [
                (name, colour, seconds[name] / seconds["copy"]) for name, colour in names.items()
            ]
    title = "Time to fuse, in units of copying all members (logarithmic)"
    return dots(title, groups, (1, 10, 100), ".1f", scale=math.log10)


def dots(
    title: str,
    groups: Mapping[str, Sequence[tuple[str, str, float]]],
    ticks: Sequence[float],
    digits: str,
    scale: Callable[[float], float] = float,
) -> str:
    """Values as dots on lines.

    Args:
        title: What is above.
        groups: For each group, its lines: label, colour and value.
        ticks: The numbers below; the lines go from the first to the last.
        digits: Format of a value.
        scale: Where a value is on the axis.
    """
    # Narrow, with names above the lines and not beside them: for a telephone, too.
    left, width = 170, 250
    begin, end = scale(ticks[0]), scale(ticks[-1])

    def at(value: float) -> float:
        return left + width * (scale(value) - begin) / (end - begin)

    head, _, more = title.partition(" (")
    parts, y = [_text(20, 32, head, "title", "start")], 66
    if more:
        parts.append(_text(20, 54, more.removesuffix(")"), "small", "start"))
        y += 22
    for name, lines in groups.items():
        parts.append(_text(20, y, name, "title", "start"))
        y += 26
        for label, colour, value in lines:
            parts += [
                _text(left - 14, y + 5, label, "small", "end"),
                f'<path d="M{left} {y} L{left + width} {y}" {_LINE} stroke-opacity="0.4"/>',
                _circle(round(at(value), 1), y, 7, colour),
                _text(round(at(value), 1) + 11, y - 2, f"{value:{digits}}", "small", "start"),
            ]
            y += 26
        y += 12
    parts += [_text(round(at(tick), 1), y, f"{tick:g}", "small") for tick in ticks]
    return _svg(480, y + 20, title, parts)


#: What the rows call a network, its name in the picture, and its colour.
_NAMES = {
    "best member": ("best member", GREY),
    "best member, the same seconds of a plain loop": ("distilled as long", COLOURS[1]),
    "fused": ("what fuse returns", COLOURS[0]),
    "ensemble": ("ensemble", COLOURS[2]),
}


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the fusion of two members reached, in words."""
    best, loop, fused, ensemble = (f"{_mean(rows, 2, name):.2f}" for name in _NAMES)
    two = [row for row in rows if row["members"] == 2]
    seconds = math.ceil(max(row["seconds"] for row in two))
    mixed = sum("refitted" in row["handed over"] for row in two)
    return (
        f"Two published MLPs saw different digits. On MNIST's test set the better one reaches\n"
        f"{best} %, and their ensemble {ensemble} %. From 400 unlabelled images and in at most\n"
        f"{seconds} CPU seconds, `fuse` makes one network of a member's size that reaches\n"
        f"**{fused} %**. Distilling the ensemble into the best member for as long gives {loop} %.\n"
        f"(In {mixed} of {len(two)} runs the result holds units of both members. Otherwise it is\n"
        f"one member, trained towards the ensemble.)\n"
    )


def specialists(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """What was made of two ResNets that saw five classes each, in words.

    Args:
        ours: The rows of benchmarks/results/cifar10.json.
        theirs: Those of ZipIt's own code.
    """
    fused = [r for r in ours if (r["setting"], r["row"], r["size"]) == ("halves", "no step", 1)]
    zipped = [row for row in theirs if row["method"] == "ZipIt"]

    def mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    return (
        f"Two ResNet-20s saw five classes of CIFAR-10 each. On all ten the better one reaches\n"
        f"{mean(fused, 'best member'):.1f} %, and their ensemble {mean(fused, 'ensemble'):.1f} %. "
        f"From {fused[0]['calibration inputs']:,} unlabelled images, in\n"
        f"{mean(fused, 'CPU seconds'):.0f} CPU seconds and without a step of training, `fuse` "
        f"makes one ResNet-20 that\nreaches **{mean(fused, 'accuracy'):.1f} %**. The code of ZipIt "
        f"makes {mean(zipped, 'accuracy'):.1f} % of the same members and images.\n"
        f"(Means of {len(fused)} pairs.)\n"
    )


def _mean(rows: Sequence[Mapping[str, Any]], count: int, name: str) -> float:
    return statistics.mean(row[name] for row in rows if row["members"] == count)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{text}</text>'


def _circle(x: float, y: float, radius: float, colour: str, opacity: float = 1) -> str:
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}" fill-opacity="{opacity:g}"/>'
    )


def _arrow(x: float, y: float, end: float) -> str:
    head = f"M{end - 10} {y - 7} L{end} {y} L{end - 10} {y + 7}"
    return f'<path d="M{x} {y} L{end} {y} {head}" class="line" fill="none" stroke-width="2.5"/>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{1.2 * width:g}" height="{1.2 * height:g}" role="img" aria-label="{title}">'
    )
    panel = f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="12" class="panel"/>'
    return "\n".join([opening, _STYLE, panel, *parts, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(run(__doc__, "python -m benchmarks.pictures", pages))
