"""Ridge regression of a layer's outputs on its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxfuse.errors import InputError


@dataclass(frozen=True)
class Fit:
    """An affine map.

    Attributes:
        matrix: [groups, features, outputs of a group].
        shift: [groups, outputs of a group].
    """

    matrix: torch.Tensor
    shift: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, groups, features] → [n, groups · outputs]."""
        return ((rows.transpose(0, 1) @ self.matrix).transpose(0, 1) + self.shift).flatten(1)


class Ridge:
    """Regression with an L2 penalty.

    B = (AᵀA/n + α·mean(diag)·I)⁻¹ AᵀZ/n, with A and Z centred; with fewer rows than features the
    same through the rows' own Gram matrix. Factorised once, in float64.

    Args:
        rows: A, float32 [n, groups, features].
        alpha: α, relative to the mean of the Gram matrix's diagonal. A group whose system is
            singular all the same, in float32's rounding of the Gram matrix, gets ten times the
            penalty, and again until it is not.
        centred: Whether there is a shift; else the map goes through the origin.
    """

    def __init__(self, rows: torch.Tensor, alpha: float, *, centred: bool) -> None:
        self.mean = rows.mean(0) if centred else torch.zeros_like(rows[0])
        # [groups, n, features]
        self.rows = (rows - self.mean).transpose(0, 1)
        self.centred = centred
        n, features = self.rows.shape[1:]
        self.dual = n < features
        gram = self.rows @ self.rows.mT if self.dual else self.rows.mT @ self.rows
        gram = gram.double() / n
        # The diagonals of both Gram matrices have the same sum: that of all squares.
        diagonal = gram.diagonal(dim1=1, dim2=2)
        level = diagonal.sum(1) / features
        # A group that is always zero learns nothing, and must not make the system singular.
        floor = torch.finfo(torch.float32).tiny
        penalty = (alpha * level).clamp(min=floor)
        diagonal += penalty[:, None]
        self.factor, failed = torch.linalg.cholesky_ex(gram)
        while failed.any():
            if not bool(torch.isfinite(gram).all()):
                raise InputError(
                    "a layer cannot be regressed on its inputs",
                    why="products of its inputs overflow float32, or are NaN",
                    how="scale the calibration inputs as in training, and check them for NaN",
                )
            more = torch.where(failed > 0, 9 * penalty, 0.0)
            penalty = penalty + more
            diagonal += more[:, None]
            self.factor, failed = torch.linalg.cholesky_ex(gram)
        self.n = n

    def fit(self, targets: torch.Tensor) -> Fit:
        """Regresses targets [n, groups · outputs of a group] on the rows."""
        groups = self.rows.shape[0]
        z = targets.reshape(self.n, groups, -1).transpose(0, 1)
        z_mean = z.mean(1) if self.centred else torch.zeros_like(z[:, 0])
        rest = z - z_mean[:, None]
        if self.dual:
            weights = torch.cholesky_solve(rest.double() / self.n, self.factor)
            matrix = self.rows.mT @ weights.to(rest.dtype)
        else:
            right = (self.rows.mT @ rest).double() / self.n
            matrix = torch.cholesky_solve(right, self.factor).to(rest.dtype)
        shift = z_mean - torch.einsum("gf,gfo->go", self.mean, matrix)
        return Fit(matrix, shift)
