"""`fxfuse analyze`: what of a network is free, and what is frozen and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import fxfuse
from fxfuse.cli.load import load_model
from fxfuse.cli.options import (
    Freeze,
    Ignore,
    Input,
    Json,
    Model,
    ModelArg,
    OutputDims,
    Share,
    parse_output_dims,
)
from fxfuse.cli.show import err, out, print_json, table
from fxfuse.coupling import CouplingGraph


def analyze(
    model: Model,
    input: Input,
    model_arg: ModelArg = None,
    freeze: Freeze = None,
    share: Share = None,
    ignore: Ignore = None,
    output_dims: OutputDims = None,
    json: Json = False,
) -> None:
    """Show the coupling groups of a network, and what is frozen and why."""
    network, inputs = load_model(model, model_arg, input)
    with err.status("analysing"):
        graph = fxfuse.analyze(
            network,
            inputs,
            freeze=freeze or (),
            share=share or (),
            ignore=ignore or (),
            output_dims=parse_output_dims(output_dims or ()),
        )
    if json:
        print_json(_as_json(graph))
        return
    out.print(
        table(
            f"Coupling groups of {model}",
            ("group", "units", "tensors"),
            ((g.name, g.n_units, _tensors(g.index)) for g in graph.groups),
        )
    )
    reasons = Counter(reason.why for reason in graph.frozen.values())
    out.print(table("Frozen dimensions", ("count", "why"), ((n, w) for w, n in _ranked(reasons))))
    if graph.mixing:
        rows = ((note.why, note.source) for note in graph.mixing)
        out.print(table("Mixing operators", ("why", "source"), rows))
    out.print(f"free fraction: {graph.free_fraction:.2%} of parameter elements")


def _tensors(index: Any) -> str:
    names = [f"{tensor}[{dim}]" for tensor, dim in index]
    more = f" + {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    return counts.most_common()


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
        "frozen": [
            {
                "tensor": t,
                "dim": d,
                "kind": str(r.kind),
                "why": r.why,
                "node": r.node,
                "source": r.source,
            }
            for (t, d), r in graph.frozen.items()
        ],
        "mixing": [{"why": n.why, "node": n.node, "source": n.source} for n in graph.mixing],
    }
