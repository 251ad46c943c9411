"""Results that have been written, read again and measured beside their members."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxfuse.api.saved import PLAN, WEIGHTS, load
from fxfuse.api.stages import build
from fxfuse.cli.evaluate import RUN_TIME, Ensemble, beside_members, find_task, repeated
from fxfuse.cli.recipe.networks import Networks, load_data, load_networks, made_with
from fxfuse.cli.recipe.run import REPORT, Stage, evaluated, next_step
from fxfuse.cli.recipe.schema import DataSource, Recipe
from fxfuse.cli.recipe.text import RECIPE, read_recipe, trusted
from fxfuse.cli.report.content import Network
from fxfuse.cli.report.transplanted import planned
from fxfuse.cli.report.write import check_installed, write_report
from fxfuse.cli.sources import Data
from fxfuse.common.measure import milliseconds
from fxfuse.common.output import check_replaceable
from fxfuse.errors import CheckpointError, OptionError
from fxfuse.graph.capture import capture
from fxfuse.members.checkpoint import load_tensors, read_state_dict
from fxfuse.planning.plan import read_plan
from fxfuse.refine import Classification, Task
from fxfuse.refine.infer_task import infer_task
from fxfuse.transform.emit import emit


def compared(
    folders: Sequence[Path],
    data: Mapping[str, Any] | None,
    task: Task | None,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    latency: bool,
    model: str | None = None,
    trust: bool = False,
) -> tuple[Network, ...]:
    """Measure written networks, and the members and ensemble of the first of them.

    `folders` are what `fxfuse fuse`, `run`, `refit` or `distill` wrote, of the same members, and
    after the first also stacks. `task` is what their outputs mean; None: what the first one's
    recipe or else the members' graph says. `dtype` and `quantize` as in `fxfuse.compile`: each
    network is measured in that precision, too. `model` and `trust` as in `trusted`, of the first
    one.
    """
    first = read_recipe(folders[0])
    # A stack has no recipe: what it is made of is its own business.
    for folder in (f for f in folders[1:] if (f / RECIPE).exists()):
        recipe = read_recipe(folder)
        if (recipe.model, _hashes(recipe)) != (first.model, _hashes(first)):
            raise OptionError(
                "the results have different members",
                where=str(folder),
                why=f"all results are compared with the ensemble of {folders[0]}",
                how="compare results of the same members",
            )
    first = trusted(first, folders[0], model=model, trust=trust)
    own = {str(folder): load(folder) for folder in folders}
    networks, examples = _networks(first, data)
    cast = _cast(own, networks.inputs, dtype, quantize)
    if task is None and first.fuse.task is not None:
        task = first.fuse.task.make()
    if examples is not None and task is None:
        task = find_task(None, capture(networks.modules[0], networks.inputs))
    stacks = {str(folder) for folder in folders if not (folder / RECIPE).exists()}
    tasks = _own_tasks({name: own[name] for name in own if name in stacks}, task, networks)
    tasks |= {new: tasks[name] for name, new in zip(own, cast, strict=False) if name in tasks}
    return beside_members(
        {**own, **cast},
        networks.modules,
        task,
        examples,
        networks.inputs,
        own_tasks=tasks,
        latency=latency,
    )


def _cast(
    networks: Mapping[str, fx.GraphModule],
    inputs: tuple[torch.Tensor, ...],
    dtype: str | None,
    quantize: str | None,
) -> dict[str, nn.Module]:
    """Return networks in another precision, uncompiled, where one was asked for."""
    if dtype is quantize is None:
        return {}
    # Here, since it takes a second to import.
    from fxfuse.runtime import compile as compiled_form

    told: Any = None if dtype is None else getattr(torch, dtype, dtype)
    words = ", ".join(filter(None, (dtype, quantize)))
    return {
        f"{name}, {words}": compiled_form(
            network, inputs, backend="eager", dtype=told, quantize=quantize
        ).uncompiled()
        for name, network in networks.items()
    }


def _own_tasks(
    stacks: Mapping[str, nn.Module], task: Task | None, networks: Networks
) -> dict[str, Classification]:
    """Return the tasks of stacks that return probabilities, where members return logits."""
    if not isinstance(task, Classification) or task.outputs != "logits":
        return {}
    found = {name: infer_task(capture(s, networks.inputs))[0] for name, s in stacks.items()}
    return {
        name: own
        for name, own in found.items()
        if isinstance(own, Classification) and own.outputs == "probabilities"
    }


def latencies(
    folder: Path,
    batches: Sequence[int],
    *,
    compiled: bool,
    stage: Stage,
    model: str | None = None,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Time a written network, one of its members and the ensemble, as they are and `compiled`.

    Returns, for each network, batch size and way, its median in ms, and the ratio to one member's.
    `model` and `trust` as in `trusted`.
    """
    recipe = trusted(read_recipe(folder), folder, model=model, trust=trust)
    fused = load(folder)
    networks, _ = _networks(recipe)
    member = networks.modules[0].eval()
    kinds = {"one member": member, "ensemble": Ensemble(networks.modules).eval(), "fused": fused}
    rows = []
    for batch in batches:
        inputs = repeated(networks.inputs, batch)
        ways: dict[str, dict[str, Any]] = {"eager": dict(kinds)}
        if compiled:
            ways["compiled"] = {}
            for name, network in kinds.items():
                with stage(f"compiling {name} for batch {batch}"):
                    ways["compiled"][name] = _compiled(network, inputs)
        for how, calls in ways.items():
            with stage(f"timing batch {batch}, {how}"):
                took = {name: milliseconds(call, inputs, RUN_TIME) for name, call in calls.items()}
            rows += [
                {
                    "network": name,
                    "batch": batch,
                    "how": how,
                    "latency_ms": ms,
                    "ratio_to_one_member": ms / took["one member"],
                }
                for name, ms in took.items()
            ]
    return rows


