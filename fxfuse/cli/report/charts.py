"""The charts of a report, as Vega-Lite specifications (altair checks them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import altair as alt

from fxfuse.cli.report.content import Network, renamed
from fxfuse.cli.report.coupled import FREE, FROZEN_LANES, Coupled
from fxfuse.cli.report.transplanted import SEVERAL, GroupShare
from fxfuse.refine import RefitReport
from fxfuse.refine.history import Candidate, History

#: Okabe and Ito's palette, which the colour-blind can tell apart, too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_GREY = "#999999"
#: Colour and shape of what is free and of each kind of freezing.
_MARKS = (
    (COLOURS[0], "circle"),
    (_GREY, "square"),
    (COLOURS[1], "triangle"),
    (COLOURS[5], "diamond"),
)
_ROW = 14
_LABEL = alt.Axis(title=None, ticks=False, domain=False)

Spec = dict[str, Any]
_Chart = alt.Chart | alt.LayerChart | alt.FacetChart


_SEVERAL_NAME = "several members"


def transplant_map(shares: Sequence[GroupShare], members: Sequence[str]) -> Spec:
    """Return for each group a strip: which of the named members each fused unit came from."""
    n_members = len(members)
    rows = [
        {
            "group": share.group,
            "from": run.start / share.n_units,
            "to": run.stop / share.n_units,
            "units": f"{run.start} to {run.stop - 1}",
            "member": _SEVERAL_NAME if run.member == SEVERAL else members[run.member],
        }
        for share in shares
        for run in share.runs
    ]
    names = [*members] + [_SEVERAL_NAME] * any(row["member"] == _SEVERAL_NAME for row in rows)
    # More members than colours can be told apart repeat them; the tooltip names each.
    colours = [COLOURS[i % len(COLOURS)] for i in range(n_members)]
    colours += [_GREY] * (len(names) - n_members)
    chart = (
        alt.Chart(_table(rows))
        .mark_bar(height=_ROW - 3)
        .encode(
            x=alt.X("from:Q", title="share of the fused units", scale=alt.Scale(domain=[0, 1])),
            x2="to:Q",
            y=alt.Y("group:N", sort=None, axis=_LABEL),
            color=alt.Color(
                "member:N",
                title=None,
                scale=alt.Scale(domain=names, range=colours),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["group:N", "member:N", "units:N"],
        )
    )
    return _spec(chart, _ROW * len(shares), "Which member each kept unit came from, by group.")


def scores(shares: Sequence[GroupShare]) -> Spec:
    """Return for each group, the share of the members' score that was kept and lost."""
    rows = [
        {"group": s.group, "part": part, "share": value}
        for s in shares
        if s.kept is not None
        for part, value in (("kept", s.kept), ("lost", 1 - s.kept))
    ]
    chart = (
        alt.Chart(_table(rows))
        .mark_bar(height=_ROW - 3)
        .encode(
            x=alt.X("share:Q", title="share of the members' summed score"),
            y=alt.Y("group:N", sort=None, axis=_LABEL),
            color=alt.Color(
                "part:N",
                title=None,
                scale=alt.Scale(domain=["kept", "lost"], range=[COLOURS[0], "#DDDDDD"]),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["group:N", "part:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    height = _ROW * sum(s.kept is not None for s in shares)
    return _spec(chart, height, "Score kept and lost, by group.")


def coupling(coupled: Coupled) -> Spec:
    """Return every dimension as a dot in the lane of its group; a click goes to its explanation."""
    names = [lane.name for lane in coupled.lanes]
    dots = [
        {
            "place": dot.place,
            "order": dot.order,
            "lane": names[dot.lane],
            "state": dot.state,
            "why": dot.why,
            "size": dot.size,
            "href": f"#{dot.anchor}",
        }
        for lane in coupled.lanes
        for dot in lane.dots
    ]
    edges = [
        {"lane": names[a.lane], "from": min(a.order, b.order), "to": max(a.order, b.order)}
        for a, b in coupled.edges
        if a.order != b.order
    ]
    y = alt.Y("lane:N", sort=None, scale=alt.Scale(domain=names), axis=_LABEL)
    x = alt.X(
        "order:Q",
        title="tensors, in the network's order",
        scale=alt.Scale(zero=False, nice=False, padding=8),
    )
    marks = {
        state: mark
        for state, mark in zip((FREE, *FROZEN_LANES.values()), _MARKS, strict=True)
        if any(dot["state"] == state for dot in dots)
    }
    states = list(marks)
    colours, shapes = (list(part) for part in zip(*marks.values(), strict=True))
    lines = (
        alt.Chart(_table(edges))
        .mark_rule(color=_GREY, opacity=0.6)
        .encode(x=alt.X("from:Q", title="tensors, in the network's order"), x2="to:Q", y=y)
    )
    points = (
        alt.Chart(_table(dots))
        .mark_point(filled=True, size=55, opacity=0.9, cursor="pointer")
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "state:N",
                title=None,
                scale=alt.Scale(domain=states, range=colours),
                legend=alt.Legend(orient="top", columns=1),
            ),
            shape=alt.Shape("state:N", title=None, scale=alt.Scale(domain=states, range=shapes)),
            href="href:N",
            tooltip=["place:N", "size:Q", "state:N", "why:N"],
        )
    )
    zoom = alt.selection_interval(bind="scales", encodings=["x"])
    chart = alt.layer(lines, points.add_params(zoom))
    return _spec(chart, (_ROW + 4) * len(names), "Dimensions of all tensors by coupling group.")


def refit_errors(refit: RefitReport) -> Spec:
    """Return for each layer, the error of its output before and after the refit."""
    outside = "on rows left out of the fit"
    rows = [
        {"layer": fit.weight, "when": when, "error": max(error, 1e-6)}
        for fit in refit.layers
        if fit.fitted
        for when, error in (("before", fit.before), ("after", fit.after), (outside, fit.held_out))
        if isfinite(error)
    ]
    whens = ["before", "after", outside]
    base = alt.Chart(_table(rows)).encode(
        x=alt.X(
            "error:Q",
            title="error, as a share of the target's variance",
            scale=alt.Scale(type="log"),
        ),
        y=alt.Y("layer:N", sort=None, axis=_LABEL),
    )
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(
        color=alt.Color(
            "when:N",
            title=None,
            scale=alt.Scale(domain=whens, range=[COLOURS[1], COLOURS[0], COLOURS[2]]),
            legend=alt.Legend(orient="top"),
        ),
        shape=alt.Shape(
            "when:N",
            title=None,
            scale=alt.Scale(domain=whens, range=["square", "circle", "diamond"]),
        ),
        tooltip=["layer:N", "when:N", alt.Tooltip("error:Q", format=".3g")],
    )
    line = base.mark_line(color=_GREY).encode(detail="layer:N")
    fitted = sum(fit.fitted for fit in refit.layers)
    return _spec(alt.layer(line, dots), _ROW * fitted, "Error of every layer, before and after.")


def history(found: History, names: Sequence[str]) -> Spec:
    """Return for each candidate its distance from the ensemble, and what became of it."""
    kinds = ["returned", "accepted", "a start", "rejected"]

    def kind(c: Candidate) -> str:
        if c.name == found.chosen:
            return kinds[0]
        return kinds[1] if c.accepted else kinds[3] if c.against else kinds[2]

    rows = [
        {"network": renamed(c.name, names), "distance": c.judged, "what": kind(c), "why": c.verdict}
        for c in found.candidates
        if isfinite(c.judged)
    ]
    chart = (
        alt.Chart(_table(rows))
        .mark_bar(height=_ROW - 3)
        .encode(
            x=alt.X("distance:Q", title=f"distance from the ensemble, {found.unit}"),
            y=alt.Y("network:N", sort=None, axis=_LABEL),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(
                    domain=kinds, range=[COLOURS[2], COLOURS[0], COLOURS[4], "#BBBBBB"]
                ),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["network:N", alt.Tooltip("distance:Q", format=".3g"), "why:N"],
        )
    )
    return _spec(chart, (_ROW + 4) * len(rows), "Distance of every candidate from the ensemble.")


def sweep(networks: Sequence[Network], points: Sequence[Network]) -> Spec:
    """Quality against floating-point operations, with other networks as points of reference.

    Quality is accuracy, or without labels the distance from the ensemble.
    """
    measure = "accuracy" if any(n.accuracy is not None for n in networks) else "distance"
    unit = next((n.unit for n in networks if n.unit), "")
    title = "accuracy, %" if measure == "accuracy" else f"distance from the ensemble, {unit}"
    rows = [
        {"name": n.name, "flops": n.flops, "quality": getattr(n, measure), "kind": kind}
        for kind, group in (("fused, by width", networks), ("for comparison", points))
        for n in group
        if n.flops is not None and getattr(n, measure) is not None
    ]
    base = alt.Chart(_table(rows)).encode(
        x=alt.X("flops:Q", title="floating-point operations", axis=alt.Axis(format="~s")),
        y=alt.Y("quality:Q", title=title, scale=alt.Scale(zero=False)),
    )
    kinds = ["fused, by width", "for comparison"]
    dots = base.mark_point(filled=True, size=70).encode(
        color=alt.Color(
            "kind:N",
            title=None,
            scale=alt.Scale(domain=kinds, range=list(COLOURS[:2])),
            legend=alt.Legend(orient="top"),
        ),
        shape=alt.Shape(
            "kind:N", title=None, scale=alt.Scale(domain=kinds, range=["circle", "square"])
        ),
        tooltip=["name:N", "quality:Q", "flops:Q"],
    )
    names = base.mark_text(align="left", dx=7, dy=-7).encode(text="name:N")
    line = base.mark_line(color=COLOURS[0]).transform_filter("datum.kind == 'fused, by width'")
    return _spec(alt.layer(line, dots, names), 260, f"{title} against floating-point operations.")


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the rows as a chart's data; altair has no annotations here."""
    make: Any = alt.Data
    return make(values=rows)


def _spec(
    chart: alt.Chart | alt.LayerChart | alt.FacetChart, height: int, description: str
) -> Spec:
    told = chart.properties(width="container", height=max(height, 40), description=description)
    spec: Spec = told.configure_view(stroke=None).configure_axis(grid=False).to_dict()
    return spec
