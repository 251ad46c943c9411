"""Neuron Transplantation: concatenate the members, keep the most important units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fxfuse.activations import components
from fxfuse.analysis.coupling import CouplingGraph, Index
from fxfuse.errors import InputError, OptionError
from fxfuse.planning.context import Context, State
from fxfuse.planning.methods.registry import Method, method
from fxfuse.planning.plan import UnitMap, Weights
from fxfuse.planning.scores import Scores, check_score, note_of, score_units
from fxfuse.planning.size import by_pattern

#: For each group: (member, unit) of every unit that is kept, sorted, int64 [n, 2].
Kept = dict[str, Index]

#: Scores that measure nothing.
_OF_WEIGHTS = ("l1", "l2", "bn_scale")


@method("transplant")
@dataclass(frozen=True)
class Transplant(Method):
    """One-hot maps (Öz et al., "Model Fusion via Neuron Transplantation", arXiv:2502.06849).

    Variants: None fuses all members at once; `iterative` fuses the first two, then the result with
    the next member, and so on; `hierarchical` fuses pairs, then pairs of the results; `components`
    fuses all at once, and merges residual streams, whose single units have no meaning: their maps
    are mixtures of all members' units (`fxfuse.activations.components`), for a refit to build on.

    With `fraction` f, a group of n units keeps the (1 - f)·n best of the base member, and takes the
    f·n best of all others. With fractions by pattern, groups without one keep the best units of all
    members.

    Attributes:
        score: Importance of a unit: `l1`, `l2` or `bn_scale`; with calibration inputs also
            `activation` and `obs`, with labelled ones `taylor` and `fisher`. None: `obs` with
            calibration inputs, else `l2`.
        variant: None fuses all members at once; `iterative` and `hierarchical` fuse in steps;
            `components` merges residual streams (transformers) and needs calibration inputs and a
            refit.
        fraction: Share of units that come from other members than the base member, in [0, 1], for
            all groups or by `fnmatch` pattern of their tensors; None leaves it to the score.
    """

    score: str | None = None
    variant: Literal["iterative", "hierarchical", "components"] | None = None
    fraction: float | Mapping[str, float] | None = None
    any_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the score and the fraction, too."""
        super().__post_init__()
        if self.score is not None:
            check_score(self.score)
        if self.fraction is not None and self.variant is not None:
            raise OptionError(
                f"fraction and variant {self.variant!r} contradict each other",
                why="a variant fuses in steps, and a fraction speaks of one step",
                how="leave one of them out",
            )

    def score_in(self, context: Context) -> str:
        """Return the score, where None depends on whether there are calibration inputs."""
        return self.score or ("l2" if context.calibration is None else "obs")

    @property
    def weights_only(self) -> bool:
        """Whether it looks at weights only: with a score of these."""
        return self.score in _OF_WEIGHTS and self.variant != "components"

    def described(self, graph: CouplingGraph, context: Context) -> dict[str, str]:
        """Return what a plan says of the options; it always names the score."""
        score = self.score_in(context)
        rest = super().described(graph, context)
        return {**rest, "score": score, **note_of(score, graph)}

    def maps(
        self, graph: CouplingGraph, states: Sequence[State], context: Context
    ) -> tuple[UnitMap, ...]:
        """Make one-hot maps; mixtures for residual streams with `components`."""
        pool = _Pool(graph, states, self.score_in(context), context)
        leaves = [_whole(graph, i) for i in range(len(states))]
        if self.fraction is not None:
            kept = _by_fraction(pool, leaves, self.fraction)
        elif self.variant in (None, "components"):
            kept = pool.select(leaves)
        elif self.variant == "iterative":
            kept = leaves[0]
            for leaf in leaves[1:]:
                kept = pool.select([kept, leaf])
        else:
            while len(leaves) > 1:
                pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
                leaves = [pool.select(pair) if len(pair) > 1 else pair[0] for pair in pairs]
            kept = leaves[0]
        mixtures = _mixtures(graph, states, kept, context) if self.variant == "components" else {}
        return tuple(
            mixtures.get(group.name)
            or UnitMap(
                group.name,
                context.size_of(group),
                np.arange(context.size_of(group)),
                kept[group.name][:, 0],
                kept[group.name][:, 1],
            )
            for group in graph.groups
        )


