"""The fusion plan: groups, maps and roles, before any weight is touched."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxfuse.analysis.constraints import Constraints
from fxfuse.analysis.coupling import Index, MixingNote
from fxfuse.analysis.label_spaces import Heads
from fxfuse.common.json_file import parse_json
from fxfuse.common.output import MARK
from fxfuse.common.readable import Description, Readable, counted
from fxfuse.errors import OptionError, PlanError
from fxfuse.graph.source_lines import at_line
from fxfuse.members.fingerprint import Fingerprint, digest_of
from fxfuse.planning.plan_codec import MapEntries, decode, decode_map, encode, encode_map
from fxfuse.planning.roles import Role, RoleKind
from fxfuse.planning.size import MixingMode

#: Other schemas are not read: nothing that wrote them was released.
_SCHEMA = 4
#: What is beside the content in a file.
_BESIDE = ("note", "digest")
#: Far more units than a layer has, and few enough to be listed.
_MOST_UNITS = 10**7
#: Most characters of a plan, and most values and containers in it: half a gigabyte of memory.
_LONGEST, _MOST_VALUES = 1 << 30, 1 << 24

Weights = NDArray[np.float64]
_TREATMENT: Mapping[MixingMode, str] = {
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
        kept: Why the group keeps a member's size although another was asked for; or "".
    """

    group: str
    n_units: int
    target: Index
    member: Index
    unit: Index
    weight: float | Weights = 1.0
    read: float | Weights = 1.0
    kept: str = ""

    def entries(self) -> MapEntries:
        """Return all entries."""
        return MapEntries(self.target, self.member, self.unit, self.weight, self.read)

    def units(self) -> Index:
        """The units with a part in the fused group, each once, as (member, unit): int64 [n, 2]."""
        return np.unique(np.stack([self.member, self.unit], axis=1), axis=0)

    def counts(self, n_members: int) -> tuple[int, ...]:
        """Return how many units of each member have a part; one in several fused units is one."""
        return tuple(np.bincount(self.units()[:, 0], minlength=n_members).tolist())

    def of_member(self, member: int) -> tuple[Index, Index]:
        """Return the fused units and units of one member, both int64 [k_member]."""
        chosen = self.member == member
        return self.target[chosen], self.unit[chosen]

    def weights_of(self, member: int) -> tuple[Weights, Weights]:
        """Return the entries of M and of U in the order of `of_member`, both float64 [k_member]."""
        chosen = self.member == member
        merge, unmerge = (np.broadcast_to(w, chosen.shape) for w in (self.weight, self.read))
        return merge[chosen].astype(np.float64), unmerge[chosen].astype(np.float64)

    def encoded(self) -> dict[str, Any]:
        """Return the map as JSON can hold it."""
        named = {"group": self.group, "n_units": self.n_units, "kept": self.kept}
        if not self.kept:
            del named["kept"]
        return {**named, **encode_map(self.entries(), self.n_units)}

    @staticmethod
    def decoded(value: Mapping[str, Any], where: str) -> UnitMap:
        """Read what `encoded` returned."""
        entries = dict(value)
        for name in ("group", "n_units"):
            if name not in entries:
                raise ValueError(f"{where} lacks {name!r}")
        group = decode(str, entries.pop("group"), f"{where}.group")
        n_units = decode(int, entries.pop("n_units"), f"{where}.n_units")
        kept = decode(str, entries.pop("kept", ""), f"{where}.kept")
        if not 0 < n_units <= _MOST_UNITS:
            raise ValueError(f"{where}.n_units is {n_units}, and not between 1 and {_MOST_UNITS:,}")
        return UnitMap(group, n_units, *decode_map(entries, n_units, where), kept=kept)


@dataclass(frozen=True)
class MemberRecord:
    """What a plan knows of a member.

    Attributes:
        tensors: A hash of each of its tensors, by name; none: the plan is for any members.
        units: How many units of each group it has, where members differ in width or depth; of a
            block that it lacks, 0.
        plan: Digest of the plan that it was made with, where it is a fused network itself.
    """

    tensors: Fingerprint = field(default_factory=dict, repr=False)
    units: Mapping[str, int] = field(default_factory=dict)
    plan: str = ""


