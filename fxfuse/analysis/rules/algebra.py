"""What operators have in common: operands that meet, letters that are contracted.

Every rule is written with three functions: `meet` (operands side by side, element by element),
`contract` (einsum-like letters) and `reduce_over` (a dimension is averaged or normalised over).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial, reduce
from math import prod

from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.labels import (
    PART,
    AbstractTensor,
    DimLabels,
    Kind,
    distinct,
    flat_ids,
    neurons,
    positions,
)


def align(value: AbstractTensor, rank: int) -> AbstractTensor:
    """Add leading dimensions of size 1, as broadcasting does."""
    extra = rank - value.rank
    if extra == 0:
        return value

    def lift(fields: tuple[DimLabels, ...]) -> tuple[DimLabels, ...]:
        return tuple(f.spread(range(extra, rank), rank) for f in fields)

    return replace(
        value,
        shape=(1,) * extra + value.shape,
        fields=lift(value.fields),
        positions=lift(value.positions),
        constant=None,
    )


def meet(coupling: CouplingConstraints, a: AbstractTensor, b: AbstractTensor) -> AbstractTensor:
    """Two operands of equal rank meet element by element (sizes of 1 broadcast).

    Ids along the same dimensions are tied. Ids that face content without labels freeze, or move
    in blocks when only some of their dimensions face it.

    Returns:
        The labels of the result.
    """
    a, b = _only_one(coupling, a, b), _only_one(coupling, b, a)
    covered_a = [_match(coupling, f, b, a) for f in a.fields]
    covered_b = [_covered(g, a) for g in b.fields]
    kept = [f for f, c in zip(a.fields, covered_a, strict=True) if _face(coupling, f, c, a, b)]
    others = [g for g, c in zip(b.fields, covered_b, strict=True) if _face(coupling, g, c, b, a)]
    sources = None
    if a.sources is not None and b.sources is not None:
        sources = a.sources | b.sources
    shape = tuple(max(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    return AbstractTensor(
        shape,
        _merge(coupling, kept, others),
        merge_positions((*a.positions, *b.positions)),
        sources,
    )


def _only_one(
    coupling: CouplingConstraints, value: AbstractTensor, other: AbstractTensor
) -> AbstractTensor:
    """Of several labels along the same dimensions, one may move neurons of another tensor.

    A flattened kernel has labels for its channels and for its positions. Against a single label
    along the flattened dimension, the one stays that tells the same places apart, or the first
    where all of the other's neurons differ; the others freeze: tied to both, all of them would
    become one unit.
    """
    for g in other.fields:
        rivals = [f for f in value.fields if f.dims == g.dims]
        if len(rivals) < 2:
            continue
        alone = not any(h.dims == g.dims for h in other.fields if h is not g)
        kept = next((f for f in rivals if alone and _tells_alike(f, g)), None)
        if kept is None and len(distinct(flat_ids(neurons(g.bare)))) < prod(g.shape):
            continue
        gone = [f for f in rivals if f is not (kept or rivals[0])]
        for f in gone:
            kind = Kind.SHARED_INDEX if value.is_parameter else Kind.KEEP_BASE
            coupling.freeze(f, kind, "is flattened together with other neurons")
        value = replace(
            value,
            fields=tuple(f for f in value.fields if not any(f is r for r in gone)),
            positions=merge_positions((*gone, *value.positions)),
        )
    return value


def _tells_alike(f: DimLabels, g: DimLabels) -> bool:
    """Tell whether the same places hold the same neuron in both fields."""
    if f.shape != g.shape:
        return False
    # A neuron has 31 bits at most, so that two make one number.
    left, right = (flat_ids(neurons(each.bare)) for each in (f, g))
    pairs = len(distinct(left << PART | right))
    return pairs == len(distinct(left)) == len(distinct(right))


def merge_positions(fields: Iterable[DimLabels]) -> tuple[DimLabels, ...]:
    """One entry per set of dimensions is enough to know where content varies."""
    return tuple({f.dims: f for f in fields}.values())


def _covered(f: DimLabels, other: AbstractTensor) -> frozenset[int]:
    return frozenset(d for g in other.fields for d in g.dims if d in f.dims)


def _match(
    coupling: CouplingConstraints, f: DimLabels, other: AbstractTensor, own: AbstractTensor
) -> frozenset[int]:
    """Tie a field to the fields of the other operand that share dimensions with it."""
    mine = set(f.dims)
    for g in other.fields:
        theirs = set(g.dims)
        overlap = mine & theirs
        if not overlap:
            continue
        if mine == theirs:
            if _are_partners(f, g, own, other):
                coupling.tie_fields(f, g)
        elif mine < theirs:
            coupling.deferred.append((f, g, own.is_parameter, coupling.node))
        elif theirs < mine:
            coupling.deferred.append((g, f, other.is_parameter, coupling.node))
        else:
            coupling.block(f, mine - overlap)
            coupling.block(g, theirs - overlap)
            coupling.tie(f.first(mine - overlap), g.first(theirs - overlap))
    return _covered(f, other)


def _are_partners(f: DimLabels, g: DimLabels, own: AbstractTensor, other: AbstractTensor) -> bool:
    """Tell whether labels along the same dimensions belong together.

    Two dimensions that were flattened alike in both operands (inputs and a basis) stay apart.
    """
    ours, theirs = ([h for h in v.fields if h.dims == f.dims] for v in (own, other))
    if not len(ours) == len(theirs) > 1:
        return True
    matched = [[_tells_alike(a, b) for b in theirs] for a in ours]
    apart = all(sum(line) == 1 for line in (*matched, *zip(*matched, strict=True)))
    return not apart or _tells_alike(f, g)


def _face(
    coupling: CouplingConstraints,
    f: DimLabels,
    covered: frozenset[int],
    own: AbstractTensor,
    other: AbstractTensor,
) -> bool:
    """Deals with what the other operand has where it has no labels; False drops the field."""
    bare = (other.unlabelled & set(f.dims)) - covered
    if bare == set(f.dims):
        # What comes from the input tells what each index means, for all members alike.
        meant = own.is_parameter or other.sources is None
        coupling.freeze(
            f,
            Kind.SHARED_INDEX if meant else Kind.KEEP_BASE,
            "meets content without labels that varies along the same dimension",
        )
        # The position stays visible through the other operand; a parameter's index is no neuron.
        return not own.is_parameter
    if bare:
        coupling.block(f, bare)
    if not covered and not own.is_parameter:
        if other.is_parameter:
            coupling.mix("a parameter is shared by all units", sources=other.sources or frozenset())
        elif any(not set(g.dims) & set(f.dims) for g in other.fields):
            coupling.mix("two unrelated coupling groups meet in one tensor")
    return True


def _merge(
    coupling: CouplingConstraints, ours: Sequence[DimLabels], theirs: Sequence[DimLabels]
) -> tuple[DimLabels, ...]:
    merged = list(ours)
    for g in theirs:
        twin = next((f for f in ours if set(f.dims) >= set(g.dims)), None)
        if twin is None:
            gone = [f for f in merged if set(f.dims) < set(g.dims)]
            if gone and bool((neurons(g.bare) == 0).any()):
                # Where only a part of the other tensor has neurons, these would lose their label.
                for f in gone:
                    coupling.freeze(
                        f, Kind.KEEP_BASE, "meets a tensor in part of which neurons stand"
                    )
            merged = [f for f in merged if not any(f is each for each in gone)]
            merged.append(g)
        elif set(twin.dims) > set(g.dims) and bool((neurons(twin.bare) == 0).any()):
            coupling.freeze(g, Kind.KEEP_BASE, "meets a tensor in part of which neurons stand")
    return tuple(merged)


def contract(
    coupling: CouplingConstraints, operands: Sequence[tuple[AbstractTensor, str]], out: str
) -> AbstractTensor:
    """Contract operands, each with its letters, as `einsum(f"{letters},...->{out}")` would.

    Ids along a contracted letter are tied. Where ids vary along a contracted letter and along one
    that stays (heads, groups), all ids of a block move together.
    """
    order = "".join(dict.fromkeys("".join(letters for _, letters in operands)))
    contracted = {order.index(x) for x in order if x not in out}
    lifted = [_lift(value, letters, order) for value, letters in operands]
    are_parameters = all(value.is_parameter for value in lifted)
    for place, value in enumerate(lifted):
        others = [*lifted[:place], *lifted[place + 1 :]]
        for f in value.fields:
            summed = contracted & set(f.dims)
            # A block that is read and stays (a group) tells the members apart, as a writer does.
            # Parameters among themselves read nothing: what is made of them does. Nor does a
            # parameter write an index that an operand has beforehand (a frequency, a position).
            along = {d for v in others for g in v.positions for d in g.dims}
            if not are_parameters and not set(f.dims) <= along - contracted:
                writes = _is_written_by(lifted, place, f)
                coupling.role(value, f, reader=summed == set(f.dims) and not writes)
            if not summed:
                continue
            if summed != set(f.dims):
                coupling.block(f, summed)
            elif not value.is_parameter:
                _note_sum(coupling, f, others)
    met = reduce(partial(meet, coupling), lifted)
    result = _lower(coupling, met, order, out)
    if are_parameters and met.fields and not result.fields:
        coupling.mix("weights are summed over the members' neurons")
    return result


def _is_written_by(operands: Sequence[AbstractTensor], place: int, f: DimLabels) -> bool:
    """Tell whether neurons are in parameters alone, of which this is the first."""
    having = [
        n
        for n, other in enumerate(operands)
        if any(set(g.dims) & set(f.dims) for g in other.fields)
    ]
    return len(having) > 1 and place == having[0] and all(operands[n].is_parameter for n in having)


def _note_sum(coupling: CouplingConstraints, f: DimLabels, others: list[AbstractTensor]) -> None:
    """A sum over neurons is the sum of the members' sums only against per-neuron weights."""
    facing = [other for other in others if any(set(g.dims) & set(f.dims) for g in other.fields)]
    if not facing:
        coupling.mix("neurons are summed without weights of their own")
    elif not any(other.is_parameter for other in facing):
        coupling.mix("two activations are contracted over their neurons")
    coupling.mix("an averaged activation is read by weights", ids=f)


