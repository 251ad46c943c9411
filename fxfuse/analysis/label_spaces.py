"""The members' label spaces: what a network with a head of each member hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fxfuse.analysis.constraints import Patterns, listed
from fxfuse.errors import OptionError

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
            OptionError: There are more or fewer lists than members, or names than logits.
        """
        if self.outputs != "map":
            return
        if len(self.classes) != len(counts):
            raise OptionError(
                f"{len(self.classes)} lists of classes for {len(counts)} members",
                where="classes=",
                how="give one list for each member, in the members' order",
            )
        for number, (names, count) in enumerate(zip(self.classes, counts, strict=True)):
            if len(names) != count:
                raise OptionError(
                    f"member {number} has {count} logits, and {len(names)} classes are named",
                    where=f"classes[{number}]",
                    how="name every class of the member once, in the order of its logits",
                )

    def combined(self, outputs: Sequence[Sequence[torch.Tensor]], dim: int) -> list[torch.Tensor]:
        """What the network hands out for the members' outputs, by definition.

        Args:
            outputs: For each member, the tensors that it returns.
            dim: The dimension of classes.
        """
        if self.outputs == "tuple":
            return [tensor for own in outputs for tensor in own]
        logits = [own[0].movedim(dim, -1) for own in outputs]
        if self.outputs == "concat":
            return [torch.cat(logits, -1).movedim(-1, dim)]
        columns = [
            torch.stack(
                [
                    own[..., names.index(name)]
                    for own, names in zip(logits, self.classes, strict=True)
                    if name in names
                ]
            ).mean(0)
            for name in self.union
        ]
        return [torch.stack(columns, dim)]

    def merged(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The heads' tensors of one name, as one layer would hold that answers for all of them.

        Right for tensors whose dimension 0 is classes, in which the answer is linear.

        Args:
            tensors: For each member, [classes, *]; the first one's if it has no dimension.

        Raises:
            OptionError: They differ in another dimension.
        """
        first = tensors[0]
        if not first.dim():
            return first
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            raise OptionError(
                "the members' heads do not fit into one layer",
                why=f"they have the shapes {', '.join(str(tuple(t.shape)) for t in tensors)}",
            )
        joined = torch.cat(list(tensors))
        if self.outputs != "map":
            return joined
        projection = self.projection(joined.dtype, joined.device)
        return (projection @ joined.reshape(len(joined), -1)).reshape(-1, *first.shape[1:])

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
        OptionError: The options contradict each other.
        OptionError: A member's classes are no list of different names.
    """
    outputs: Any = head_outputs
    if heads in ("concat", "map"):
        if head_outputs not in (None, heads):
            raise OptionError(
                f"heads={heads!r} and head_outputs={head_outputs!r} contradict each other",
                why=f"{heads!r} is a way of handing out the heads that fxfuse finds",
                how="leave head_outputs out, or give heads as a list of patterns",
            )
        heads, outputs = (), heads
    outputs = outputs or "tuple"
    if outputs not in get_args(HeadOutputs):
        raise OptionError(
            f"head_outputs={outputs!r} is unknown",
            how=f"use one of {', '.join(get_args(HeadOutputs))}",
        )
    if (outputs == "map") != (classes is not None):
        raise OptionError(
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
            raise OptionError(
                "a member's classes are no list of names",
                where=f"classes[{number}]",
                why=f"it is {names!r}",
                how="give one list of class names for each member: classes=[[...], [...]]",
            )
        texts = tuple(str(name) for name in names)
        twice = next((name for name in texts if texts.count(name) > 1), None)
        if twice is not None:
            raise OptionError(
                f"member {number} has two classes named {twice!r}",
                where=f"classes[{number}]",
                why="a class of the union is the mean of one logit of each member that knows it",
                how="name every class of the member once, in the order of its logits",
            )
        found.append(texts)
    return tuple(found)
