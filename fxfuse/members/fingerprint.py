"""Hashes that tell networks and plans apart: a member's tensors, a plan's content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxfuse.errors import PlanError
from fxfuse.members.ranks import of_each

#: For each tensor of a network, by `state_dict()` name, a hash of it.
Fingerprint = Mapping[str, str]

#: Elements of a tensor that count, so that a large network costs no more than a small one.
_SAMPLED = 4096
#: Hexadecimal digits of a tensor's hash: 128 bits, more than accidents need.
_DIGITS = 32


def fingerprint(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Hash each tensor of a network into 32 hexadecimal digits.

    SHA-256 over name, shape, dtype and at most 4,096 evenly spaced elements: another network and
    further training are told apart from this one, a change of single elements may not be. Device
    and strides do not count.
    """
    return {name: _hash(name, tensor.detach()) for name, tensor in state.items()}


def fingerprints(states: Sequence[Mapping[str, torch.Tensor]]) -> tuple[dict[str, str], ...]:
    """Return the fingerprint of each member, taken where the member is."""
    return tuple(found for _, found in of_each(states, lambda _, state: fingerprint(state)))


def _hash(name: str, tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    count = min(tensor.numel(), _SAMPLED)
    if count:
        if count < tensor.numel():
            chosen = torch.arange(count, dtype=torch.int64) * tensor.numel() // count
            chosen = chosen.to(tensor.device)
            # By index, since flattening would copy a tensor that is not contiguous.
            contiguous = tensor.is_contiguous()
            tensor = (
                tensor.view(-1)[chosen]
                if contiguous
                else tensor[torch.unravel_index(chosen, tensor.shape)]
            )
        sample = tensor.reshape(-1).cpu().contiguous().resolve_conj()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def digest_of(content: Any) -> str:
    """Return the SHA-256 of plain data, 64 hexadecimal digits, however its JSON text is set."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_members(
    known: Sequence[Fingerprint], states: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Check that networks are those that a plan was made for, in the same order."""
    for number, (ours, theirs) in enumerate(zip(known, fingerprints(states), strict=True)):
        if ours == theirs:
            continue
        if theirs in known:
            raise PlanError(
                f"member {number} is not the plan's member {number}",
                why=f"it is the plan's member {list(known).index(theirs)}",
                how="pass the members in the order in which they were fused",
            )
        names = [*ours, *(name for name in theirs if name not in ours)]
        differing = [name for name in names if ours.get(name) != theirs.get(name)]
        lacking = next((name for name in differing if name not in ours or name not in theirs), None)
        why = f"{len(differing)} of {len(names)} tensors differ"
        if lacking is not None:
            why += f"; only the {'plan' if lacking in ours else 'network'} has {lacking}"
        raise PlanError(
            f"member {number} is not the network that the plan was made for",
            where=differing[0],
            why=why,
            how="pass the networks that were fused, with the weights that they had then, or make "
            "a new plan with fxfuse.plan",
        )
