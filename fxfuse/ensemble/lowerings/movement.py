"""Data movement and reductions: the same operator, its dimensions counted one further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxfuse.ensemble.forms import Form, Writer, arguments, is_tensor, recall
from fxfuse.ensemble.lowerings.registry import lowering

aten = torch.ops.aten

#: Operators of which some arguments count dimensions, and the names of these.
_DIMENSIONS: Mapping[Any, tuple[str, ...]] = {
    aten.permute.default: ("dims",),
    aten.transpose.int: ("dim0", "dim1"),
    aten.swapaxes.default: ("axis0", "axis1"),
    aten.swapdims.default: ("dim0", "dim1"),
    aten.movedim.int: ("source", "destination"),
    aten.movedim.intlist: ("source", "destination"),
    aten.unsqueeze.default: ("dim",),
    aten.squeeze.dim: ("dim",),
    aten.squeeze.dims: ("dim",),
    aten.flatten.using_ints: ("start_dim", "end_dim"),
    aten.unflatten.int: ("dim",),
    aten.select.int: ("dim",),
    aten.slice.Tensor: ("dim",),
    aten.narrow.default: ("dim",),
    aten.chunk.default: ("dim",),
    aten.split.Tensor: ("dim",),
    aten.split_with_sizes.default: ("dim",),
    aten.unbind.int: ("dim",),
    aten.roll.default: ("dims",),
    aten.flip.default: ("dims",),
    aten.glu.default: ("dim",),
    # reductions
    aten.mean.dim: ("dim",),
    aten.sum.dim_IntList: ("dim",),
    aten.amax.default: ("dim",),
    aten.amin.default: ("dim",),
    aten.var.correction: ("dim",),
    aten.std.correction: ("dim",),
    aten.logsumexp.default: ("dim",),
    aten.softmax.int: ("dim",),
    aten.log_softmax.int: ("dim",),
    aten.cumsum.default: ("dim",),
    aten.max.dim: ("dim",),
    aten.min.dim: ("dim",),
}
#: Operators that take a whole shape.
_SHAPES: Mapping[Any, str] = {aten.view.default: "size", aten.reshape.default: "shape"}


@lowering(*_DIMENSIONS)
def shifted(writer: Writer, node: fx.Node) -> fx.Node | None:
    """The operator on a dimension further."""
    given = arguments(node)
    source = given.pop("self")
    if not isinstance(source, fx.Node) or source.meta["val"].dim() == 0:
        return None
    shifts: dict[str, Any] = {}
    for name in _DIMENSIONS[node.target]:
        dims = given[name]
        if dims is None or dims == []:
            # All dimensions are meant, and those of the stack are more.
            return None
        shifts[name] = _further(dims)
    if node.target is aten.permute.default:
        rank = len(shifts["dims"])
        shifts["dims"] = [0, *(d % (rank + 1) for d in shifts["dims"])]
    rest = fx.map_arg(given, writer.shared)
    return recall(writer, node, {"self": writer.stacked(source), **rest, **shifts})


@lowering(*_SHAPES)
def reshaped(writer: Writer, node: fx.Node) -> fx.Node:
    """A reshape, as a stacked tensor need not be as contiguous as a member's."""
    given = arguments(node)
    sizes = fx.map_arg(given[_SHAPES[node.target]], writer.shared)
    return writer.call(aten.reshape.default, writer.stacked(given["self"]), [writer.n, *sizes])


@lowering(aten.expand.default)
def expanded(writer: Writer, node: fx.Node) -> fx.Node:
    """New dimensions come behind the members'."""
    given = arguments(node)
    sizes = fx.map_arg(given["size"], writer.shared)
    source = writer.broadcast(given["self"], len(sizes))
    return writer.call(aten.expand.default, source, [writer.n, *sizes])


@lowering(aten.repeat.default)
def repeated(writer: Writer, node: fx.Node) -> fx.Node:
    """As `expanded`."""
    given = arguments(node)
    times = fx.map_arg(given["repeats"], writer.shared)
    return writer.call(node.target, writer.broadcast(given["self"], len(times)), [1, *times])


@lowering(aten.cat.default, aten.stack.default)
def joined(writer: Writer, node: fx.Node) -> fx.Node | None:
    """Every operand stacked, those that members share too."""
    given = arguments(node)
    tensors: Any = given["tensors"]
    if isinstance(tensors, fx.Node) or not all(is_tensor(n) for n in tensors):
        return None
    if len({n.meta["val"].dim() for n in tensors}) > 1:
        # torch leaves out empty tensors of one dimension.
        return None
    return writer.call(node.target, [writer.stacked(n) for n in tensors], _further(given["dim"]))


@lowering(aten.slice_scatter.default)
def overwritten(writer: Writer, node: fx.Node) -> fx.Node:
    """Both tensors stacked."""
    given = arguments(node)
    whole, part = writer.stacked(given["self"]), writer.stacked(given["src"])
    rest = fx.map_arg({k: given[k] for k in ("start", "end", "step")}, writer.shared)
    dim = _further(given["dim"])
    return recall(writer, node, {"self": whole, "src": part, "dim": dim, **rest})


@lowering(aten.pad.default)
def padded(writer: Writer, node: fx.Node) -> fx.Node | None:
    """Constant padding counts dimensions from the last."""
    given = arguments(node)
    if given["mode"] != "constant":
        return None
    rest = fx.map_arg({k: given[k] for k in ("pad", "mode", "value")}, writer.shared)
    return recall(writer, node, {"self": writer.stacked(given["self"]), **rest})


@lowering(aten.index.Tensor)
def indexed(writer: Writer, node: fx.Node) -> fx.Node | None:
    """Indices that all members share, next to each other."""
    given = arguments(node)
    indices: list[Any] = given["indices"]
    used = [place for place, index in enumerate(indices) if index is not None]
    if any(writer.form(indices[place]) is not Form.SHARED for place in used):
        return None
    if used != list(range(used[0], used[-1] + 1)):
        # Their dimensions would come out in front of the members'.
        return None
    shared = [None if index is None else writer.shared(index) for index in indices]
    return writer.call(node.target, writer.stacked(given["self"]), [None, *shared])


def _further(dims: Any) -> Any:
    """Return the dimensions counted from the front, one further."""
    if isinstance(dims, list | tuple):
        return [_further(d) for d in dims]
    return dims + 1 if dims >= 0 else dims
