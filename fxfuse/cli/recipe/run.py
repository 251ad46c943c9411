"""Running a recipe: from the members' files to a folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from fxfuse.activations.calibration import Calibration
from fxfuse.api.fuse import fuse
from fxfuse.api.prune import prune
from fxfuse.api.result import FusionResult
from fxfuse.api.saved import FILES as NETWORK_FILES
from fxfuse.api.saved import write_network
from fxfuse.api.stages import build
from fxfuse.cli.evaluate import Likeness, beside_members, find_task, likeness
from fxfuse.cli.hub import member_path
from fxfuse.cli.model_names import is_pretrained
from fxfuse.cli.pretrained import write_pretrained
from fxfuse.cli.recipe.networks import Networks, load_data, load_networks, made_with
from fxfuse.cli.recipe.schema import Fuse, OptionPart, Recipe
from fxfuse.cli.recipe.summary import summary
from fxfuse.cli.recipe.text import RECIPE, write_recipe
from fxfuse.cli.report.content import Network
from fxfuse.cli.report.write import check_installed, write_report
from fxfuse.cli.sources import Data
from fxfuse.cli.training import train
from fxfuse.common.output import MARK, atomic_folder, check_output, locked
from fxfuse.graph.module_checks import check_enough
from fxfuse.planning.methods import find_method
from fxfuse.planning.plan import FusionPlan, read_plan
from fxfuse.refine import Match, Refit
from fxfuse.refine.pipeline import resolve_steps

SUMMARY, REPORT, PACKAGE, ONNX = "summary.md", "report.html", "package.pt2", "network.onnx"
PRETRAINED = "pretrained"
#: Every file and folder that a result's folder may hold.
FILES = (*NETWORK_FILES, SUMMARY, RECIPE, REPORT, PACKAGE, ONNX, PRETRAINED)

#: Says what is being done while a block runs.
Stage = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Outcome:
    """What running a recipe gave.

    Attributes:
        folder: Where it was written.
        files: Names of the files in it.
        result: The fused network.
        recipe: The recipe, with what it was made with.
        networks: What was measured, if there were data for it.
        trained: What training did, in a sentence, or "".
        likeness: How a network that nothing was fitted after answers, beside the ensemble.
        unsaved: Why there is no folder of transformers, where members are; else "".
    """

    folder: Path
    files: tuple[str, ...]
    result: FusionResult
    recipe: Recipe
    networks: tuple[Network, ...]
    trained: str
    likeness: Likeness | None = None
    unsaved: str = ""

    @property
    def raw_note(self) -> str:
        """What a network is worth that was neither fitted nor trained, else ""."""
        return "" if self.recipe.refines else self.result.raw_note


def _silently(what: str) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


@contextmanager
def prepare_output(recipe: Recipe, *, force: bool) -> Iterator[Path]:
    """Check that a recipe's folder may be written, and keep others from writing it.

    Args:
        recipe: The recipe.
        force: Whether an earlier result may be replaced.

    Yields:
        The folder.

    Raises:
        OutputError: Something is there already that may not be overwritten.
        OutputError: Another process is writing it.
    """
    folder = Path(recipe.base or "", recipe.output.folder)
    check_output(folder, FILES, force=force)
    with locked(folder):
        yield folder


def run(
    recipe: Recipe,
    *,
    force: bool = False,
    stage: Stage = _silently,
    progress: bool | Progress = False,
) -> Outcome:
    """Fuse as a recipe says, and write the result.

    The result's folder holds the recipe with what it was made with: the versions, the number of
    threads, and SHA-256 of every file. Run again, that recipe checks them and gives the same bytes
    on the same machine, unless a budget is in seconds. While it runs, the recipe's `base` is the
    working directory.

    Args:
        recipe: The recipe.
        force: Whether an earlier result may be replaced.
        stage: Is told what is being done.
        progress: As in `fxfuse.refine.match`.

    Raises:
        FxfuseError: What the recipe asks for cannot be done; nothing is written then.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(prepare_output(recipe, force=force)).absolute()
        if recipe.output.report:
            check_installed()
        if recipe.base:
            stack.enter_context(contextlib.chdir(recipe.base))
        threads = recipe.made.threads if recipe.made is not None else recipe.threads
        if threads is not None:
            stack.enter_context(_threads(threads))
        if recipe.fuse.size is None and recipe.fuse.plan is None:
            # With a size, one member alone is pruned.
            check_enough(recipe.members, "fusion")
        with stage("reading networks and data"):
            networks = load_networks(recipe)
            calibration = load_data(recipe.calibration, recipe, networks)
            evaluation = load_data(recipe.evaluation, recipe, networks)
            made = made_with(recipe, networks)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(recipe.seed)
        with stage(f"fusing {len(recipe.members)} networks"):
            result = _fused(recipe, networks, calibration, progress)
        trained = ""
        if recipe.train is not None:
            data = load_data(recipe.train.data, recipe, networks) or calibration
            with stage("training"):
                trained = train(
                    recipe.train.make(),
                    result.module,
                    networks.modules,
                    data,
                    seed=recipe.seed,
                    progress=progress,
                )
        measured: tuple[Network, ...] = ()
        if evaluation is not None:
            with stage("evaluating"):
                measured = evaluated(result, networks, recipe, evaluation)
        alike = None
        if result.raw_note and not recipe.refines and evaluation is None:
            with stage("comparing with the ensemble"):
                alike = _likeness(result, networks, recipe, calibration)
        kept = recipe.model_copy(update={"made": made, "base": recipe.base or str(Path.cwd())})
        with stage("writing"), atomic_folder(folder, FILES, force=force) as work:
            unsaved = _write(kept, result, networks, measured, trained, work)
            files = tuple(name for name in FILES if (work / name).exists())
    return Outcome(folder, files, result, kept, measured, trained, alike, unsaved)


