"""What a report says, gathered from a result before any of it is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import nn

import fxfuse
from fxfuse.api.result import FusionResult
from fxfuse.cli.report.coupled import Coupled, coupled
from fxfuse.cli.report.transplanted import GroupShare, planned, shares
from fxfuse.errors import RewriteError
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.roles import RoleKind
from fxfuse.refine import RefitReport
from fxfuse.refine.history import History
from fxfuse.transform.cost import operations_of, parameters_of
from fxfuse.verify import Check


@dataclass(frozen=True)
class Network:
    """A network of the report's table; None is what was not measured.

    Attributes:
        flops: Floating-point operations for the example inputs.
        accuracy: On the data that was given, in percent.
        agreement: Share of positions at which it names the ensemble's class, in percent.
        distance: From the ensemble, in `unit`.
        milliseconds: Median latency for one batch.
        nll: Negative log-likelihood of the labels, in nats.
        brier: Brier score of the labels.
        ece: Expected calibration error, in percent.
        equivalent: Number of members whose ensemble has this likelihood.
        unit: Unit of the distance.
        intervals: 95 % interval of each of these measures, by its name.
    """

    name: str
    parameters: int
    flops: int | None = None
    accuracy: float | None = None
    agreement: float | None = None
    distance: float | None = None
    milliseconds: float | None = None
    nll: float | None = None
    brier: float | None = None
    ece: float | None = None
    equivalent: float | None = None
    unit: str = ""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data; keys carry units, and the distance has its unit."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "flops": self.flops,
            "latency_ms": self.milliseconds,
            **{key: getattr(self, name) for name, _, _, key in MEASURES},
            "distance_unit": self.unit,
            "intervals": {
                key: list(self.intervals[name])
                for name, _, _, key in MEASURES
                if name in self.intervals
            },
        }


#: What is measured on data: attribute of a network, heading, digits behind the point, JSON key.
MEASURES = (
    ("accuracy", "accuracy, %", 2, "accuracy_percent"),
    ("agreement", "agrees with the ensemble, %", 2, "agreement_percent"),
    ("distance", "distance from the ensemble", 4, "distance"),
    ("nll", "NLL, nats", 4, "nll_nats"),
    ("brier", "Brier score", 4, "brier"),
    ("ece", "ECE, %", 2, "ece_percent"),
    ("equivalent", "equal to how many members", 2, "equivalent_members"),
)


def measures(networks: Sequence[Network]) -> dict[str, list[str]]:
    """Return what was measured on data, by heading, each with its interval; "–" if it was not."""
    units = "".join({n.unit for n in networks if n.unit})
    found = {}
    for name, heading, digits, _ in MEASURES:
        if any(getattr(n, name) is not None for n in networks):
            title = f"{heading}, {units}" if name == "distance" else heading
            found[title] = [_measure(n, name, digits) for n in networks]
    return found


def _measure(network: Network, name: str, digits: int) -> str:
    value, interval = getattr(network, name), network.intervals.get(name)
    if value is None:
        return "–"
    ends = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{value:.{digits}f}{ends}"


@dataclass(frozen=True)
class Bar:
    """A network's quality as a bar.

    Attributes:
        share: Length of the bar, in percent.
        value: What it stands for, with its unit.
        cost: What the network costs beside a member.
        ours: Whether it is the network that the report is on.
    """

    name: str
    share: float
    value: str
    cost: str
    ours: bool


@dataclass(frozen=True)
class Content:
    """A report.

    Attributes:
        headline: How good the network is, in one sentence.
        bars: The same beside the members and the ensemble.
        measure: What the bars show.
        next_step: What to do next.
        members: What the members are called; empty: by their numbers.
        names: The same of the members of the plan, which may be some of them.
        verdict: Sentences that say what came out, the most important first.
        shares: For each group, where its units come from.
        refit: What the closed-form refit did, if there was one.
        history: What became of each candidate, if they were judged.
        sweep: Networks of other widths, where some were measured.
        free: Share of the parameter elements in tensors with a free dimension, in percent.
        versions: Package → version.
    """

    title: str
    headline: str
    bars: tuple[Bar, ...]
    measure: str
    next_step: str
    members: tuple[str, ...]
    names: tuple[str, ...]
    verdict: tuple[str, ...]
    networks: tuple[Network, ...]
    checks: tuple[Check, ...]
    shares: tuple[GroupShare, ...]
    coupled: Coupled
    refit: RefitReport | None
    history: History | None
    sweep: tuple[Network, ...]
    free: float
    versions: dict[str, str]


def gather(
    result: FusionResult,
    *,
    title: str,
    members: Sequence[nn.Module] | None = None,
    networks: Sequence[Network] = (),
    sweep: Sequence[Network] = (),
    refined: bool = False,
    names: Sequence[str] = (),
    next_step: str = "",
) -> Content:
    """Gather everything that a report says; arguments are those of `write_report`."""
    called = tuple(names)
    rows = tuple(
        replace(row, name=renamed(row.name, called)) for row in networks or sizes_of(result)
    )
    measured = measured_networks(result, rows, called)
    measure, bars = _bars(measured)
    raw = bool(result.raw_note) and not refined
    return Content(
        title,
        _headline(measured, raw=raw),
        bars,
        measure,
        next_step or _next_step(rows, raw=raw),
        called,
        _own_names(result, members, called),
        _verdict(result, rows, refined=refined),
        rows,
        result.verification.checks,
        shares(result, members),
        coupled(result.graph),
        result.refit,
        result.history,
        tuple(sweep),
        100 * result.graph.free_fraction,
        {"fxfuse": fxfuse.__version__, "torch": torch.__version__},
    )


def renamed(text: str, names: Sequence[str]) -> str:
    """Return a text in which members that are numbered have their names."""

    def name(match: re.Match[str]) -> str:
        numbers = [int(number) for number in match[1].split(", ")]
        known = all(number < len(names) for number in numbers)
        return ", ".join(names[number] for number in numbers) if known else match[0]

    return re.sub(r"\bmembers? (\d+(?:, \d+)*)", name, text)


def _own_names(
    result: FusionResult, members: Sequence[nn.Module] | None, names: Sequence[str]
) -> tuple[str, ...]:
    """Return what the members of a plan are called, which may be some of all."""
    n = result.plan.n_members
    if len(names) == n:
        return tuple(names)
    if members is not None and len(names) == len(members):
        chosen = {id(member) for member in planned(result.plan, members)}
        found = [name for name, m in zip(names, members, strict=True) if id(m) in chosen]
        if len(found) == n:
            return tuple(found)
    return tuple(f"member {number}" for number in range(n))


def measured_networks(
    result: FusionResult, rows: Sequence[Network], names: Sequence[str]
) -> tuple[Network, ...]:
    """Return networks whose quality is known, the result last: as measured, or as was judged."""
    if any(row.accuracy is not None or row.distance is not None for row in rows):
        return tuple(rows)
    history = result.history
    if history is None or not any(isfinite(c.judged) for c in history.candidates):
        return ()
    starts = [c for c in history.starts if c.name.startswith("member ") and isfinite(c.judged)]
    member, own = rows[0], rows[-1]
    found = [
        replace(member, name=renamed(c.name, names), distance=c.judged, unit=history.unit)
        for c in starts
    ]
    judged = history[history.chosen].judged
    return (*found, replace(own, distance=judged, unit=history.unit))


def _bars(rows: Sequence[Network]) -> tuple[str, tuple[Bar, ...]]:
    """Return what is compared, and a bar for each network that it is known of."""
    name = "accuracy" if any(row.accuracy is not None for row in rows) else "distance"
    known = [row for row in rows if getattr(row, name) is not None]
    if not known:
        return "", ()
    values = [float(getattr(row, name)) for row in known]
    longest = 100.0 if name == "accuracy" else max(*values, 1e-30)
    bars = []
    for row, value in zip(known, values, strict=True):
        text = f"{value:.2f} %" if name == "accuracy" else f"{value:.3g}"
        cost = f"{row.parameters / max(rows[0].parameters, 1):.2f} × parameters"
        if row.milliseconds is not None:
            cost += f", {row.milliseconds:.2f} ms"
        bars.append(Bar(row.name, 100 * value / longest, text, cost, row is rows[-1]))
    unit = next((row.unit for row in known if row.unit), "")
    how = f"Distance from the ensemble ({unit}); shorter is better"
    return "Accuracy" if name == "accuracy" else how, tuple(bars)


def _headline(rows: Sequence[Network], *, raw: bool) -> str:
    """Say in a sentence how good the network is."""
    if not rows and raw:
        return "Raw: nothing was fitted to the members, and nothing was measured."
    if not rows:
        return "Nothing was measured on data."
    *others, own = rows
    singles = [n for n in others if not n.name.startswith("ensemble of ")]
    whole = next((n for n in others if n.name.startswith("ensemble of ")), None)
    if own.accuracy is not None:
        best = max((n.accuracy for n in singles if n.accuracy is not None), default=None)
        parts = [f"{own.accuracy:.2f} % accuracy"]
        parts += [f"the best member has {best:.2f} %"] * (best is not None)
        if whole is not None and whole.accuracy is not None:
            parts.append(f"the ensemble {whole.accuracy:.2f} %")
        return f"{'; '.join(parts)}."
    if own.distance is not None:
        near = min((n.distance for n in singles if n.distance is not None), default=None)
        text = f"{own.distance:.3g} from the ensemble ({own.unit})"
        return f"{text}; the closest member is {near:.3g} away." if near is not None else f"{text}."
    return "The network itself was not measured on data."


def _next_step(rows: Sequence[Network], *, raw: bool) -> str:
    if raw:
        return "refit and match it: pass calibration inputs, 100 to 1,000 without labels."
    if all(row.accuracy is None for row in rows):
        return "measure it on labelled data: fxfuse report FOLDER --data DATA."
    return "use it: fxfuse.load(FOLDER), or compile it with fxfuse.compile."


def sizes_of(result: FusionResult) -> tuple[Network, ...]:
    """Return what the networks cost, predicted from the plan."""
    graph, plan, n = result.graph, result.plan, result.plan.n_members
    own, fused = parameters_of(graph, {}), parameters_of(graph, plan.sizes(), plan)
    try:
        work = operations_of(graph, {})
        fused_work = operations_of(graph, plan.sizes(), plan)
    except RewriteError:
        work = fused_work = None
    ensemble = Network(f"ensemble of {n}", n * own, None if work is None else n * work)
    alone = Network("one member", own, work)
    # What members of other architectures cost is not known from the plan.
    rows = (alone, ensemble) if n > 1 and not result.others else (alone,)
    name = "fused" if n > 1 or result.others else "pruned"
    return (*rows, Network(name, fused, fused_work, milliseconds=result.latency))


def _verdict(result: FusionResult, rows: Sequence[Network], *, refined: bool) -> tuple[str, ...]:
    plan, checks = result.plan, result.verification.checks
    failed = [check.name for check in checks if not check.passed]
    n = plan.n_members + len(result.others)
    said = [f"{n} networks became one" if n > 1 else "One network"]
    said[0] += f" by method {plan.method}, with {rows[-1].parameters:,} parameters."
    if result.raw_note and not refined:
        said.append(result.raw_note)
    if not checks:
        said.append("No oracle ran: verification was skipped.")
    elif failed:
        said.append(f"FAILED: {', '.join(failed)}.")
    else:
        said.append(f"All {len(checks)} oracles hold.")
    accuracies = {row.name: row.accuracy for row in rows if row.accuracy is not None}
    if accuracies:
        said.append("; ".join(f"{name} {value:.2f} %" for name, value in accuracies.items()) + ".")
    if result.history is not None:
        said.append(f"{result.history.described()[0]}.")
    said += _approximations(plan)
    return tuple(said)


def _approximations(plan: FusionPlan) -> list[str]:
    """Return sentences on what is not as the members have it."""
    said = []
    roles = plan.roles.values()
    averaged = sum(
        r.kind is RoleKind.AVERAGED or (r.kind is RoleKind.BASE and r.spread > 0) for r in roles
    )
    if averaged:
        said.append(f"{averaged} tensors are averaged inside the network, an approximation.")
    if plan.mixing.notes:
        one_by_one = plan.mixing.mode == "per_member"
        treated = "once for each member" if one_by_one else "over all members"
        said.append(f"{len(plan.mixing.notes)} operators mix members; they run {treated}.")
    units = {group: {m.units[group] for m in plan.members} for group in plan.members[0].units}
    differ = [group for group, found in units.items() if len(found - {0}) > 1]
    if differ:
        said.append(f"Members differ in width in {len(differ)} of {len(units)} groups.")
    if plan.absent:
        who = sorted({member for members in plan.absent.values() for member in members})
        said.append(
            f"Blocks that are the identity where members lack them (members "
            f"{', '.join(map(str, who))}): {len(plan.absent)} tensors."
        )
    if plan.kept_sizes:
        said.append(f"{len(plan.kept_sizes)} groups keep a member's size.")
    return said
