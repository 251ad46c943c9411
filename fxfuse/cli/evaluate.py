"""What networks are worth, beside each other: accuracy, likeness to the ensemble, size, latency."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.activations.calibration import join_rows
from fxfuse.cli.report.content import Network
from fxfuse.cli.sources import Data
from fxfuse.common.measure import flops, milliseconds, parameters
from fxfuse.errors import FxfuseError, InputError
from fxfuse.graph.capture import Program
from fxfuse.graph.example import first_line
from fxfuse.graph.run import answers as answers_of
from fxfuse.graph.run import untouched
from fxfuse.graph.torch_compat import pytree
from fxfuse.refine.infer_task import infer_task, task_of_answer
from fxfuse.refine.quality import Estimate, qualities
from fxfuse.refine.task import Answer, Classification, Task, main_output

#: Inputs per call, and seconds of repetition for a latency.
_BATCH, RUN_TIME = 128, 0.3


class Ensemble(nn.Module):
    """What an ensemble answers, one member after the other.

    Args:
        members: Networks whose outputs have one shape.
        task: What the outputs mean, and so how they are combined. None: the mean of the outputs.
    """

    def __init__(self, members: Sequence[nn.Module], task: Task | None = None) -> None:
        super().__init__()
        self.members, self.task = nn.ModuleList(members), task

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the task makes of the members' outputs, or their mean."""
        outputs = [member(*args, **kwargs) for member in self.members]
        if self.task is None:
            return torch.stack([main_output(output) for output in outputs]).mean(0)
        return self.task.combine([self.task.read(output) for output in outputs])


def find_task(given: Task | None, program: Program) -> Task:
    """Return the task that was given, or else what the members' graph says."""
    if given is not None:
        return given
    if program.is_exported:
        return infer_task(program)[0]
    args, kwargs = program.example_inputs
    assert program.source is not None
    return task_of_answer(answers_of(program.source, {}, args, kwargs))


def beside_members(
    networks: Mapping[str, nn.Module],
    members: Sequence[nn.Module],
    task: Task | None,
    data: Data | None,
    example: tuple[Any, ...],
    *,
    own_tasks: Mapping[str, Classification] = MappingProxyType({}),
    latency: bool = True,
) -> tuple[Network, ...]:
    """Measure the members, their ensemble and networks on the same data.

    One member alone has no ensemble, and networks are measured against itself.

    Args:
        networks: Networks by name.
        members: The members.
        task: What the outputs mean; needed with data.
        data: Examples, with labels for accuracies; None: only sizes and latency are measured.
        example: Inputs for FLOPs and latency.
        own_tasks: Tasks of networks that return probabilities where members return logits.
        latency: Whether to measure latency.

    Returns:
        A row for each network.

    Raises:
        InputError: A network does not take the data, or the labels do not fit.
        OptionError: The task does not fit what the members answer.
    """
    own = {f"member {i}": member for i, member in enumerate(members)}
    whole = {f"ensemble of {len(members)}": Ensemble(members, task)} if len(members) > 1 else {}
    rows: dict[str, nn.Module] = {**own, **whole, **networks}
    found: dict[str, dict[str, Estimate]] = {}
    if data is not None and task is not None:
        said = {name: answers(rows[name], task, data) for name in (*own, *networks)}
        _check(task, [said[name] for name in own])
        # Log-probabilities are logits, too.
        said |= {n: own_task.log_probabilities(said[n]) for n, own_task in own_tasks.items()}
        found = qualities(
            task, said, [said[name] for name in own], data.labels, ensemble="".join(whole)
        )
    measured = []
    for name, network in rows.items():
        with untouched(network):
            operations = flops(network, example)
            took = milliseconds(network, example, RUN_TIME) if latency else None
        each = found.get(name, {})
        measured.append(
            Network(
                name,
                parameters(network),
                operations,
                milliseconds=took,
                unit=task.unit if task is not None and "distance" in each else "",
                intervals={measure: (e.low, e.high) for measure, e in each.items()},
                **{measure: e.value for measure, e in each.items()},
            )
        )
    return tuple(measured)


