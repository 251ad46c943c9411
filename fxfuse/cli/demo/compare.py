"""Who is compared with whom: all networks of one repetition, each beside its control.

A control is the best member with the same images and steps, so that the difference is what fusion
brought. Everything without labels (refit, matching, auto, distillation, recalibration) sees the
same calibration images; fine-tuning sees all training images, with labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxfuse import Classification, Match, Refit, Transplant
from fxfuse.api.fuse import fuse
from fxfuse.cli.data import Batches
from fxfuse.cli.demo import measure
from fxfuse.cli.demo.members import average, train_member
from fxfuse.cli.demo.network import SmallResNet
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
    """A network that was measured.

    Attributes:
        network: Whose costs it has: `member`, `ensemble` or `fused`.
        accuracy: On test images, in [0, 1].
        control: Name of the row without fusion that it is to be compared with.
        seconds: CPU seconds of what the row adds; None where it adds nothing.
        learning_rate: What validation chose.
        start: For `auto`: what the matching started from.
    """

    name: str
    network: str
    accuracy: float
    control: str | None = None
    seconds: float | None = None
    learning_rate: float | None = None
    start: str | None = None


def networks(images: Tensor) -> dict[str, nn.Module]:
    """Return an untrained network of each kind, for images `[n, 1, 28, 28]`."""
    members: list[nn.Module] = [SmallResNet().eval() for _ in range(MEMBERS)]
    return {
        "member": members[0],
        "ensemble": Ensemble(members, Classification()),
        "fused": fuse(members, images[:2]).module,
    }


def compare(case: Repetition, steps: int, member_steps: int) -> Iterator[Entry]:
    """Train the members of a repetition, and measure them and every network made of them."""
    members: list[nn.Module] = []
    for index in range(MEMBERS):
        batches = case.batches_of_member(index)
        members.append(train_member(batches, member_steps, case.seed_of(index)))
        yield _entry(case, f"member {index + 1}", "member", members[-1])
    best = max(members, key=lambda member: merit(member, case.validation))
    ensemble = Ensemble(members, Classification())
    yield _entry(case, f"ensemble of {MEMBERS}", "ensemble", ensemble)
    images = case.calibration()
    # Capturing is the same for every method: once is enough.
    program = [capture(member, images[:2]) for member in members]
    plain = fuse(program).module
    yield _entry(case, "weight averaging", "member", average(members), _BEST)
    aligned = fuse(program, method="weight_matching").module
    done = timed(aligned, lambda module: recalibrate(module, images))
    yield _refined(case, "weight matching + recalibration", "fused", done, _BEST)
    yield _entry(case, "NT, right after fusion", "fused", plain, _BEST)
    yield from _without_labels(case, members, program, best, images, steps)
    yield from _trained(case, members, plain, best, images, steps)


def _without_labels(
    case: Repetition,
    members: list[nn.Module],
    program: list[Program],
    best: nn.Module,
    images: Tensor,
    steps: int,
) -> Iterator[Entry]:
    control = f"best member + {steps} matching steps"
    result = fuse(program, calibration=images, method=Transplant(score="obs"), refine=[Refit()])
    assert result.refit is not None
    done = Refined(result.module, result.refit.seconds)
    yield _refined(case, "NT + refit", "fused", done, _HEAD)
    done = matched(result.module, members, images, steps, case.seed)
    done = Refined(done.module, result.refit.seconds + done.seconds)
    yield _refined(case, f"NT + refit + {steps} matching steps", "fused", done, control)

    auto = fuse(program, calibration=images, refine=[Refit(), Match(steps=steps)])
    assert auto.refit is not None
    assert auto.match is not None
    done = Refined(auto.module, auto.refit.seconds + auto.match.seconds)
    name, start = f"auto, {steps} matching steps", auto.plan.options["start"]
    yield _refined(case, name, "fused", done, control, start)
    yield _entry(case, _BEST, "member", best)
    done = timed(best, lambda module: refit_head(module, members, images, layer="head"))
    yield _refined(case, _HEAD, "member", done)
    done = matched(best, members, images, steps, case.seed)
    yield _refined(case, control, "member", done)


def _trained(
    case: Repetition,
    members: list[nn.Module],
    plain: nn.Module,
    best: nn.Module,
    images: Tensor,
    steps: int,
) -> Iterator[Entry]:
    control = f"best member + {steps} fine-tuning steps"
    shared = steps, case.seed, case.validation
    done = trained(plain, finetune, case.training, *shared)
    yield _refined(case, f"NT + {steps} fine-tuning steps", "fused", done, control)
    done = trained(best, finetune, case.training, *shared)
    yield _refined(case, control, "member", done)

    def distilled(module: nn.Module, batches: Batches, **options: Any) -> RefineReport:
        return distill(module, members, batches, **options)

    done = trained(best, distilled, lambda: _unlabelled(images, case.seed), *shared)
    yield _refined(case, f"best member + {steps} distillation steps", "member", done)


def _entry(
    case: Repetition,
    name: str,
    network: str,
    module: nn.Module,
    control: str | None = None,
    **refined: Any,
) -> Entry:
    accuracy, _ = measure.evaluate(module, *case.test)
    return Entry(name, network, accuracy, control, **refined)


def _refined(
    case: Repetition,
    name: str,
    network: str,
    done: Refined,
    control: str | None = None,
    start: str | None = None,
) -> Entry:
    told = {"seconds": done.seconds, "learning_rate": done.learning_rate, "start": start}
    return _entry(case, name, network, done.module, control, **told)


def _unlabelled(images: Tensor, seed: int) -> Batches:
    """Return batches whose labels, all 0, nobody reads."""
    return Batches(images, images.new_zeros(len(images)), BATCH, seed=seed)
