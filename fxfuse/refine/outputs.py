"""What kind of output a network has, which decides what its loss and its head are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import fx

from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program
from fxfuse.refine.task import Classification, Task

#: Logits of classes, of which only differences count; or values, each of which counts.
Outputs = Literal["logits", "values"]


def kind_of(shape: Sequence[int], task: Task | None) -> Outputs:
    """The kind of an output: what the task says, or what its shape suggests.

    Args:
        shape: Shape of one output, batch first.
        task: What the output means. None: two dimensions with several columns are logits.
    """
    if task is not None and not isinstance(task, Task):
        raise OptionError(
            f"unknown task {task!r}",
            how="use fxfuse.Classification() or fxfuse.Regression(), or leave task out",
        )
    if task is None:
        return "logits" if len(shape) == 2 and shape[1] > 1 else "values"
    return "logits" if isinstance(task, Classification) else "values"


def kind_of_network(program: Program, task: Task | None) -> Outputs:
    """The kind of a network's first output; of several heads: logits, if any of them has logits."""
    outputs = [node for node in program.outputs() if isinstance(node, fx.Node)]
    asked = outputs if program.heads else outputs[:1]
    kinds = [kind_of(node.meta["val"].shape, task) for node in asked]
    return "logits" if "logits" in kinds else "values"
