"""Write docs/coverage.md from the results of the sweep, or check that it is up to date.

python benchmarks/coverage_table.py           # rewrite docs/coverage.md
python benchmarks/coverage_table.py --check   # exit with 1 when it is out of date
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.pages import run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "coverage.md"
LIBRARIES = ("torchvision", "timm", "transformers", "transformers-types", "plain")
USES = {"fuse": "fuse 1.5", "prune": "prune 0.5", "stack": "stack", "refit": "refit"}
#: How a use turned out, in a table; anything else is a reason why not.
_WORDS = {"ok": "yes", "": ""}
#: Below this share of free weights, the page says why.
EXPLAINED = 0.95

Row = dict[str, Any]


def page() -> str:
    """The whole page."""
    coverage = _read("coverage.json")
    every: list[Row] = coverage["rows"]
    rows = [r for r in every if "not_built" not in r]
    versions = ", ".join(f"{name} {version}" for name, version in coverage["versions"].items())
    lines = [
        "# Coverage",
        "",
        "How much of a network can be fused, and whether the checks hold on it. The networks are",
        "every torchvision model, every timm family and the usual transformers. The rows",
        "`transformers-types` are one text or vision class of each model type of transformers,",
        "with a small config (`benchmarks/transformers_models.py`). The rows `plain` are kinds of",
        "networks that no library holds (`benchmarks/plain_models.py`).",
        "",
        "Written by `python benchmarks/coverage.py` and `python benchmarks/coverage_table.py`;",
        f"{versions}.",
        "",
        "Networks have random weights in float64, and the checks can see a difference. BatchNorm",
        "statistics are calibrated and jittered, weights that start at zero are randomised, and",
        "outputs are shown to depend on the input.",
        "",
        "- *Free* is the share of weights in tensors with at least one free dimension of two units",
        "  or more.",
        "- *Permutation* is the largest relative change of an output when the units of every group",
        "  are permuted.",
        "- *Wide* is the largest relative difference between the concatenation of two members and",
        "  their mean, where no operator mixes them.",
        "- Times are for one thread. The analysis starts from the captured graph.",
        "",
        f"{len(every)} of the sweep's {coverage['models']} models have been tried;"
        f" {len(every) - len(rows)} of them cannot be built by a small config, as the end of this",
        "page lists.",
        "",
        *_summary(rows),
        *_random(),
        *_widths(),
    ]
    for library in LIBRARIES:
        chosen = [r for r in rows if _library(r) == library]
        lines += ["", f"## {library}", "", *_table(chosen), *_uses(chosen)]
    lines += ["", "## What stays frozen, where less than 95 % is free", ""]
    low = [r for r in rows if r.get("free", 1.0) < EXPLAINED]
    for row in low:
        lines.append(f"- `{row['model']}`, {row['free']:.1%} free:")
        lines += [f"    - {_plain(why)}" for why in row["frozen"][:3]]
    if not low:
        lines.append("Nothing.")
    lines += ["", "## Operators without a rule that met labels or parameters", ""]
    missing: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for operator in row.get("without_rule", ()):
            missing[operator].append(row["model"])
    lines += [
        f"- `{operator}`: {len(models)} models, such as `{models[0]}`"
        for operator, models in sorted(missing.items())
    ] or ["None."]
    failed = [r for r in rows if "failure" in r]
    lines += ["", "## Failures", ""]
    lines += [f"- `{r['model']}`: {_plain(r['failure'])}" for r in failed] or ["None."]
    lines += ["", "## What a small config does not build", ""]
    unbuilt = [r for r in every if "not_built" in r]
    lines += [f"- `{r['model']}`: {_plain(r['not_built'])}" for r in unbuilt] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _library(row: Row) -> str:
    return str(row["model"]).partition(":")[0]


def _summary(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| | models | exported | traced | permutation holds | wide exact | mixes | not shown "
        "| free, median | free, least | analysis faster than capture | most memory, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for library in (*LIBRARIES, "all"):
        chosen = [r for r in rows if library in ("all", _library(r))]
        done = [r for r in chosen if "permutation" in r]
        wide = [r["wide"] for r in done]
        exact = sum(not isinstance(w, str) for w in wide)
        mixes = wide.count("mixes")
        free = [r["free"] for r in done] or [0.0]
        fast = sum(r["analysis_s"] < r["capture_s"] for r in done)
        lines.append(
            f"| {library} | {len(chosen)} | {sum(r['capture'] == 'export' for r in done)} "
            f"| {sum(r['capture'] == 'trace' for r in done)} "
            f"| {sum(r['permutation_passed'] for r in done)} | {exact} | {mixes} "
            f"| {len(wide) - exact - mixes} | {statistics.median(free):.2%} | {min(free):.2%} "
            f"| {fast} of {len(done)} | {max((r['analysis_gb'] for r in done), default=0):.2f} |"
        )
    return lines


def _random() -> list[str]:
    if not (RESULTS / "random_networks.json").exists():
        return []
    found = _read("random_networks.json")
    return [
        "",
        f"Random networks (`python benchmarks/random_networks.py`, seed {found['seed']}): "
        f"**{found['networks']:,}** drawn, **{len(found['findings'])}** with findings.",
    ]


def _widths() -> list[str]:
    """Other widths: exactness at N, and what 0.5 and 1.5 cost beside what was foretold."""
    if not (RESULTS / "wide.json").exists():
        return []
    found = _read("wide.json")
    lines = [
        "",
        "## Other widths",
        "",
        f"{found['members']} members (`python benchmarks/wide.py`) of the exported models of",
        f"torchvision and transformers; {len(found['rows'])} of {found['models']} are measured.",
        "",
        "- *Exact*: at width N the network answers as the members' mean, to 1e-9 in float64.",
        "- *Apart*: models in which operators run member by member for that.",
        "- *Runs*: at widths 0.5, 1.5 and N all outputs are finite and of a member's shape.",
        "- *Predicted*: largest difference between the floating-point operations that a network",
        "  takes and those predicted from its plan.",
        "- *Kept*: models in which a group kept a member's size.",
        "",
        "| | measured | exact | worst error | apart | runs | predicted | kept |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for library in LIBRARIES:
        rows = [r for r in found["rows"] if _library(r) == library]
        done = [r for r in rows if "wide" in r]
        if not done:
            continue
        tries = [w for r in done for w in r["widths"].values()]
        off = max(abs(w["flops"] / max(w["foretold"], 1) - 1) for w in tries)
        runs = [
            all(w["finite"] and w.get("shape", True) for w in r["widths"].values()) for r in done
        ]
        kept = sum(any(w.get("refused") for w in r["widths"].values()) for r in done)
        lines.append(
            f"| {library} | {len(rows)} | {sum(r['wide'] <= 1e-9 for r in done)} "
            f"| {max(r['wide'] for r in done):.0e} | {sum(r['mixes'] > 0 for r in done)} "
            f"| {sum(runs)} | {off:.1%} | {kept} |"
        )
    failed = [r for r in found["rows"] if "failure" in r]
    if failed:
        lines += ["", *(f"- `{r['model']}`: {_plain(r['failure'])}" for r in failed)]
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| model | weights | captured | nodes | groups | units | free | permutation | wide "
        "| capture, s | analysis, s |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        name = str(r["model"]).partition(":")[2]
        if "permutation" not in r:
            lines.append(f"| {name} | – | **failed** | – | – | – | – | – | – | – | – |")
            continue
        wide = r["wide"] if isinstance(r["wide"], str) else f"{r['wide']:.0e}"
        lines.append(
            f"| {name} | {_millions(r['parameters'])} | {r['capture']} | {r['nodes']} "
            f"| {r['groups']} | {r['units']} | {r['free']:.2%} | {r['permutation']:.0e} "
            f"| {_plain(wide.partition(':')[0])} | {r['capture_s']:.2f} | {r['analysis_s']:.2f} |"
        )
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def _uses(rows: Sequence[Row]) -> list[str]:
    """What can be done with two members of each model, and where something cannot, why."""
    used = [r for r in rows if "uses" in r]
    if not used:
        return []
    uses = {use: name for use, name in USES.items() if any(use in r["uses"] for r in used)}
    green = sum(set(r["uses"].values()) == {"ok"} for r in used)
    lines = [
        "",
        f"What is done with two members of each ({', '.join(uses.values())}): {green} of",
        f"{len(used)} models pass everywhere. What was not tried is empty.",
        "",
        "| model | " + " | ".join(uses.values()) + " |",
        "|---|" + "---|" * len(uses),
    ]
    lines += [
        f"| {r['model'].partition(':')[2]} | "
        + " | ".join(_WORDS.get(r["uses"].get(use, ""), "no") for use in uses)
        + " |"
        for r in used
    ]
    why = [
        f"- `{r['model']}`, {uses[use]}: {_plain(r['uses'][use])}"
        for r in used
        for use in uses
        if r["uses"].get(use, "ok") != "ok"
    ]
    return [*lines, "", *why] if why else lines


def _plain(text: str) -> str:
    """Without the paths of the machine that it ran on, and without marks of tables and links."""
    return re.sub(r"([|\[<])", r"\\\1", re.sub(r"\S*/(site-packages|work)/", "", text))


def pages() -> dict[Path, str]:
    """The page, and what it should hold."""
    return {PAGE: page()}


if __name__ == "__main__":
    sys.exit(run(__doc__, "python benchmarks/coverage_table.py", pages))
