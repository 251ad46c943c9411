"""Write the tables of docs/performance.md from JSON, or check that they are up to date.

python -m benchmarks.performance_table           # rewrite the page's tables
python -m benchmarks.performance_table --check   # exit with 1 when they are out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pages import run, with_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
REPORT = PAGE.parent / "how-to" / "report.md"


def inference(results: dict[str, Any]) -> str:
    """Milliseconds of every way, and the ratios that matter."""
    names = list(results["rows"][0]["ms"])
    ratios = list(results["rows"][0]["ratios"])
    lines = []
    for row in results["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        times = [f"{row['ms'][name]:.3g}" for name in names]
        lines += [
            f"**{row['network']}**, batch {row['batch']}, {shape}: "
            + "; ".join(f"{name} {row['ratios'][name]:.2f}" for name in ratios)
            + ".",
            "",
            f"| {' | '.join(names)} |",
            f"| {' | '.join('---:' for _ in names)} |",
            f"| {' | '.join(times)} |",
            "",
        ]
    about = results["environment"]
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    lines.append(
        f"Milliseconds for {results['members']} members on {results['card'] or about['cpu']} "
        f"({threads}), medians over {results['rounds']} rounds, float32; torch {about['torch']}, "
        f"torchvision {about['torchvision']}."
    )
    return "\n".join(lines) + "\n"


def choice(results: dict[str, Any]) -> str:
    """What is chosen, as ratios to what it must not be slower than; and other precisions."""
    names = list(dict.fromkeys(n for row in results["rows"] for n in row["ratios"]))
    lines = [
        f"| network | batch | plain, ms | chosen | {' | '.join(names)} | compiling |",
        f"| --- | ---: | ---: | --- | {' | '.join('---:' for _ in names)} | ---: |",
    ]
    for row in results["rows"]:
        ratios = [row["ratios"].get(n) for n in names] + [row.get("compiling / plain, backend")]
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        plain, form = row["ms"]["fused, plain"], row["forms"]["fused, chosen"]
        lines.append(
            f"| {row['network']} | {row['batch']} | {plain:.3g} | {form} | {' | '.join(cells)} |"
        )
    lines += [
        "",
        "Ratios of times, so that 1.03 is 3 % slower. *Compiling* is the CPU time of compiling the "
        "ensemble with the backend, as a multiple of plain compilation.",
        "",
        "In other precisions, as multiples of what is chosen in float32, and the largest "
        "difference from the network's own outputs:",
        "",
        "| network | batch | precision | form | time | difference |",
        "| --- | ---: | --- | --- | ---: | ---: |",
    ]
    for row in results["rows"]:
        for name in ("bfloat16", "int8", "int8_dynamic"):
            way = f"fused, {name}"
            if way in row["ms"]:
                lines.append(
                    f"| {row['network']} | {row['batch']} | {name} | {row['forms'][way]} "
                    f"| {row['ms'][way] / row['ms']['fused, chosen']:.2f} "
                    f"| {row['errors'][way]:.1e} |"
                )
    about = results["environment"]
    lines += [
        "",
        f"{results['members']} members on {about['cpu']}, one thread, torch {about['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def fusion(results: dict[str, Any]) -> str:
    """Seconds and memory of every way of fusing, and the seconds as multiples of copying."""
    ways = list(dict.fromkeys(way for row in results["rows"] for way in row["ways"]))
    lines = [
        f"| network | N | members, MB | {' | '.join(ways)} |",
        f"| --- | ---: | ---: | {' | '.join('---:' for _ in ways)} |",
    ]
    left: dict[str, None] = {}
    for row in results["rows"]:
        cells = []
        copied = row["ways"].get("copy", {}).get("seconds")
        for way in ways:
            found = row["ways"].get(way)
            if found is None:
                cells.append("")
            elif "left" in found:
                left[f"{row['network']}, N = {row['n']}, {way}: {found['left']}"] = None
                cells.append("–")
            else:
                times = f" ({found['seconds'] / copied:.1f}x)" if copied else ""
                cells.append(f"{found['seconds']:.3g} s{times}, {found['megabytes']:,.0f} MB")
        size = f"{row['megabytes']:,.0f}"
        lines.append(f"| {row['network']} | {row['n']} | {size} | {' | '.join(cells)} |")
    about = results["environment"]
    lines += [
        "",
        f"Seconds, in multiples of *copy* in brackets, and the most memory beyond the imports; one "
        f"thread on {results['card'] or about['cpu']}, torch {about['torch']}.",
    ]
    lines += ["", *_asked(results["rows"])]
    if left:
        lines += ["", "Left out:", "", *(f"- {text}" for text in left)]
    return "\n".join(lines) + "\n"


def _asked(rows: list[dict[str, Any]]) -> list[str]:
    """What was to be reached, and what was."""
    by_case = {(row["network"], row["n"]): row["ways"] for row in rows}
    lines = ["Asked, and measured:", ""]
    rates = {(r["network"], r["n"]): r["megabytes"] / r["ways"]["copy"]["seconds"] for r in rows}
    # A copy at less than half the usual rate was held up: its multiples tell nothing.
    disturbed = [case for case, rate in rates.items() if 2 * rate < median(rates.values())]
    times = {
        case: ways["transplant"]["seconds"] / ways["copy"]["seconds"]
        for case, ways in by_case.items()
        if case not in disturbed
    }
    within = [f"{name} N = {n}" for (name, n), ratio in times.items() if ratio <= 3]
    lines.append(f"- at most 3 times the copy: {len(within)} of {len(times)} ({'; '.join(within)})")
    fastest = max(rates.values())
    fast = sum(r["ways"]["transplant"]["seconds"] <= 3 * r["megabytes"] / fastest for r in rows)
    lines.append(
        f"- the same if every copy had the fastest row's rate, {fastest / 1000:.1f} GB/s (the "
        f"slowest: {min(rates.values()) / 1000:.1f}): {fast} of {len(rows)}"
    )
    ways = by_case["mlp4096", 2]
    faster = ways["reference"]["seconds"] / ways["transplant"]["seconds"]
    lines.append(f"- 20 times as fast as the reference on mlp4096, N = 2: {faster:.1f} times")
    ways = by_case["resnet50", 4]
    faster = ways["reference"]["seconds"] / ways["whole"]["seconds"]
    share = ways["whole"]["megabytes"] / ways["reference"]["megabytes"]
    lines.append(
        "- the whole call on resnet50, N = 4, 3 times as fast as the reference with a quarter of "
        f"its memory: {faster:.1f} times, {share:.0%}"
    )
    lines += [
        f"- the copy of {name}, N = {n}, took longer than its bytes explain: that row's multiples "
        "do not count"
        for name, n in disturbed
    ]
    return lines


def analysis_growth(results: dict[str, Any]) -> str:
    """Seconds and memory of the analysis at each depth, beside torch.export's."""
    rows = results["rows"]
    lines = [
        "| blocks | nodes | export, s | capture, s | analysis, s | per 1,000 nodes, s | export, MB "
        "| analysis, MB |",
        f"|{' ---: |' * 8}",
    ]
    lines += [
        f"| {r['blocks']} | {r['nodes']:,} | {r['export_s']:.2f} | {r['capture_s']:.2f} "
        f"| {r['analysis_s']:.2f} | {1000 * r['analysis_s'] / r['nodes']:.2f} "
        f"| {r['export_mb']:.0f} | {r['analysis_mb']:.0f} |"
        for r in rows
    ]
    each = [1000 * r["analysis_s"] / r["nodes"] for r in rows]
    shares = [r["analysis_s"] / r["export_s"] for r in rows]
    memory = [r["analysis_mb"] / r["export_mb"] for r in rows]
    about = results["environment"]
    lines += [
        "",
        f"Per node the slowest depth takes {max(each) / min(each):.1f} times the fastest's time. "
        f"The analysis takes {min(shares):.0%} to {max(shares):.0%} of the export's time and "
        f"{min(memory):.1f} to {max(memory):.1f} times its memory. CPU seconds, of the "
        f"analysis medians over {results['repetitions']} repetitions; one thread on "
        f"{about['cpu']}, torch {about['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def profiles(results: dict[str, Any]) -> str:
    """What a step costs, before and after a change, and where the time went last."""
    lines = [
        "| network | step | N | inputs | CPU s | peak, MB | members' forward, s | most time in |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        case = (row["network"], row["step"], row["members"], row.get("inputs", ""))
        cases.setdefault(case, []).append(row)
    for case, rows in cases.items():
        costs, peaks, forward = (
            " → ".join(f"{row[key]:,g}" for row in rows if key in row)
            for key in ("cpu_s", "peak_mb", "forward_cpu_s")
        )
        last = rows[-1]
        most = (f"`{n}` {s / last['cpu_s']:.0%}" for n, s in list(last["self"].items())[:3])
        lines.append(
            f"| {' | '.join(map(str, case))} | {costs} | {peaks} | {forward} | {', '.join(most)} |"
        )
    return "\n".join(lines) + f"\n\nOne thread, torch {results['torch']}.\n"


def report_size(results: dict[str, Any]) -> str:
    """How large the report is, and how soon it can be used."""
    return (
        f"The report of a {results['network']} has {results['megabytes']:.2f} MB and can be used "
        f"after {results['ready_s']:.2f} s (`python -m benchmarks.report_size`, median of "
        f"{len(results['all_s'])}).\n"
    )


def billion(results: dict[str, Any]) -> str:
    """Time and memory of each step with a decoder of a billion parameters."""
    rows = results["rows"]
    lines = ["| step | parameters | CPU s | s | peak, MB | asked, MB |", f"| --- |{' ---: |' * 5}"]
    for row in rows:
        count = f"{row['parameters']:,}" if "parameters" in row else ""
        asked = f"{row['asked_mb']:,.0f}" if "asked_mb" in row else ""
        lines.append(
            f"| {row['step']} | {count} | {row['cpu_s']:g} | {row['wall_s']:g} "
            f"| {row['peak_mb']:,.0f} | {asked} |"
        )
    about = results["environment"]
    lines += [
        "",
        f"{results['members']} members of {rows[0]['member_mb']:,.0f} MB each "
        f"({results['family']}), one thread on {about['cpu']}, torch {about['torch']}, "
        f"transformers {results['versions']['transformers']}.",
    ]
    return "\n".join(lines) + "\n"


#: Name of a table's marks and of its JSON file → its page, and what writes it.
TABLES: Mapping[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "inference": (PAGE, inference),
    "choice": (PAGE, choice),
    "fusion": (PAGE, fusion),
    "analysis_growth": (PAGE, analysis_growth),
    "billion": (PAGE, billion),
    "profiles": (PAGE, profiles),
    "report_size": (REPORT, report_size),
}


def pages() -> dict[Path, str]:
    """The pages, and what they should hold."""
    found = {page: page.read_text(encoding="utf-8") for page, _ in TABLES.values()}
    for name, (page, write) in TABLES.items():
        results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        found[page] = with_tables(found[page], name, write(results))
    return found


if __name__ == "__main__":
    sys.exit(run(__doc__, "python -m benchmarks.performance_table", pages))
