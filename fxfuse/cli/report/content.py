"""What a report says, gathered from a result before any of it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

import fxfuse
from fxfuse.api.result import FusionResult
from fxfuse.cli.report.coupled import Coupled, coupled
from fxfuse.cli.report.transplanted import GroupShare, shares
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


#: What is measured on data: attribute of a network, heading, digits behind the point.
MEASURES = (
    ("accuracy", "accuracy, %", 2),
    ("agreement", "agrees with the ensemble, %", 2),
    ("distance", "distance from the ensemble", 4),
    ("nll", "NLL, nats", 4),
    ("brier", "Brier score", 4),
    ("ece", "ECE, %", 2),
    ("equivalent", "as good as so many members", 2),
)


def measures(networks: Sequence[Network]) -> dict[str, list[str]]:
    """Return what was measured on data, by heading, each with its interval; "–" if it was not."""
    units = "".join({n.unit for n in networks if n.unit})
    found = {}
    for name, heading, digits in MEASURES:
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
class Content:
    """A report.

    Attributes:
        verdict: Sentences that say what came out, the most important first.
        shares: For each group, where its units come from.
        refit: What the closed-form refit did, if there was one.
        history: What became of each candidate, if they were judged.
        sweep: Networks of other widths, where some were measured.
        free: Share of the parameter elements in tensors with a free dimension, in percent.
        versions: Package → version.
    """

    title: str
    verdict: tuple[str, ...]
    networks: tuple[Network, ...]
    checks: tuple[Check, ...]
    n_members: int
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
) -> Content:
    """Gather everything that a report says; arguments are those of `write_report`."""
    rows = tuple(networks) or _sizes(result)
    return Content(
        title,
        _verdict(result, rows, refined=refined),
        rows,
        result.verification.checks,
        result.plan.n_members,
        shares(result, members),
        coupled(result.graph),
        result.refit,
        result.history,
        tuple(sweep),
        100 * result.graph.free_fraction,
        {"fxfuse": fxfuse.__version__, "torch": torch.__version__},
    )


def _sizes(result: FusionResult) -> tuple[Network, ...]:
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
    rows = (alone, ensemble) if n > 1 else (alone,)
    return (*rows, Network("fused" if n > 1 else "pruned", fused, fused_work))


def _verdict(result: FusionResult, rows: Sequence[Network], *, refined: bool) -> tuple[str, ...]:
    plan, checks = result.plan, result.verification.checks
    failed = [check.name for check in checks if not check.passed]
    said = [f"{plan.n_members} networks became one" if plan.n_members > 1 else "One network"]
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