@dataclass(frozen=True)
class Mixing:
    """The operators that mix members, and how they run.

    Attributes:
        mode: `joint`, over the kept units of all members together, or `per_member`, in the wide
            model, which is the members' mean exactly then.
        notes: The operators.
    """

    mode: MixingMode = "joint"
    notes: tuple[MixingNote, ...] = ()

    def in_words(self) -> list[str]:
        """Return how they run, and where they stand; empty where there are none."""
        if not self.notes:
            return []
        how = "one by one" if self.mode == "per_member" else "jointly, inexact"
        where = [at_line(note.node, note.source) for note in self.notes]
        return [f"{len(self.notes):,} {how}: {where[0]}", *where[1:]]


@dataclass(frozen=True, repr=False)
class FusionPlan(Readable):
    """What goes where.

    Attributes:
        method: Name of the fusion method.
        options: Its options (score, variant).
        maps: One map per coupling group.
        roles: What becomes of each tensor beside the maps, by name.
        members: What is known of each member.
        constraints: What had to stay as it is.
        heads: The members' own heads (partial fusion).
        mixing: The operators that mix members, and how they run.
    """

    method: str
    options: Mapping[str, str]
    maps: tuple[UnitMap, ...]
    roles: Mapping[str, Role]
    members: tuple[MemberRecord, ...]
    constraints: Constraints = field(default_factory=Constraints)
    heads: Heads = field(default_factory=lambda: Heads(()))
    mixing: Mixing = field(default_factory=Mixing)

    @property
    def n_members(self) -> int:
        """N."""
        return len(self.members)

    @property
    def base_member(self) -> int:
        """Number of the member that keeps every piece frozen inside the network."""
        return self.constraints.base_member

    def names_of(self, kind: str) -> tuple[str, ...]:
        """Return the tensors with a role of this kind (`RoleKind`)."""
        return tuple(name for name, role in self.roles.items() if role.kind == kind)

    @property
    def absent(self) -> dict[str, tuple[int, ...]]:
        """Tensors of residual blocks that some members lack → the numbers of these members."""
        return {name: role.absent_in for name, role in self.roles.items() if role.absent_in}

    @property
    def kept_sizes(self) -> dict[str, str]:
        """Groups that keep a member's size although another was asked for → why."""
        return {m.group: m.kept for m in self.maps if m.kept}

    def map_of(self, group: str) -> UnitMap:
        """Return the map of a group.

        Raises:
            PlanError: The plan has no such group.
        """
        for entry in self.maps:
            if entry.group == group:
                return entry
        raise PlanError(
            f"the plan has no group {group!r}",
            why="it was made for another network",
            how="make a plan with members of this network",
        )

    def sizes(self) -> dict[str, int]:
        """Return the units of each fused group, by its name."""
        return {m.group: m.n_units for m in self.maps}

    def made_for(self, tensors: Sequence[Fingerprint], plan: str = "") -> FusionPlan:
        """Return the same plan, which knows its members.

        Args:
            tensors: The fingerprint of each member.
            plan: Digest of the plan that they were made with.
        """
        pairs = zip(self.members, tensors, strict=True)
        return replace(
            self, members=tuple(replace(m, tensors=found, plan=plan) for m, found in pairs)
        )

    def inexact(self) -> list[str]:
        """Return why the concatenation is not exactly the mean of the members; empty when it is."""
        if self.mixing.mode == "per_member":
            return []
        found = [f"{n.why} ({n.node})" for n in self.mixing.notes]
        found += [f"{name} is averaged" for name, role in self.roles.items() if role.spread > 0]
        found += [f"{name} is the base member's" for name in self.names_of(RoleKind.BASE)]
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's content, 64 hexadecimal digits."""
        return digest_of(self._content())

    def to_json(self) -> str:
        """Return the plan as JSON text, with its digest."""
        content = self._content()
        return json.dumps({"note": MARK, **content, "digest": digest_of(content)}, indent=1)

    def _content(self) -> dict[str, Any]:
        return {"schema": _SCHEMA, **encode(self)}

    @staticmethod
    def from_json(text: str) -> FusionPlan:
        """Read a plan back.

        Raises:
            PlanError: The text is no plan of this version's schema, or it was edited; says where
                and how.
        """
        try:
            value = parse_json(text, _LONGEST, _MOST_VALUES)
            if not isinstance(value, dict) or "schema" not in value:
                raise ValueError("it is not a JSON object with a schema")
            _check_origin(value)
            content = {k: v for k, v in value.items() if k not in ("schema", *_BESIDE)}
            plan: FusionPlan = decode(FusionPlan, content, "the plan")
            _check(plan)
        except (ValueError, RecursionError, OptionError) as error:
            raise PlanError(
                "this is not a fusion plan",
                why=" ".join(str(error).split()),
                how="pass the text of FusionPlan.to_json()",
            ) from error
        return plan

    def described(self) -> Description:
        """Return what becomes of the members, in a few rows; `summary` says all."""
        named = ", ".join(f"{key} {value}" for key, value in self.options.items())
        title = f"Fusion plan: {counted(self.n_members, 'member')} by {self.method}"
        absent = [
            f"{name} (not in {', '.join(map(str, who))})" for name, who in self.absent.items()
        ]
        return title + (f" ({named})" if named else ""), {
            "units": self._units_in_words(),
            "kept sizes": [f"{name}: {why}" for name, why in self.kept_sizes.items()],
            "tensors": self._roles_in_words(),
            "absent": absent,
            "heads": str(self.heads),
            "constraints": str(self.constraints),
            "mixing": self.mixing.in_words(),
        }

    def _units_in_words(self) -> list[str]:
        total = sum(m.n_units for m in self.maps)
        counts = [m.counts(self.n_members) for m in self.maps]
        each = (sum(count[i] for count in counts) for i in range(self.n_members))
        origin = [f"{count:,} from member {i}" for i, count in enumerate(each)]
        return [f"{total:,} in {counted(len(self.maps), 'group')}: {origin[0]}", *origin[1:]]

    def _roles_in_words(self) -> list[str]:
        counts = Counter(role.kind for role in self.roles.values())
        spread = max((role.spread for role in self.roles.values()), default=0.0)
        said = {
            RoleKind.MAPPED: "fused",
            RoleKind.AVERAGED: f"averaged (members differ by up to {spread:.2g})",
            RoleKind.BASE: f"kept from member {self.base_member}",
            RoleKind.COPIED: "copied",
            RoleKind.HEAD: "in heads",
            RoleKind.PER_MEMBER: "one for each member",
        }
        return [f"{counts[kind]:,} {text}" for kind, text in said.items() if counts[kind]]

    def summary(self) -> str:
        """Return the plan as a Markdown page."""
        options = "".join(f", {key} `{value}`" for key, value in self.options.items())
        lines = [
            "# Fusion plan",
            "",
            f"{self.n_members} members, method `{self.method}`{options}, "
            f"base member: member {self.base_member}.",
            "",
            *self._group_lines(),
        ]
        for title, entries in self._sections():
            if entries:
                lines += ["", f"## {title}", "", *entries]
        if self.heads.output == "concat":
            lines += ["", "The outputs of the heads stand side by side in one tensor."]
        if self.heads.output == "union":
            lines += [
                "",
                f"Classes: {', '.join(self.heads.union)}. Each has the mean of its logits.",
            ]
        if self.mixing.notes:
            how = _TREATMENT[self.mixing.mode]
            lines += ["", "## Operators that mix members", "", f"They run {how}.", ""]
            lines += [f"- `{n.node}`: {n.why}  {n.source}".rstrip() for n in self.mixing.notes]
        return "\n".join(lines) + "\n"

    def _group_lines(self) -> list[str]:
        lines = [
            "| group | units | " + " | ".join(f"from {i}" for i in range(self.n_members)) + " |",
            "|---|---:|" + "---:|" * self.n_members,
        ]
        for m in self.maps:
            cells = [str(count) for count in m.counts(self.n_members)]
            own = [member.units.get(m.group) for member in self.members]
            for i, units in enumerate(own):
                if units is not None:
                    cells[i] = f"{cells[i]} of {units}" if units else "–"
            lines.append(f"| `{m.group}` | {m.n_units} | " + " | ".join(cells) + " |")
        return lines

    def _sections(self) -> Iterable[tuple[str, list[str]]]:
        """Return the roles, each kind under a title."""

        def lines(kind: RoleKind) -> list[str]:
            found = ((name, self.roles[name]) for name in self.names_of(kind))
            return [f"- `{name}`{_details(role)}" for name, role in found]

        yield "Averaged inside the network (an approximation)", lines(RoleKind.AVERAGED)
        yield "Kept from the base member", lines(RoleKind.BASE)
        yield "Copied from the base member", lines(RoleKind.COPIED)
        yield "Heads, each with its member's own weights", lines(RoleKind.HEAD)
        kept = [f"- `{name}`: {why}" for name, why in self.kept_sizes.items()]
        yield "Groups that keep a member's size", kept
        absent = [f"- `{n}`: not in {', '.join(map(str, m))}" for n, m in self.absent.items()]
        yield "Blocks that are the identity in members that lack them", absent
        own = [f"- `{name}`" for name in self.names_of(RoleKind.PER_MEMBER)]
        yield "Of these each member keeps its own, and runs on its own there", own