def _lift(value: AbstractTensor, letters: str, order: str) -> AbstractTensor:
    """Bring a value into the space of all letters, size 1 where it lacks one."""
    places = [order.index(x) for x in letters]

    def lift(fields: tuple[DimLabels, ...]) -> tuple[DimLabels, ...]:
        return tuple(f.spread(places, len(order)) for f in fields)

    shape = [1] * len(order)
    for d, place in enumerate(places):
        shape[place] = value.shape[d]
    return AbstractTensor(tuple(shape), lift(value.fields), lift(value.positions), value.sources)


def _lower(
    coupling: CouplingConstraints, met: AbstractTensor, order: str, out: str
) -> AbstractTensor:
    gone = [d for d, x in enumerate(order) if x not in out]
    keep = [order.index(x) for x in out]

    def lower(fields: tuple[DimLabels, ...]) -> list[DimLabels]:
        lowered = []
        for f in fields:
            ids = (
                f.first(gone)
                .permute(keep + gone)
                .reshape([f.ids.shape[d] if d not in gone else 1 for d in keep])
            )
            dims = tuple(d for d in range(len(keep)) if ids.shape[d] > 1)
            if dims:
                lowered.append(DimLabels(ids, dims))
        return lowered

    fields: dict[tuple[int, ...], DimLabels] = {}
    for f in lower(met.fields):
        # Labels that now share their dimensions say the same neurons twice.
        coupling.tie_fields(fields.setdefault(f.dims, f), f)
    # One that lost a dimension of its block says less than another of the same units.
    told = [f for f in fields.values() if not any(set(f.dims) < set(dims) for dims in fields)]
    shape = tuple(met.shape[d] for d in keep)
    return AbstractTensor(shape, tuple(told), merge_positions(lower(met.positions)), met.sources)


