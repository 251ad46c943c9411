"""The members' label spaces: what a network with a head of each member hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fxfuse.controls import Patterns, listed
from fxfuse.errors import ControlError, PartialFusionError

#: How the outputs of the members' heads are handed out.
HeadOutputs = Literal["tuple", "concat", "map"]


@dataclass(frozen=True)
class LabelSpaces:
    """How the heads' outputs become the network's.

    Attributes:
        outputs: `tuple`: one entry for each member; `concat`: one tensor, the members' classes side
            by side; `map`: one tensor over the union of the members' classes.
        classes: For `map`: the names of each member's classes, in the order of its logits.
    """

    outputs: HeadOutputs = "tuple"
    classes: tuple[tuple[str, ...], ...] = ()

    @property
    def union(self) -> tuple[str, ...]:
        """The classes of all members, in order of first appearance."""
        return tuple(dict.fromkeys(name for names in self.classes for name in names))

    def check_counts(self, counts: Sequence[int]) -> None:
        """Checks the lists of classes against the sizes of the members' heads.

        Raises:
            PartialFusionError: There are more or fewer lists than members, or names than logits.
        """
        if self.outputs != "map":
            return
        if len(self.classes) != len(counts):
            raise PartialFusionError(
                f"{len(self.classes)} lists of classes for {len(counts)} members",
                where="classes=",
                how="give one list for each member, in the members' order",
            )
        for number, (names, count) in enumerate(zip(self.classes, counts, strict=True)):
            if len(names) != count:
                raise PartialFusionError(
                    f"member {number} has {count} logits, and {len(names)} classes are named",
                    where=f"classes[{number}]",
                    how="name every class of the member once, in the order of its logits",
                )

    def projection(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """From the members' logits side by side to those of the union: [classes, logits].

        A class has the mean of the members that know it.
        """
        columns = [name for names in self.classes for name in names]
        matrix = torch.zeros(len(self.union), len(columns), dtype=dtype, device=device)
        for row, name in enumerate(self.union):
            known = [i for i, column in enumerate(columns) if column == name]
            matrix[row, known] = 1 / len(known)
        return matrix


def label_spaces(
    heads: Patterns, head_outputs: str | None, classes: Sequence[Sequence[Any]] | None
) -> tuple[tuple[str, ...], LabelSpaces]:
    """What a caller asks for with `heads`, `head_outputs` and `classes`.

    Returns:
        Patterns of the heads, none where they are to be found, and how they are handed out.

    Raises:
        ControlError: The options contradict each other.
        PartialFusionError: A member's classes are no list of different names.
    """
    outputs: Any = head_outputs
    if heads in ("concat", "map"):
        if head_outputs not in (None, heads):
            raise ControlError(
                f"heads={heads!r} and head_outputs={head_outputs!r} contradict each other",
                why=f"{heads!r} is a way of handing out the heads that fxfuse finds",
                how="leave head_outputs out, or give heads as a list of patterns",
            )
        heads, outputs = (), heads
    outputs = outputs or "tuple"
    if outputs not in get_args(HeadOutputs):
        raise ControlError(
            f"head_outputs={outputs!r} is unknown",
            how=f"use one of {', '.join(get_args(HeadOutputs))}",
        )
    if (outputs == "map") != (classes is not None):
        raise ControlError(
            "the outputs are mapped to the union of the members' classes"
            if outputs == "map"
            else f"classes are given, and head_outputs is {outputs!r}",
            why="only head_outputs='map' needs to know which class a logit is of",
            how="give one list of class names for each member: classes=[[...], [...]]"
            if outputs == "map"
            else "use heads='map', or leave classes out",
        )
    return listed(heads), LabelSpaces(outputs, _named(classes or ()))


def _named(classes: Sequence[Sequence[Any]]) -> tuple[tuple[str, ...], ...]:
    found = []
    for number, names in enumerate(classes):
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise PartialFusionError(
                "a member's classes are no list of names",
                where=f"classes[{number}]",
                why=f"it is {names!r}",
                how="give one list of class names for each member: classes=[[...], [...]]",
            )
        texts = tuple(str(name) for name in names)
        twice = next((name for name in texts if texts.count(name) > 1), None)
        if twice is not None:
            raise PartialFusionError(
                f"member {number} has two classes named {twice!r}",
                where=f"classes[{number}]",
                why="a class of the union is the mean of one logit of each member that knows it",
                how="name every class of the member once, in the order of its logits",
            )
        found.append(texts)
    return tuple(found)
