"""What `gains` measured, as Markdown: the figures that were to be reached, and all rows.

A share of the gain is that of the means over the seeds: how far a row has come from the best member
to the ensemble. Differences are in points of test accuracy.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.paper.markdown import heading

Case = dict[str, Any]

BEST, ENSEMBLE, AUTO = "best member", "ensemble", "auto"
REFIT, QUICK = "obs + refit", "obs + refit + matching, 2 s"
COPIES = "obs + refit, a copy of each input"
REFIT_LOGITS, AUTO_LOGITS = "obs + refit, mean of logits", "auto, mean of logits"
#: The ensemble that networks are fitted to where nothing is said; `ENSEMBLE` is the mean of logits.
SOFT_ENSEMBLE = "ensemble, mean of probabilities"
LABELLED, DISTILLED = "NT + 160 fine-tuning steps", "best member + KL distillation"
#: Rows, and controls of equal standing: without a step either, or with as much CPU time.
CONTROLS = (
    (REFIT, "best member + head refit"),
    (AUTO, "best member + matching"),
    (AUTO, DISTILLED),
    (AUTO_LOGITS, DISTILLED),
)
_SAME, _SPECIALISTS = "same data", "specialists"
#: Below this difference between the ensemble and the best member a share says nothing.
_LEAST = 0.1


def markdown(cases: Sequence[Case]) -> str:
    """The figures, where controls win, and the tables."""
    parts = [
        "## The figures to reach",
        "\n".join(figures(cases)),
        "## Against the controls",
        "\n".join(controls(cases)),
        "## All rows",
    ]
    for (network, data, setting), group in _by(cases, "network", "data", "setting").items():
        about = {"network": network, "data": data, "setting": setting, "n": None}
        parts.append(f"**{heading(about)}**: test accuracy, %\n\n" + "\n".join(table(group)))
    return "\n\n".join(parts)


def table(cases: Sequence[Case]) -> list[str]:
    """All rows of one network and setting, by the number of members."""
    sizes = _by(cases, "n")
    head, rule = "| row |", "|---|"
    for (n,), group in sizes.items():
        head += f" N = {n}, {_seeds(len(group))} | gain | CPU s |"
        rule += "---:|---:|---:|"
    lines = [head, rule]
    for name in cases[0]["rows"]:
        line = f"| {name} |"
        for group in sizes.values():
            values = accuracies(group, name)
            spent = statistics.mean(case["rows"][name]["seconds"] for case in group)
            mean = statistics.mean(values)
            line += f" {mean:.1f} [{min(values):.1f}, {max(values):.1f}] |"
            line += f" {_percent(share(group, name))} | {spent:.1f} |"
        lines.append(line)
    return lines


def figures(cases: Sequence[Case]) -> list[str]:
    """A line for each figure that was to be reached: by what it was, in which cases."""
    same, special = (_of(cases, setting) for setting in (_SAME, _SPECIALISTS))
    return [
        "| figure | reached | measured |",
        "|---|---|---|",
        _shares("specialists, no step: `obs` + refit ≥ 80 % of the gain", special, REFIT, 0.80),
        _shares("the same with an augmented copy of each input", special, COPIES, 0.80),
        _shares("the same, fitted to the mean of logits", special, REFIT_LOGITS, 0.80),
        _shares("specialists, 2 CPU s: ≥ 97 % of the gain", special, QUICK, 0.97),
        _ahead(
            "specialists, `auto`: at or above the ensemble (mean of probabilities)",
            special,
            (AUTO, SOFT_ENSEMBLE),
            every_run=False,
        ),
        _ahead(
            "specialists, `auto` with the mean of logits: at or above that ensemble",
            special,
            (AUTO_LOGITS, ENSEMBLE),
            every_run=False,
        ),
        _ahead(
            "same data, `auto`: at or above the best member in every run",
            same,
            (AUTO, BEST),
            every_run=True,
        ),
        _never_worse("`auto`: no run significantly worse than the best member", cases, AUTO),
        _never_worse("the same with the mean of logits", cases, AUTO_LOGITS),
        _average("same data, `auto`: ≥ 75 % of the gain on average", same, AUTO, 0.75),
        _ahead(
            "same data, `auto`: ahead of best member + KL distillation at equal CPU time",
            same,
            (AUTO, DISTILLED),
            every_run=False,
        ),
        _ahead(
            "same data, no step: `obs` + refit ahead of NT after 160 steps on labels (not ResNet)",
            [case for case in same if case["network"] != "resnet"],
            (REFIT, LABELLED),
            every_run=False,
        ),
    ]


def controls(cases: Sequence[Case]) -> list[str]:
    """A line for each row with a control, network, setting and N: who is ahead."""
    lines = [
        "| network, setting | N | row | control | difference | ahead in |",
        "|---|---:|---|---|---:|---:|",
    ]
    for (network, data, setting, n), group in _by(cases, "network", "data", "setting", "n").items():
        about = heading({"network": network, "data": data, "setting": setting, "n": None})
        for row, control in CONTROLS:
            differences = _differences(group, row, control)
            mean = statistics.mean(differences)
            shown = f"{mean:+.1f}" if mean >= 0 else f"**{mean:+.1f}**"
            lines.append(f"| {about} | {n} | {row} | {control} | {shown} | {_count(differences)} |")
    return lines


def accuracies(cases: Iterable[Case], name: str) -> list[float]:
    """Test accuracy of a row in each case, in percent."""
    return [float(case["rows"][name]["accuracy"]) for case in cases]


def share(cases: Sequence[Case], name: str) -> float | None:
    """Share of the gain of a row; None where the ensemble gains next to nothing."""
    low, high, own = (statistics.mean(accuracies(cases, row)) for row in (BEST, ENSEMBLE, name))
    return (own - low) / (high - low) if high - low >= _LEAST else None


def _shares(figure: str, cases: Sequence[Case], name: str, wanted: float) -> str:
    each = {
        f"{network} N = {n}": share(group, name)
        for (network, n), group in _by(cases, "network", "n").items()
    }
    told = {place: found for place, found in each.items() if found is not None}
    good = sum(found >= wanted for found in told.values())
    shown = ", ".join(f"{place} {_percent(found)}" for place, found in told.items())
    return _line(figure, good, len(told), shown)


def _average(figure: str, cases: Sequence[Case], name: str, wanted: float) -> str:
    found = share(cases, name)
    shown = f"{_percent(found)} over {len(cases)} runs"
    return _line(figure, int(found is not None and found >= wanted), 1, shown)


def _never_worse(figure: str, cases: Sequence[Case], name: str) -> str:
    """By the paired bootstrap intervals over the test inputs, at 95 %."""
    ends = [case["rows"][name]["gain"][2] for case in cases]
    good = sum(end >= 0 for end in ends)
    return _line(figure, good, len(ends), f"significantly worse: {len(ends) - good} of {len(ends)}")


def _ahead(figure: str, cases: Sequence[Case], rows: tuple[str, str], *, every_run: bool) -> str:
    """Of each network and N by the means, or of every run."""
    groups = _by(cases, "network", "n")
    means = [statistics.mean(_differences(group, *rows)) for group in groups.values()]
    shown = ", ".join(
        f"{network} N = {n} {mean:+.2f}" for (network, n), mean in zip(groups, means, strict=True)
    )
    reached = _differences(cases, *rows) if every_run else means
    runs = _differences(cases, *rows)
    shown += f"; runs at or above: {sum(d >= 0 for d in runs)} of {len(runs)}"
    return _line(figure, sum(d >= 0 for d in reached), len(reached), shown)


def _line(figure: str, good: int, count: int, shown: str) -> str:
    reached = "yes" if good == count else "no" if not good else f"in {good} of {count}"
    return f"| {figure} | {reached} | {shown} |"


def _differences(cases: Iterable[Case], row: str, control: str) -> list[float]:
    cases = list(cases)
    pairs = zip(accuracies(cases, row), accuracies(cases, control), strict=True)
    # Rounded, or what is level would be ahead or behind by the last bit.
    return [round(own - other, 6) for own, other in pairs]


def _count(differences: Sequence[float]) -> str:
    ahead, level = sum(d > 0 for d in differences), sum(d == 0 for d in differences)
    return f"{ahead} of {len(differences)}" + (f", level in {level}" if level else "")


def _by(cases: Iterable[Case], *keys: str) -> dict[tuple[Any, ...], list[Case]]:
    """Cases by some of what they are about, in order."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(case[key] for key in keys), []).append(case)
    return groups


def _of(cases: Iterable[Case], setting: str) -> list[Case]:
    return [case for case in cases if case["setting"] == setting]


def _percent(found: float | None) -> str:
    return "–" if found is None else f"{100 * found:.0f} %"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
