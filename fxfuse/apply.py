"""Maps applied to weights: pure tensor functions, gathers only, never a block-diagonal matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fxfuse.coupling import CouplingGraph, CouplingGroup, Index


def permuted(
    state: Mapping[str, torch.Tensor],
    graph: CouplingGraph,
    permutations: Mapping[str, Index],
) -> dict[str, torch.Tensor]:
    """Moves units: unit `permutations[group][k]` of the old network becomes unit k of the new one.

    Args:
        state: Tensors by `state_dict()` name.
        graph: The analysis of the network.
        permutations: For each group name, int64 [n_units].

    Returns:
        New tensors; those that no group owns are the old ones. The function of the network is
        unchanged (DESIGN.md section 7, permutation oracle).
    """
    result = dict(state)
    groups = {group.name: group for group in graph.groups}
    for name, permutation in permutations.items():
        for (tensor, dim), rows in groups[name].index.items():
            source = np.arange(state[tensor].shape[dim])
            source[rows.reshape(-1)] = rows[permutation].reshape(-1)
            index = torch.from_numpy(source).to(result[tensor].device)
            result[tensor] = result[tensor].index_select(dim, index)
    return result


def random_permutations(
    groups: Sequence[CouplingGroup], generator: np.random.Generator
) -> dict[str, Index]:
    """A uniformly random permutation for each group."""
    return {group.name: generator.permutation(group.n_units) for group in groups}
