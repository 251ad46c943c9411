"""Draws the pictures of README and of the site: how a fusion works, and one real result.

python -m benchmarks.pictures           # rewrite docs/pictures/*.svg and README's sentence
python -m benchmarks.pictures --check   # exit with 1 when one of them is out of date
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import run, with_tables

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"
README = ROOT / "README.md"
MLPS = ROOT / "benchmarks" / "results" / "real" / "mlps.json"
#: Colours that people with any colour vision can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73")
GREY = "#8A8F98"
#: The importance of each member's four units; the picture keeps the largest four of all.
IMPORTANCE = ((0.9, 0.3, 0.55, 0.2), (0.25, 0.8, 0.4, 0.6), (0.35, 0.15, 0.7, 0.5))
#: A panel of its own, so that the picture can be read on any page, light or dark.
_STYLE = """<style>
text { font: 15px system-ui, sans-serif; fill: #1f2328; }
.panel { fill: #ffffff; stroke: #d0d7de; }
.line { stroke: #8a8f98; }
.title { font-weight: 600; }
.small { font-size: 13px; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .panel { fill: #1c2128; stroke: #444c56; }
}
</style>"""


def pages() -> Mapping[Path, str]:
    """The pictures, and README with the sentence that goes with the second one."""
    rows = json.loads(MLPS.read_text(encoding="utf-8"))["rows"]
    readme = with_tables(README.read_text(encoding="utf-8"), "figure", sentence(rows))
    return {
        FOLDER / "fusion.svg": fusion(),
        FOLDER / "mlps.svg": accuracies(rows),
        README: readme,
    }


def fusion() -> str:
    """Members, their units in order of importance, and the network made of the first ones."""
    parts = [_text(130, 34, "3 members", "title"), _text(430, 34, "Units, ranked", "title")]
    parts += [_text(740, 34, "1 network", "title")]
    for member, importance in enumerate(IMPORTANCE):
        parts += _network(50, 62 + 84 * member, [(member, size) for size in importance])
    units = [(size, m) for m, sizes in enumerate(IMPORTANCE) for size in sizes]
    units.sort(reverse=True)
    for place, (size, member) in enumerate(units):
        x, y = 350 + 52 * (place % 4), 95 + 84 * (place // 4)
        parts.append(_circle(x, y, 8 + 12 * size, COLOURS[member], 1 if place < 4 else 0.25))
    parts.append(
        '<rect x="318" y="62" width="224" height="66" rx="10" fill="none" class="line" '
        'stroke-dasharray="5 4"/>'
    )
    parts += [_text(430, 152, "kept", "small"), _text(430, 302, "dropped", "small")]
    parts += [_arrow(250, 180, 300), _arrow(560, 180, 620)]
    parts += _network(660, 146, [(member, size) for size, member in units[:4]])
    parts.append(_text(130, 332, "one architecture, trained apart", "small"))
    parts.append(_text(430, 332, "a unit is a channel and all that is tied to it", "small"))
    parts.append(_text(740, 332, "refitted, matched, checked", "small"))
    title = "Units of three members are ranked; the most important ones form one network"
    return _svg(880, 350, title, parts)


def _network(x: float, y: float, units: Sequence[tuple[int, float]]) -> list[str]:
    """One layer of units between an input and an output, 160 wide and 66 high."""
    parts = []
    for place in range(4):
        at = x + 22 + 39 * place
        parts.append(f'<path d="M{x + 80} {y + 66} L{at} {y + 33} L{x + 80} {y}" {_LINE}/>')
    for place, (member, size) in enumerate(units):
        parts.append(_circle(x + 22 + 39 * place, y + 33, 8 + 12 * size, COLOURS[member]))
    return [*parts, _circle(x + 80, y, 5, GREY), _circle(x + 80, y + 66, 5, GREY)]


_LINE = 'class="line" fill="none" stroke-width="1"'


def accuracies(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in percent for each number of members: a dot on a line from 85 to 100."""
    counts = list(dict.fromkeys(row["members"] for row in rows))
    low, high, left, width = 85, 100, 300, 480
    scale = width / (high - low)
    parts = [_text(440, 34, "Test accuracy of MLPs that saw different digits, %", "title")]
    y = 70
    for count in counts:
        parts.append(_text(20, y + 43, f"{count} members", "title", "start"))
        for name, (label, colour) in _NAMES.items():
            mean = _mean(rows, count, name)
            at = left + scale * (mean - low)
            parts += [
                _text(left - 14, y + 5, label, "small", "end"),
                f'<path d="M{left} {y} L{left + width} {y}" {_LINE} stroke-opacity="0.4"/>',
                _circle(at, y, 7, colour),
                _text(at + 14, y - 3, f"{mean:.2f}", "small", "start"),
            ]
            y += 25
        y += 18
    for tick in range(low, high + 1, 5):
        parts.append(_text(left + scale * (tick - low), y, f"{tick}", "small"))
    return _svg(880, y + 20, "Accuracy of best member, fused network and ensemble", parts)


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
    seconds = max(row["seconds"] for row in two)
    mixed = sum("refitted" in row["handed over"] for row in two)
    return (
        f"Two published MLPs saw different digits. On MNIST's test set the better one reaches\n"
        f"{best} %, and their ensemble {ensemble} %. From 400 unlabelled images and in at most\n"
        f"{seconds:.0f} CPU seconds, `fuse` makes one network of a member's size that reaches\n"
        f"**{fused} %**. Distilling the ensemble into the best member for as long gives {loop} %.\n"
        f"(In {mixed} of {len(two)} runs the result holds units of both members. Otherwise it is\n"
        f"one member, trained towards the ensemble.)\n"
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
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title}">'
    )
    panel = f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="12" class="panel"/>'
    return "\n".join([opening, _STYLE, panel, *parts, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(run(__doc__, "python -m benchmarks.pictures", pages))