@dataclass(frozen=True)
class Likeness:
    """How closely a network answers like the ensemble on some inputs.

    Attributes:
        inputs: What the inputs are, in words.
        count: Number of inputs.
        unit: Unit of the distances.
        distance: Of the network from the ensemble.
        closest: The same of the member that is closest to it.
        agreement: Share of positions at which the network names the ensemble's class, in percent;
            None where outputs are not classes.
        why: Why nothing could be measured, or "".
    """

    inputs: str
    count: int
    unit: str = ""
    distance: float = math.nan
    closest: float = math.nan
    agreement: float | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"not compared with the ensemble: {self.why}"
        text = f"distance from the ensemble on {self.count} {self.inputs}: {self.distance:.3g} "
        text += f"({self.unit}); the closest member has {self.closest:.3g}"
        if self.agreement is not None:
            text += f"; it names the ensemble's class in {self.agreement:.0f} % of cases"
        return text

    def as_json(self) -> dict[str, Any]:
        """Plain data; what was not measured is None."""
        known = not self.why
        return {
            "inputs": self.inputs,
            "count": self.count,
            "unit": self.unit,
            "distance": self.distance if known else None,
            "closest_member_distance": self.closest if known else None,
            "agreement_percent": self.agreement,
            "why_not": self.why,
        }


def likeness(
    network: nn.Module, members: Iterable[nn.Module], task: Task, data: Data, inputs: str
) -> Likeness:
    """Compare a network with the ensemble of its members, which may be read one by one.

    `inputs` is what the data are called.
    """
    try:
        own = answers(network, task, data)
        said = [answers(member, task, data) for member in members]
        _check(task, [own, *said])
        named = {"": own} | {str(i): answer for i, answer in enumerate(said)}
        found = qualities(task, named, said)
        each = [found[str(i)]["distance"].value for i in range(len(said))]
        agreement = found[""].get("agreement")
        return Likeness(
            inputs,
            len(data),
            task.unit,
            found[""]["distance"].value,
            min(each),
            None if agreement is None else agreement.value,
        )
    except FxfuseError as error:
        return Likeness(inputs, len(data), why=f"{error.what}. {error.why}".strip())


def answers(network: nn.Module, task: Task, data: Data) -> Answer:
    """Return what a network in eval mode answers, float32 [n, *], on the CPU.

    Raises:
        InputError: It does not take the data.
    """
    found = []
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with torch.no_grad(), untouched(network):
        for start in range(0, len(data), _BATCH):
            batch = tuple(
                _like(x[start : start + _BATCH], parameter).to(device) for x in data.inputs
            )
            try:
                answer = task.read(network(*batch))
            # The network may reject them with anything.
            except Exception as error:
                raise InputError(
                    "the network rejects the data",
                    where=", ".join(f"{list(x.shape)} {x.dtype}" for x in batch),
                    why=first_line(error),
                    how="pass examples of the shape and dtype that it was trained on",
                ) from error
            found.append(pytree.tree_map_only(Tensor, lambda x: x.float().cpu(), answer))
    return join_rows(found)


def _check(task: Task, said: Sequence[Answer]) -> None:
    """Check that there is an ensemble of what the members answer."""
    shapes = {tuple(x.shape) for x in said if isinstance(x, Tensor)}
    if len(shapes) > 1:
        raise InputError(
            "the members have no ensemble",
            where=f"outputs {', '.join(map(str, sorted(shapes)))}",
            why="networks are compared with it, and outputs of different shapes cannot be combined",
            how="leave the data out, and measure each head on its own labels",
        )
    for answer in said:
        task.check(answer)


def _like(x: Tensor, parameter: Tensor | None) -> Tensor:
    return x.to(parameter.dtype) if parameter is not None and x.is_floating_point() else x


def repeated(example: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """Return example inputs of another batch size: the first examples, over and over.

    Args:
        example: Inputs, each [n, ...].
        batch: The size.
    """

    def resize(x: Tensor) -> Tensor:
        return x[torch.arange(batch, device=x.device) % len(x)] if x.dim() else x

    found: tuple[Any, ...] = pytree.tree_map_only(Tensor, resize, example)
    return found
