"""What kind of output a network has, which decides what its loss and its head are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import fx

from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program

#: Logits of classes, of which only differences count; or values, each of which counts.
Outputs = Literal["logits", "values"]
KINDS = ("logits", "values")


def kind_of(shape: Sequence[int], wish: str | None) -> Outputs:
    """The kind of an output: what the caller says, or what its shape suggests.

    Args:
        shape: Shape of one output, batch first.
        wish: `logits`, `values`, or None: two dimensions with several columns are logits.
    """
    if wish is None:
        return "logits" if len(shape) == 2 and shape[1] > 1 else "values"
    if wish not in KINDS:
        raise OptionError(
            f"unknown outputs {wish!r}",
            where="outputs",
            how=f"use one of {', '.join(KINDS)}, or None to let the shape decide",
        )
    return "logits" if wish == "logits" else "values"


def kind_of_network(program: Program, wish: str | None) -> Outputs:
    """The kind of a network's first output; of several heads: logits, if any of them has logits."""
    outputs = [node for node in program.outputs() if isinstance(node, fx.Node)]
    asked = outputs if program.heads else outputs[:1]
    kinds = [kind_of(node.meta["val"].shape, wish) for node in asked]
    return "logits" if "logits" in kinds else "values"
