"""The members of a fusion, wherever they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.export import ExportedProgram

from fxfuse.errors import MemberError
from fxfuse.graph.capture import Program
from fxfuse.members.streamed import Network

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Members:
    """Trained networks of one architecture: in memory, in files, or on several processes.

    They may differ in width (the score decides who provides which unit; by default the result has
    member 0's size), in the size of heads and groups (where not all is kept, member 0's are), and
    in depth, if some lack residual blocks that others have: then all have the deepest one's graph,
    and a block that a member lacks counts as the identity.

    Attributes:
        networks: The networks, or paths of their checkpoints.
        template: For checkpoints: a module of the members' class, which may be on the meta device
            and is left as it is.
        group: For members on several processes: the process group of `torch.distributed`, or
            "world", the default one. The members are rank 0's, then rank 1's, and so on; a rank
            may have none, with a template. Every rank returns what one process with all members
            would. The inputs of the rank with member 0 count.
    """

    networks: Sequence[Network | str | Path]
    template: nn.Module | None = None
    group: ProcessGroup | Literal["world"] | None = None

    @staticmethod
    def from_files(paths: Sequence[str | Path], template: nn.Module) -> Members:
        """Members in checkpoints; besides the fused network only one of them is in memory.

        Args:
            paths: `.safetensors`, `*.safetensors.index.json` or weights-only `.pt` files.
            template: A module of the members' class, which may be on the meta device.
        """
        return Members(paths, template)

    @staticmethod
    def on_ranks(
        networks: Sequence[Network | str | Path],
        group: ProcessGroup | Literal["world"] = "world",
        template: nn.Module | None = None,
    ) -> Members:
        """Members on several processes, each of which calls with its own.

        Args:
            networks: This rank's members; there may be none, with a template.
            group: The process group, or "world", the default one.
            template: A module of the members' class.
        """
        return Members(networks, template, group)

    @staticmethod
    def of(given: Any) -> Members:
        """Return what a caller gave as members: networks or paths, or a `Members`."""
        if isinstance(given, Members):
            return given
        one = isinstance(given, str | Path | ExportedProgram | Program | Mapping)
        if one or (isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList)):
            raise MemberError(
                "one network is not an ensemble",
                where=f"members: a {type(given).__name__}",
                how="pass a list of two or more trained networks of one architecture; "
                "fxfuse.prune makes one network smaller",
            )
        if not isinstance(given, Iterable):
            raise MemberError(
                f"a {type(given).__name__} holds no members",
                where="members",
                how="pass a list of two or more trained networks of one architecture",
            )
        return Members(list(given))
