"""Ready-made rules for the commonest operators of one's own (docs/how-to/add-an-operator.md).

rule(my_activation)(elementwise)
rule(my_filter)(same_labels(ordered=(-1,)))
rule(my_linear)(contracting("... i, o i, o -> ... o"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fxfuse.analysis.labels import AbstractTensor, positions
from fxfuse.analysis.rules.algebra import align, contract, meet, only_unlabelled, reduce_over
from fxfuse.analysis.rules.pointwise import pointwise
from fxfuse.analysis.rules.registry import Call, Rule
from fxfuse.errors import RuleError

#: Letters that `...` stands for; a pattern's own letters are lower case.
_BATCH_LETTERS = "ABCDEFGHIJKLMNOP"

#: All tensor arguments broadcast and meet element by element. torch finds an operator that is made
#: with `tags=torch.Tag.pointwise` to be one without any rule.
elementwise: Rule = pointwise


def same_labels(*, ordered: Sequence[int] = (), mixed: Sequence[int] = ()) -> Rule:
    """Return a rule: the result has the shape and the labels of the operator's only tensor.

    For an operator that treats all indices of a dimension alike and each by itself, save those of
    the dimensions named here. Further tensor arguments that are labelled, or that vary along some
    dimension, are not covered: that use freezes.

    Args:
        ordered: Dimensions in which neighbours or positions matter (a filter, a cumulative sum);
            labels there freeze.
        mixed: Dimensions over which indices come together regardless of their order (a
            normalisation, a softmax).

    Returns:
        The rule, to be registered by `rule(operator)(...)`.
    """

    def apply(call: Call) -> Any:
        x, *others = call.values()
        if any(other.fields or other.positions for other in others):
            return NotImplemented
        call.coupling.record_use(x)
        along = {d % x.rank for d in ordered}
        x = only_unlabelled(call.coupling, x, along, "worked along: the order of indices matters")
        name = call.node.target
        reduce_over(call.coupling, x, {d % x.rank for d in mixed}, f"{name} over members' neurons")
        for f in x.fields:
            call.coupling.mix(f"an averaged activation passes {name}", ids=f)
        varying = x.unlabelled | {d for d in along if x.shape[d] > 1}
        return replace(x, positions=positions(x.shape, varying), constant=None)

    return apply


def contracting(pattern: str, *, nonlinear: bool = False) -> Rule:
    """Return a rule: two tensors are contracted over letters, as in `torch.einsum`.

    Args:
        pattern: One term for each tensor argument of the operator, in the order of its schema, such
            as `"b i, o i -> b o"`. A letter that the result lacks is summed over. Terms after the
            second belong to tensors that are added to the result or scale it (a bias), which may be
            None. `...` stands for any leading dimensions.
        nonlinear: Whether the operator also applies a nonlinear function to each element of the
            result.

    Returns:
        The rule, to be registered by `rule(operator)(...)`.
    """
    left, arrow, out = pattern.replace(" ", "").partition("->")
    terms = left.split(",")
    _check_pattern(pattern, terms, out if arrow else None)

    def apply(call: Call) -> AbstractTensor:
        operands = call.tensor_arguments()
        if len(operands) != len(terms) or None in operands[:2]:
            raise _misfit(pattern, call, operands)
        named = [
            _expand(pattern, call, term, operand.rank, operands) if operand is not None else ""
            for term, operand in zip(terms, operands, strict=True)
        ]
        letters_out = _expand(pattern, call, out, len(call.shape), operands)
        (a, b, *addends) = operands
        assert a is not None
        assert b is not None
        call.coupling.record_use(a, 0)
        call.coupling.record_use(b, 1)
        result = contract(call.coupling, [(a, named[0]), (b, named[1])], letters_out)
        for letters, addend in zip(named[2:], addends, strict=True):
            if addend is not None:
                result = _added(call, result, letters_out, addend, letters)
        if nonlinear:
            for f in result.fields:
                call.coupling.mix("an averaged activation passes a nonlinear operator", ids=f)
        return replace(result, shape=call.shape)

    return apply


def _added(
    call: Call, result: AbstractTensor, out: str, addend: AbstractTensor, letters: str
) -> AbstractTensor:
    for f in addend.fields:
        call.coupling.role(addend, f, reader=False)
    order = sorted(range(len(letters)), key=lambda d: out.index(letters[d]))
    first = min((out.index(x) for x in letters), default=0)

    def spread(t: Any) -> Any:
        sizes = {letters[d]: t.shape[d] for d in range(len(letters))}
        return t.permute(order).reshape([sizes.get(x, 1) for x in out[first:]])

    return meet(call.coupling, result, align(addend.moved(spread), result.rank))


def _check_pattern(pattern: str, terms: Sequence[str], out: str | None) -> None:
    why = ""
    if out is None:
        why = "it has no ->"
    elif len(terms) < 2:
        why = "a contraction has two operands or more"
    else:
        for term in (*terms, out):
            letters = term.removeprefix("...")
            if letters and not (letters.isascii() and letters.islower() and letters.isalpha()):
                why = f"{term!r} is not a row of lower-case letters, with ... at most in front"
            elif len(set(letters)) != len(letters):
                why = f"{term!r} has a letter twice"
        unknown = set(out.removeprefix("...")) - set("".join(terms[:2]))
        late = set("".join(terms[2:]).replace(".", "")) - set(out)
        if unknown or late:
            why = why or f"no operand defines {', '.join(sorted(unknown | late))}"
    if why:
        raise RuleError(
            f"the pattern {pattern!r} is invalid",
            why=why,
            how='write it like "b i, o i -> b o"',
        )


def _expand(pattern: str, call: Call, term: str, rank: int, operands: Sequence[Any]) -> str:
    letters = term.removeprefix("...")
    lead = rank - len(letters)
    if lead < 0 or (lead and letters == term) or lead > len(_BATCH_LETTERS):
        raise _misfit(pattern, call, operands)
    # Counted from the back, as broadcasting does.
    return _BATCH_LETTERS[len(_BATCH_LETTERS) - lead :] + letters


def _misfit(pattern: str, call: Call, operands: Sequence[AbstractTensor | None]) -> RuleError:
    shapes = [None if operand is None else operand.shape for operand in operands]
    return RuleError(
        f"the pattern {pattern!r} does not fit {call.node.target}",
        where=call.where,
        why=f"its tensor arguments have the shapes {shapes}, its result {call.shape}",
        how="write one term for each tensor argument of the schema, with one letter per dimension",
    )
