"""What is frozen and why: the network's interface, missing rules, wishes, the members' heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fxfuse.analysis.constraints import Asked, contradiction
from fxfuse.analysis.coupling_constraints import CouplingConstraints, Freeze
from fxfuse.analysis.heads import region_of
from fxfuse.analysis.labels import Index, Kind, Place
from fxfuse.analysis.rules import rule_file
from fxfuse.graph.capture import Program
from fxfuse.graph.source_lines import source_of
from fxfuse.graph.tensors import is_constant

_KINDS = (Kind.KEEP_BASE, Kind.OUTPUT, Kind.SHARED_INDEX)
#: Where an index means the same in all members anyhow, a wish concerns its tensor alone.
_SPARED = {Kind.KEEP_BASE: Kind.SHARED_INDEX, Kind.SHARED_INDEX: Kind.OUTPUT}
_HEAD = Freeze(np.empty(0, np.int64), Kind.SHARED_INDEX, "lies inside the head of one member", None)


@dataclass(frozen=True)
class FrozenReason:
    """Why a dimension, or a part of one, must stay as it is.

    Attributes:
        kind: What that means for fusion.
        why: One sentence.
        node: Name of the graph node that froze it, or "".
        source: File, line and code of that node, or "".
        indices: The frozen indices, int64 [n]; others of the same dimension may be free.
        operator: The operator that has no rule (or none for this use), when that is the reason.
        rule_file: Where a rule for that operator belongs, or "".
        inside: Whether the reason lies inside the network.
    """

    kind: Kind
    why: str
    node: str
    source: str
    indices: Index = field(repr=False)
    operator: str = ""
    rule_file: str = ""
    inside: bool = False

    @property
    def interface(self) -> bool:
        """Whether the dimension is frozen by what the network is, so that no rule can free it.

        Inputs and outputs of the network, positions in a kernel or a sequence, integer constants,
        and dimensions of size 1.
        """
        return self.kind is not Kind.KEEP_BASE and not self.inside


@dataclass(frozen=True)
class FrozenComponents:
    """What of the network's components is frozen.

    Attributes:
        kind: int8 [components]: index into `_KINDS`, -1 where free.
        reason: int64 [components]: index into `reasons`.
    """

    kind: NDArray[np.int8]
    reason: Index
    reasons: tuple[Freeze, ...]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Bool [components]."""
        return self.kind >= 0

    def kind_is(self, kind: Kind) -> NDArray[np.bool_]:
        """Return bool [components]: those that are frozen and of this kind."""
        mask: NDArray[np.bool_] = self.kind == _KINDS.index(kind)
        return mask

    @property
    def heads(self) -> NDArray[np.bool_]:
        """Bool [components]: those that lie inside the head of one member."""
        last = len(self.reasons) - 1
        mask: NDArray[np.bool_] = self.mask & (self.reason == last)
        return mask if self.reasons[last] is _HEAD else np.zeros_like(mask)

    def of(self, component: int) -> Freeze:
        """Return why a component is frozen; of the kind that decides."""
        freeze = self.reasons[int(self.reason[component])]
        return replace(freeze, kind=_KINDS[int(self.kind[component])])


def excused(asked: Mapping[str, Asked]) -> frozenset[str]:
    """Tensors that stay the base member's as they are, so that nothing has to be known of them."""
    return frozenset(name for name, wish in asked.items() if wish.kind is Kind.KEEP_BASE)


