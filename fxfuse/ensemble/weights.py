"""Where the members' tensors are kept in a stack, under which names, and in which shape."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import fx, nn

from fxfuse.graph.capture import Program
from fxfuse.graph.tensors import attach, fetch, is_constant
from fxfuse.transform.emit import COUNTER, MEAN

aten = torch.ops.aten


class Place(Enum):
    """Where a tensor of the members is kept.

    Members: one tensor each, `member<i>__<name>`. Stacked: one tensor for all, `stacked__<name>`,
    any view of [N, *shape]. Shared: all members hold the same tensor object, `shared__<name>`.
    """

    MEMBERS = "member"
    STACKED = "stacked"
    SHARED = "shared"


@dataclass(frozen=True)
class Entry:
    """Where one tensor is found.

    Attributes:
        name: Its `state_dict()` name in a member.
        place: Where it is kept.
        key: First name under which a member's `state_dict()` has the same tensor.
        word: Its name as one word.
    """

    name: str
    place: Place
    shape: tuple[int, ...]
    key: str
    word: str


@dataclass(frozen=True)
class Inventory:
    """What `unstack` has to know, by plain data only.

    Attributes:
        entries: Of each member, its tensors in the order of its `state_dict()`.
    """

    entries: tuple[tuple[Entry, ...], ...]


def name_in_stack(place: Place, word: str, member: int = 0) -> str:
    """Return the name of a member's tensor in the stack; `word` is its own name as one word."""
    return f"{place.value}{member}{word}" if place is Place.MEMBERS else f"{place.value}{word}"


def as_words(names: Iterable[str]) -> dict[str, str]:
    """Return the dotted names as one word each: `a.b` as `__a__b`.

    A name with dots is looked up module by module, at every call, which takes as long as a small
    operator.
    """
    words: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        word = "__" + name.replace(".", "__")
        while word in taken:
            # In front, so that the end of a name still says what the tensor is.
            word = "_" + word
        taken.add(word)
        words[name] = word
    return words


