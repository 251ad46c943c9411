"""A network as it would have been captured at other sizes: node by node the same graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import torch
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxfuse.analysis.coupling import CouplingGraph
from fxfuse.errors import RewriteError
from fxfuse.graph.capture import Program
from fxfuse.graph.rebuild import rebuild
from fxfuse.graph.source_lines import where_of
from fxfuse.graph.torch_compat import FakeTensor
from fxfuse.transform.layout import copies_of
from fxfuse.transform.resizing.state import ResizedGraph
from fxfuse.transform.resizing.walk import walk_at


def program_at(
    graph: CouplingGraph, sizes: Mapping[str, int], own: Mapping[str, torch.Tensor]
) -> Program:
    """Return the network of an analysis as it is at other sizes.

    `own` are tensors of these sizes by name. Of others, parameters are zero, and buffers hold the
    network's values, unit by unit.
    """
    program = graph.program
    wide = walk_at(graph, copies_of(graph, sizes))
    _fold_sizes(wide)
    _check_operators(wide)
    state: dict[str, torch.Tensor] = {}
    for name in program.names:
        first = program.canonical[name]
        state[name] = state[first] if first != name else _tensor(wide, name, own)
    # Not pruned: every node stands for one of the given network.
    source = fx.GraphModule(program.module, wide.graph)
    module = rebuild(source, state, prune=False)
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    with torch.no_grad():
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*inputs)
    return replace(program, module=module)


def _fold_sizes(wide: ResizedGraph) -> None:
    """Write a size such as batch · heads with the new number, where all that reads it grew alike.

    `b * 3`, of which every reader makes `(b * 3) * 2 // 3`, becomes `b * 2`.
    """
    kept = set(wide.mapping.values())
    for node in wide.mapping.values():
        size, factor = node.args if node.target is operator.mul else (None, None)
        if not isinstance(size, fx.Node) or not isinstance(factor, int):
            continue
        scaled = [_scaled(user) for user in node.users if user not in kept]
        ratios = {ratio for _, ratio in scaled}
        if len(scaled) < len(node.users) or len(ratios) != 1:
            continue
        (grown,) = (factor * ratio for ratio in ratios)
        if grown.denominator == 1:
            node.args = (size, int(grown))
            for product, (last, _) in zip(list(node.users), scaled, strict=True):
                last.replace_all_uses_with(node)
                for written in dict.fromkeys((last, product)):
                    wide.graph.erase_node(written)


def _scaled(product: fx.Node) -> tuple[fx.Node, Fraction]:
    """The node that scales a size, which may be a product and its quotient, and by how much."""
    (number,) = (arg for arg in product.args if isinstance(arg, int))
    (user, *others) = product.users
    if others or user.target is not operator.floordiv:
        return product, Fraction(number)
    divisor = user.args[1]
    assert isinstance(divisor, int)
    return user, Fraction(number, divisor)


def _check_operators(wide: ResizedGraph) -> None:
    nodes, written = list(wide.analysis.program.graph.nodes), list(wide.graph.nodes)
    for before, after in zip(nodes, written, strict=False):
        if wide.mapping.get(before, after) is not after or before.target != after.target:
            raise RewriteError(
                "the network cannot be written at these sizes with the same operators",
                where=where_of(before),
                why="units would need another order there",
                how="use members of one width or of one depth",
            )


def _tensor(wide: ResizedGraph, name: str, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    found = wide.analysis.program.tensor(name)
    tensor = found.detach()
    for dim in range(found.dim()):
        if (name, dim) in wide.resized:
            source = torch.from_numpy(wide.place_layout((name, dim)).source)
            tensor = tensor.index_select(dim, source.to(tensor.device))
    if name in own:
        if own[name].shape != tensor.shape:
            raise RewriteError(
                "a tensor does not fit the sizes of the other tensors",
                where=name,
                why=f"its shape is {tuple(own[name].shape)}, they need {tuple(tensor.shape)}",
                how="use members of one architecture",
            )
        return own[name]
    if not isinstance(found, nn.Parameter):
        return tensor.clone()
    return nn.Parameter(torch.zeros_like(tensor), requires_grad=found.requires_grad)
