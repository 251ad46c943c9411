"""What a caller may ask of an analysis: parameters that stay, are shared, or outputs set free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NoReturn

import torch
from torch import fx

from fxfuse.analysis.labels import Kind
from fxfuse.common.options import Options, check_type
from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program

#: One pattern, or several.
Patterns = str | Iterable[str]
#: For an output, by its index in flattened order: the dimensions that are interface.
OutputDims = Mapping[int, Sequence[int]]


@dataclass(frozen=True, init=False)
class Constraints(Options):
    """What must stay as it is; patterns are those of `fnmatch`, and a single one needs no list.

    Attributes:
        freeze: `state_dict()` names of parameters that stay exactly as in the base member. Every
            dimension freezes, and what is coupled to it follows: the base member keeps it. A
            dimension that means the same in all members anyhow (input channels, tokens) draws
            nothing in.
        share: `state_dict()` names of parameters whose index means the same in all members (a
            pretrained stem that all members hold): the members' mean is taken, along with
            whatever is coupled to it, and the plan lists how far they disagree.
        ignore: Dotted paths of submodules of which nothing is fused: all their parameters and
            buffers are frozen as by `freeze`.
        output_dims: For an output, by its index in flattened order, the dimensions that are
            interface: `{0: ()}` sets all dimensions of the first output free, so that its channels
            may be permuted and fused. An output that is not listed is interface in every
            dimension.
        base_member: Number of the member that keeps every piece that is frozen inside the network.
            Where members have different architectures, the result has this one's.
    """

    freeze: tuple[str, ...] = ()
    share: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    output_dims: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    base_member: int = 0

    def __init__(
        self,
        freeze: Patterns = (),
        share: Patterns = (),
        ignore: Patterns = (),
        output_dims: OutputDims | None = None,
        base_member: int = 0,
    ) -> None:
        """Normalise patterns and dimensions."""
        check_type("output_dims", output_dims or {}, Mapping, how="pass a mapping, such as {0: ()}")
        dims = {output: tuple(dims) for output, dims in (output_dims or {}).items()}
        for name, value in (
            ("freeze", listed(freeze, "freeze")),
            ("share", listed(share, "share")),
            ("ignore", listed(ignore, "ignore")),
            ("output_dims", dims),
            ("base_member", base_member),
        ):
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __str__(self) -> str:
        """Return what is asked for, in one line; empty where that is nothing."""
        found = [
            f"{option}={list(patterns)}"
            for option, patterns in (
                ("freeze", self.freeze),
                ("share", self.share),
                ("ignore", self.ignore),
            )
            if patterns
        ]
        found += [f"output_dims={dict(self.output_dims)}"] if self.output_dims else []
        found += [f"base_member={self.base_member}"] if self.base_member else []
        return ", ".join(found)

    def and_also(self, other: Constraints) -> Constraints:
        """What both ask for; of an output or a base member that both name, what the other says."""
        return Constraints(
            self.freeze + other.freeze,
            self.share + other.share,
            self.ignore + other.ignore,
            {**self.output_dims, **other.output_dims},
            other.base_member,
        )

    def check_base_member(self, n_members: int) -> None:
        """Check that the base member is one of the members."""
        if not 0 <= self.base_member < n_members:
            raise OptionError(
                f"base_member must be 0 to {n_members - 1}, got {self.base_member}",
                how="pass base_member= with the number of a member, counted from 0",
            )


@dataclass(frozen=True)
class Asked:
    """What was asked for one tensor.

    Attributes:
        kind: `Kind.KEEP_BASE` (frozen, ignored) or `Kind.SHARED_INDEX` (shared).
        why: The option, as it is told to the user.
    """

    kind: Kind
    why: str


def listed(patterns: Patterns, option: str) -> tuple[str, ...]:
    """Return the patterns of an option as a tuple.

    Raises:
        OptionError: It is neither a pattern nor several of them.
    """
    check_type(option, patterns, (str, Iterable), how="pass a pattern or a list of patterns")
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def paths_of(name: str) -> tuple[str, ...]:
    """Return the dotted paths of the modules that hold a tensor, outermost first."""
    parts = name.split(".")[:-1]
    return tuple(".".join(parts[: n + 1]) for n in range(len(parts)))


def names_like(names: Iterable[str], pattern: str, option: str) -> tuple[str, ...]:
    """Return the tensor names that match a pattern."""
    names = tuple(names)
    found = tuple(name for name in names if fnmatchcase(name, pattern))
    return found or nothing_like(pattern, option, names, "no tensor of the network has such a name")


def names_under(names: Iterable[str], pattern: str, option: str) -> tuple[str, ...]:
    """Return the tensor names that lie in a submodule whose path matches a pattern.

    A tensor that the network itself holds lies in no submodule and is matched by its own name.
    """
    names = tuple(names)
    paths = {name: paths_of(name) or (name,) for name in names}
    found = tuple(n for n in names if any(fnmatchcase(path, pattern) for path in paths[n]))
    known = tuple(dict.fromkeys(path for name in names for path in paths[name]))
    return found or nothing_like(pattern, option, known, "no submodule of this path holds a tensor")


def nothing_like(pattern: str, option: str, known: Sequence[str], why: str) -> NoReturn:
    """Raise the error for a pattern that matches nothing, with what comes close to it."""
    close = get_close_matches(pattern, known, n=5, cutoff=0.4) or list(known[:5])
    more = f" (and {len(known) - len(close)} more)" if len(known) > len(close) else ""
    raise OptionError(
        f"{option}={pattern!r} matches nothing",
        why=why,
        how=f"use one of {', '.join(close)}{more}"
        if known
        else f"leave {option} out: the network has no tensors",
    )


def asked_for(program: Program, constraints: Constraints) -> dict[str, Asked]:
    """Return what was asked for each tensor, by canonical name."""
    found: dict[str, Asked] = {}
    for option, patterns, search, kind in (
        ("freeze", constraints.freeze, names_like, Kind.KEEP_BASE),
        ("ignore", constraints.ignore, names_under, Kind.KEEP_BASE),
        ("share", constraints.share, names_like, Kind.SHARED_INDEX),
    ):
        for pattern in patterns:
            asked = Asked(kind, f"asked for: {option}={pattern}")
            for name in search(program.names, pattern, option):
                _add(found, program, name, asked)
    return found


def _add(found: dict[str, Asked], program: Program, name: str, asked: Asked) -> None:
    if name in program.heads:
        raise OptionError(
            "a head cannot be frozen or shared",
            where=name,
            why=f"{asked.why}, but every head keeps its own member's weights",
            how="use a pattern that matches tensors of the trunk only",
        )
    earlier = found.setdefault(program.canonical[name], asked)
    if earlier.kind is not asked.kind:
        raise contradiction(name, earlier.why, asked.why)


def contradiction(where: str, first: str, second: str) -> OptionError:
    """Return the error for something that is to be the base member's and shared at once."""
    return OptionError(
        "two options contradict each other",
        where=where,
        why=f"{first}, but also {second}",
        how="drop one of the two patterns: a tensor is copied from the base member or averaged",
    )


def interface_dims(program: Program, constraints: Constraints) -> dict[int, frozenset[int]]:
    """Return the interface dimensions of the outputs that are listed, counted from the front."""
    outputs = program.outputs()
    found = {}
    ranks = {
        index: node.meta["val"].dim()
        for index, node in enumerate(outputs)
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
    }
    for index, dims in constraints.output_dims.items():
        if index not in ranks:
            raise OptionError(
                f"output_dims names output {index}, which the network does not have",
                how="use one of "
                + ", ".join(f"{i} ({rank} dimensions)" for i, rank in ranks.items()),
            )
        rank = ranks[index]
        for dim in dims:
            if not -rank <= dim < rank:
                raise OptionError(
                    f"output {index} has no dimension {dim}",
                    where=f"output_dims={dict(constraints.output_dims)}",
                    how=f"use one of 0 to {rank - 1}",
                )
        found[index] = frozenset(dim % rank for dim in dims)
    return found
