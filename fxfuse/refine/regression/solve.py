"""Ridge regression of a layer's outputs on its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxfuse.errors import InputError

#: Rows of a Gram matrix that are computed at a time.
_BLOCK = 512
#: A system of more unknowns is factorised in float64, and solved in float32: with the penalties
#: that there are, its solution is far more exact than the targets.
_LARGE = 1024


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


class _Part:
    """Rows of a regression, centred and weighted.

    Attributes:
        rows: float32 [groups, n, features].
        mean: What was taken off, [groups, features].
        weights: float32 [n], or None.
        total: Sum of the weights.
        chosen: Which of all rows these are; None: all.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor | None,
        *,
        centred: bool,
        chosen: torch.Tensor | None = None,
    ) -> None:
        self.weights, self.chosen = weights, chosen
        self.total = float(len(rows)) if weights is None else float(weights.sum())
        self.mean = self.mean_of(rows) if centred else torch.zeros_like(rows[0])
        self.rows = (rows - self.mean).transpose(0, 1)
        if weights is not None:
            self.rows = self.rows * weights.sqrt()[:, None]

    def mean_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The mean of rows [n, groups, *]."""
        if self.weights is None:
            return rows.mean(0)
        return (self.weights[:, None, None] * rows).sum(0) / self.total


class Ridge:
    """Regression with an L2 penalty.

    B = (AᵀA/n + α·mean(diag)·I)⁻¹ AᵀZ/n, with A and Z centred; with fewer rows than features the
    same through the rows' own Gram matrix. Solved in float64.

    Args:
        rows: A, float32 [n, groups, features].
        centred: Whether there is a shift; else the map goes through the origin.
        weights: How much each row counts, float32 [n], 1 on average; None: all the same.
        held: Rows that `trial` does not see, bool [n]; None: it is not used.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        *,
        centred: bool,
        weights: torch.Tensor | None = None,
        held: torch.Tensor | None = None,
    ) -> None:
        self.centred = centred
        self.dual = rows.shape[0] < rows.shape[2]
        self.all = self.seen = _Part(rows, weights, centred=centred)
        if held is not None:
            chosen = (~held).nonzero().flatten()
            own = None if weights is None else weights[chosen]
            self.seen = _Part(rows[chosen], own, centred=centred, chosen=chosen)
        if held is None:
            self.gram = self.seen_gram = self._gram_of(self.all)
        elif self.dual:
            self.gram, self.seen_gram = self._gram_of(self.all), self._gram_of(self.seen)
        else:
            # What the parts are centred by differs: by that, the sum of their matrices does, too.
            rest = held.nonzero().flatten()
            own = None if weights is None else weights[rest]
            others = _Part(rows[rest], own, centred=centred)
            self.seen_gram = self._gram_of(self.seen)
            self.gram = self.seen_gram + self._gram_of(others)
            for part in (self.seen, others) if centred else ():
                gap = (part.mean - self.all.mean).double()
                self.gram += part.total * gap[:, :, None] * gap[:, None, :]
        if not bool(torch.isfinite(self.gram.diagonal(dim1=1, dim2=2)).all()):
            raise InputError(
                "a layer cannot be regressed on its inputs",
                why="products of its inputs overflow float32, or are NaN",
                how="scale the calibration inputs as in training, and check them for NaN",
            )
        self._factors: dict[tuple[float, bool], torch.Tensor] = {}

    def _gram_of(self, part: _Part) -> torch.Tensor:
        return _gram(part.rows if self.dual else part.rows.mT)

    def fit(self, targets: torch.Tensor, alpha: float) -> Fit:
        """Regresses targets on the rows.

        Args:
            targets: float32 [n, groups · outputs of a group].
            alpha: α, relative to the mean of the Gram matrix's diagonal. A group whose system is
                singular all the same, in float32's rounding of the Gram matrix, gets ten times the
                penalty, and again until it is not.
        """
        return self._solved(targets, alpha, self.all)

    def trial(self, targets: torch.Tensor, alpha: float) -> Fit:
        """Regresses targets of all rows on those that are not held out."""
        chosen = self.seen.chosen
        return self._solved(targets if chosen is None else targets[chosen], alpha, self.seen)

    def _solved(self, targets: torch.Tensor, alpha: float, part: _Part) -> Fit:
        rows, (groups, n) = part.rows, part.rows.shape[:2]
        z = targets.reshape(n, groups, -1)
        z_mean = part.mean_of(z) if self.centred else torch.zeros_like(z[0])
        rest = (z - z_mean).transpose(0, 1)
        if part.weights is not None:
            rest = rest * part.weights.sqrt()[:, None]
        factor = self._factor(alpha, part)
        if self.dual:
            found = torch.cholesky_solve(rest.to(factor.dtype) / n, factor)
            matrix = rows.mT @ found.to(rest.dtype)
        else:
            right = (rows.mT @ rest).to(factor.dtype) / n
            matrix = torch.cholesky_solve(right, factor).to(rest.dtype)
        shift = z_mean - torch.einsum("gf,gfo->go", part.mean, matrix)
        return Fit(matrix, shift)

    def _factor(self, alpha: float, part: _Part) -> torch.Tensor:
        """The Cholesky factor of the Gram matrix of some rows with its penalty."""
        trial = part is not self.all
        known = self._factors.get((alpha, trial))
        if known is not None:
            return known
        gram = (self.seen_gram if trial else self.gram) / part.rows.shape[1]
        large = gram.shape[1] > _LARGE
        if large and trial:
            gram = gram.float()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # The diagonals of both Gram matrices have the same sum: that of all squares.
        level = diagonal.sum(1) / part.rows.shape[2]
        # A group that is always zero learns nothing, and must not make the system singular.
        penalty = (alpha * level).clamp(min=torch.finfo(torch.float32).tiny)
        diagonal += penalty[:, None]
        factor, failed = torch.linalg.cholesky_ex(gram)
        while failed.any():
            more = torch.where(failed > 0, 9 * penalty, 0.0)
            penalty = penalty + more
            diagonal += more[:, None]
            factor, failed = torch.linalg.cholesky_ex(gram)
        if large:
            factor = factor.float()
        # One at a time: it is as large as the Gram matrix.
        self._factors = {(alpha, trial): factor}
        result: torch.Tensor = factor
        return result


def _gram(x: torch.Tensor) -> torch.Tensor:
    """x·xᵀ of [groups, f, n] in float64; of large ones only one triangle is multiplied out."""
    size = x.shape[1]
    if size <= _BLOCK:
        return (x @ x.mT).double()
    result = x.new_empty(len(x), size, size, dtype=torch.float64)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        block = x[:, start:end] @ x[:, :end].mT
        result[:, start:end, :end] = block
        result[:, :start, start:end] = block[:, :, :start].mT
    return result
