"""What a member must be before it is captured or fused: checks before any work."""

from __future__ import annotations

import keyword
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxfuse.errors import (
    CaptureError,
    MemberError,
)
from fxfuse.graph.eager import alone


@alone
def state_of(model: nn.Module | ExportedProgram) -> Mapping[str, Any]:
    """Return the tensors of a model by `state_dict()` name, not copied."""
    state: Mapping[str, Any]
    if isinstance(model, ExportedProgram):
        state = model.state_dict
    else:
        state = model.state_dict(keep_vars=True)
    return state


def check_model(model: object) -> None:
    """Check that a model is of a kind that can be captured, with tensors that can be labelled."""
    if not isinstance(model, nn.Module | ExportedProgram):
        what, how = f"a {type(model).__name__}", "pass the network itself"
        if isinstance(model, type):
            what, how = f"the class {model.__name__}", f"pass a network, such as {model.__name__}()"
        elif callable(model):
            what, how = "a function", "call it, or wrap it in an nn.Module"
        elif isinstance(model, Mapping):
            what = "a state_dict"
            how = (
                "load a state_dict into a network of its class, network.load_state_dict(...), and "
            )
            how += "pass the network; of files: Members.from_files(paths, template)"
        raise CaptureError(
            f"{what} is not a network",
            why="it is neither an nn.Module nor an ExportedProgram",
            how=how,
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"a scripted module cannot be captured: {type(model).__name__}",
            why="TorchScript keeps a program of its own, which torch.export does not follow",
            how="pass the nn.Module that was scripted or traced",
        )
    state = state_of(model)
    for name in chain(state, _own_names(model)):
        # torch.fx writes these names into Python, between quotes where they are no identifiers.
        if _UNWRITABLE.search(name) or not name.isprintable() or _has_keyword(name):
            raise MemberError(
                "the name of a tensor cannot be written",
                where=f"{name!r:.99}",
                why='graphs are Python code, in which a name with ", \\ or a control character, '
                "or a keyword, breaks or does something else",
                how="rename the module or parameter in the members' class",
            )
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise MemberError(
                "the model holds weights that are not tensors",
                where=name,
                why=f"its state_dict() holds a {type(tensor).__name__}, as that of a quantised "
                "layer does",
                how="fuse the floating-point networks, and quantise the result",
            )
        if tensor.is_quantized or tensor.layout is not torch.strided:
            form = "quantised" if tensor.is_quantized else f"in the layout {tensor.layout}"
            how = "dequantised" if tensor.is_quantized else "made dense by .to_dense()"
            raise MemberError(
                "the model holds a tensor that is not dense",
                where=name,
                why=f"it is {form}; neurons are indices of dense tensors",
                how=f"fuse networks whose tensors were {how}, and convert the result",
            )


#: What ends quotes, or is no character in them; a lone surrogate is no text at all.
_UNWRITABLE = re.compile(r'["\\\x00-\x1f\x7f\ud800-\udfff]')


def _own_names(model: nn.Module | ExportedProgram) -> Iterator[str]:
    """Yield the names of tensors that no state_dict() has."""
    if isinstance(model, ExportedProgram):
        yield from model.constants
        return
    for prefix, module in model.named_modules():
        held = (name for name, value in vars(module).items() if isinstance(value, torch.Tensor))
        buffers = (name for name, _ in module.named_buffers(recurse=False))
        yield from (f"{prefix}.{name}" if prefix else name for name in chain(held, buffers))


def _has_keyword(name: str) -> bool:
    return any(keyword.iskeyword(part) for part in name.split("."))


def check_enough(members: Sequence[object], what: str) -> None:
    """Check that there are at least two members."""
    if len(members) < 2:
        raise MemberError(
            f"{what} needs at least 2 members, got {len(members)}",
            how="pass two or more trained networks of one architecture",
        )


def warn_of_twins(members: Sequence[object]) -> None:
    """Warn of a network or a file that is there twice: most likely a mistake."""
    first: dict[object, int] = {}
    for number, member in enumerate(members):
        key = str(member) if isinstance(member, str | Path) else id(member)
        earlier = first.setdefault(key, number)
        if earlier != number and isinstance(member, nn.Module | str | Path):
            what = "object" if isinstance(member, nn.Module) else "file"
            warnings.warn(
                f"members {earlier} and {number} are the same {what}, so its weights count twice. "
                "Pass each network once; copies are made by copy.deepcopy.",
                stacklevel=4,
            )


def check_alike(members: Sequence[object]) -> None:
    """Check that members which are not captured yet agree in the dtypes and devices of tensors.

    The same inputs are to run through all of them. Each must have passed `check_model`.
    """
    states = {
        number: state_of(member)
        for number, member in enumerate(members)
        if isinstance(member, nn.Module | ExportedProgram)
    }
    first = min(states, default=0)
    for number, state in states.items():
        for name in (name for name in states[first] if name in state):
            ours, theirs = states[first][name], state[name]
            for what, a, b in (
                ("dtypes", ours.dtype, theirs.dtype),
                ("devices", ours.device, theirs.device),
            ):
                if a != b:
                    raise MemberError(
                        f"member {number} differs from member {first}: {what}",
                        where=name,
                        why=f"{a} vs {b}",
                        how="convert all members with .to(...) to one dtype and one device",
                    )


def check_values(state: Mapping[str, torch.Tensor]) -> None:
    """Check that tensors have values."""
    for name, tensor in state.items():
        if tensor.is_meta:
            raise MemberError(
                "the network has no weights",
                where=name,
                why="it is on the meta device, which keeps shapes but no values: enough to "
                "analyze a network, but not to run or fuse it",
                how="load the weights: model.to_empty(device='cpu'), then load_state_dict()",
            )


def check_finite(number: int, state: Mapping[str, torch.Tensor]) -> None:
    """Check that the weights of a member are finite."""
    for name, tensor in state.items():
        weighs = tensor.is_floating_point() or tensor.is_complex()
        # A sum is finite only if every term is, and it is found without a copy.
        if not weighs or bool(torch.isfinite(tensor.sum())):
            continue
        broken = int((~torch.isfinite(tensor)).sum())
        # None is, where finite weights add up to more than their dtype holds.
        if broken:
            raise MemberError(
                f"member {number} holds weights that are not finite",
                where=name,
                why=f"{broken} of {tensor.numel()} values are NaN or infinite",
                how="leave this member out, or use an earlier checkpoint of it",
            )