def reduce_over(
    coupling: CouplingConstraints, value: AbstractTensor, dims: Iterable[int], why: str
) -> None:
    """Note that an operator mixes everything along `dims` (mean, softmax, normalisation)."""
    over = set(dims)
    for f in value.fields:
        inside = over & set(f.dims)
        if not inside:
            continue
        if inside == set(f.dims):
            coupling.mix(why)
        else:
            coupling.block(f, inside)


def drop(value: AbstractTensor, dims: Iterable[int], *, keepdim: bool) -> AbstractTensor:
    """Return the labels left after a reduction over `dims`."""
    gone = sorted({d % value.rank for d in dims})

    def shrink(fields: tuple[DimLabels, ...]) -> tuple[DimLabels, ...]:
        left = []
        for f in fields:
            ids = f.first(gone)
            if not keepdim:
                ids = ids.reshape([s for d, s in enumerate(ids.shape) if d not in gone])
            kept = tuple(d for d in range(ids.dim()) if ids.shape[d] > 1)
            if kept:
                left.append(DimLabels(ids, kept))
        return tuple(left)

    shape = tuple(
        1 if d in gone else s for d, s in enumerate(value.shape) if keepdim or d not in gone
    )
    return AbstractTensor(
        shape, shrink(value.fields), merge_positions(shrink(value.positions)), value.sources
    )


def only_unlabelled(
    coupling: CouplingConstraints,
    value: AbstractTensor,
    dims: Iterable[int],
    what: str,
    *,
    means_the_same: bool = False,
) -> AbstractTensor:
    """Leave no labels along dimensions in which an operator is not the same for every index.

    Labels that vary along other dimensions too (the pixels of a shuffled channel, say) become one
    unit, in order; the others freeze. `means_the_same`: an index along these dimensions has one
    meaning for all members, as it has in a parameter.
    """
    shared = means_the_same or value.is_parameter
    over = set(dims)
    kept, hit = list[DimLabels](), list[DimLabels]()
    for f in value.fields:
        inside, rest = over & set(f.dims), set(f.dims) - over
        if not inside:
            kept.append(f)
            continue
        hit += positions(value.shape, inside)
        if rest:
            coupling.block(f, sorted(inside))
            kept.append(DimLabels(f.first(sorted(inside)), tuple(sorted(rest))))
        else:
            coupling.freeze(f, Kind.SHARED_INDEX if shared else Kind.KEEP_BASE, what)
    return replace(value, fields=tuple(kept), positions=merge_positions((*hit, *value.positions)))
