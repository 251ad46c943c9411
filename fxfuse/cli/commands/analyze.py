"""`fxfuse analyze`: what of a network is free, and what is frozen and why."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Annotated, Any

import typer

import fxfuse
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.cli.flags import CONSTRAINTS, Given, takes
from fxfuse.cli.frozen import few, frozen_lines, interface_lines, without_rule_lines
from fxfuse.cli.load import load_model
from fxfuse.cli.options import Input, Json, Model, ModelArg
from fxfuse.cli.show import err, out, print_json, table

Strict = Annotated[
    bool,
    typer.Option("--strict", help="Exit 1 if an operator that meets labels has no rule for it."),
]


@takes(CONSTRAINTS)
def analyze(
    model: Model,
    input: Input,
    given: Given,
    model_arg: ModelArg = None,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Show the coupling groups of a network, and what is frozen and why.

    Exits 0 when the network could be analysed, whatever is frozen in it; with `--strict`, 1 when an
    operator has no rule, or none for this use; 2 for bad input.
    """
    network, inputs = load_model(model, model_arg, input)
    constraints = given.make(CONSTRAINTS)
    with err.status("analysing"):
        graph = fxfuse.analyze(network, inputs, constraints)
    if json:
        print_json(_as_json(graph))
    else:
        _show(model, graph)
    if strict and graph.without_rule:
        raise typer.Exit(1)


def _show(model: str, graph: CouplingGraph) -> None:
    groups = (
        (g.name, g.n_units, few(f"{tensor}[{dim}]" for tensor, dim in g.index))
        for g in graph.groups
    )
    out.print(table(f"Coupling groups of {model}", ("group", "units", "tensors"), groups))
    for line in chain(
        interface_lines(graph), frozen_lines(graph), without_rule_lines(graph.without_rule)
    ):
        out.print(line, markup=False, highlight=False)
    if graph.single_units:
        single = table(
            "Groups of one unit", ("group", "its neurons are"), graph.single_units.items()
        )
        out.print(single)
    if graph.mixing:
        counts = Counter((note.why, note.source) for note in graph.mixing)
        rows = ((count, *what) for what, count in counts.items())
        out.print(table("Mixing operators", ("nodes", "why", "source"), rows))
    out.print(f"free fraction: {graph.free_fraction:.2%} of parameter elements")


def _as_json(graph: CouplingGraph) -> dict[str, Any]:
    return {
        "free_fraction": graph.free_fraction,
        "groups": [
            {
                "name": group.name,
                "n_units": group.n_units,
                "tensors": [
                    {"tensor": tensor, "dim": dim, "slots_per_unit": slots.shape[1]}
                    for (tensor, dim), slots in group.index.items()
                ],
            }
            for group in graph.groups
        ],
        "single_units": dict(graph.single_units),
        "frozen": [
            {
                "tensor": t,
                "dim": d,
                "kind": str(r.kind),
                "why": r.why,
                "node": r.node,
                "source": r.source,
                "count": len(r.indices),
                "size": graph.program.tensor(t).shape[d],
                "interface": r.interface,
                "operator": r.operator,
                "rule_file": r.rule_file,
            }
            for (t, d), r in graph.frozen.items()
        ],
        "without_rule": [
            {
                "operator": o.operator,
                "has_rule": o.has_rule,
                "nodes": o.nodes,
                "sources": o.sources,
                "rule_file": o.rule_file,
            }
            for o in graph.without_rule
        ],
        "mixing": [{"why": n.why, "node": n.node, "source": n.source} for n in graph.mixing],
    }
