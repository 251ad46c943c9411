"""The frozen dimensions of a network, those with one reason together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from fxfuse.cli.show import table
from fxfuse.coupling import CouplingGraph, FrozenReason, Place, WithoutRule

#: Names that are shown of each kind of thing; the others are counted.
_SHOWN = 3


def frozen_table(graph: CouplingGraph) -> Table:
    """Every reason that lies inside the network: node, source line, operator and rule file."""
    alike: dict[tuple[str, ...], list[tuple[Place, FrozenReason]]] = defaultdict(list)
    for place, reason in graph.frozen.items():
        if not reason.interface:
            key = (str(reason.kind), reason.why, reason.source, reason.operator, reason.rule_file)
            alike[key].append((place, reason))
    rows = [
        (
            len(found),
            f"{why} ({kind})",
            few(dict.fromkeys(reason.node for _, reason in found if reason.node)),
            source,
            operator,
            rule_file,
            tensor_names(place for place, _ in found),
        )
        for (kind, why, source, operator, rule_file), found in alike.items()
    ]
    rows.sort(key=lambda row: -row[0])
    columns = ("dims", "why", "nodes", "source", "operator", "rule file", "tensors")
    return table("Frozen inside the network", columns, rows)


def interface_table(graph: CouplingGraph) -> Table:
    """What is frozen because of what the network is: how many dimensions, and why."""
    alike: dict[str, int] = defaultdict(int)
    for reason in graph.frozen.values():
        if reason.interface:
            alike[reason.why] += 1
    rows = sorted(((count, why) for why, count in alike.items()), reverse=True)
    return table("Frozen as the network's interface", ("dims", "why"), rows)


def without_rule_table(operators: Iterable[WithoutRule]) -> Table:
    """Operators that the rules do not cover."""
    rows = (
        (
            o.operator,
            "none for this use" if o.has_rule else "none",
            few(o.nodes),
            few(dict.fromkeys(o.sources)),
            o.rule_file,
        )
        for o in operators
    )
    columns = ("operator", "rule", "nodes", "source", "rule file")
    return table("Operators without a rule", columns, rows)


def few(names: Iterable[str] | Mapping[str, object]) -> str:
    """The first names, and how many more there are."""
    listed: Sequence[str] = list(names)
    more = f" + {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def tensor_names(places: Iterable[Place]) -> str:
    """Places as `tensor[dim]`; those that differ in numbers only are one pattern with a count."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, dim in places:
        alike[re.sub(r"\d+", "*", f"{name}:") + str(dim)].append(f"{name}[{dim}]")
    return few(
        names[0] if len(names) == 1 else f"{pattern.replace(':', '[')}] x{len(names)}"
        for pattern, names in alike.items()
    )
