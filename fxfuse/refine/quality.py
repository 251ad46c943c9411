"""How good answers are: like the ensemble's and, with labels, accurate and calibrated.

Every measure is a function of sums over inputs, so one bootstrap over the inputs gives all
intervals (Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 13).

Notation of shapes: n inputs, k classes, p positions, r resamples, c sums, * any further dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxfuse.refine.judge import CONFIDENCE, greedy_order, resampled
from fxfuse.refine.task import Answer, Classification, Task, per_input

_RESAMPLES = 1000
#: Bins of the expected calibration error.
_BINS = 15


@dataclass(frozen=True)
class Estimate:
    """A measure over inputs.

    Attributes:
        value: On the inputs that there are.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end of it.
    """

    value: float
    low: float
    high: float


def qualities(
    task: Task,
    answers: Mapping[str, Answer],
    members: Sequence[Answer],
    labels: Tensor | None = None,
    *,
    ensemble: str = "",
) -> dict[str, dict[str, Estimate]]:
    """Measure the answers of networks on the same inputs.

    Args:
        task: What the answers mean.
        answers: What each network answers, `[n, *]`, by its name.
        members: What each member of the ensemble answers, `[n, *]`.
        labels: Class numbers, one for each position, `[n, *]`; for classes only.
        ensemble: Name of a further row for the ensemble itself; "": none.

    Returns:
        For each network its measures by name. `distance` is that from the ensemble, in the task's
        unit. For classes there are `agreement` (positions at which it names the ensemble's class,
        %) and, with labels, `accuracy` (%), `nll` (nats), `brier`, `ece` (expected calibration
        error, 15 bins, %: Guo et al., arXiv:1706.04599) and `equivalent`, how many members of an
        ensemble have this likelihood (Ashukha et al., arXiv:2002.06470): 0 are equal
        probabilities, and each next member is the one that helps most.

    Raises:
        InputError: The labels are no class numbers, one for each position.
    """
    members = [task.exact(member) for member in members]
    wanted = task.combine(members)
    task = task.prepared(wanted, members)
    found = {
        name: _columns(task, task.exact(answer), wanted, labels) for name, answer in answers.items()
    }
    if ensemble and isinstance(task, Classification):
        said = replace(task, outputs="log_probabilities")
        found[ensemble] = _columns(said, wanted, wanted, labels)
    if labels is not None and isinstance(task, Classification):
        curve = _likelihoods(task, members, labels)
        for columns in found.values():
            columns["equivalent"] = torch.cat([columns["nll"], curve], 1)
    return _estimated(found)


def _columns(
    task: Task, answer: Answer, wanted: Answer, labels: Tensor | None
) -> dict[str, Tensor]:
    """What each measure sums over the inputs, `[n, c]`; none of an ensemble of other shapes."""
    found: dict[str, Tensor] = {}
    alike = not isinstance(answer, Tensor) or answer.shape == wanted.shape
    if alike:
        found["distance"] = task.distance(answer, wanted)
    if isinstance(task, Classification):
        logs, dim = task.log_probabilities(answer), task.dim
        confidence, named = logs.exp().max(dim)
        if alike:
            found["agreement"] = 100 * per_input((named == wanted.argmax(dim)).double())
        nll = None if labels is None else task.label_loss(answer, labels)
        if nll is not None and labels is not None:
            right = (named == labels).double()
            truth = torch.zeros_like(logs).scatter_(dim, labels.unsqueeze(dim), 1)
            found["accuracy"] = 100 * per_input(right)
            found["nll"] = nll
            found["brier"] = per_input((logs.exp() - truth).square().sum(dim))
            found["ece"] = 100 * _gaps(confidence.double(), right)
    return {name: each.double().reshape(len(each), -1) for name, each in found.items()}


def _gaps(confidence: Tensor, right: Tensor) -> Tensor:
    """Right minus confidence, summed over the positions of each input in each bin, `[n, 15]`."""
    confidence, right = (x.reshape(len(x), -1) for x in (confidence, right))
    bins = (confidence * _BINS).ceil().long().sub(1).clamp(0, _BINS - 1)
    found = confidence.new_zeros(len(confidence), _BINS)
    return found.scatter_add_(1, bins, right - confidence) / confidence.shape[1]


def _likelihoods(task: Classification, members: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The loss on the labels of none, one, two ... members, `[n, members + 1]`."""
    said, weights = replace(task, outputs="log_probabilities"), task.weights

    def loss(chosen: Sequence[int]) -> Tensor:
        own = None if weights is None else tuple(weights[i] for i in chosen)
        part = replace(task, weights=own if own and sum(own) > 0 else None)
        each = said.label_loss(part.combine([members[i] for i in chosen]), labels)
        assert each is not None
        return each.double()

    classes = members[0].shape[task.dim]
    found = [torch.full((len(labels),), math.log(classes), dtype=torch.double)]
    order = greedy_order(len(members), lambda chosen: float(loss(chosen).mean()))
    found += [loss(order[: i + 1]) for i in range(len(order))]
    return torch.stack(found, 1)


def _estimated(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Estimate]]:
    """The measures of what each network sums, with their intervals."""
    places = [(name, measure) for name, columns in found.items() for measure in columns]
    if not places:
        return {name: {} for name in found}
    columns = [found[name][measure] for name, measure in places]
    means = _with_all(torch.cat(columns, 1)).split([each.shape[1] for each in columns], 1)
    result: dict[str, dict[str, Estimate]] = {name: {} for name in found}
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.double)
    for (name, measure), each in zip(places, means, strict=True):
        values = _measured(measure, each)
        low, high = values[1:].quantile(ends).tolist()
        result[name][measure] = Estimate(float(values[0]), low, high)
    return result


def _measured(measure: str, means: Tensor) -> Tensor:
    """The measure of each row of means, `[r + 1, c]` → `[r + 1]`."""
    if measure == "ece":
        return means.abs().sum(1)
    return _equivalent(means[:, 0], means[:, 1:]) if measure == "equivalent" else means[:, 0]


def _equivalent(loss: Tensor, curve: Tensor) -> Tensor:
    """How many members have a loss, between two numbers by interpolation, `[r]`."""
    curve = curve.cummin(1).values
    above = (curve > loss[:, None]).sum(1)
    last = curve.shape[1] - 1
    upper = above.clamp(1, last)
    worse, better = (curve.gather(1, at[:, None])[:, 0] for at in (upper - 1, upper))
    share = ((worse - loss) / (worse - better).clamp(min=1e-300)).clamp(0, 1)
    return upper - 1 + share


def _with_all(columns: Tensor) -> Tensor:
    """Means over all inputs, and over each resample of them, `[n, c]` → `[r + 1, c]`."""
    return torch.cat([columns.mean(0, keepdim=True), resampled(columns, _RESAMPLES)])
