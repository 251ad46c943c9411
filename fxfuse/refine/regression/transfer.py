"""What a network takes over from an ensemble of other architectures, in closed form.

head: the last layer is fitted to what the whole ensemble answers. levels: before that, the ends of
stages are drawn towards what the other members' most similar stages and the ensemble's answer say
of them.

Notation of shapes: n inputs, c channels, f features of a layer, r rows, * any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

import torch
from torch import Tensor, fx

from fxfuse.activations import NodeRunner
from fxfuse.activations.calibration import count_rows, pick_rows
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.graph.capture import Program
from fxfuse.planning.plan import FusionPlan
from fxfuse.refine.infer_task import logits_of
from fxfuse.refine.judge import Asked
from fxfuse.refine.regression.counterpart import counterparts
from fxfuse.refine.regression.fit_target import FitTarget, routes_of
from fxfuse.refine.regression.head import fit_head
from fxfuse.refine.regression.rows import HELD_OUT, rows_for
from fxfuse.refine.regression.solve import Fit, Ridge
from fxfuse.refine.regression.work import tensors_of
from fxfuse.refine.regression.write import State, current, write
from fxfuse.refine.task import Classification, NextToken, Regression, Task
from fxfuse.transform.resizing import Resized, resized_of

#: Penalties that are tried, relative to the mean square of a feature, from the largest one down.
_ALPHAS = (10.0, 1.0, 0.1, 1e-2, 1e-3)
#: Numbers of a last layer, beyond which one penalty is tried, and of an answer that predicts.
_MANY, _PREDICTING = 100_000, 1024
#: Log-probabilities below this are taken for this.
_LEAST = -12.0
#: Levels of a network that are drawn, at most, and inputs that say where to: each level takes two
#: runs of them. The last levels say most of the answer.
_LEVELS, _INPUTS = 4, 512
#: Parts of the inputs, each of which is predicted from the others.
_FOLDS = 4


@dataclass(frozen=True)
class Level:
    """The end of a stage of the result, which was drawn towards what the other members see.

    Attributes:
        weight: Name of the weight of the layer that was fitted.
        similar: Number of each other member → its most similar stage, by the weight at its end, and
            the share of this one's variance that it explains on inputs that were not fitted to.
        explained: Share of what the level should change by that its own inputs explain.
        why: Why it was left as it was, or "".
    """

    weight: str
    similar: Mapping[int, tuple[str, float]]
    explained: float
    why: str = ""

    def __str__(self) -> str:
        """The layer, and what it was drawn towards."""
        near = ", ".join(f"{place} of member {n}" for n, (place, _) in self.similar.items())
        return f"{self.weight} towards {near}" + (f" (left: {self.why})" if self.why else "")


@dataclass(frozen=True)
class Moved:
    """What was moved into a network from members of other architectures, beside their answers.

    Attributes:
        head: Why its last layer was not fitted to the ensemble's answers, or "".
        levels: Stages that were to be drawn towards what the other members see.
        kept: Whether that is in the network that is returned.
    """

    head: str
    levels: tuple[Level, ...]
    kept: bool = False

    def __str__(self) -> str:
        """What was moved, and what could not be."""
        drawn = [level for level in self.levels if not level.why]
        if not self.kept:
            return f"nothing was moved in closed form: {self.head or 'it was no closer'}"
        said = self.head or "the last layer was fitted to the ensemble's answers"
        share = f"; {len(drawn)} of {len(self.levels)} stages were drawn towards theirs"
        return said + share * bool(drawn)


class Student:
    """A network that takes over: its graph, and the layers that can be fitted.

    Args:
        graph: The analysis of the members of its architecture.
        plan: The plan that it was made by.
        state: Its tensors by name; changed by what is fitted.
    """

    def __init__(self, graph: CouplingGraph, plan: FusionPlan, state: Mapping[str, Tensor]) -> None:
        self.program, self.asked = graph.program, graph.asked
        self.state: State = {name: tensor.detach() for name, tensor in state.items()}
        found = resized_of(graph, plan)
        self._resized = found or Resized(self.program.graph, {}, {}, {}, {})
        self.routes: Sequence[FitTarget] = routes_of(self.program)
        if found is not None:
            self.routes, *_ = counterparts(self.program, found.nodes, self.routes, (), ())
        nodes = self._resized.nodes
        self.outputs = logits_of(nodes.get(node, node) for node in self.program.outputs())

    def runner(self, asked: Asked) -> NodeRunner:
        """Make what runs the network, as it is now, on the inputs."""
        return NodeRunner(
            self.program,
            self.state,
            asked.calibration,
            graph=self._resized.graph,
            constants=self._resized.constants,
        )

    def levels(self) -> list[FitTarget]:
        """The last stages that may be drawn, by the layers that end them."""
        found = stages(self.routes, self._resized.graph)
        free = [r for r in found if r.aim not in self.outputs and self._is_free(r)]
        return free[-_LEVELS:]

    def head(self, task: Task) -> FitTarget | str:
        """The layer that writes the answer, or why it cannot be fitted."""
        if isinstance(task, NextToken) or not isinstance(task, Classification | Regression):
            return f"the last layer is not fitted in closed form for {type(task).__name__}"
        routes = [r for r in self.routes if any(r.aim is node for node in self.outputs)]
        if len(routes) != 1 or len(self.outputs) != 1:
            return "no one layer writes the answer"
        (route,) = routes
        rank = len(route.aim.meta["val"].shape)
        along = task.dim if isinstance(task, Classification) else route.layer.facts.channels
        plain = route.norm is None and route.skip is None and route.layer.groups == 1
        if not plain or not route.is_straight or (along - route.layer.facts.channels) % rank:
            return "the layer that writes the answer is not the last operator"
        return route if self._is_free(route) else "an option asked for the last layer to stay"

    def _is_free(self, route: FitTarget) -> bool:
        return not any(name in self.asked for name in tensors_of(route))

    def write(self, route: FitTarget, fit: Fit, rows: Tensor) -> None:
        """Set the map of a layer."""
        write(route, self.state, fit, rows)
        for name in self.program.names:
            first = self.program.canonical[name]
            if name in self.state and first in self.state:
                self.state[name] = self.state[first]


def fit_answer(student: Student, asked: Asked, task: Task) -> str:
    """Fit a network's last layer to what an ensemble answers; returns why it was left, or "".

    Args:
        student: The network.
        asked: Inputs that may be fitted to, and what the ensemble answers.
        task: What the output means.
    """
    route = student.head(task)
    if isinstance(route, str):
        return route
    rows, wanted, held = _answer_rows(student, route, asked)
    now, best = current(route, student.state), None
    classes = isinstance(task, Classification)
    least = _far(now(rows[held]), wanted[held], classes=classes)
    for alpha in _ALPHAS if now.matrix.numel() <= _MANY else _ALPHAS[1:2]:
        fit = _answering(route, rows[~held], wanted[~held], now, alpha, classes=classes)
        far = _far(fit(rows[held]), wanted[held], classes=classes)
        if far < least:
            least, best = far, alpha
        elif best is not None:
            break
    if best is None:
        return "no last layer is closer on inputs that it was not fitted to"
    student.write(route, _answering(route, rows, wanted, now, best, classes=classes), rows)
    return ""


def _answer_rows(student: Student, route: FitTarget, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
    """What the last layer reads, what it should answer, and which rows are held out."""
    sizes = _sizes(asked)
    answers = [route.layer.output_rows(x.float()) for x in asked.wanted.split(sizes)]

    def take(batch: int, x: Tensor, y: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        return route.layer.input_rows(x, chosen).float(), answers[batch][chosen]

    rows, wanted = _rows(student, route, asked, take)
    return torch.cat(rows), torch.cat(wanted), torch.cat([_last(len(part)) for part in rows])


def _rows(
    student: Student,
    route: FitTarget,
    asked: Asked,
    take: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...]]:
    """What is taken of a layer in each batch.

    `take` is called with the number of the batch, the layer's input and output, and the rows that
    are chosen: as many as a regression looks at, the same share of every batch, in their order.
    """
    layer, sizes = route.layer, _sizes(asked)
    most = rows_for(layer.matrix(layer.held(student.state)).shape[1])
    found: list[tuple[Tensor, ...]] = []
    given: list[Tensor] = []

    def look(node: fx.Node, value: Tensor) -> None:
        if node is layer.input:
            given.append(value.detach().clone())
            return
        batch, count = len(found), layer.n_rows(value)
        share = ceil(most * sizes[batch] / sum(sizes))
        generator = torch.Generator().manual_seed(batch)
        chosen = torch.randperm(count, generator=generator)[:share].sort().values
        found.append(take(batch, given.pop(), value, chosen.to(value.device)))

    runner = student.runner(asked)
    with torch.no_grad():
        for batch in range(len(sizes)):
            runner.once(batch, [layer.input, layer.node], look)
    return list(zip(*found, strict=True))


def _sizes(asked: Asked) -> list[int]:
    return [count_rows(batch) for batch in asked.calibration.batches]


def _last(count: int) -> Tensor:
    """Which of the rows of a batch are the last ones, `HELD_OUT` of all."""
    return torch.arange(count) >= count - int(HELD_OUT * count)


def _answering(
    route: FitTarget, rows: Tensor, wanted: Tensor, now: Fit, alpha: float, *, classes: bool
) -> Fit:
    """The map nearest to the ensemble's answers, drawn to the one there is."""
    if classes:
        found = fit_head(rows, wanted, now, alpha)
    else:
        found = _added(now, Ridge(rows, centred=route.has_shift).fit(wanted - now(rows), alpha))
    return found if route.has_shift else Fit(found.matrix, torch.zeros_like(found.shift))