def frozen_components(
    program: Program, coupling: CouplingConstraints, component: Index
) -> FrozenComponents:
    """Return the kind and first reason of every frozen component."""
    heads = _inside_heads(program, coupling, component)
    size = len(heads)
    needed = np.full((len(_KINDS), size), -1, dtype=np.int64)
    wished = needed.copy()
    # What lies inside could be mended, so it is only said where nothing else holds.
    order = sorted(range(len(coupling.freezes)), key=lambda n: coupling.freezes[n].inside)
    # Backwards, so that the first reason is the one that stays.
    for number in reversed(order):
        freeze = coupling.freezes[number]
        table = wished if freeze.asked else needed
        table[_KINDS.index(freeze.kind), component[freeze.ids]] = number
    read = np.zeros(size, dtype=bool)
    for place in coupling.readers:
        read[component[coupling.ids_of(coupling.owners.index(place))]] = True
    kind = np.full(size, -1, dtype=np.int8)
    for number in reversed(range(len(_KINDS))):
        kind[needed[number] >= 0] = number
    # An output that nothing inside reads is the members' mean, whatever it passes.
    output = _KINDS.index(Kind.OUTPUT)
    kind[(needed[output] >= 0) & ~read] = output
    reason = np.take_along_axis(needed, np.maximum(kind, 0)[None], axis=0)[0]
    granted = {
        k: (wished[_KINDS.index(k)] >= 0) & (kind != _KINDS.index(spared))
        for k, spared in _SPARED.items()
    }
    torn = np.flatnonzero(np.logical_and(*granted.values()))
    if len(torn):
        wishes = [coupling.freezes[wished[_KINDS.index(k), torn[0]]] for k in granted]
        places = [coupling.owners[int(coupling.owner_positions(w.ids)[0])] for w in wishes]
        where = " is coupled with ".join(f"{name}:{dim}" for name, dim in places)
        raise contradiction(where, *(w.why for w in wishes))
    for k, mask in granted.items():
        kind[mask] = _KINDS.index(k)
        reason[mask] = wished[_KINDS.index(k)][mask]
    kind[heads], reason[heads] = _KINDS.index(_HEAD.kind), len(coupling.freezes)
    return FrozenComponents(kind, reason, (*coupling.freezes, _HEAD))


def frozen_places(
    program: Program,
    coupling: CouplingConstraints,
    component: Index,
    stuck: FrozenComponents,
    asked: Mapping[str, Asked],
) -> dict[Place, FrozenReason]:
    """Return why each place is frozen, of those that are, wholly or in part."""
    by_owner: dict[Place, Index] = {}
    for owner, place in enumerate(coupling.owners):
        by_owner[place] = component[coupling.ids_of(owner)]
    reached = program.reached()
    frozen: dict[Place, FrozenReason] = {}
    for name, first in program.canonical.items():
        tensor = program.tensor(name)
        for dim, size in enumerate(tensor.shape):
            members = by_owner.get((first, dim))
            everything = np.arange(size)
            wish = asked.get(first)
            if wish is not None:
                frozen[(name, dim)] = FrozenReason(wish.kind, wish.why, "", "", everything)
            elif is_constant(tensor):
                why = "an integer or boolean tensor is a constant of the network"
                frozen[(name, dim)] = FrozenReason(Kind.SHARED_INDEX, why, "", "", everything)
            elif first not in reached:
                why = "the captured graph does not read this tensor"
                reason = FrozenReason(Kind.SHARED_INDEX, why, "", "", everything, inside=True)
                frozen[(name, dim)] = reason
            elif members is None:
                why = "size 1: there is nothing to permute"
                frozen[(name, dim)] = FrozenReason(Kind.SHARED_INDEX, why, "", "", everything)
            else:
                indices = np.flatnonzero(stuck.mask[members])
                if len(indices):
                    freeze = stuck.of(int(members[indices[0]]))
                    frozen[(name, dim)] = _reason(freeze, indices)
    return frozen


def _inside_heads(
    program: Program, coupling: CouplingConstraints, component: Index
) -> NDArray[np.bool_]:
    """Return the components that only heads have: a head keeps its member's order in them."""
    size = int(component.max(initial=0)) + 1
    heads, trunk = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    if not program.heads:
        return heads
    inner = {f"<{node.name}>" for node in region_of(program, program.heads)}
    for owner, (name, _) in enumerate(coupling.owners):
        own = name in program.heads or name in inner
        (heads if own else trunk)[component[coupling.ids_of(owner)]] = True
    return heads & ~trunk


def _reason(freeze: Freeze, indices: Index) -> FrozenReason:
    node = freeze.node
    return FrozenReason(
        freeze.kind,
        freeze.why,
        node.name if node is not None else "",
        source_of(node) if node is not None else "",
        indices,
        freeze.operator,
        rule_file(node.target) if node is not None and freeze.operator else "",
        freeze.inside,
    )