def report_on(
    folder: Path,
    data: Mapping[str, Any] | None,
    page: Path | None,
    *,
    model: str | None = None,
    trust: bool = False,
) -> Path:
    """Write a report on a written fusion, by default into its folder, and return where it is.

    The plan is applied to the members again, and gets the weights in the folder. `model` and
    `trust` as in `trusted`.
    """
    check_installed()
    recipe = trusted(read_recipe(folder), folder, model=model, trust=trust)
    page = Path(page or folder / REPORT).absolute()
    check_replaceable(page)
    if not (folder / PLAN).is_file():
        raise CheckpointError(
            f"{folder.name} holds no plan",
            where=str(folder / PLAN),
            why="a report describes a fusion",
            how="use a folder that `fxfuse fuse` wrote",
        )
    plan = read_plan(folder / PLAN)
    state = read_state_dict(folder / WEIGHTS)
    networks, examples = _networks(recipe, data)
    result = build(plan, planned(plan, networks.modules), networks.inputs)
    if result.emitted:
        load_tensors(result.module, state, folder / WEIGHTS)
    else:
        result = replace(result, _state=state)
    rows = () if examples is None else evaluated(result, networks, recipe, examples)
    source = None if data is None else DataSource(**data)
    asked = recipe.model_copy(update={"evaluation": source})
    write_report(
        result,
        page,
        title=recipe.title,
        members=networks.modules,
        networks=rows,
        refined=recipe.refines,
        names=recipe.names,
        next_step=next_step(asked, result, folder.name),
    )
    return page


def _compiled(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
    """A network after the same passes as any other, and compiled; an ensemble's members each."""
    # Here, since it takes a second to import.
    from fxfuse.runtime import compile as compiled_form

    if isinstance(network, Ensemble):
        return Ensemble([_compiled(member, inputs) for member in network.members]).eval()
    program = capture(network, inputs)
    return compiled_form(emit(program, program.state()), inputs)


def _networks(
    recipe: Recipe, data: Mapping[str, Any] | None = None
) -> tuple[Networks, Data | None]:
    """Load the members of a result, which may not have changed since, and other data for them.

    Images are prepared as the recipe says where they are not prepared otherwise.
    """
    source = None if data is None else DataSource(**{**recipe.images, **data})
    with contextlib.chdir(recipe.base or "."):
        asked = recipe if source is None else recipe.model_copy(update={"evaluation": source})
        networks = load_networks(asked, in_memory=True)
        made_with(recipe, networks)
        return networks, load_data(source, recipe, networks)


def _hashes(recipe: Recipe) -> list[str]:
    made = recipe.made.sha256 if recipe.made else {}
    return [made.get(m.path, m.path) for m in recipe.members]