def _far(answer: Tensor, wanted: Tensor, *, classes: bool) -> float:
    if not classes:
        return float((answer - wanted).square().mean())
    found = answer.double().log_softmax(1)
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


def _added(one: Fit, other: Fit) -> Fit:
    return Fit(one.matrix + other.matrix, one.shift + other.shift)


def draw_levels(
    student: Student, others: Mapping[int, Program], asked: Asked, task: Task
) -> list[Level]:
    """Draw a network's levels, one after the other, towards what the other members see.

    What a level answers to an input, on average over positions, is predicted from the most similar
    place of each other member and from the ensemble's answer: the part that they confirm. The layer
    behind which the level stands is then regressed on its own inputs, so that it comes closer to
    that, with a penalty on the change. (Romero et al., "FitNets", ICLR 2015, train towards a
    teacher's features. Here features stay the student's own, so that what reads them still can.)

    Args:
        student: The network.
        others: The members of other architectures, by their numbers.
        asked: Inputs that may be fitted to, and what the ensemble answers.
        task: What the output means.
    """
    routes = student.levels()
    if not routes:
        return []
    few = asked.calibration.first(_INPUTS, max(_sizes(asked)))
    wanted = pick_rows(asked.wanted, slice(0, few.size))
    asked = replace(asked, calibration=few, wanted=wanted)
    views = {number: _views(program, asked) for number, program in others.items()}
    found = []
    for route in routes:
        own = _means(student.runner(asked), [route])[0]
        similar = {n: _most_similar(own, places, asked) for n, places in views.items() if places}
        seen = [views[n][place] for n, (place, _) in similar.items()] + _answer_seen(asked, task)
        if not seen or len(own) != asked.calibration.size:
            # Nobody sees anything like it, or its first dimension is not the batch.
            continue
        found.append(_drawn(student, asked, route, own, seen, similar))
    return found


