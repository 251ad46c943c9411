"""The demo's numbers as tables, for a terminal and for Markdown; both have the same rows."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

_MISSING = "–"


def to_rich(results: dict[str, Any]) -> list[Table]:
    """Return one table per setting of what `run_demo` returned; the last one has the caption."""
    tables = []
    for setting in results["settings"]:
        first, *others = _header(results)
        table = Table(first, title=setting["name"], title_justify="left", caption_justify="left")
        for name in others:
            table.add_column(name, justify="right")
        for row in setting["rows"]:
            # As Text, since rich reads [min, max] in a plain string as markup.
            table.add_row(*(Text(cell) for cell in _cells(row)))
        tables.append(table)
    tables[-1].caption = Text(" ".join(_caption(results)))
    return tables


def to_markdown(results: dict[str, Any]) -> str:
    """Return the same tables in Markdown, with a closing line break."""
    header = _header(results)
    lines = []
    for setting in results["settings"]:
        lines += [f"**{setting['name'].capitalize()}**", ""]
        lines += [_line(header), _line(["---"] + ["---:"] * (len(header) - 1))]
        lines += [_line(_cells(row)) for row in setting["rows"]]
        lines += [""]
    return "\n".join(lines + _caption(results)) + "\n"


def _header(results: dict[str, Any]) -> list[str]:
    return [
        "network",
        "test accuracy, %",
        "params",
        "MFLOPs",
        "eager, ms",
        "compiled, ms",
        "adds, CPU s",
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    accuracy = row["accuracy"]
    mean, low, high = (100 * accuracy[key] for key in ("mean", "min", "max"))
    return [
        _name(row),
        f"{mean:.1f} [{low:.1f}, {high:.1f}]",
        f"{row['params']:,}",
        f"{row['flops'] / 1e6:.2f}",
        _number(row["latency_ms"]["eager"], 2),
        _number(row["latency_ms"]["compiled"], 2),
        _number(row["seconds"], 1),
    ]


def _name(row: dict[str, Any]) -> str:
    """Return a row's name; that of `auto` says which starts won."""
    if not row["starts"]:
        return str(row["name"])
    fused = row["starts"].count("fused")
    member = len(row["starts"]) - fused
    won = [f"{name} {n}x" for name, n in (("member", member), ("fused", fused)) if n]
    return f"{row['name']} (start: {', '.join(won)})"


def _number(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f"{value:.{digits}f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _caption(results: dict[str, Any]) -> list[str]:
    """Return what a reader needs to judge the numbers, one sentence or two per item."""
    environment = results["environment"]
    repetitions = len(results["settings"][0]["rows"][0]["accuracy"]["seeds"])
    seeds = f"mean [min, max] over {repetitions} seeds" if repetitions > 1 else "one seed"
    return [
        f"Accuracy: {seeds}. Members were trained for {results['member_steps']} steps of "
        f"{results['batch']} images.",
        "Validation images chose the best member and, for fine-tuning and distillation, the "
        "learning rate.",
        "Fine-tuning sees all training images with labels; recalibration, refit, matching, auto "
        f"and distillation see {results['calibration']:,} of them without labels.",
        "CPU s: of refit, matching or training, all threads together; not of the fusion itself.",
        f"MFLOPs per image; latency per {results['batch']} images, measured once per architecture.",
        f"{results['seconds']:.0f} s in all: torch {environment['torch']}, "
        f"Python {environment['python']}, {environment['cpu']}, {environment['cores']} cores.",
        *results["notes"],
    ]
