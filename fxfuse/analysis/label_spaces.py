"""The members' label spaces: what a network with a head of each member hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fxfuse.analysis.constraints import Patterns, listed
from fxfuse.common.options import Options, check_type
from fxfuse.errors import OptionError

#: How the outputs of the members' heads are returned.
HeadOutput = Literal["tuple", "concat", "union"]


@dataclass(frozen=True, init=False)
class Heads(Options):
    """Which modules each member keeps as its own head, and what the network returns.

    Heads may differ in shape. Tensors of head i are named `heads.<i>.<name>`.

    Attributes:
        modules: Dotted paths of the head modules, `fnmatch` patterns. None: they are found, as the
            modules whose parameters have an index for each class. An empty tuple: one head for all
            members.
        output: `tuple`: the outputs of every head; `concat`: one tensor, the members' logits side
            by side, for members that know different classes; `union`: one tensor with the logits
            of the union of their classes, in order of first appearance, each the mean of the
            members that know the class.
        classes: For `union`: the names of each member's classes, in the order of its logits.
    """

    modules: tuple[str, ...] | None = None
    output: HeadOutput = "tuple"
    classes: tuple[tuple[str, ...], ...] | None = None

    def __init__(
        self,
        modules: Patterns | None = None,
        output: HeadOutput = "tuple",
        classes: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        """Normalise patterns and names."""
        for name, value in (
            ("modules", None if modules is None else listed(modules, "modules")),
            ("output", output),
            ("classes", None if classes is None else _named(classes)),
        ):
            object.__setattr__(self, name, value)
        self.__post_init__()
        _check(self)

    def __bool__(self) -> bool:
        """Tell whether members keep heads of their own."""
        return self.modules != ()

    def __str__(self) -> str:
        """The modules and what is returned of them, in one line; empty where there are none."""
        if not self:
            return ""
        named = "those that are found" if self.modules is None else ", ".join(self.modules)
        return f"{named}; output: {self.output}" + (
            f" of {', '.join(self.union)}" * bool(self.classes)
        )

    @property
    def union(self) -> tuple[str, ...]:
        """The classes of all members, in order of first appearance."""
        return tuple(dict.fromkeys(name for names in self.classes or () for name in names))

    def check_counts(self, counts: Sequence[int]) -> None:
        """Check the lists of classes against the sizes of the members' heads."""
        if self.classes is None:
            return
        if len(self.classes) != len(counts):
            raise OptionError(
                f"classes must hold {len(counts)} lists, one for each member, "
                f"got {len(self.classes)}",
                where="classes",
                how="pass one list for each member, in the members' order",
            )
        for number, (names, count) in enumerate(zip(self.classes, counts, strict=True)):
            if len(names) != count:
                raise OptionError(
                    f"member {number} needs {count} classes, one for each logit, got {len(names)}",
                    where=f"classes[{number}]",
                    how="name each class of the member once, in the order of its logits",
                )

    def combined(self, outputs: Sequence[Sequence[torch.Tensor]], dim: int) -> list[torch.Tensor]:
        """Return what the network returns for the members' outputs, by definition.

        Args:
            outputs: For each member, the tensors that it returns.
            dim: The dimension of classes.
        """
        if self.output == "tuple":
            return [tensor for own in outputs for tensor in own]
        logits = [own[0].movedim(dim, -1) for own in outputs]
        if self.classes is None:
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

    def merged(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The heads' tensors of one name, as one layer would hold that answers for all of them.

        Right for tensors whose dimension 0 is classes, in which the answer is linear. None where
        they differ in another dimension.

        Args:
            tensors: For each member, [classes, *]; the first one's if it has no dimension.
        """
        first = tensors[0]
        if not first.dim():
            return first
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            return None
        joined = torch.cat(list(tensors))
        if self.classes is None:
            return joined
        projection = self.projection(joined.dtype, joined.device)
        return (projection @ joined.reshape(len(joined), -1)).reshape(-1, *first.shape[1:])

    def projection(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """From the members' logits side by side to those of the union: [classes, logits].

        A class has the mean of the members that know it.
        """
        columns = [name for names in self.classes or () for name in names]
        matrix = torch.zeros(len(self.union), len(columns), dtype=dtype, device=device)
        for row, name in enumerate(self.union):
            known = [i for i, column in enumerate(columns) if column == name]
            matrix[row, known] = 1 / len(known)
        return matrix


def _check(heads: Heads) -> None:
    """Check that what is asked for with heads is one thing."""
    if heads.output not in get_args(HeadOutput):
        raise OptionError(
            f"unknown output {heads.output!r} of heads",
            how=f"use one of {', '.join(get_args(HeadOutput))}",
        )
    if not heads and heads.output != "tuple":
        raise OptionError(
            f"output {heads.output!r} needs heads, but no module is one",
            how="leave modules out to have the heads found, or name them",
        )
    if heads.output == "union" and heads.classes is None:
        raise OptionError(
            "output 'union' needs classes",
            why="it maps logits to the union of the members' classes",
            how="pass one list of class names for each member: classes=[[...], [...]]",
        )
    if heads.output != "union" and heads.classes is not None:
        raise OptionError(
            f"classes and output {heads.output!r} contradict each other",
            why="only output 'union' maps logits to the union of the members' classes",
            how="use output 'union', or leave classes out",
        )


def _named(classes: Sequence[Sequence[Any]]) -> tuple[tuple[str, ...], ...]:
    check_type("classes", classes, Sequence, how="pass one list of class names for each member")
    found = []
    for number, names in enumerate(classes):
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise OptionError(
                "a member's classes are not a list of names",
                where=f"classes[{number}]",
                why=f"it is {names!r}",
                how="pass one list of class names for each member: classes=[[...], [...]]",
            )
        texts = tuple(str(name) for name in names)
        twice = next((name for name in texts if texts.count(name) > 1), None)
        if twice is not None:
            raise OptionError(
                f"member {number} has two classes named {twice!r}",
                where=f"classes[{number}]",
                why="a class of the union averages one logit of each member that has it",
                how="name each class of the member once, in the order of its logits",
            )
        found.append(texts)
    return tuple(found)
