"""Widths chosen group by group against uniform widths of the same cost.

    python -m benchmarks.allocation [--case digits:resnet digits:vit cifar10:vgg11 minilm]
    python -m benchmarks.allocation --table   # write the table of docs/how-to/choose-a-width.md

A network is pruned, and two networks are fused, at several widths: once with `allocation="auto"`,
once with `"uniform"`, which has at least as many parameters. Both get the same unlabelled inputs
and a refit, nothing is trained. Reported is the distance on inputs that nothing has seen: the KL
divergence from the network's (or the ensemble's) answers, and for MiniLM 1 - Spearman's correlation
of pairwise similarities. Every seed is another sample of calibration inputs. The JSON is
written line by line, and what it holds is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fxfuse
from benchmarks import records
from benchmarks.members import cifar10
from benchmarks.members.train import trained
from benchmarks.pages import update, with_tables
from benchmarks.paper.datasets import load
from benchmarks.paper.setting import case
from benchmarks.real import minilm
from fxfuse import Refit, Size

RESULTS = Path(__file__).resolve().parent / "results" / "allocation.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "choose-a-width.md"
CASES = ("digits:resnet", "digits:vgg", "digits:vit", "cifar10:vgg11", "minilm")
# CIFAR-10 members train shortly: what is compared is how well they are compressed.
IMAGES, EPOCHS = 15_000, 5


@dataclass(frozen=True)
class Task:
    """Members, samples of calibration inputs by seed, and the distance on unseen inputs."""

    members: Sequence[nn.Module]
    calibration: Callable[[int], Any]
    distance: Callable[[nn.Module, int], float]
    widths: dict[int, tuple[float, ...]]


def task_of(name: str, data_root: Path) -> Task:
    """Make or load what a case needs."""
    if name == "minilm":
        return _minilm()
    source, network = name.split(":")
    if source == "digits":
        made = case(network, load("mnist5k", None), "same data", 2, 0)
        return _classifiers(made.members, made.calibration, made.test[0])
    data = cifar10.load(data_root)
    part = data.train.where(torch.arange(IMAGES))
    members = [trained(network, part, EPOCHS, seed)[0] for seed in range(2)]
    return _classifiers(members, data.held_out.inputs, data.test.inputs[:3000])


def _classifiers(members: Sequence[nn.Module], known: Tensor, unseen: Tensor) -> Task:
    answers = [_answers(member, unseen).softmax(1) for member in members]

    def distance(module: nn.Module, n: int) -> float:
        wanted = torch.stack(answers[:n]).mean(0)
        found = _answers(module, unseen).log_softmax(1)
        return float(functional.kl_div(found, wanted, reduction="batchmean"))

    def calibration(seed: int) -> Tensor:
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        return known[order[:1000]]

    return Task(members, calibration, distance, {1: (0.25, 0.5, 0.75), 2: (0.5, 1.0)})


def _answers(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part) for part in inputs.split(500)])


def _minilm() -> Task:
    encoder = minilm.encoder()
    known, unseen = minilm.sentences("calibration"), minilm.sentences("test")[:400]
    tokens = minilm.tokens_of(unseen)
    reference = minilm.embeddings(encoder, tokens)

    def calibration(seed: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        return minilm.tokens_of([known[i] for i in order[:500]])

    def distance(module: nn.Module, n: int) -> float:
        return 1 - minilm.spearman(reference, minilm.embeddings(module, tokens))

    return Task([encoder], calibration, distance, {1: (0.5, 0.75)})


def measure(name: str, task: Task, seeds: int, done: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Yield a row for each width, seed and allocation that is not done yet."""
    known = {
        tuple(row[key] for key in ("case", "n", "width", "seed", "allocation")) for row in done
    }
    for n, widths in task.widths.items():
        x = task.calibration(0)
        example = tuple(part[:2] for part in x) if isinstance(x, tuple) else x[:2]
        programs = [fxfuse.capture(member, example) for member in task.members[:n]]
        for seed, width, kind in itertools.product(range(seeds), widths, ("uniform", "auto")):
            if (name, n, width, seed, kind) in known:
                continue
            start = time.process_time()
            options: Any = {
                "size": Size(width, allocation=kind),
                "calibration": task.calibration(seed),
                "refine": [Refit()],
                "verify": False,
            }
            result = (
                fxfuse.prune(programs[0], **options) if n == 1 else fxfuse.fuse(programs, **options)
            )
            assert result.history is not None
            yield {
                "case": name,
                "n": n,
                "width": width,
                "seed": seed,
                "allocation": kind,
                "distance": task.distance(result.module, n),
                "chosen": result.history.chosen,
                "parameters": sum(p.numel() for p in result.module.parameters()),
                "CPU seconds": round(time.process_time() - start, 1),
                "sizes": dict(result.plan.sizes()),
            }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the means over the seeds, with ranges, in Markdown."""
    lines = [
        "| network | width | uniform | auto | closer in |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    found: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        own = found.setdefault((row["case"], row["n"], row["width"]), {"uniform": {}, "auto": {}})
        own[row["allocation"]][row["seed"]] = row["distance"]
    for (name, n, width), own in found.items():
        seeds = sorted(own["uniform"].keys() & own["auto"].keys())
        pairs = [(own["uniform"][seed], own["auto"][seed]) for seed in seeds]
        if not pairs:
            continue
        closer = sum(auto < uniform for uniform, auto in pairs)
        level = sum(auto == uniform for uniform, auto in pairs)
        told = f"{closer} of {len(pairs)}" + (f", level in {level}" if level else "")
        what = f"{name}, " + ("pruned" if n == 1 else f"{n} members")
        cells = [what, f"{width:g}", *(_range(each) for each in zip(*pairs, strict=True)), told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def _range(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.2g} [{min(values):.2g}, {max(values):.2g}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = records.earlier(RESULTS, "rows", keep=True)
    for name in () if options.table else options.case:
        task = task_of(name, options.data_root)
        records.add(RESULTS, rows, measure(name, task, options.seeds, list(rows)))
    page = with_tables(PAGE.read_text(encoding="utf-8"), "allocation", table(rows))
    update({PAGE: page}, "python -m benchmarks.allocation --table", check=False)


if __name__ == "__main__":
    main()
