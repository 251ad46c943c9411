"""What `fuse` and `prune` return: the network, its plan, and ways into the user's own class."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.analysis.heads import head_name
from fxfuse.api.own_class import copy_source, resized_copy
from fxfuse.common.options import check_type
from fxfuse.common.readable import Description, Readable
from fxfuse.errors import CheckpointError, OptionError, RewriteError
from fxfuse.graph.capture import Program
from fxfuse.graph.torch_compat import original_module
from fxfuse.members.streamed import check_buffers, tied_parameters
from fxfuse.planning.plan import FusionPlan
from fxfuse.refine import MatchReport, RefitReport
from fxfuse.refine.history import History
from fxfuse.refine.regression.transfer import Moved
from fxfuse.transform.cost import parameters_of
from fxfuse.transform.emit import FusedModule
from fxfuse.verify import Verification

Model = TypeVar("Model", bound=nn.Module)

#: What nothing was fitted after is worth, fused or pruned.
_RAW_FUSION = (
    "This is a raw transplant, most likely at chance level: no layer was fitted to the members."
)
_RAW_PRUNING = (
    "This network is pruned and not refitted: it is most likely far less accurate than before."
)


def class_of(program: Program) -> str:
    """What a member is called in sentences: its class, where that is known."""
    return "a network" if program.source is None else type(program.source).__name__


@dataclass(frozen=True, repr=False)
class FusionResult(Readable):
    """A fused network.

    `print(result)` says from what it was made, into what, how close it is to the ensemble, which
    checks passed, and what to do next.

    Attributes:
        plan: Which unit of which member went where.
        verification: The oracles that ran.
        graph: The analysis of the members.
        refit: What the closed-form refit did, if one was asked for.
        history: Every network on the way, how far it is from the ensemble on inputs that no fit has
            seen, and what became of it; None without calibration inputs that judge.
        match: What the matching did that led to this network, or the first one if it was rejected.
        others: Members of other architectures, by their numbers: the names of their classes.
        moved: What was moved from them in closed form, as far as that was tried.
        latency: Milliseconds that `module` takes, measured at the end, where `Size(latency=...)`
            was asked for.
    """

    plan: FusionPlan
    verification: Verification
    graph: CouplingGraph
    _state: Mapping[str, torch.Tensor]
    _module: FusedModule | None
    refit: RefitReport | None = None
    history: History | None = None
    match: MatchReport | None = None
    _member: Program | None = None
    others: Mapping[int, str] = field(default_factory=dict)
    moved: Moved | None = None
    latency: float | None = None

    @property
    def raw_note(self) -> str:
        """What the network is worth if nothing was fitted after its units were chosen, else "".

        A network that runs every member one by one is their mean, and not raw.
        """
        if self.refit or self.match or self.history or self.plan.mixing.mode == "per_member":
            return ""
        return _RAW_FUSION if self.plan.n_members > 1 else _RAW_PRUNING

    @property
    def emitted(self) -> bool:
        """Whether there is a `module`: False where torch.export rejected the members."""
        return self._module is not None

    @property
    def module(self) -> FusedModule:
        """The network: `train()`/`eval()`, picklable, exportable, compilable with `fullgraph=True`.

        Its `state_dict()` has the names of a member's, at a member's width the shapes, too.

        Raises:
            CaptureError: torch.export rejected the members; use `to_module`.
        """
        if self._module is None:
            self.graph.program.require_exported()
        assert self._module is not None
        return self._module

    @property
    def heads(self) -> Mapping[str, int]:
        """Tensors of a partial fusion's heads, by name → the member that each belongs to."""
        roles = self.plan.roles.items()
        return {name: role.member for name, role in roles if role.member is not None}

    @property
    def classes(self) -> tuple[str, ...]:
        """Where heads have the output "union": the class of each logit, in order."""
        return self.plan.heads.union

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the fused tensors by name; those of `module`, where there is one."""
        return dict(self._state) if self._module is None else self._module.state_dict()

    def described(self) -> Description:
        """From what, how, how close to the ensemble, which checks passed, and what to do next."""
        options = ", ".join(f"{name} {value}" for name, value in self.plan.options.items())
        rows: dict[str, str | Sequence[str]] = {
            "method": f"{self.plan.method} ({options})" if options else self.plan.method,
            "refit": str(self.refit or ""),
            "others": self._others(),
            "latency": "" if self.latency is None else f"{self.latency:.3g} ms",
            **self._distances(),
            "checks": self.verification.described()[0].removeprefix("Verification: "),
            "kept": self._kept(),
            "note": self.raw_note or self._closer(),
            "next": "use result.module, or keep it with fxfuse.save(result, folder)",
        }
        if self.raw_note:
            rows["next"] = "pass calibration=..., 100 to 1,000 inputs, to refit it and match it"
        elif not self.emitted:
            rows["next"] = "use result.to_module(): there is no graph, as torch.export rejects it"
        return self._from_what_into_what(), rows

    def _others(self) -> str:
        """What reached the network from members of other architectures."""
        if not self.others:
            return ""
        names = ", ".join(f"{number} ({name})" for number, name in self.others.items())
        chosen = "matched from" if self.history is None else self.history.chosen
        matched = self.match is not None and chosen.startswith("matched from")
        how = f"{'' if matched else 'not '}matched to their answers"
        return f"{names}: {'; '.join(filter(None, (how, str(self.moved or ''))))}"

    def _closer(self) -> str:
        """Whether a member of another architecture is closer to the ensemble than the network."""
        if self.history is None or not self.others:
            return ""
        judged = {n: self.history[f"member {n}"].judged for n in self.others}
        best = min(judged, key=judged.__getitem__)
        if not judged[best] < self.history[self.history.chosen].judged:
            return ""
        return (
            f"member {best} ({self.others[best]}) alone is closer to the ensemble: "
            f"Constraints(base_member={best}) takes its architecture"
        )

    def _kept(self) -> str:
        """Which modules were left out, since the forward pass does not use them."""
        modules = ", ".join(self.graph.program.unread_modules())
        how = f"as in member {self.plan.base_member}" if self.plan.n_members > 1 else "as they were"
        return f"{how}, since the forward pass does not use them: {modules}" if modules else ""

    def _distances(self) -> dict[str, str]:
        """How far the candidates and the network are from the ensemble."""
        if self.history is None:
            return {}
        title, rows = self.history.described()
        return {"judged": title, "task": str(rows["task"])}

    def _from_what_into_what(self) -> str:
        plan, name = self.plan, class_of(self._member or self.graph.program)
        fused = f"{parameters_of(self.graph, plan.sizes(), plan):,} parameters"
        own = "" if plan.heads else f" ({parameters_of(self.graph, {}):,} parameters)"
        if self.others:
            n = plan.n_members + len(self.others)
            return f"{n} members, {plan.n_members} of {name}{own}, fused into one {name} ({fused})"
        if plan.n_members == 1:
            return f"{name}{own} pruned to {fused}"
        return f"{plan.n_members} members of {name}{own} fused into one network ({fused})"

    def _require_one_head(self, name: str) -> None:
        if self.plan.heads:
            raise OptionError(
                f"a network with {self.plan.n_members} heads does not fit into {name}",
                why="the members' class has one head",
                how="use result.module, or build a class whose state_dict() has the names of "
                "result.state_dict()",
            )

    def to_module(self) -> nn.Module:
        """A copy of member 0, of the user's own class and in the mode it has, with fused weights.

        At another width than a member's, the sizes that torch's layers and the class's own modules
        hold (`in_features`, `num_heads`) are derived again. The copy then runs on the example
        inputs, and is handed out only where it answers as `module` does; a size that the forward
        pass does not read may keep its value. Of a network that `fuse` or `prune` made, a copy of
        `module` is returned. Heads that are returned as one tensor become one layer, with as many
        outputs, where that answers as they do.

        Raises:
            RewriteError: Member 0 was an `ExportedProgram`, it cannot be copied, or its class
                cannot be built at this width or with these heads; says what was tried.
            OptionError: The network returns a tuple with an entry for each head.
        """
        if self.plan.heads and self.plan.heads.output == "tuple":
            self._require_one_head("a member's class")
        program = self._member or self.graph.program
        source = program.source
        if source is None:
            raise RewriteError(
                "there is no module to copy",
                why="member 0 was an ExportedProgram, which holds no module of your class",
                how="use result.module, or build your model and call result.load_into(model)",
            )
        if isinstance(source, FusedModule):
            return copy.deepcopy(self.module).train(source.training)
        state = self._one_headed(program)
        names = program.names
        # The deepest member's class, where members differ in depth: its width may be another one.
        held = source.state_dict()
        same = all(n in state and state[n].shape == held[n].shape for n in names)
        if same and not self.plan.heads:
            return self.load_into(copy_source(source))
        return resized_copy(source, program, self.module, state, self.graph)

    def _one_headed(self, member: Program) -> dict[str, torch.Tensor]:
        """Return the fused tensors by a member's names."""
        state = self.state_dict()
        for name in member.names:
            own = [state.get(head_name(i, name)) for i in range(self.plan.n_members)]
            tensors = [tensor for tensor in own if tensor is not None]
            if name in state or len(tensors) < len(own):
                continue
            merged = self.plan.heads.merged(tensors)
            if merged is None:
                raise RewriteError(
                    f"{type(member.source).__name__} cannot hold these heads",
                    where=name,
                    why="they do not fit into one layer: their shapes are "
                    + ", ".join(str(tuple(tensor.shape)) for tensor in tensors),
                    how="use result.module",
                )
            state[name] = merged
        return state

    def load_into(self, model: Model) -> Model:
        """Load the fused weights into the user's own class, strictly; return that model.

        A model on the meta device takes the fused tensors themselves, so that no second copy of
        them is in memory; what is tied in it stays tied.

        Raises:
            CheckpointError: The model has other tensors.
            MemberError: A buffer that is not saved with the weights is on the meta device.
            OptionError: The network has several heads, and a member's class only one.
        """
        check_type("model", model, nn.Module, how="pass a network of the members' class")
        self._require_one_head(type(model).__name__)
        own, state = original_module(model), self.state_dict()
        empty = any(tensor.is_meta for tensor in own.state_dict().values())
        if empty:
            check_buffers(own)
            state |= tied_parameters(own, state)
        try:
            own.load_state_dict(state, strict=True, assign=empty)
        except RuntimeError as error:
            raise CheckpointError(
                f"the fused network does not fit {type(model).__name__}",
                why=" ".join(str(error).split()),
                how="build the model with the arguments of the members or, at another width, with "
                "the sizes of result.module",
            ) from error
        return model
