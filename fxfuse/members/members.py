"""The members of a fusion, wherever they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.export import ExportedProgram

from fxfuse.errors import MemberError
from fxfuse.graph.capture import Program
from fxfuse.members.find_weights import Checkpoints
from fxfuse.members.streamed import Network, first_member, split_paths

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Members:
    """Trained networks of one architecture: in memory, in files, or on several processes.

    They may differ in width (the score decides who provides which unit; by default the result has
    member 0's size), in the size of heads and groups (where not all is kept, member 0's are), and
    in depth, if some lack residual blocks that others have: then all have the deepest one's graph,
    and a block that a member lacks counts as the identity. Networks in memory may also have
    different architectures, where `fuse` is given calibration inputs.

    Attributes:
        networks: The networks, or paths of their checkpoints.
        template: For checkpoints: a module of the members' class, which may be on the meta device
            and is left as it is.
        group: For members on several processes: the process group of `torch.distributed`, or
            "world", the default one. The members are rank 0's, then rank 1's, and so on; a rank
            may have none, with a template. Every rank returns what one process with all members
            would. The inputs of the rank with member 0 count.
        checkpoints: How checkpoints are read.
    """

    networks: Sequence[Network | str | Path]
    template: nn.Module | None = None
    group: ProcessGroup | Literal["world"] | None = None
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    @staticmethod
    def from_files(
        paths: Sequence[str | Path], template: nn.Module, *, weights: str | None = None
    ) -> Members:
        """Members in checkpoints; besides the fused network only one of them is in memory.

        Prefixes that wrappers add to names (`module.`, `_orig_mod.`) are removed, and keys under
        which the weights are nested (`state_dict`, `model`) are found.

        Args:
            paths: `.safetensors` and `.pt` files, indices of checkpoints in several files
                (`*.index.json`), or folders that `save_pretrained` wrote.
            template: A module of the members' class, which may be on the meta device.
            weights: Where a checkpoint holds several: the key or prefix of the weights to read,
                such as "ema". None: the only ones that fit, or rather the weights than their
                moving average.
        """
        return Members(paths, template, checkpoints=Checkpoints(weights))

    def load(self) -> Members:
        """Return members that are in files as networks in memory, for what runs them.

        Raises:
            CheckpointError: A file cannot be read, or does not fit the template.
            OptionError: A checkpoint has no weights of this name, or several that fit.
        """
        if not any(isinstance(network, str | Path) for network in self.networks):
            return self
        files, _ = split_paths(self.networks, self.template)
        assert self.template is not None
        loaded = [first_member(self.template, path, self.checkpoints.weights) for path in files]
        return replace(self, networks=loaded, template=None)

    @staticmethod
    def on_ranks(
        networks: Sequence[Network | str | Path],
        group: ProcessGroup | Literal["world"] = "world",
        template: nn.Module | None = None,
        *,
        weights: str | None = None,
    ) -> Members:
        """Members on several processes, each of which calls with its own.

        Args:
            networks: This rank's members; there may be none, with a template.
            group: The process group, or "world", the default one.
            template: A module of the members' class.
            weights: For checkpoints, as in `from_files`.
        """
        return Members(networks, template, group, Checkpoints(weights))

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
