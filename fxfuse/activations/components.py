"""The directions of residual streams that their readers make most of, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.elimination import covariance_at, products_of, weights_at, width_of
from fxfuse.activations.streams import streams
from fxfuse.activations.units import consumer_inputs, consumers_of
from fxfuse.analysis.coupling import CouplingGraph, Index

#: Smallest eigenvalue of a covariance that counts, relative to the mean of its diagonal.
_LEAST = 1e-6


def components(
    graph: CouplingGraph,
    states: Sequence[Mapping[str, torch.Tensor]],
    calibration: CalibrationBatches,
    kept: Mapping[str, Index],
    sizes: Mapping[str, int],
    base_member: int,
) -> dict[str, NDArray[np.float64]]:
    """For each residual stream, the mixtures of all members' units that tell its readers most.

    Of k mixtures zᵀP of the concatenated streams z, those from which all readers' outputs are
    predicted best: with C the covariance of z and W the readers' weights, each reader divided by
    √tr(WᵀCW), they span the first eigenvectors of C^½ W Wᵀ C^½ (reduced-rank regression: Izenman,
    "Reduced-rank regression for the multivariate linear model", J. Multivariate Anal. 1975). They
    are uncorrelated, and as large as the members' units are on average.

    Args:
        graph: The analysis of the members, of one width.
        states: Their tensors by name.
        calibration: Unlabelled inputs.
        kept: For each group, the units (member, unit) that are kept, int64 [n, 2]: of a reader,
            the outputs count that survive.
        sizes: k, for each group.
        base_member: The member that keeps what is frozen inside the network.

    Returns:
        For each stream that a layer reads, P, float64 [members · units, k].
    """
    found, names = {}, streams(graph)
    every = consumers_of(graph)
    readers = {n: [c for c in cs if width_of(c) == 1] for n, cs in every.items() if n in names}
    readers = {name: own for name, own in readers.items() if own}
    if not readers:
        return {}
    n, numbered = len(states), dict(enumerate(states))
    inputs = consumer_inputs([graph] * n, [readers] * n, numbered, calibration)
    left = {name: units for name, units in kept.items() if name not in readers}
    for name, own in readers.items():
        covariances, products = [], []
        for reader in own:
            covariance = covariance_at(inputs[reader.layer], [reader] * n)
            each = [
                weights_at(graph, s, reader, left, m, base_member) for m, s in enumerate(states)
            ]
            covariances.append(covariance)
            products.append(products_of(each, covariance))
        whole = torch.stack(covariances).mean(0)
        found[name] = _directions(whole, torch.stack(products).sum(0), sizes[name]).numpy()
    return found


def _directions(covariance: torch.Tensor, product: torch.Tensor, count: int) -> torch.Tensor:
    """C^-½ times the first eigenvectors of C^½ S C^½, times the root of C's mean variance."""
    level = covariance.diagonal().mean().clamp(min=1e-30)
    values, vectors = torch.linalg.eigh(covariance)
    roots = values.clamp(min=_LEAST * float(level)).sqrt()
    root, inverse = ((vectors * r) @ vectors.T for r in (roots, 1 / roots))
    _, told = torch.linalg.eigh(root @ product @ root)
    # eigh sorts from small to large.
    directions = told.flip(1)[:, :count]
    # The sign of an eigenvector is anyone's choice, and machines choose otherwise.
    largest = directions.abs().argmax(0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()
    result: torch.Tensor = inverse @ directions * level.sqrt()
    return result.cpu()
