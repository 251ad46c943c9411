"""Ridge regression of a layer's outputs on its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxfuse.common.cholesky import cholesky_with_ridge
from fxfuse.errors import InputError

#: Rows of a Gram matrix that are computed at a time.
_BLOCK = 512
#: A system of more unknowns is factorised in float32 where that succeeds: with the penalties that
#: there are, its solution is far more exact than the targets.
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


@dataclass(frozen=True)
class _Target:
    """What the rows are regressed on, centred and weighted, in the order of the rows.

    Attributes:
        given: The tensor that it was made of.
        rows: float32 [groups, n, outputs of a group].
        mean: What was taken off, [groups, outputs of a group].
        gap: By how much the mean of the rows that are seen is above that.
    """

    given: torch.Tensor
    rows: torch.Tensor
    mean: torch.Tensor
    gap: torch.Tensor


class Ridge:
    """Regression with an L2 penalty.

    B = (AᵀA/n + α·mean(diag)·I)⁻¹ AᵀZ/n, with A and Z centred; with fewer rows than features the
    same through the rows' own Gram matrix. The rows are kept once, those that are held out last;
    what a trial needs is a part of what the whole fit needs, but for its means.

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
        n, _, features = rows.shape
        self.centred, self.dual = centred, n < features
        self.order = None if held is None else held.byte().argsort(stable=True)
        self.n_seen = n if held is None else n - int(held.sum())
        if weights is None:
            weights = rows.new_ones(n)
        self.roots = (weights if self.order is None else weights[self.order]).sqrt()
        self.rows, self.mean, self.gap = self._centred(rows)
        self.gram, self.seen_gram = self._grams()
        if not bool(torch.isfinite(self.gram.diagonal(dim1=1, dim2=2)).all()):
            raise InputError(
                "a layer cannot be regressed on its inputs",
                why="products of its inputs overflow float32, or are NaN",
                how="scale the calibration inputs as in training, and check them for NaN",
            )
        self._factors: dict[tuple[float, bool], torch.Tensor] = {}
        self._target: _Target | None = None
        self._products: dict[bool, torch.Tensor] = {}

    def fit(self, targets: torch.Tensor, alpha: float) -> Fit:
        """Regress targets on the rows.

        Args:
            targets: float32 [n, groups · outputs of a group].
            alpha: α, relative to the mean of the Gram matrix's diagonal. A group whose system is
                singular all the same, in float32's rounding of the Gram matrix, gets ten times the
                penalty, and again until it is not.
        """
        return self._solved(targets, alpha, trial=False)

    def trial(self, targets: torch.Tensor, alpha: float) -> Fit:
        """Regress targets of all rows on those that are not held out."""
        return self._solved(targets, alpha, trial=True)

    # --- the system -----------------------------------------------------------------------------

    def _centred(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [n, groups, *] centred and weighted as [groups, n, *]; their mean, and the gap."""
        x = rows.clone() if self.order is None else rows[self.order]
        weights, mean, gap = self.roots.square(), torch.zeros_like(x[0]), torch.zeros_like(x[0])
        if self.centred:
            mean = torch.einsum("n,ngf->gf", weights, x) / weights.sum()
            x -= mean
            seen = weights[: self.n_seen]
            gap = torch.einsum("n,ngf->gf", seen, x[: self.n_seen]) / seen.sum().clamp(min=1e-30)
        return x.mul_(self.roots[:, None, None]).transpose(0, 1), mean, gap

    def _grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The Gram matrix of all rows, and of those that are seen, centred by their own mean."""
        x, n, roots = self.rows, self.n_seen, self.roots[: self.n_seen]
        if self.dual:
            every = _gram(x)
            if self.order is None:
                return every, every
            shift = x[:, :n] @ self.gap[:, :, None] * roots
            seen = every[:, :n, :n] - shift - shift.mT
            seen += self.gap.square().sum(1)[:, None, None] * (roots[:, None] * roots)
            return every, seen
        seen = _gram(x[:, :n].mT)
        if self.order is None:
            return seen, seen
        every = _gram(x[:, n:].mT).add_(seen)
        total, gap = float(roots.square().sum()), self.gap.to(seen.dtype)
        seen.baddbmm_(gap[:, :, None], gap[:, None, :], alpha=-total)
        return every, seen

    def _factor(self, alpha: float, *, trial: bool) -> torch.Tensor:
        """The Cholesky factor of a Gram matrix with its penalty."""
        known = self._factors.get((alpha, trial))
        if known is not None:
            return known
        # One at a time: it is as large as the Gram matrix.
        self._factors.clear()
        n = self.n_seen if trial else self.rows.shape[1]
        gram = (self.seen_gram if trial else self.gram) / n
        # The diagonals of both Gram matrices have the same sum: that of all squares.
        level = gram.diagonal(dim1=1, dim2=2).sum(1) / self.rows.shape[2]
        # A group that is always zero learns nothing, and must not make the system singular.
        penalty = (alpha * level).clamp(min=torch.finfo(torch.float32).tiny)
        factor = cholesky_with_ridge(gram, penalty)
        if gram.shape[1] > _LARGE:
            factor = factor.float()
        self._factors[alpha, trial] = factor
        return factor

    # --- a target -------------------------------------------------------------------------------

    def _solved(self, targets: torch.Tensor, alpha: float, *, trial: bool) -> Fit:
        target = self._centred_target(targets)
        trial = trial and self.order is not None
        factor = self._factor(alpha, trial=trial)
        n = self.n_seen if trial else self.rows.shape[1]
        roots = self.roots[:n, None]
        if self.dual:
            z = target.rows[:, :n] - roots * target.gap[:, None] if trial else target.rows
            found = torch.cholesky_solve(z.to(factor.dtype) / n, factor).to(z.dtype)
            matrix = self.rows[:, :n].mT @ found
            if trial:
                matrix -= self.gap[:, :, None] * (roots * found).sum(1, keepdim=True)
        else:
            right = self._product(target, trial=trial).to(factor.dtype) / n
            matrix = torch.cholesky_solve(right, factor).to(target.rows.dtype)
        z_mean = target.mean + target.gap if trial else target.mean
        mean = self.mean + self.gap if trial else self.mean
        return Fit(matrix, z_mean - torch.einsum("gf,gfo->go", mean, matrix))

    def _centred_target(self, targets: torch.Tensor) -> _Target:
        """A target as the rows are; the last one is remembered, with its products."""
        if self._target is None or self._target.given is not targets:
            n = self.rows.shape[1]
            self._target = _Target(
                targets, *self._centred(targets.reshape(n, self.rows.shape[0], -1))
            )
            self._products.clear()
        return self._target

    def _product(self, target: _Target, *, trial: bool) -> torch.Tensor:
        """AᵀZ of the rows that are seen, centred by their own means, or of all."""
        n = self.n_seen
        for part, rows in ((True, slice(n)), (False, slice(n, None))):
            if part not in self._products and (part or not trial):
                self._products[part] = self.rows[:, rows].mT @ target.rows[:, rows]
        if not trial:
            return self._products[True] + self._products[False]
        total = float(self.roots[:n].square().sum())
        return self._products[True] - total * self.gap[:, :, None] * target.gap[:, None, :]


def _gram(x: torch.Tensor) -> torch.Tensor:
    """x·xᵀ of [groups, f, n], a small one as float64; of large ones one triangle is multiplied."""
    size = x.shape[1]
    dtype = torch.float64 if size <= _LARGE else torch.float32
    if size <= _BLOCK:
        return (x @ x.mT).to(dtype)
    result = x.new_empty(len(x), size, size, dtype=dtype)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        block = x[:, start:end] @ x[:, :end].mT
        result[:, start:end, :end] = block
        result[:, :start, start:end] = block[:, :, :start].mT
    return result