@dataclass(frozen=True)
class _Pool:
    """Units of several networks, of which the best are kept."""

    graph: CouplingGraph
    states: Sequence[State]
    score: str
    context: Context

    def select(self, parts: Sequence[Kept]) -> Kept:
        """Keep the best units of several (fused) networks, as many as are asked for."""
        values = self.scored(parts)
        return {
            group.name: _sorted(_best(*values[group.name], count=self.context.size_of(group)))
            for group in self.graph.groups
        }

    def scored(self, parts: Sequence[Kept]) -> dict[str, tuple[Index, Weights]]:
        """For each group, all units of several networks, int64 [n, 2], and their scores [n]."""
        groups = self.graph.groups
        pool = {g.name: np.concatenate([part[g.name] for part in parts]) for g in groups}
        involved = sorted({m for rows in pool.values() for m in np.unique(rows[:, 0]).tolist()})
        alive = {
            member: {name: rows[rows[:, 0] == member][:, 1] for name, rows in pool.items()}
            for member in involved
        }
        scores = score_units(self.graph, self.states, self.score, self.context, alive)
        return {name: (rows, _of_rows(rows, name, scores)) for name, rows in pool.items()}


def _mixtures(
    graph: CouplingGraph, states: Sequence[State], kept: Kept, context: Context
) -> dict[str, UnitMap]:
    """Make the maps of residual streams that are not one-hot."""
    if context.calibration is None:
        raise InputError(
            "variant 'components' needs calibration inputs",
            why="it measures what the layers that read a residual stream make of it",
            how="pass calibration=..., 100 to 1,000 inputs without labels",
        )
    if graph.members:
        raise OptionError(
            "variant 'components' works with members of one width only",
            why="it mixes units of one stream across members",
            how="leave variant out",
        )
    sizes = {group.name: context.size_of(group) for group in graph.groups}
    found = components(graph, states, context.calibration, kept, sizes, context.base_member)
    maps = {}
    for name, mixture in found.items():
        rows, size = mixture.shape
        n_units = rows // len(states)
        target, row = np.divmod(np.arange(rows * size), rows)
        # As precise as the members' weights, and half as long in a plan.
        entries = mixture[row, target].astype(np.float32).astype(np.float64)
        maps[name] = UnitMap(name, size, target, row // n_units, row % n_units, entries, entries)
    return maps


def _whole(graph: CouplingGraph, member: int) -> Kept:
    return {
        g.name: np.stack([np.full(g.n_units, member), np.arange(g.n_units)], axis=1)
        for g in graph.of_member(member).groups
    }


def _by_fraction(pool: _Pool, parts: Sequence[Kept], given: float | Mapping[str, float]) -> Kept:
    """Keep the base member's best units, and the given share of the best units of all others."""
    graph, base_member = pool.graph, pool.context.base_member
    shares = (
        by_pattern(graph, "fraction", given)
        if isinstance(given, Mapping)
        else {group.name: given for group in graph.groups}
    )
    for share in shares.values():
        if not 0.0 <= share <= 1.0:
            raise OptionError(
                f"fraction must be in [0, 1], got {share}",
                why="it is the share of units that come from other members than the base member",
                how="use 0 for the base member alone, 1 for the others alone",
            )
    kept, scored = {}, pool.scored(parts)
    for group in graph.groups:
        rows, values = scored[group.name]
        mine, size = rows[:, 0] == base_member, pool.context.size_of(group)
        if group.name not in shares:
            kept[group.name] = _sorted(_best(rows, values, count=size))
            continue
        # A half is rounded up, so that the members' counts do not depend on the width's parity.
        taken = int(np.floor(shares[group.name] * size + 0.5))
        # Nobody gives more units than there are.
        taken = min(max(taken, size - int(mine.sum())), int((~mine).sum()))
        chosen = [
            _best(rows[who], values[who], count=count)
            for who, count in ((mine, size - taken), (~mine, taken))
        ]
        kept[group.name] = _sorted(np.concatenate(chosen))
    return kept


def _of_rows(rows: Index, group: str, scores: Mapping[int, Scores]) -> Weights:
    """Return the score of each (member, unit), float64 [n]."""
    values = np.empty(len(rows))
    for member in np.unique(rows[:, 0]).tolist():
        mine = rows[:, 0] == member
        values[mine] = scores[member][group][rows[mine, 1]]
    return values


def _best(rows: Index, values: Weights, *, count: int) -> Index:
    # Stable: of equal scores the earlier member's unit stays.
    return rows[np.argsort(-values, kind="stable")[:count]]


def _sorted(rows: Index) -> Index:
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]
