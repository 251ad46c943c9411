"""Contractions: a letter that both operands have and the result lacks is summed over.

Notation of shapes: b batch, i input channel, o output channel, g group, h head, t query token,
s key token, d channel of a head, k kernel position, p output pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fxfuse.analysis.labels import AbstractTensor, DimLabels, positions
from fxfuse.analysis.rules.algebra import align, contract, meet, only_unlabelled, reduce_over
from fxfuse.analysis.rules.registry import Call, rule
from fxfuse.graph.operator_facts import FACTS, Convolution, operators

aten = torch.ops.aten

#: What the dimensions of `...` are called; an equation's own letters are no digits.
_ELLIPSIS = "0123456789"


def _bias(
    call: Call, result: AbstractTensor, bias: AbstractTensor | None, dim: int
) -> AbstractTensor:
    """Add a bias of shape [o] along one dimension of the result."""
    if bias is None:
        return result
    for f in bias.fields:
        call.coupling.role(bias, f, reader=False)
    column = bias.moved(lambda t: t.reshape([-1] + [1] * (result.rank - 1 - dim % result.rank)))
    return replace(meet(call.coupling, result, align(column, result.rank)), shape=result.shape)


def _free_letters(count: int) -> str:
    # Letters before 'g' name the leading dimensions; the rules use later ones for their own.
    return "ABCDEFGH"[:count]


@rule(aten.linear.default)
def linear(call: Call) -> AbstractTensor:
    """`* i, o i -> * o` plus bias `o`."""
    x, weight = call.args[0], call.args[1]
    call.coupling.record_use(x)
    lead = _free_letters(x.rank - 1)
    result = contract(call.coupling, [(x, lead + "i"), (weight, "oi")], lead + "o")
    return _bias(call, result, call.argument("bias"), -1)


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(call: Call) -> AbstractTensor:
    """`* t i, * i o -> * t o` plus an addend that broadcasts."""
    addend, x, weight = call.args[:3]
    call.coupling.record_use(x)
    lead = _free_letters(x.rank - 2)
    result = contract(call.coupling, [(x, lead + "ti"), (weight, lead + "io")], lead + "to")
    for f in addend.fields:
        call.coupling.role(addend, f, reader=False)
    return replace(meet(call.coupling, result, align(addend, x.rank)), shape=result.shape)


@rule(
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.vdot.default,
)
def matmul(call: Call) -> AbstractTensor:
    """`* t s, * s d -> * t d`, leading dimensions broadcast; a vector lacks t or d."""
    a, b = call.args[0], call.args[1]
    call.coupling.record_use(a, 0)
    call.coupling.record_use(b, 1)
    if a.rank == 1 or b.rank == 1:
        lead = _free_letters(max(a.rank, b.rank) - (1 if 1 in (a.rank, b.rank) else 2))
        if a.rank == 1 and b.rank == 1:
            return contract(call.coupling, [(a, "s"), (b, "s")], "")
        if a.rank == 1:
            return contract(call.coupling, [(a, "s"), (b, lead[:-1] + "sd")], lead[:-1] + "d")
        return contract(call.coupling, [(a, lead + "s"), (b, "s")], lead)
    rank = max(a.rank, b.rank)
    lead = _free_letters(rank - 2)
    operands = [(align(a, rank), lead + "ts"), (align(b, rank), lead + "sd")]
    result = contract(call.coupling, operands, lead + "td")
    return replace(result, shape=call.shape)


@rule(aten.einsum.default)
def einsum(call: Call) -> AbstractTensor:
    """`torch.einsum`: any number of operands, `...`, repeated letters, with and without `->`."""
    left, arrow, out = str(call.args[0]).replace(" ", "").partition("->")
    operands = []
    for place, (value, term) in enumerate(zip(call.args[1], left.split(","), strict=True)):
        call.coupling.record_use(value, place)
        operands.append(_diagonal(call, value, spelled(term, value.rank)))
    terms = [letters for _, letters in operands]
    if arrow:
        most = max(sum(x in _ELLIPSIS for x in term) for term in terms)
        out = spelled(out, len(out.replace("...", "")) + most)
    else:
        once = {x for x in left if x.isalpha() and left.count(x) == 1}
        out = "".join(sorted({x for x in "".join(terms) if x in _ELLIPSIS} | once))
    return contract(call.coupling, operands, out)


def spelled(term: str, rank: int) -> str:
    """Return a letter for each dimension that a term stands for, also for those of `...`."""
    # Counted from the back, as broadcasting does.
    count = rank - len(term.replace("...", ""))
    return term.replace("...", _ELLIPSIS[len(_ELLIPSIS) - count :])


def _diagonal(call: Call, value: AbstractTensor, letters: str) -> tuple[AbstractTensor, str]:
    """Take the diagonal of dimensions with the same letter: what stands along them is tied."""
    for letter in dict.fromkeys(letters):
        while letters.count(letter) > 1:
            first = letters.index(letter)
            second = letters.index(letter, first + 1)
            value = value.moved(partial(torch.diagonal, dim1=first, dim2=second))
            letters = letters[:first] + letters[first + 1 : second] + letters[second + 1 :] + letter
            along = [f for f in value.fields if len(letters) - 1 in f.dims]
            for f in along[1:]:
                call.coupling.tie_fields(along[0], f)
            # One of labels that say the same neurons twice is enough.
            rest = tuple(f for f in value.fields if not any(f is twin for twin in along[1:]))
            value = replace(value, fields=rest)
    return value, letters


@rule(aten.outer.default, aten.inner.default, aten.tensordot.default)
def product(call: Call) -> AbstractTensor:
    """`i, j -> i j`; `* i, + i -> * +`; or over pairs of dimensions that are named."""
    a, b = call.args[:2]
    call.coupling.record_use(a, 0)
    call.coupling.record_use(b, 1)
    left, right = _letters(a.rank), _letters(a.rank + b.rank)[a.rank :]
    summed: list[tuple[int, int]] = []
    if call.node.target is aten.inner.default and a.rank and b.rank:
        summed = [(a.rank - 1, b.rank - 1)]
    elif call.node.target is aten.tensordot.default:
        own, others = call.argument("dims_self"), call.argument("dims_other")
        summed = [(d % a.rank, e % b.rank) for d, e in zip(own, others, strict=True)]
    for d, e in summed:
        right = right.replace(right[e], left[d])
    out = "".join(x for x in left + right if (left + right).count(x) == 1)
    return contract(call.coupling, [(a, left), (b, right)], out)


def _letters(count: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[:count]


@rule(aten.bilinear.default)
def bilinear(call: Call) -> AbstractTensor:
    """`* i, * j, o i j -> * o` plus bias `o`."""
    weight: AbstractTensor = call.args[2]
    parts = []
    for place, (x, letter) in enumerate(zip(call.args[:2], "ij", strict=True)):
        call.coupling.record_use(x, place)
        lead = _free_letters(x.rank - 1)
        parts.append(contract(call.coupling, [(x, lead + letter), (weight, "oij")], lead + "o"))
    return _bias(call, meet(call.coupling, *parts), call.argument("bias"), -1)


@rule(*operators(Convolution))
def convolution(call: Call) -> AbstractTensor:
    """`b g i *, g o i k -> b g o *`: the kernel positions k and the pixels stay in place.

    The weight of a transposed one is `g i o k`.
    """
    facts = FACTS[call.node.target]
    assert isinstance(facts, Convolution)
    x, weight = call.argument(facts.input), call.argument(facts.weight)
    call.coupling.record_use(x)
    if x.rank < weight.rank:
        # Unbatched input; the result gets the batch dimension removed again at the end.
        x = x.moved(lambda t: t[None])
        return replace(_convolve(call, facts, x, weight).moved(lambda t: t[0]), shape=call.shape)
    return replace(_convolve(call, facts, x, weight), shape=call.shape)


def _convolve(
    call: Call, facts: Convolution, x: AbstractTensor, weight: AbstractTensor
) -> AbstractTensor:
    coupling, groups = call.coupling, call.argument(facts.groups)
    space = range(2, weight.rank)
    passing = _passing(call, x, weight)
    x = only_unlabelled(coupling, x, set(space) - set(passing), "convolved over: neighbours matter")
    # So it is for a kernel that the network computes: pixels tell what an index means.
    why = "kernel positions are in order"
    weight = only_unlabelled(coupling, weight, space, why, means_the_same=True)
    # Other pixels play no part in the labels: [b, c, *] is seen as [b, g, i] and what passes.
    flat = _corner(x, passing).moved(lambda t: t.unflatten(1, (groups, -1)))
    kernel = _corner(weight, ()).moved(lambda t: t.unflatten(0, (groups, -1)))
    letters = "gio" if facts.transposed else "goi"
    if call.node.name in coupling.keeps_groups:
        flat = _within_groups(call, flat, kernel)
    if facts.transposed and groups > 1:
        # The groups share the kernel's output dimension: either the groups are the units and the
        # outputs of a group are in order, or all groups read the same neurons, in order.
        tells_groups = any(1 in f.dims for f in flat.fields)
        kernel = only_unlabelled(
            coupling, kernel, [2 if tells_groups else 0], "the groups share their output channels"
        )
    pixels = "xyz"[: len(passing)]
    result = contract(coupling, [(flat, "bgi" + pixels), (kernel, letters)], "bgo" + pixels)
    sizes = [x.shape[d] if d in passing else 1 for d in space]
    result = result.moved(lambda t: t.flatten(1, 2).reshape(t.shape[0], -1, *sizes))
    full = (*result.shape[:2], *call.shape[-len(space) :])
    rest = set(space) - {d for f in result.fields for d in f.dims}
    result = replace(result, shape=full, positions=(*result.positions, *positions(full, rest)))
    return _bias(call, result, call.argument(facts.bias), 1)


def _within_groups(call: Call, x: AbstractTensor, kernel: AbstractTensor) -> AbstractTensor:
    """Let the channels within a group be the units: `b g i` without labels that tell groups apart.

    What a group reads, all of them read in the same order; what it writes stays in the group.
    """
    fields = []
    for f in x.fields:
        if 1 in f.dims:
            call.coupling.block(f, [1])
            f = DimLabels(f.first([1]), tuple(d for d in f.dims if d != 1))
        fields.append(f)
    for f in kernel.fields:
        call.coupling.tell_apart(f, 0)
    return replace(x, fields=tuple(f for f in fields if f.dims))


def _passing(call: Call, x: AbstractTensor, weight: AbstractTensor) -> tuple[int, ...]:
    """Labelled dimensions in which the kernel has size 1, so that no neighbour plays a part."""
    labelled = {d for f in x.fields for d in f.dims}
    space = weight.rank - 2

    def plain(name: str, neutral: int, d: int) -> bool:
        given = call.argument(name)
        # A padding given as a word is none for a kernel of size 1.
        return isinstance(given, str) or (list(given) * space)[d - 2] == neutral

    return tuple(
        d
        for d in range(2, weight.rank)
        if d in labelled
        and weight.shape[d] == 1
        and plain("stride", 1, d)
        and plain("padding", 0, d)
    )


def _corner(value: AbstractTensor, kept: Sequence[int]) -> AbstractTensor:
    """Return the first pixel along every dimension of space but those that are kept."""
    whole = slice(None)
    corner = tuple(whole if d < 2 or d in kept else 0 for d in range(value.rank))
    return value.moved(lambda t: t[corner])


@rule(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> Any:
    """`* t d, * s d -> * t s`, softmax over s, `* t s, * s d -> * t d`."""
    query, key, value = call.args[:3]
    coupling = call.coupling
    if call.argument("enable_gqa"):
        # Each head of keys and values serves several heads of queries, one after the other.
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.moved(lambda t: t.repeat_interleave(repeats, -3)) for x in (key, value))
    for place, operand in enumerate((query, key, value)):
        coupling.record_use(operand, min(place, 1))
    lead = _free_letters(query.rank - 2)
    scores = contract(coupling, [(query, lead + "td"), (key, lead + "sd")], lead + "ts")
    mask = call.argument("attn_mask")
    if mask is not None:
        for f in mask.fields:
            coupling.role(mask, f, reader=False)
        scores = replace(meet(coupling, scores, align(mask, scores.rank)), shape=scores.shape)
    reduce_over(coupling, scores, [scores.rank - 1], "softmax over labelled neurons")
    return contract(coupling, [(scores, lead + "ts"), (value, lead + "se")], lead + "te")
