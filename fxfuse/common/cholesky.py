"""Cholesky factors of Gram matrices, which may be singular in the precision that they have."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_with_ridge(grams: Tensor, ridges: Tensor) -> Tensor:
    """Factorise Gram matrices with a ridge each; one that is singular all the same gets more.

    A single precision that is not enough is raised first. Then ridges of those that are singular
    become ten times as large, and again until none is.

    Args:
        grams: [n, f, f], finite; the ridges are added to it in place.
        ridges: [n], above 0.

    Returns:
        Lower triangular factors, [n, f, f], in float64 where float32 was not enough.
    """
    grams.diagonal(dim1=1, dim2=2).add_(ridges[:, None])
    factors, failed = torch.linalg.cholesky_ex(grams)
    if failed.any() and grams.dtype != torch.float64:
        grams = grams.double()
        factors, failed = torch.linalg.cholesky_ex(grams)
    while failed.any():
        more = torch.where(failed > 0, 9 * ridges, 0.0)
        ridges = ridges + more
        grams.diagonal(dim1=1, dim2=2).add_(more[:, None])
        factors, failed = torch.linalg.cholesky_ex(grams)
    result: Tensor = factors
    return result
