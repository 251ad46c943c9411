"""REPAIR (Jordan et al., arXiv:2211.08403): units of a fused network vary as members' units do.

Averaging weights makes activations of aligned members cancel: the fused units vary less from layer
to layer. Here every unit's mean and standard deviation become those that the plan's maps give of
the members', layer after layer, each on what the layers before it give by then.

Notation of shapes: n inputs, c channels, * positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.activations import NodeRunner
from fxfuse.activations.calibration import Calibration, CalibrationBatches
from fxfuse.activations.layers import Layer, layers_of, name_of
from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.graph.arguments import argument
from fxfuse.graph.capture import Program
from fxfuse.graph.operator_facts import FACTS, batch_norm_of
from fxfuse.refine.fused import Fused, Member, check_joint, check_one_head, measurable
from fxfuse.refine.targets import Targets
from fxfuse.transform.resizing import Resized, resized_of

# A unit that varies less than this share of the layer's most varying one is as good as dead.
_DEAD = 1e-6


@dataclass(frozen=True)
class RepairReport:
    """What REPAIR did.

    Attributes:
        layers: Weights of linear and convolutional layers whose outputs were rescaled.
        scaled_only: Those of them that have no bias, so that their means could not be set.
        normalisations: Running means that were reset, with their variances.
        left: Weights of layers with free outputs that were left, since a batch normalisation
            follows, or their targets are divided among the members in two dimensions at once.
    """

    layers: tuple[str, ...]
    scaled_only: tuple[str, ...]
    normalisations: tuple[str, ...]
    left: tuple[str, ...]


def repair(result: Fused, members: Sequence[Member], inputs: Any) -> RepairReport:
    """Set the statistics of a fused network's units to those of the members' units, in place.

    Running statistics of batch normalisations are reset, as by `recalibrate`. A linear or
    convolutional layer without one behind it is rescaled per channel, if its outputs are units of a
    group: mean and standard deviation of its output become the sums, with the weights of the plan's
    maps, of those in the members.

    Args:
        result: What `fxfuse.fuse` returned; `result.module` is changed.
        members: The networks that were fused, in the same order.
        inputs: 100 to 1,000 unlabelled inputs, as in `refit`.

    Returns:
        Which layers were changed, and which were left.

    Raises:
        InputError: The members reject the inputs, or an activation is NaN.
        MemberError: These are not the members that were fused.
        CaptureError: `torch.export` rejected the members, so there is no graph to run.
        OptionError: The network has several heads, or members run one by one in it.
    """
    check_one_head(result, "repaired", why="the members' trunks lead to different outputs")
    given = Calibration.of(inputs)
    if given.augmentations is None:
        # A mixture of two inputs has smaller statistics than either.
        given = replace(given, augmentations=0)
    states, calibration = measurable(result, members, given)
    check_joint(result, "repair")
    graph, program = result.graph, result.graph.program
    resized = resized_of(graph, result.plan) or _same(program)
    norms = _norms_of(program)
    free = _free_layers(graph)
    layers = [layer for layer in free if not any(user in norms for user in layer.node.users)]
    layers = [layer for layer in layers if layer.node in resized.nodes]
    targets = Targets(graph, result.plan, resized.layouts)
    wanted = _wanted(targets, graph, layers, states, calibration)
    state = {name: tensor.clone() for name, tensor in result.module.state_dict().items()}
    runner = NodeRunner(
        program,
        state,
        calibration,
        name="the fused network",
        graph=resized.graph,
        constants=resized.constants,
    )
    rescaled = {resized.nodes[layer.node]: layer for layer in layers if layer in wanted}
    own_norms = {resized.nodes[n]: names for n, names in norms.items() if n in resized.nodes}
    for node in runner.nodes:
        if node in own_norms:
            _reset(runner, node, own_norms[node], state)
        elif node in rescaled:
            layer = rescaled[node]
            _rescale(runner, _written(layer, node), *wanted[layer], state)
    result.module.load_state_dict(state)
    return RepairReport(
        tuple(layer.weight for layer in rescaled.values()),
        tuple(layer.weight for layer in rescaled.values() if not layer.bias),
        tuple(mean for mean, _ in own_norms.values()),
        tuple(layer.weight for layer in free if layer not in rescaled.values()),
    )


def _same(program: Program) -> Resized:
    """The fused network of a member's size: its graph is the members'."""
    return Resized(program.graph, {}, {node: node for node in program.graph.nodes}, {}, {})


def _written(layer: Layer, node: fx.Node) -> Layer:
    """A layer as it is in the graph of the fused network."""
    return replace(layer, node=node, input=argument(node, FACTS[node.target].input))


def _norms_of(program: Program) -> dict[fx.Node, tuple[str, str]]:
    """Batch normalisations with running statistics of their own → names of these."""
    found = {}
    for node in program.graph.nodes:
        facts = batch_norm_of(node)
        if facts is not None:
            statistics = (argument(node, name) for name in (facts.mean, facts.variance))
            mean, variance = (name_of(program, each) for each in statistics)
            if mean is not None and variance is not None:
                found[node] = (mean, variance)
    uses = Counter(mean for mean, _ in found.values())
    return {node: names for node, names in found.items() if uses[names[0]] == 1}


def _free_layers(graph: CouplingGraph) -> list[Layer]:
    """Layers whose outputs are units of a group."""
    canonical = graph.program.canonical
    return [
        layer
        for layer in layers_of(graph.program)
        if graph.group_of.get((canonical[layer.weight], layer.written))
    ]


def _wanted(
    targets: Targets,
    graph: CouplingGraph,
    layers: Sequence[Layer],
    states: Sequence[Mapping[str, Tensor]],
    calibration: CalibrationBatches,
) -> dict[Layer, tuple[Tensor, Tensor]]:
    """Mean and standard deviation `[c]` that each layer's output should have, in float64."""
    means: dict[Layer, list[Tensor]] = {layer: [] for layer in layers}
    deviations: dict[Layer, list[Tensor]] = {layer: [] for layer in layers}
    for number, state in enumerate(states):
        runner = NodeRunner(
            graph.of_member(number).program, state, calibration, name=f"member {number}"
        )
        for layer in layers:
            node = graph.node_of(layer.node, number)
            runner.run_to(node)
            values = runner.value(node)
            mean, variance = _moments(layer.output_rows(y) for y in values)
            means[layer].append(_spread(layer, mean, values[0]))
            deviations[layer].append(_spread(layer, variance.sqrt(), values[0]))
    found = {}
    for layer in layers:
        merged = [targets.merge(layer.node, kind[layer]) for kind in (means, deviations)]
        each = [layer.output_rows(statistic)[0] for statistic in merged if statistic is not None]
        if len(each) == 2:
            found[layer] = each[0], each[1]
    return found


