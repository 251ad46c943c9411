"""The results of an experiment as Markdown tables: mean [least, greatest] over the seeds."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.experiment import Experiment

_NETWORKS = {"mlp": "MLP", "vgg": "VGG", "resnet": "ResNet", "vit": "ViT"}
_DATA = {
    "mnist5k": "5,000 MNIST images",
    "mnist1d": "MNIST-1D",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
}
_NONE = "–"

Cell = dict[str, Any]


def heading(block: dict[str, Any]) -> str:
    """What a block of results is about."""
    where = f"{_NETWORKS[block['network']]}, {_DATA.get(block['data'], block['data'])}"
    members = "" if block["n"] is None else f", {block['n']} members"
    return f"{where}, {block['setting']}{members}"


def markdown(experiment: Experiment, results: dict[str, Any]) -> str:
    """All tables of an experiment, each under its heading."""
    parts = []
    for block in results["blocks"]:
        for measure, title in experiment.measures.items():
            lines = [f"**{heading(block)}**: {title}", ""]
            parts.append("\n".join(lines + _table(experiment.line, block["rows"], measure)))
    return "\n\n".join(parts)


def _table(line: str, cells: list[Cell], measure: str) -> list[str]:
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    shown = {(cell["row"], cell["column"]): _spread(cell["values"][measure]) for cell in cells}
    lines = [f"| {line} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in rows:
        each = " | ".join(shown.get((row, column), _NONE) for column in columns)
        lines.append(f"| {row} | {each} |")
    return lines


def _spread(spread: dict[str, Any]) -> str:
    mean, least, greatest = (_number(spread[name]) for name in ("mean", "min", "max"))
    return f"{mean} [{least}, {greatest}]"


def _number(value: float) -> str:
    """One decimal, and two significant digits where that would hide a small number."""
    return f"{value:.2g}" if 0 < abs(value) < 1 else f"{value:.1f}"
