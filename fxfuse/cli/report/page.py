"""The page itself: a template filled with content and charts, everything in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair
import jinja2
import vl_convert
from markupsafe import Markup

from fxfuse.cli.report import charts
from fxfuse.cli.report.content import Content, Network, measures, renamed
from fxfuse.cli.report.coupled import modules_of

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
#: What a network costs, in columns of their table: attribute, heading, format.
_COSTS = (
    ("parameters", "parameters", "{:,}"),
    ("flops", "MFLOPs", "{:,.2f}"),
    ("milliseconds", "latency, ms", "{:.2f}"),
)
_MILLION = 1e6


def render(content: Content) -> str:
    """Return a report as HTML that needs no other file and no network."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
    )
    columns = measures(content.networks)
    columns |= {
        heading: [_cell(n, name, form) for n in content.networks]
        for name, heading, form in _COSTS
        if any(getattr(n, name) is not None for n in content.networks)
    }
    return environment.get_template(_TEMPLATE.name).render(
        content=content,
        columns=list(columns),
        rows=zip(
            (n.name for n in content.networks), zip(*columns.values(), strict=True), strict=True
        ),
        candidates=_candidates(content),
        judged=""
        if content.history is None
        else renamed(content.history.described()[0], content.members),
        charts={name: Markup(_script_safe(spec)) for name, spec in _charts(content).items()},
        modules_of=modules_of,
        library=Markup(_library()),
    )


def _charts(content: Content) -> dict[str, charts.Spec]:
    """Return the specifications by the id of their place in the page."""
    found = {"coupling": charts.coupling(content.coupled)}
    if len(content.names) > 1:
        found["map"] = charts.transplant_map(content.shares, content.names)
    if any(share.kept is not None for share in content.shares):
        found["scores"] = charts.scores(content.shares)
    if content.refit is not None and any(fit.fitted for fit in content.refit.layers):
        found["refit"] = charts.refit_errors(content.refit)
    if content.history is not None:
        found["history"] = charts.history(content.history, content.members)
    if content.sweep:
        found["sweep"] = charts.sweep(content.sweep, content.networks)
    return found


def _candidates(content: Content) -> list[tuple[str, ...]]:
    """Return the lines of the table of candidates."""
    columns = {} if content.history is None else content.history.table()
    lines = zip(*columns.values(), strict=True)
    return [tuple(renamed(cell, content.members) for cell in line) for line in lines]


def _cell(network: Network, name: str, form: str) -> str:
    value: Any = getattr(network, name)
    if value is None:
        return "–"
    return form.format(value / _MILLION if name == "flops" else value)


def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which brings no other."""
    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version).replace(
        "</script", "<\\/script"
    )


def _script_safe(spec: charts.Spec) -> str:
    """Return JSON that may be inside a script element: no name in it can end that element."""
    return json.dumps(spec, separators=(",", ":")).replace("<", "\\u003c")