def _drawn(
    student: Student,
    asked: Asked,
    route: FitTarget,
    own: Tensor,
    seen: Sequence[Tensor],
    similar: Mapping[int, tuple[str, float]],
) -> Level:
    """Draw one level, whose mean over positions is `own` [n, c], towards what is seen [n, *]."""
    layer, sizes = route.layer, _sizes(asked)
    changes = (_predicted(torch.cat(list(seen), 1), own, asked)[0] - own).split(sizes)

    def take(batch: int, x: Tensor, y: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        # The same change at every position of an input.
        sizes = [1] * y.dim()
        sizes[0], sizes[layer.facts.channels] = len(y), y.shape[layer.facts.channels]
        change = changes[batch].reshape(sizes).expand(y.shape)
        return layer.input_rows(x, chosen).float(), layer.output_rows(change)[chosen]

    rows, wanted = _rows(student, route, asked, take)
    held = torch.cat([_last(len(part)) for part in rows])
    x, z = torch.cat(rows), torch.cat(wanted)
    ridge = Ridge(x, centred=route.has_shift, held=held)
    level = z[held].square().mean().clamp(min=1e-30)
    errors = {
        alpha: float((ridge.trial(z, alpha)(x[held]) - z[held]).square().mean() / level)
        for alpha in _ALPHAS
    }
    alpha = min(errors, key=errors.__getitem__)
    explained = 1 - errors[alpha]
    if not explained > 0:
        return Level(layer.weight, similar, explained, "its own inputs do not tell")
    student.write(route, _added(current(route, student.state), ridge.fit(z, alpha)), x)
    return Level(layer.weight, similar, explained)


def _views(program: Program, asked: Asked) -> dict[str, Tensor]:
    """What a member sees at its stages, mean over positions [n, c], by the layer's weight."""
    routes = stages(routes_of(program), program.graph)
    means = _means(NodeRunner(program, program.state(), asked.calibration), routes)
    named = {route.layer.weight: mean for route, mean in zip(routes, means, strict=True)}
    return {name: mean for name, mean in named.items() if len(mean) == asked.calibration.size}


def _means(runner: NodeRunner, routes: Sequence[FitTarget]) -> list[Tensor]:
    """What the aims of layers answer to each input, mean over positions: [n, c] each."""
    found: dict[fx.Node, list[Tensor]] = {route.aim: [] for route in routes}
    channels = {route.aim: route.layer.facts.channels for route in routes}

    def look(node: fx.Node, value: Tensor) -> None:
        found[node].append(_mean(value.float(), channels[node]))

    with torch.no_grad():
        for batch in range(len(runner.calibration.batches)):
            runner.once(batch, list(found), look)
    return [torch.cat(found[route.aim]) for route in routes]


def _mean(value: Tensor, channels: int) -> Tensor:
    """The mean of [n, *] over all dimensions but the batch's and the channels': [n, c]."""
    last = value.movedim(channels, -1)
    return last.reshape(len(last), -1, last.shape[-1]).mean(1)


def _answer_seen(asked: Asked, task: Task) -> list[Tensor]:
    """The ensemble's answer as numbers that predict; none where it is too large, or no tensor."""
    wanted, classes = asked.wanted, isinstance(task, Classification)
    dim = task.dim if isinstance(task, Classification) else 1
    if not isinstance(wanted, Tensor) or wanted.dim() < 2 or wanted.shape[dim] > _PREDICTING:
        return []
    return [_mean(wanted.float().clamp(min=_LEAST if classes else None, max=inf), dim)]


def _most_similar(own: Tensor, places: Mapping[str, Tensor], asked: Asked) -> tuple[str, float]:
    """The place from which a level is predicted best on inputs that were not fitted to."""
    found = {name: _predicted(seen, own, asked)[1] for name, seen in places.items()}
    best = max(found, key=found.__getitem__)
    return best, found[best]


def _predicted(seen: Tensor, own: Tensor, asked: Asked) -> tuple[Tensor, float]:
    """A level [n, c] predicted from what others see [n, *], each part of the inputs by the rest.

    Returns:
        The prediction, and the share of the level's variance that it explains.
    """
    seen = (seen - seen.mean(0)) / seen.std(0, correction=0).clamp(min=1e-6)
    part = torch.cat([torch.arange(n) * _FOLDS // n for n in _sizes(asked)])
    best, found = float("inf"), own
    ridges = [Ridge(seen[:, None], centred=True, held=part == fold) for fold in range(_FOLDS)]
    for alpha in _ALPHAS:
        guess = torch.empty_like(own)
        for fold, ridge in enumerate(ridges):
            guess[part == fold] = ridge.trial(own, alpha)(seen[part == fold, None])
        error = float((guess - own).square().sum())
        if error < best:
            best, found = error, guess
    total = float((own - own.mean(0)).square().sum())
    return found, 1 - best / max(total, 1e-30)


def stages(routes: Sequence[FitTarget], graph: fx.Graph) -> list[FitTarget]:
    """Return the layers that end a stage: all passes through what they answer.

    The next such place, if there is one, has another shape.
    """
    narrow = cuts(graph)
    every = [route for route in routes if route.is_straight and route.aim in narrow]
    shapes = [[str(size) for size in route.aim.meta["val"].shape[1:]] for route in every]
    return [
        route
        for route, own, following in zip(every, shapes, [*shapes[1:], None], strict=True)
        if own != following
    ]


def cuts(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes through which everything passes on its way from the inputs to the output."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    carried: set[fx.Node] = set()
    last, found = -1, set()
    for node in graph.nodes:
        reads = any(n in carried or n.op == "placeholder" for n in node.all_input_nodes)
        if node.op != "call_function" or not reads or _is_number(node):
            continue
        carried.add(node)
        if last <= order[node] and isinstance(node.meta.get("val"), Tensor):
            found.add(node)
        last = max([last, *(order[user] for user in node.users if not _is_number(user))])
    return found


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)
