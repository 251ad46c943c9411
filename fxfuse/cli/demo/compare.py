"""Who is compared with whom: all networks of one repetition, each beside its control.

A control is the best member with the same images and steps, so that the difference is what fusion
brought. Everything without labels (refit, matching, auto, distillation, recalibration) sees the
same calibration images; fine-tuning sees all training images, with labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from fxfuse import Classification, Match, Refit, Transplant
from fxfuse.api.fuse import fuse
from fxfuse.cli.data import Batches
from fxfuse.cli.demo.members import average, train_member
from fxfuse.cli.demo.refined import Refined, matched, merit, timed, trained
from fxfuse.cli.demo.repetition import BATCH, MEMBERS, Repetition
from fxfuse.cli.evaluate import Ensemble
from fxfuse.graph.capture import Program, capture
from fxfuse.refine import RefineReport, distill, finetune, recalibrate, refit_head

#: Networks of one repetition.
ENTRIES = MEMBERS + 13

_BEST = "best member (by validation)"
_HEAD = "best member + head refit"


@dataclass(frozen=True)
class Entry:
    """A network to measure.

    Attributes:
        network: Whose costs it has: `member`, `ensemble` or `fused`.
        control: Name of the row without fusion that it is to be compared with.
        seconds: CPU seconds of what the row adds; None where it adds nothing.
        learning_rate: What validation chose.
        start: For `auto`: what the matching started from.
    """

    name: str
    network: str
    module: nn.Module
    control: str | None = None
    seconds: float | None = None
    learning_rate: float | None = None
    start: str | None = None


def compare(
    case: Repetition, steps: int, member_steps: int, progress: Progress | bool
) -> Iterator[Entry]:
    """Train the members of a repetition, and yield them and every network made of them."""
    members: list[nn.Module] = []
    for index in range(MEMBERS):
        batches = case.batches_of_member(index)
        members.append(train_member(batches, member_steps, case.seed_of(index), progress))
        yield Entry(f"member {index + 1}", "member", members[-1])
    best = max(members, key=lambda member: merit(member, case.validation))
    yield Entry(f"ensemble of {MEMBERS}", "ensemble", Ensemble(members, Classification()))
    images = case.calibration()
    # Capturing is the same for every method: once is enough.
    program = [capture(member, images[:2]) for member in members]
    plain = fuse(program).module
    yield from _alignments(members, program, images)
    yield Entry("NT, right after fusion", "fused", plain, _BEST)
    yield from _without_labels(case, members, program, best, images, steps, progress)
    yield from _trained(case, members, plain, best, images, steps, progress)


def _alignments(
    members: list[nn.Module], program: list[Program], images: Tensor
) -> Iterator[Entry]:
    yield Entry("weight averaging", "member", average(members), _BEST)
    aligned = fuse(program, method="weight_matching").module
    done = timed(aligned, lambda module: recalibrate(module, images))
    yield _entry("weight matching + recalibration", "fused", done, _BEST)


def _without_labels(
    case: Repetition,
    members: list[nn.Module],
    program: list[Program],
    best: nn.Module,
    images: Tensor,
    steps: int,
    progress: Progress | bool,
) -> Iterator[Entry]:
    control = f"best member + {steps} matching steps"
    result = fuse(program, calibration=images, method=Transplant(score="obs"), refine=[Refit()])
    assert result.refit is not None
    refit_seconds = result.refit.seconds
    yield Entry("NT + refit", "fused", result.module, _HEAD, refit_seconds)
    done = matched(result.module, members, images, steps, case.seed, progress)
    done = Refined(done.module, refit_seconds + done.seconds)
    yield _entry(f"NT + refit + {steps} matching steps", "fused", done, control)

    auto = fuse(program, calibration=images, refine=[Refit(), Match(steps=steps)])
    assert auto.refit is not None
    assert auto.match is not None
    assert auto.history is not None
    yield Entry(
        f"auto, {steps} matching steps",
        "fused",
        auto.module,
        control,
        auto.refit.seconds + auto.match.seconds,
        start=auto.plan.options["start"],
    )
    yield Entry(_BEST, "member", best)
    done = timed(best, lambda module: refit_head(module, members, images, layer="head"))
    yield _entry(_HEAD, "member", done)
    yield _entry(control, "member", matched(best, members, images, steps, case.seed, progress))


def _trained(
    case: Repetition,
    members: list[nn.Module],
    plain: nn.Module,
    best: nn.Module,
    images: Tensor,
    steps: int,
    progress: Progress | bool,
) -> Iterator[Entry]:
    control = f"best member + {steps} fine-tuning steps"
    shared = steps, case.seed, case.validation, progress
    done = trained(plain, finetune, case.training, *shared)
    yield _entry(f"NT + {steps} fine-tuning steps", "fused", done, control)
    yield _entry(control, "member", trained(best, finetune, case.training, *shared))

    def distilled(module: nn.Module, batches: Batches, **options: Any) -> RefineReport:
        return distill(module, members, batches, **options)

    done = trained(best, distilled, lambda: _unlabelled(images, case.seed), *shared)
    yield _entry(f"best member + {steps} distillation steps", "member", done)


def _entry(name: str, network: str, done: Refined, control: str | None = None) -> Entry:
    return Entry(name, network, done.module, control, done.seconds, done.learning_rate)


def _unlabelled(images: Tensor, seed: int) -> Batches:
    """Return batches whose labels, all 0, nobody reads."""
    return Batches(images, images.new_zeros(len(images)), BATCH, seed=seed)