def _details(role: Role) -> str:
    """Return what is worth knowing of a role beside its kind."""
    if role.kind is RoleKind.HEAD:
        return f": member {role.member}"
    if role.kind is RoleKind.AVERAGED:
        return f": members differ by {role.spread:.2g}"
    rest = f"; the rest is averaged, members differ by {role.spread:.2g}" if role.spread else ""
    return (f": {role.why}" if role.why else "") + rest


def read_plan(path: str | Path) -> FusionPlan:
    """Read the plan in a file.

    Raises:
        PlanError: There is no such file, or it holds no plan.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LONGEST + 1)
    except OSError as error:
        raise PlanError(
            "the plan cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            how="check the path and its permissions",
        ) from error
    return FusionPlan.from_json(content.decode("utf-8", errors="replace"))


def _check_origin(value: Mapping[str, Any]) -> None:
    """Check that this version wrote a plan, and nobody changed it."""
    if value["schema"] != _SCHEMA:
        raise PlanError(
            f"unknown plan schema {value['schema']!r:.20}, expected {_SCHEMA}",
            how="make the plan again with this version of fxfuse",
        )
    content = {key: entry for key, entry in value.items() if key not in _BESIDE}
    if digest_of(content) != value.get("digest"):
        raise PlanError(
            "the plan was edited",
            why="its content does not match its digest",
            how="use the plan as to_json() wrote it; to change it, change the FusionPlan in Python "
            "and write that",
        )


def _check(plan: FusionPlan) -> None:
    """Check that the parts of a plan fit each other."""
    if not plan.members:
        raise ValueError("it has no members")
    if not 0 <= plan.base_member < plan.n_members:
        raise ValueError(f"the base member is member {plan.base_member} of {plan.n_members}")
    for group, count in Counter(m.group for m in plan.maps).items():
        if count > 1:
            raise ValueError(f"the group {group!r} has {count} maps")
    for m in plan.maps:
        lacking = m.n_units - len(m.target)
        if lacking > 0:
            raise ValueError(f"{lacking:,} fused units of {m.group!r} are made of nothing")
        _check_below(f"the map of {m.group!r} has fused unit", m.target, m.n_units)
        _check_below(f"the map of {m.group!r} has member", m.member, plan.n_members)
    for name, role in plan.roles.items():
        _check_role(f"the role of {name!r}", role, plan.n_members)
    for i, member in enumerate(plan.members):
        for group, units in member.units.items():
            if units < 0:
                raise ValueError(f"member {i} has {units} units of {group!r}")


def _check_role(called: str, role: Role, n_members: int) -> None:
    _check_below(f"{called} is absent in member", np.asarray(role.absent_in), n_members)
    if len({*role.absent_in}) < len(role.absent_in):
        raise ValueError(f"{called} is absent in one member twice")
    if role.member is not None:
        _check_below(f"{called} names member", np.asarray([role.member]), n_members)
    if (role.kind is RoleKind.HEAD) != (role.member is not None):
        raise ValueError(f"{called} is {role.kind}, and its member is {role.member}")
    if role.spread < 0:
        raise ValueError(f"{called} has the spread {role.spread}")


def _check_below(called: str, values: NDArray[Any], count: int) -> None:
    wrong = values[(values < 0) | (values >= count)]
    if len(wrong):
        raise ValueError(f"{called} {wrong[0]} of {count}, counted from 0")
