"""Members that are spread over the processes of a `torch.distributed` group.

Every rank runs the same program. What reads a member runs on the rank that has it (`of_each`), and
every rank gets what came out: scores, kept rows, hashes. So all ranks hold the same plan and the
same network, and no rank holds the members of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
import torch.distributed as dist

from fxfuse.errors import FxfuseError, MemberError, OptionError
from fxfuse.graph.torch_compat import pytree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

#: A member's tensors by name.
State = Mapping[str, torch.Tensor]


class Ranks:
    """The processes of a group, seen from one of them.

    Args:
        group: A process group with a backend for the members' device, or "world": the default one.
    """

    def __init__(self, group: ProcessGroup | str) -> None:
        ready = dist.is_available() and dist.is_initialized()
        if isinstance(group, str) and (group != "world" or not ready):
            raise OptionError(
                f"there is no process group {group!r}",
                where="group=",
                why='"world" is the default group, and it is not initialised'
                if group == "world"
                else 'only the default group has a name, "world"',
                how="start the program with torchrun, and call "
                "torch.distributed.init_process_group() first",
            )
        self.group: Any = dist.group.WORLD if isinstance(group, str) else group
        self.rank: int = dist.get_rank(self.group)
        self.size: int = dist.get_world_size(self.group)
        if self.rank < 0:
            raise OptionError(
                "this process is not in the group",
                where="group=",
                why="every rank of the group calls with its own members, and other ranks do not",
                how="call on the ranks that were passed to torch.distributed.new_group",
            )

    def all(self, work: Callable[[], T]) -> list[T]:
        """What a piece of work returns on each rank, in their order; small, and no tensors."""
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            error = raised
        # What else is raised may not be made for being sent.
        said = (
            error
            if isinstance(error, FxfuseError)
            else error and f"{type(error).__name__}: {error}"
        )
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (said, value), group=self.group)
        for rank, (failure, _) in enumerate(everyone):
            if failure is not None:
                if error is not None and not isinstance(error, FxfuseError):
                    raise error
                raise _on_rank(rank, failure) from error
        return [value for _, value in everyone]

    def sent(self, owner: int, value: Any, device: torch.device) -> Any:
        """Return what another rank has; its tensors arrive one after the other on `device`.

        Elsewhere than on its owner, `value` is the same nested containers with tensors on the meta
        device.
        """

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if self.rank == owner:
                tensor = tensor.detach().contiguous()
            else:
                tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if tensor.numel():
                # As bytes: not every backend knows every dtype.
                dist.broadcast(
                    tensor.reshape(-1).view(torch.uint8), group=self.group, group_src=owner
                )
            return tensor

        return pytree.tree_map_only(torch.Tensor, moved, value)

    def from_rank(self, owner: int, work: Callable[[], T], device: torch.device) -> T:
        """Return what a piece of work returns on one rank, on every rank."""
        made: list[Any] = []

        def described() -> Any:
            if self.rank == owner:
                made.append(work())
            return outline(made)

        outlines = self.all(described)
        (found,) = self.sent(owner, made or outlines[owner], device)
        result: T = found
        return result


class RankedStates(Sequence[State]):
    """For each member of all ranks, its tensors: rank 0's members first, then rank 1's, and so on.

    Member 0 is on every rank, since it is the network that is analysed. The others are read by
    `of_each`. To read one in another way is an error, on its own rank as well, so that all ranks
    go the same way.

    Args:
        ranks: The processes.
        owners: For each member, the rank that has it.
        first: Member 0's tensors.
        own: The tensors of the members of this rank, by their number.
        device: Where tensors of other ranks arrive.
    """

    def __init__(
        self,
        ranks: Ranks,
        owners: Sequence[int],
        first: State,
        own: Mapping[int, State],
        device: torch.device,
    ) -> None:
        self._ranks, self._owners, self._first, self._own = ranks, owners, first, own
        self._device = device

    def __len__(self) -> int:
        return len(self._owners)

    @overload
    def __getitem__(self, index: int) -> State: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[State]: ...

    def __getitem__(self, index: int | slice) -> State | Sequence[State]:
        """Return member 0's tensors."""
        if index == 0:
            return self._first
        if isinstance(index, int) and index >= len(self):
            raise IndexError(index)
        raise OptionError(
            "this needs all members in one process",
            where="group=",
            why="it compares members with each other, and each is on its own rank",
            how="use method='transplant' with the score l1, l2 or bn_scale, or method='average'; "
            "or pass all members to one process, and leave group= out",
        )

    def of_each(
        self, work: Callable[[int, State], T], members: Iterable[int]
    ) -> Iterator[tuple[int, T]]:
        """As the function of this name."""
        members = list(members)
        made: dict[int, T] = {}

        def described() -> dict[int, Any]:
            made.update({m: work(m, self._own[m]) for m in members if m in self._own})
            return {m: outline(value) for m, value in made.items()}

        outlines = self._ranks.all(described)
        for member in members:
            owner = self._owners[member]
            value = made.pop(member) if member in made else outlines[owner][member]
            yield member, self._ranks.sent(owner, value, self._device)

    def mapped(self, function: Callable[[State], State]) -> RankedStates:
        """Return the members with other tensors, each changed on its own rank."""
        own = {member: function(state) for member, state in self._own.items()}
        return RankedStates(self._ranks, self._owners, function(self._first), own, self._device)


def of_each(
    states: Sequence[State],
    work: Callable[[int, State], T],
    members: Iterable[int] | None = None,
) -> Iterator[tuple[int, T]]:
    """Yield what a piece of work returns for each member, done where the member is.

    Args:
        states: For each member, its tensors by name.
        work: Gets a member's number and tensors. It returns nested containers of tensors and of
            small values that can be pickled.
        members: Which, and in which order; None: all.

    Yields:
        A member's number, and what came out; in one process each is made when it is asked for.
    """
    members = range(len(states)) if members is None else members
    if isinstance(states, RankedStates):
        yield from states.of_each(work, members)
    else:
        for member in members:
            yield member, work(member, states[member])


def mapped(states: Sequence[State], function: Callable[[State], State]) -> Sequence[State]:
    """Return the members with other tensors, each changed where it is."""
    if isinstance(states, RankedStates):
        return states.mapped(function)
    return [function(state) for state in states]


def outline(value: Any) -> Any:
    """Return nested containers with tensors that have no content."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), value)


def _on_rank(rank: int, failure: FxfuseError | str) -> FxfuseError:
    if isinstance(failure, FxfuseError):
        where = f"{failure.where} on rank {rank}".strip()
        return type(failure)(failure.what, where=where, why=failure.why, how=failure.how)
    return MemberError(
        f"rank {rank} failed",
        why=failure,
        how="read what that process printed, and start all processes again",
    )