class Weights:
    """Tensors of the members as a graph that is being written asks for them.

    How a tensor is kept follows from how it is read: where every reader wants one tensor for all
    members in the same shape, it is kept so; where none does, each member keeps its own; elsewhere
    it is kept as [N, *shape], and readers take views.
    """

    def __init__(self, members: Sequence[Program], graph: fx.Graph) -> None:
        self.members = members
        self.graph = graph
        self.words = as_words(members[0].names)
        self.tensors = [{name: m.tensor(name) for name in m.names} for m in members]
        self._owners: dict[int, set[int]] = defaultdict(set)
        for number, tensors in enumerate(self.tensors):
            for tensor in tensors.values():
                self._owners[id(tensor)].add(number)
        self._stacked: dict[str, dict[tuple[int, ...], fx.Node]] = defaultdict(dict)
        self._own: dict[str, dict[int, fx.Node]] = defaultdict(dict)

    @property
    def n(self) -> int:
        """Number of members."""
        return len(self.members)

    def is_shared(self, name: str) -> bool:
        """Tell whether all members hold the same tensor object."""
        return len({id(tensors[name]) for tensors in self.tensors}) == 1

    def is_stackable(self, name: str) -> bool:
        """Tell whether one tensor can stand for those of all members.

        Not where some members share it, and not where some train it and others do not.
        """
        own = [tensors[name] for tensors in self.tensors]
        alike = len({(t.requires_grad, isinstance(t, nn.Parameter)) for t in own}) == 1
        return alike and all(len(self._owners[id(t)]) == 1 for t in own)

    def key(self, name: str) -> str:
        """Return the first name of the same tensor within a member."""
        return self.members[0].canonical[name]

    def shared(self, name: str) -> fx.Node:
        """Read a tensor that all members share, or a constant of which member 0's serves all."""
        return self.own(name, 0)

    def own(self, name: str, member: int) -> fx.Node:
        """Read a member's tensor, of the member's shape."""
        found = self._own[self.key(name)]
        if member not in found:
            found[member] = self.graph.create_node("get_attr", self.key(name))
        return found[member]

    def stacked(self, name: str, shape: tuple[int, ...]) -> fx.Node:
        """Read a tensor of all members at once, viewed from [N, *shape of a member]."""
        found = self._stacked[self.key(name)]
        if shape not in found:
            found[shape] = self.graph.create_node("get_attr", self.key(name))
        return found[shape]

    def reads(self) -> Iterator[tuple[fx.Node, str, int | tuple[int, ...]]]:
        """Yield all nodes that read the members' tensors.

        Yields:
            The node, the tensor's first name in a member, and the number of the member that it
            reads, or the shape in which it reads all of them: a view of [N, *shape of a member].
        """
        for key, own in self._own.items():
            for member, node in own.items():
                yield node, key, member
        for key, stacked in self._stacked.items():
            for shape, node in stacked.items():
                yield node, key, shape

    def place_tensors(self) -> tuple[Program, Inventory]:
        """Decide how every tensor is kept, and let all readers read it there.

        Returns:
            The stack without its graph: copies of the members' tensors by their names in it; and
            where each one is.
        """
        first = self.members[0]
        places: dict[str, Place] = {}
        holder = fx.GraphModule({}, fx.Graph())
        canonical: dict[str, str] = {}
        made: dict[Any, str] = {}

        def keep(name: str, identity: Any, tensor: torch.Tensor) -> None:
            """A copy, since training the stack must not change the members."""
            canonical[name] = made.setdefault(identity, name)
            if canonical[name] == name:
                copy = tensor.detach().clone()
                kept = (
                    nn.Parameter(copy, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else copy
                )
            else:
                kept = fetch(holder, canonical[name])
            attach(holder, name, kept, persistent=True)

        for name in first.names:
            key = self.key(name)
            places[key] = place = places.get(key) or self._place(key)
            own = [tensors[key] for tensors in self.tensors]
            if place is Place.MEMBERS:
                for number, tensor in enumerate(own):
                    keep(self._name(place, name, number), id(tensor), tensor)
            elif place is Place.SHARED:
                keep(self._name(place, name), id(own[0]), own[0])
            else:
                with torch.no_grad():
                    together = torch.stack([t.detach() for t in own]).reshape(self._shape(key))
                if isinstance(own[0], nn.Parameter):
                    together = nn.Parameter(together, requires_grad=own[0].requires_grad)
                keep(self._name(place, name), key, together)
        for key, place in places.items():
            self._point(key, place)
        entries = tuple(
            Entry(
                name,
                places[self.key(name)],
                tuple(first.tensor(name).shape),
                self.key(name),
                self.words[name],
            )
            for name in first.names
        )
        joined = replace(
            first, module=holder, names=tuple(canonical), canonical=canonical, source=None
        )
        return joined, Inventory((entries,) * self.n)

    def _name(self, place: Place, name: str, member: int = 0) -> str:
        return name_in_stack(place, self.words[name], member)

    def _place(self, key: str) -> Place:
        if self.is_shared(key):
            return Place.SHARED
        # A batch norm of all members counts its batches for all of them.
        mean = key.removesuffix(COUNTER) + MEAN
        counts = key.endswith(COUNTER) and mean in self.members[0].canonical
        follows = self.key(mean) if counts else key
        return Place.STACKED if self._stacked.get(follows) else Place.MEMBERS

    def _shape(self, key: str) -> tuple[int, ...]:
        """Return the shape in which one tensor for all members is kept."""
        wanted = self._stacked.get(key, {})
        if len(wanted) == 1 and not self._own.get(key):
            return next(iter(wanted))
        return (self.n, *self.members[0].tensor(key).shape)

    def _point(self, key: str, place: Place) -> None:
        """Give the nodes that read a tensor its name, and a view where they need one."""
        for number, node in self._own.get(key, {}).items():
            node.target = self._name(place, key, number)
            if place is Place.STACKED:
                self._view(node, aten.select.int, 0, number)
        kept = self._shape(key)
        for shape, node in self._stacked.get(key, {}).items():
            node.target = self._name(place, key)
            if shape != kept:
                self._view(node, aten.view.default, list(shape))

    def _view(self, node: fx.Node, target: Any, *args: Any) -> None:
        readers = list(node.users)
        with self.graph.inserting_after(node):
            view = self.graph.call_function(target, (node, *args))
        for reader in readers:
            reader.replace_input_with(node, view)


def read_twice(program: Program) -> frozenset[str]:
    """Return names of tensors that more than one node of the graph reads, by their first name."""
    readers = Counter(
        program.canonical[str(node.target)]
        for node in program.graph.nodes
        if node.op == "get_attr" and node.target in program.canonical
        for _ in node.users
    )
    return frozenset(name for name, count in readers.items() if count > 1)


def is_variable(program: Program, name: str) -> bool:
    """Whether a name is that of a tensor of the state which members have values of their own of."""
    return name in program.canonical and not is_constant(program.tensor(name))
