"""What of a network is frozen, as text: dimensions that share a reason stand together."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from fxfuse.analysis.coupling import CouplingGraph, FrozenReason, Place, WithoutRule

#: Names that are shown of each kind of thing; the others are counted.
_SHOWN = 3


def interface_lines(graph: CouplingGraph) -> Iterator[str]:
    """Yield how many dimensions are frozen because of what the network is, and why."""
    yield "Frozen as the network's interface:"
    counts = Counter(reason.why for reason in graph.frozen.values() if reason.interface)
    for why, count in counts.most_common():
        yield f"  {_dimensions(count)}: {why}"


def frozen_lines(graph: CouplingGraph) -> Iterator[str]:
    """Every reason that lies inside the network: node, source line, operator and rule file."""
    alike: dict[tuple[str, str, str, str, str], list[tuple[Place, FrozenReason]]]
    alike = defaultdict(list)
    for place, reason in graph.frozen.items():
        if not reason.interface:
            key = (reason.why, str(reason.kind), reason.source, reason.operator, reason.rule_file)
            alike[key].append((place, reason))
    if alike:
        yield "Frozen inside the network:"
    for key, found in sorted(alike.items(), key=lambda item: -len(item[1])):
        why, kind, source, operator, rule_file = key
        yield f"  {_dimensions(len(found))} ({kind}): {why}"
        yield f"    tensors: {tensor_names(place for place, _ in found)}"
        nodes = dict.fromkeys(reason.node for _, reason in found if reason.node)
        if nodes:
            yield f"    at: {few(nodes)}  {source}".rstrip()
        if operator:
            yield f"    a rule for {operator} belongs in {rule_file}"


def without_rule_lines(operators: Iterable[WithoutRule]) -> Iterator[str]:
    """Yield operators that the rules do not cover."""
    listed = list(operators)
    if not listed:
        return
    yield "Operators without a rule:"
    for o in listed:
        lack = "its rule does not cover this use" if o.has_rule else "no rule"
        yield f"  {o.operator} at {few(o.nodes)}: {lack}; it belongs in {o.rule_file}"
        sources = list(dict.fromkeys(source for source in o.sources if source))
        for source in sources[:_SHOWN]:
            yield f"    {source}"
        if len(sources) > _SHOWN:
            yield f"    + {len(sources) - _SHOWN} more lines"
    yield (
        "  The rule of an operator of your own is beside its definition, under fxfuse.rule: "
        "docs/how-to/add-an-operator.md"
    )


def _dimensions(count: int) -> str:
    return f"{count} dimension{'s' if count != 1 else ''}"


def few(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    more = f" + {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def tensor_names(places: Iterable[Place]) -> str:
    """Return places as `tensor[dim]`; names that differ in numbers only are one, with a count."""
    alike: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, dim in places:
        alike[(re.sub(r"\d+", "*", name), dim)].append(name)
    return few(
        f"{names[0]}[{dim}]" if len(names) == 1 else f"{pattern}[{dim}] x {len(names)}"
        for (pattern, dim), names in alike.items()
    )
