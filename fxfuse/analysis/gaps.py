"""Operators that the rules do not cover."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.rules import rule_file
from fxfuse.graph.source_lines import source_of


@dataclass(frozen=True)
class WithoutRule:
    """An operator that froze something because the rules do not cover it.

    Attributes:
        has_rule: Whether it has a rule, which does not cover these uses.
        sources: File, line and code of each node.
        rule_file: Where a rule belongs; for a rule of the user's own, its module.
    """

    operator: str
    has_rule: bool
    nodes: tuple[str, ...]
    sources: tuple[str, ...]
    rule_file: str

    @property
    def source(self) -> str:
        """File, line and code of the first node."""
        return self.sources[0]


def without_rule(coupling: CouplingConstraints) -> tuple[WithoutRule, ...]:
    """Return the gaps that the rules left, those of one operator together, in graph order."""
    found: dict[tuple[Any, bool], list[fx.Node]] = defaultdict(list)
    for gap in coupling.gaps:
        found[(gap.node.target, gap.has_rule)].append(gap.node)
    return tuple(
        WithoutRule(
            str(target),
            has_rule,
            tuple(node.name for node in nodes),
            tuple(source_of(node) for node in nodes),
            rule_file(target),
        )
        for (target, has_rule), nodes in found.items()
    )