def _fused(
    recipe: Recipe, networks: Networks, calibration: Data | None, progress: bool | Progress
) -> FusionResult:
    asked = recipe.fuse
    options: dict[str, Any] = {
        "calibration": None if calibration is None else _calibration(asked, calibration),
        "task": _made(asked.task),
        "verify": asked.verify,
        "progress": progress,
    }
    steps = None if asked.refine is None else [step.make() for step in asked.refine]
    method = find_method(_made(asked.method) or "transplant")
    unused = steps == [] and (asked.plan is not None or method.weights_only)
    if unused and recipe.train is not None and recipe.train.data is None:
        # The training takes the calibration inputs, so the fusion need not.
        options["calibration"] = None
    if asked.plan is not None:
        plan = read_plan(asked.plan)
        steps = _steps_after(plan, calibration) if steps is None else steps
        return build(plan, networks.members, networks.inputs, refine=steps, **options)
    options |= {
        "method": method,
        "size": _made(asked.size),
        "constraints": _made(asked.constraints),
        "refine": steps,
    }
    if len(recipe.members) == 1:
        return prune(networks.modules[0], networks.inputs, **options)
    return fuse(networks.members, networks.inputs, heads=_made(asked.heads), **options)


def _made(part: OptionPart | None) -> Any:
    return None if part is None else part.make()


def _calibration(asked: Fuse, data: Data) -> Calibration:
    inputs: Any = data.inputs if len(data.inputs) > 1 else data.inputs[0]
    # As one batch: it is cut up later.
    given = inputs if data.labels is None else [(inputs, data.labels)]
    found: Calibration = (
        Calibration(given) if asked.calibration is None else asked.calibration.make(inputs=given)
    )
    return found


def _steps_after(plan: FusionPlan, calibration: Data | None) -> list[Refit | Match]:
    """Return what follows a plan where a recipe does not say it: what `fuse` does by default."""
    matchable = not plan.heads and not plan.constraints.output_dims
    steps = resolve_steps(None, calibrated=calibration is not None, matchable=matchable)
    return [step for step in steps if step is not None]


def evaluated(
    result: FusionResult, networks: Networks, asked: Recipe, data: Data
) -> tuple[Network, ...]:
    """Return the members, their ensemble and the fused network, on the same data."""
    fused = _runnable(result)
    name = "fused" if len(asked.members) > 1 else "pruned"
    task = find_task(_made(asked.fuse.task), result.graph.program)
    return beside_members({name: fused}, networks.modules, task, data, networks.inputs)


def next_step(recipe: Recipe, result: FusionResult, folder: str) -> str:
    """Return what the reader of a report should do next, as a command where there is one."""
    name = Path(folder).name
    if result.raw_note and not recipe.refines:
        options = "--calibration DATA --refine refit,match --out OTHER"
        return f"refit and match it: fxfuse refit {name} {options}"
    if recipe.evaluation is None:
        return f"measure it on labelled data: fxfuse compare {name} --data DATA"
    return f'use it: fxfuse.load("{name}"), or compile it with fxfuse.compile'


def _runnable(result: FusionResult) -> nn.Module:
    return result.module if result.emitted else result.to_module()


def _likeness(
    result: FusionResult, networks: Networks, asked: Recipe, calibration: Data | None
) -> Likeness:
    """Compare a raw network with the ensemble: on calibration inputs, or else the example's."""
    if calibration is None:
        made_up = not Path(str(asked.input)).exists()
        kind = "example inputs" + " (random numbers)" * made_up
        data = Data(networks.inputs)
    else:
        kind, data = "calibration inputs", calibration
    if result.plan.heads:
        return Likeness(kind, len(data), why="each member keeps its own head")
    task = find_task(_made(asked.fuse.task), result.graph.program)
    return likeness(_runnable(result), networks.each(), task, data, kind)


def _write(
    recipe: Recipe,
    result: FusionResult,
    networks: Networks,
    measured: tuple[Network, ...],
    trained: str,
    work: Path,
) -> str:
    """Write the files of a result; return why there is no folder of transformers, or ""."""
    write_network(result, work)
    text = summary(result, measured, trained)
    (work / SUMMARY).write_text(f"{text}\n<!-- {MARK}. -->\n", encoding="utf-8")
    write_recipe(recipe, work / RECIPE)
    if recipe.output.report:
        modules = networks.modules or None
        write_report(
            result,
            work / REPORT,
            title=recipe.title,
            members=modules,
            networks=measured,
            refined=recipe.train is not None,
            names=recipe.names,
            next_step=next_step(recipe, result, recipe.output.folder),
        )
    if recipe.output.package or recipe.output.onnx:
        # Here, since it takes a second to import.
        from fxfuse.runtime import export_onnx, package

        if recipe.output.package:
            package(result, work / PACKAGE)
        if recipe.output.onnx:
            export_onnx(result, work / ONNX)
    member = member_path(recipe.members[0].path)
    if not recipe.model.startswith("hf:") or not is_pretrained(member):
        return ""
    return write_pretrained(result, recipe, member, work / PRETRAINED, measured)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as a result was made with: sums depend on them in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
