"""The fusion plan: groups and maps, before any weight is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.coupling import Index, MixingNote
from fxfuse.analysis.label_spaces import HeadOutputs, LabelSpaces
from fxfuse.errors import PlanError
from fxfuse.members.fingerprint import Fingerprint, digest_of
from fxfuse.planning.plan_codec import MapEntries, read, written
from fxfuse.planning.size import Mixing

#: Plans of schema 1 know neither their members nor what was asked for: they can be read, and not
#: applied. Those of schema 2 list every entry of every map.
_SCHEMA, _LISTED, _OLDEST = 3, 2, 1

Weights = NDArray[np.float64]
_TREATMENT: Mapping[Mixing, str] = {
    "joint": "over the kept units of all members together, which is an approximation",
    "per_member": "once for each member",
}


@dataclass(frozen=True)
class UnitMap:
    """Merge map M and unmerge map U of one group, as a list of their entries.

    Entry k says: M takes unit `unit[k]` of member `member[k]` to fused unit `target[k]` with
    `weight[k]`, at the tensors that write the group; U takes that fused unit back to this unit with
    `read[k]`, at the tensors that read it. What is not listed is 0.

    Attributes:
        group: Name of the coupling group.
        n_units: Units of the fused group.
        target: int64 [k].
        member: int64 [k].
        unit: int64 [k].
        weight: Entries of M, float64 [k], or one number for all: 1 for one-hot maps, 1/N for
            averages.
        read: Entries of U, float64 [k], or one number for all.
    """

    group: str
    n_units: int
    target: Index
    member: Index
    unit: Index
    weight: float | Weights = 1.0
    read: float | Weights = 1.0

    def entries(self) -> MapEntries:
        """All entries."""
        return MapEntries(self.target, self.member, self.unit, self.weight, self.read)

    def units(self) -> Index:
        """The units with a part in the fused group, each once, as (member, unit): int64 [n, 2]."""
        return np.unique(np.stack([self.member, self.unit], axis=1), axis=0)

    def counts(self, n_members: int) -> tuple[int, ...]:
        """How many units of each member have a part; one in several fused units is one."""
        return tuple(np.bincount(self.units()[:, 0], minlength=n_members).tolist())

    def of_member(self, member: int) -> tuple[Index, Index]:
        """Fused units and units of one member, both int64 [k_member]."""
        chosen = self.member == member
        return self.target[chosen], self.unit[chosen]

    def weights_of(self, member: int) -> tuple[Weights, Weights]:
        """Entries of M and of U in the order of `of_member`, both float64 [k_member]."""
        chosen = self.member == member
        merge, unmerge = (np.broadcast_to(w, chosen.shape) for w in (self.weight, self.read))
        return merge[chosen].astype(np.float64), unmerge[chosen].astype(np.float64)


@dataclass(frozen=True)
class FusionPlan:
    """What goes where.

    Attributes:
        method: Name of the fusion method.
        options: Its options (score, variant).
        n_members: N.
        base_member: The member that keeps every piece frozen inside the network.
        maps: One map per coupling group.
        averaged: Parameters inside the network that no group owns: the members' mean is taken,
            an approximation. Values: largest difference between members, relative to the largest
            weight.
        hosted: Tensors of which the base member's frozen part is kept.
        copied: Tensors copied from the base member (constants, tensors that the graph does not
        read). notes: Operators that mix members.
        heads: Tensors that one member's head keeps (partial fusion) → the number of that member.
        refused: Groups that keep a member's size although another was asked for → why.
        mixing: How operators that mix members run: `joint`, over the kept units of all members
            together, or `per_member`, in the wide model, which is the members' mean exactly then.
        apart: With `per_member`: the tensors of which each member keeps its own.
        absent: Tensors of residual blocks that some members lack → the numbers of these members, in
            which such a block is the identity.
        constraints: What was asked of the analysis.
        heads_asked: Patterns of the modules in which each member keeps its own head.
        members: The fingerprint of each member; empty in a plan that an earlier
            version wrote.
        origin: Where a network was pruned that had a plan of its own: the digest of that plan.
        spaces: How the heads are handed out.
        widths: For each group, how many units each member has, where members differ in width; of a
            block that a member lacks, 0.
        reasons: Why the base member's part of a hosted tensor is frozen, by its name.
    """

    method: str
    options: Mapping[str, str]
    n_members: int
    base_member: int
    maps: tuple[UnitMap, ...]
    averaged: Mapping[str, float]
    hosted: tuple[str, ...]
    copied: tuple[str, ...]
    notes: tuple[MixingNote, ...] = field(default=())
    heads: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    mixing: Mixing = "joint"
    apart: tuple[str, ...] = ()
    absent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constraints: Constraints = field(default_factory=Constraints)
    heads_asked: tuple[str, ...] = ()
    members: tuple[Fingerprint, ...] = field(default=(), repr=False)
    origin: str = ""
    spaces: LabelSpaces = field(default_factory=LabelSpaces)
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def map_of(self, group: str) -> UnitMap:
        """The map of a group.

        Raises:
            PlanError: The plan has no such group.
        """
        for entry in self.maps:
            if entry.group == group:
                return entry
        raise PlanError(
            f"the plan has no group {group!r}",
            why="it was made for another network",
            how="make the plan with members of the network that it is applied to",
        )

    def sizes(self) -> dict[str, int]:
        """Units of each fused group, by its name."""
        return {m.group: m.n_units for m in self.maps}

    def inexact(self) -> list[str]:
        """Why the concatenation is not exactly the mean of the members; empty when it is."""
        if self.mixing == "per_member":
            return []
        found = [f"{n.why} ({n.node})" for n in self.notes]
        found += [f"{name} is averaged" for name, spread in self.averaged.items() if spread > 0]
        found += [f"{name} is the base member's" for name in self.hosted]
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's content, 64 hexadecimal digits."""
        return digest_of(self._content())

    def to_json(self) -> str:
        """The plan as JSON text, with its digest."""
        content = self._content()
        return json.dumps({**content, "digest": digest_of(content)}, indent=1)

    def _content(self) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "method": self.method,
            "options": dict(self.options),
            "n_members": self.n_members,
            "base_member": self.base_member,
            "groups": [
                {"group": m.group, "n_units": m.n_units, **written(m.entries(), m.n_units)}
                for m in self.maps
            ],
            "averaged": dict(self.averaged),
            "hosted": list(self.hosted),
            "copied": list(self.copied),
            "heads": dict(self.heads),
            "refused": dict(self.refused),
            "mixing": self.mixing,
            "apart": list(self.apart),
            "absent": {name: list(members) for name, members in self.absent.items()},
            "notes": [
                {"why": n.why, "node": n.node, "source": n.source, "sources": sorted(n.sources)}
                for n in self.notes
            ],
            "controls": {
                "freeze": list(self.constraints.freeze),
                "share": list(self.constraints.share),
                "ignore": list(self.constraints.ignore),
                "output_dims": {str(k): list(v) for k, v in self.constraints.output_dims.items()},
            },
            "heads_asked": list(self.heads_asked),
            "members": [dict(member) for member in self.members],
            "origin": self.origin,
            "head_outputs": self.spaces.outputs,
            "classes": [list(names) for names in self.spaces.classes],
            # Not in plans of earlier versions, whose digests stay what they are.
            **(
                {"widths": {g: list(units) for g, units in self.widths.items()}}
                if self.widths
                else {}
            ),
            **({"reasons": dict(self.reasons)} if self.reasons else {}),
        }

    @staticmethod
    def from_json(text: str) -> FusionPlan:
        """Reads a plan back.

        Plans of earlier versions hold no hashes: they can be read, and `fuse(plan=)` refuses them.

        Raises:
            PlanError: The text is no plan that this version reads, or it was edited.
        """
        try:
            value = json.loads(text)
            if value["schema"] not in (_SCHEMA, _LISTED, _OLDEST):
                raise PlanError(
                    f"plan schema {value['schema']} is not {_SCHEMA}",
                    how="make the plan again with this version of fxfuse",
                )
            if value["schema"] != _OLDEST:
                _check_digest(value)
            return FusionPlan(
                value["method"],
                value["options"],
                int(value["n_members"]),
                int(value["base_member"]),
                tuple(_read_map(m) for m in value["groups"]),
                value["averaged"],
                tuple(value["hosted"]),
                tuple(value["copied"]),
                tuple(
                    MixingNote(n["why"], n["node"], n["source"], frozenset(n["sources"]))
                    for n in value["notes"]
                ),
                # Plans written before partial fusion have none.
                {name: int(member) for name, member in value.get("heads", {}).items()},
                value.get("refused", {}),
                _read_mixing(value.get("mixing", "joint")),
                tuple(value.get("apart", ())),
                {name: tuple(map(int, m)) for name, m in value.get("absent", {}).items()},
                _read_controls(value.get("controls", {})),
                tuple(value.get("heads_asked", ())),
                tuple(dict(member) for member in value.get("members", ())),
                value.get("origin", ""),
                _read_spaces(value),
                {group: tuple(map(int, n)) for group, n in value.get("widths", {}).items()},
                dict(value.get("reasons", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                "this is not a fusion plan",
                why=f"{type(error).__name__}: {error}",
                how="pass the text of FusionPlan.to_json()",
            ) from error

    def summary(self) -> str:
        """The plan as a Markdown page."""
        lines = [
            "# Fusion plan",
            "",
            f"{self.n_members} members, method `{self.method}`"
            + "".join(f", {key} `{value}`" for key, value in self.options.items())
            + f", base member: member {self.base_member}.",
            "",
            "| group | units | " + " | ".join(f"from {i}" for i in range(self.n_members)) + " |",
            "|---|---:|" + "---:|" * self.n_members,
        ]
        for m in self.maps:
            cells = [str(count) for count in m.counts(self.n_members)]
            if m.group in self.widths:
                each = zip(cells, self.widths[m.group], strict=True)
                cells = [f"{count} of {units}" if units else "–" for count, units in each]
            lines.append(f"| `{m.group}` | {m.n_units} | " + " | ".join(cells) + " |")
        for title, names in (
            ("Averaged inside the network (an approximation)", self.averaged),
            ("Kept from the base member", self.hosted),
            ("Copied from the base member", self.copied),
        ):
            if names:
                lines += ["", f"## {title}", ""]
            for name in names:
                spread = (
                    f": members differ by {self.averaged[name]:.2g}"
                    if names is self.averaged
                    else ""
                )
                why = self.reasons.get(name, "") if names is self.hosted else ""
                lines.append(f"- `{name}`{spread}" + (f": {why}" if why else ""))
        if self.heads:
            lines += ["", "## Heads, each with its member's own weights", ""]
            lines += [f"- `{name}`: member {member}" for name, member in self.heads.items()]
        if self.spaces.outputs == "concat":
            lines += ["", "Their outputs stand side by side in one tensor."]
        if self.spaces.outputs == "map":
            lines += [
                "",
                f"Classes: {', '.join(self.spaces.union)}. Each has the mean of its logits.",
            ]
        if self.refused:
            lines += ["", "## Groups that keep a member's size", ""]
            lines += [f"- `{name}`: {why}" for name, why in self.refused.items()]
        if self.absent:
            lines += ["", "## Blocks that are the identity in members that lack them", ""]
            lines += [f"- `{n}`: not in {', '.join(map(str, m))}" for n, m in self.absent.items()]
        if self.apart:
            lines += ["", "## Of these each member keeps its own, and runs on its own there", ""]
            lines += [f"- `{name}`" for name in self.apart]
        if self.notes:
            how = _TREATMENT[self.mixing]
            lines += ["", "## Operators that mix members", "", f"They run {how}.", ""]
            lines += [f"- `{n.node}`: {n.why}  {n.source}".rstrip() for n in self.notes]
        return "\n".join(lines) + "\n"


def _check_digest(value: Mapping[str, Any]) -> None:
    content = {key: entry for key, entry in value.items() if key != "digest"}
    if digest_of(content) != value["digest"]:
        raise PlanError(
            "the plan was edited",
            why="its content has another digest than the one that it was written with",
            how="use the plan as to_json() wrote it; to change a plan, change the FusionPlan in "
            "Python and write that",
        )


def _read_controls(value: Mapping[str, Any]) -> Constraints:
    dims = {int(output): tuple(dims) for output, dims in value.get("output_dims", {}).items()}
    freeze, share, ignore = (tuple(value.get(name, ())) for name in ("freeze", "share", "ignore"))
    return Constraints(freeze, share, ignore, dims)


def _read_spaces(value: Mapping[str, Any]) -> LabelSpaces:
    # Plans written before heads could be handed out as one tensor have none.
    outputs, classes = value.get("head_outputs", "tuple"), value.get("classes", ())
    if outputs not in get_args(HeadOutputs):
        raise ValueError(f"head_outputs {outputs!r} is none of {', '.join(get_args(HeadOutputs))}")
    return LabelSpaces(outputs, tuple(tuple(map(str, names)) for names in classes))


def _read_mixing(value: Any) -> Mixing:
    if value not in _TREATMENT:
        raise ValueError(f"mixing {value!r} is none of {', '.join(_TREATMENT)}")
    found: Mixing = value
    return found


def _read_map(value: Mapping[str, Any]) -> UnitMap:
    try:
        n_units = int(value["n_units"])
        return UnitMap(value["group"], n_units, *read(value, n_units))
    except ValueError as error:
        raise ValueError(f"group {value['group']!r}: {error}") from error
