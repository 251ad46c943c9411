"""Members of different depth: a residual block that a member lacks is the identity in it.

With all parameters of its branch zero, a residual block adds nothing to what it is given. So a
member that lacks a block is the deeper network with zeros there, and goes on as any other member.
Whether that is so is not believed but run: the deeper network has to answer as the member does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fxfuse.capture import Captured
from fxfuse.errors import MemberMismatchError
from fxfuse.verify import EXACT, relative_error
from fxfuse.verify.check import as_double, run


@dataclass(frozen=True)
class Deepest:
    """Members as networks of the deepest one's graph.

    Attributes:
        captured: The deepest member.
        states: For each member, its tensors by the deepest one's names.
        absent: Tensors that some members lack, by name → the numbers of these members.
    """

    captured: Captured
    states: tuple[Mapping[str, torch.Tensor], ...]
    absent: Mapping[str, tuple[int, ...]]


def as_deepest(members: Sequence[Captured]) -> Deepest | None:
    """The members in the graph of the deepest one, where some lack blocks that others have.

    Args:
        members: Captured members.

    Returns:
        None where all members have the same tensors, or where one of them was traced.

    Raises:
        MemberMismatchError: A member is not the deepest one with residual blocks left out.
    """
    names = [set(member.names) for member in members]
    if all(n == names[0] for n in names) or not all(m.is_program for m in members):
        return None
    number = max(range(len(members)), key=lambda i: len(names[i]))
    deepest = members[number]
    states, absent = [], dict[str, tuple[int, ...]]()
    for i, member in enumerate(members):
        missing = [name for name in deepest.names if name not in names[i]]
        for name in missing:
            absent[name] = (*absent.get(name, ()), i)
        # Also one that lacks nothing: tensors of the same names do not make the same network.
        states.append(
            member.state() if i == number else _filled(member, deepest, missing, i, number)
        )
    return Deepest(deepest, tuple(states), absent)


def _filled(
    member: Captured, deepest: Captured, missing: Sequence[str], number: int, other: int
) -> dict[str, torch.Tensor]:
    """A member's tensors, and zeros for the parameters that it lacks."""
    own, template = member.state(), deepest.state()
    extra = [name for name in own if name not in template]
    if extra:
        raise _mismatch(number, other, extra[0], f"member {other} has no such tensor")
    for name, tensor in own.items():
        if tensor.shape != template[name].shape:
            why = f"{tuple(tensor.shape)} vs {tuple(template[name].shape)}; members may differ in "
            raise _mismatch(number, other, name, why + "depth or in width, not in both")
    filled = {}
    for name in deepest.names:
        if name in own:
            filled[name] = own[name]
        elif isinstance(deepest.tensor(name), nn.Parameter):
            filled[name] = torch.zeros_like(template[name])
        else:
            # Statistics of what is multiplied by zero: any will do that trains on.
            filled[name] = template[name].clone()
    expected, found = run(member, as_double(own)), run(deepest, as_double(filled))
    error = relative_error(found, expected)
    if error > EXACT:
        where = missing[0] if missing else ""
        without = f"without {where} and what belongs to it, " if missing else "with its tensors, "
        why = f"{without}member {other} answers otherwise (relative difference {error:.1e})"
        raise _mismatch(number, other, where, why)
    return filled


def _mismatch(number: int, other: int, where: str, why: str) -> MemberMismatchError:
    return MemberMismatchError(
        f"member {number} is not member {other} with residual blocks left out",
        where=where,
        why=why,
        how="give members of one architecture; of different depths only if the blocks that one of "
        "them lacks are residual and the others have the same names",
    )