def _spread(layer: Layer, statistic: Tensor, like: Tensor) -> Tensor:
    """A statistic `[c]` at every position of one output of a layer."""
    shape = [1] * like.dim()
    shape[layer.facts.channels] = -1
    return statistic.reshape(shape).expand(1, *like.shape[1:])


def _moments(rows: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance `[c]` of all rows `[n, c]` together, in float64."""
    parts = list(rows)
    count = sum(map(len, parts))
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / count
    squares = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0)
    return mean, squares / max(1, count - 1)


def _reset(
    runner: NodeRunner, node: fx.Node, names: tuple[str, str], state: dict[str, Tensor]
) -> None:
    """Make running statistics those of what the normalisation is about to read."""
    (x, *_) = node.all_input_nodes
    runner.run_to(x)
    mean, variance = _moments(y.movedim(1, -1).flatten(0, -2) for y in runner.value(x))
    for name, statistic in zip(names, (mean, variance), strict=True):
        state[name] = statistic.to(state[name].dtype)


def _rescale(
    runner: NodeRunner, layer: Layer, mean: Tensor, deviation: Tensor, state: dict[str, Tensor]
) -> None:
    """Give the layer's output the wanted mean and standard deviation `[c]`."""
    runner.held.add(layer.input)
    runner.run_to(layer.node)
    own_mean, variance = _moments(layer.output_rows(y) for y in runner.value(layer.node))
    own = variance.sqrt()
    alive = own > _DEAD * own.max()
    scale = torch.where(alive, deviation / own.where(alive, torch.ones_like(own)), 1.0)
    weight = layer.held(state)
    factor = scale.reshape(layer.groups, 1, -1).to(weight.dtype)
    layer.put(state, layer.weight_of(layer.matrix(weight) * factor, weight))
    if layer.bias:
        layer.put_bias(state, (layer.held_bias(state).double() - own_mean) * scale + mean)
    runner.redo(layer.node)
    runner.drop(layer.input)
