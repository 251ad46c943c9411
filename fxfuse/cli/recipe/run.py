"""Running a recipe: from the members' files to a folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from fxfuse.api.fuse import fuse
from fxfuse.api.result import FusionResult
from fxfuse.api.saved import FILES as NETWORK_FILES
from fxfuse.api.saved import write_network
from fxfuse.cli.evaluate import beside_members
from fxfuse.cli.recipe.networks import Networks, load_data, load_networks, made_with
from fxfuse.cli.recipe.schema import Recipe
from fxfuse.cli.recipe.summary import summary
from fxfuse.cli.recipe.text import RECIPE, write_recipe
from fxfuse.cli.recipe.train import train
from fxfuse.cli.report.content import Network
from fxfuse.cli.report.write import check_installed, write_report
from fxfuse.cli.sources import Data
from fxfuse.common.output import atomic_folder, check_output, locked
from fxfuse.graph.module_checks import check_enough
from fxfuse.planning.plan import FusionPlan

SUMMARY, REPORT, PACKAGE, ONNX = "summary.md", "report.html", "package.pt2", "network.onnx"
#: Every file that a result's folder may hold.
FILES = (*NETWORK_FILES, SUMMARY, RECIPE, REPORT, PACKAGE, ONNX)

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
    """

    folder: Path
    files: tuple[str, ...]
    result: FusionResult
    recipe: Recipe
    networks: tuple[Network, ...]
    trained: str


def _silently(what: str) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


@contextmanager
def prepare_output(recipe: Recipe, *, force: bool) -> Iterator[Path]:
    """Checks that a recipe's folder may be written, and keeps others from writing it.

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
    """Fuses as a recipe says, and writes the result.

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
        check_enough(recipe.members, "fusion")
        with stage("reading networks and data"):
            networks, calibration = load_networks(recipe), load_data(recipe.calibration)
            evaluation = load_data(recipe.evaluation)
            made = made_with(recipe, networks)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(recipe.seed)
        with stage(f"fusing {len(recipe.members)} networks"):
            result = _fused(recipe, networks, calibration, progress)
        trained = ""
        if recipe.train is not None:
            data = load_data(recipe.train.data) or calibration
            with stage("training"):
                trained = train(
                    recipe.train,
                    result.module,
                    networks.modules,
                    data,
                    outputs=recipe.fuse.outputs,
                    seed=recipe.seed,
                    progress=progress,
                )
        measured: tuple[Network, ...] = ()
        if evaluation is not None:
            with stage("evaluating"):
                measured = evaluated(result, networks, evaluation)
        kept = recipe.model_copy(update={"made": made, "base": recipe.base or str(Path.cwd())})
        with stage("writing"), atomic_folder(folder, FILES, force=force) as work:
            _write(kept, result, networks, measured, trained, work)
            files = tuple(name for name in FILES if (work / name).exists())
    return Outcome(folder, files, result, kept, measured, trained)


def _fused(
    recipe: Recipe, networks: Networks, calibration: Data | None, progress: bool | Progress
) -> FusionResult:
    options = recipe.fuse.model_dump(exclude={"plan"})
    plan = recipe.fuse.plan
    if plan is not None:
        text = Path(plan).read_text(encoding="utf-8", errors="replace")
        options["plan"] = FusionPlan.from_json(text)
    pairs = None
    if calibration is not None:
        inputs = calibration.inputs if len(calibration.inputs) > 1 else calibration.inputs[0]
        # As one batch: fuse cuts it up.
        pairs = inputs if calibration.labels is None else [(inputs, calibration.labels)]
    return fuse(
        networks.members,
        networks.inputs,
        template=networks.template,
        calibration=pairs,
        progress=progress,
        **options,
    )


def evaluated(result: FusionResult, networks: Networks, data: Data) -> tuple[Network, ...]:
    """The members, their ensemble and the fused network, on the same data."""
    fused = result.module if result.emitted else result.to_module()
    return beside_members({"fused": fused}, networks.modules, data, networks.inputs)


def _write(
    recipe: Recipe,
    result: FusionResult,
    networks: Networks,
    measured: tuple[Network, ...],
    trained: str,
    work: Path,
) -> None:
    write_network(result, work)
    text = summary(result, measured, trained)
    (work / SUMMARY).write_text(text, encoding="utf-8")
    write_recipe(recipe, work / RECIPE)
    if recipe.output.report:
        title = f"{len(recipe.members)} networks fused into one"
        write_report(
            result,
            work / REPORT,
            title=title,
            members=networks.modules or None,
            networks=measured,
        )
    if recipe.output.package or recipe.output.onnx:
        # Here, since it takes a second to import.
        from fxfuse.runtime import export_onnx, package

        if recipe.output.package:
            package(result, work / PACKAGE)
        if recipe.output.onnx:
            export_onnx(result, work / ONNX)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as a result was made with: sums depend on them in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
