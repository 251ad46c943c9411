"""Writes in place become values: a graph in which no tensor changes once it is computed.

An in-place operator on an activation becomes the operator that returns its result, and whatever is
read of that memory later (the tensor, the views of it) is read from the result. Writes into inputs
and into the module's own tensors stay, because others can see them.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.graph.torch_compat import copy_signature, schema_of

aten = torch.ops.aten

#: Of a slice with a step, each index is a piece of its own.
_MOST_PIECES = 64

_RESHAPED = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
)


#: Operators that return a view only where memory allows it.
_PERHAPS = (
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
)


def functional(graph: fx.Graph) -> fx.Graph:
    """Copy an exported graph without writes into activations; nodes have `meta["val"]`.

    A graph that resizes a tensor in place, or writes into another operand than the first, keeps all
    of its writes: what they leave behind is not followed.
    """
    copier = _Copier(keeps_writes=any(map(_is_beyond, graph.nodes)))
    for node in graph.nodes:
        copier.copy(node)
    copy_signature(graph, copier.graph)
    return copier.graph


class _Copier:
    def __init__(self, *, keeps_writes: bool) -> None:
        self.keeps_writes = keeps_writes
        self.graph = fx.Graph()
        #: For each node of the old graph, the node of the new one that holds its content now.
        self.now: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, list[fx.Node]] = defaultdict(list)

    def copy(self, node: fx.Node) -> None:
        if is_write(node) and not self.keeps_writes and self.write(node):
            return
        self.now[node] = self.graph.node_copy(node, lambda n: self.now[n])
        if _is_view(node):
            self.views[base_of(node)].append(node)

    def write(self, node: fx.Node) -> bool:
        """Write the functional form of an in-place operator; False where there is none."""
        target, written = _functional(node), node.args[0]
        if target is None or not isinstance(written, fx.Node):
            return False
        chain = [written]
        while _is_view(chain[-1]):
            chain.append(_parent(chain[-1]))
        base = chain[-1]
        if base.op != "call_function" or not all(map(_is_reversible, chain[:-1])):
            return False
        result = self.written(node, written, target)
        changed = {written: result}
        for view in chain[:-1]:
            parent = _parent(view)
            changed[parent] = self.put_back(view, self.now[parent], changed[view])
        self.now.update(changed)
        for view in self.views[base]:
            if is_write(view):
                self.now[view] = self.now[_parent(view)]
            elif view not in changed:
                self.now[view] = self.graph.node_copy(view, lambda n: self.now[n])
        self.now[node] = result
        self.views[base].append(node)
        return True

    def written(self, node: fx.Node, written: fx.Node, target: Any) -> fx.Node:
        """Return what an in-place operator leaves behind; nothing that it overwrites is read."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.now[n])
        if node.target in (aten.copy_.default, aten.fill_.Tensor):
            given: Any = node.args[1]
            before, after = given.meta["val"], node.meta["val"]
            content = self.now[given]
            if before.dtype != after.dtype:
                content = self.call(aten.to.dtype, (content, after.dtype), {}, node)
                content.meta["val"] = before.to(after.dtype)
            if before.shape == after.shape:
                return content
            return self.call(aten.expand.default, (content, self.sizes(written)), {}, node)
        if node.target in (aten.zero_.default, aten.fill_.Scalar):
            value = args[1] if len(args) > 1 else 0.0
            like = self.now[base_of(written)]
            return self.call(aten.new_full.default, (like, self.sizes(written), value), {}, node)
        return self.call(target, args, kwargs, node)

    def sizes(self, node: fx.Node) -> list[int | fx.Node]:
        """Return the sizes of a node's result; a node where they are symbolic."""
        base = base_of(node)
        whole = base.meta["val"].shape
        sizes: list[int | fx.Node] = []
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                sizes.append(size)
                continue
            # Asked of the base where it has that size, so that the view need not be taken.
            same = [d for d, other in enumerate(whole) if str(other) == str(size)]
            owner, place = (base, same[0]) if same else (node, dim)
            made = self.call(aten.sym_size.int, (self.now[owner], place), {}, node)
            made.meta["val"] = size
            sizes.append(made)
        return sizes

    def put_back(self, view: fx.Node, whole: fx.Node, part: fx.Node) -> fx.Node:
        """Return the tensor that a view was taken of, with the view's place overwritten."""
        args: Any = fx.map_arg(view.args, lambda n: self.now[n])
        like = _parent(view)
        if view.meta["val"].shape == like.meta["val"].shape and view.target is aten.slice.Tensor:
            return part
        if view.target is aten.slice.Tensor:
            return self.put_slice(whole, part, args[1:], like)
        if view.target is aten.narrow.default:
            dim, start, length = args[1:]
            return self.put_slice(whole, part, (dim, start, start + length), like)
        if view.target is aten.select.int:
            return self.put_row(whole, part, int(args[1]), int(args[2]), like)
        if view.target is aten.transpose.int:
            return self.call(aten.transpose.int, (part, *args[1:]), {}, like)
        if view.target is aten.permute.default:
            rank = like.meta["val"].dim()
            order = [d % rank for d in args[1]]
            back = [order.index(d) for d in range(rank)]
            return self.call(aten.permute.default, (part, back), {}, like)
        return self.call(aten.reshape.default, (part, _sizes(like)), {}, like)

    def put_row(
        self, whole: fx.Node, part: fx.Node, dim: int, index: int, like: fx.Node
    ) -> fx.Node:
        index %= like.meta["val"].shape[dim]
        row = self.call(aten.unsqueeze.default, (part, dim), {}, like)
        row.meta["val"] = like.meta["val"].narrow(dim, index, 1)
        return self.put_slice(whole, row, (dim, index, index + 1), like)

    def put_slice(self, whole: fx.Node, part: fx.Node, at: Sequence[Any], like: fx.Node) -> fx.Node:
        """Return a tensor with a slice overwritten, at (dimension, start, end, step)."""
        value: torch.Tensor = like.meta["val"]
        found = _rows(value, *at) if value.is_complex() else None
        if found is None:
            return self.call(aten.slice_scatter.default, (whole, part, *at), {}, like)
        # torch has no derivative of a complex slice_scatter.
        dim, rows = found
        pieces, end = [], 0
        if rows.step == 1:
            pieces, end = [*self.piece(whole, dim, 0, rows.start, like), part], rows.stop
        for place, row in enumerate(rows if rows.step > 1 else ()):
            pieces += self.piece(whole, dim, end, row, like)
            pieces += self.piece(part, dim, place, place + 1, like)
            end = row + 1
        pieces += self.piece(whole, dim, end, value.shape[dim], like)
        return self.call(aten.cat.default, (pieces, dim), {}, like)

    def piece(self, whole: fx.Node, dim: int, start: int, end: int, like: fx.Node) -> list[fx.Node]:
        """Return a slice of a tensor, in a list; an empty one where nothing is in it."""
        if start >= end:
            return []
        made = self.call(aten.slice.Tensor, (whole, dim, start, end), {}, like)
        made.meta["val"] = like.meta["val"].narrow(dim, start, end - start)
        return [made]

    def call(self, target: Any, args: Any, kwargs: Any, like: fx.Node) -> fx.Node:
        """Return a new node whose result looks like that of a node of the old graph."""
        made = self.graph.call_function(target, args, kwargs)
        made.meta = dict(like.meta)
        return made


def _rows(
    value: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> tuple[int, range] | None:
    """The dimension and indices of a slice of a tensor; None unless they are plain numbers.

    Also None where a slice with a step would be written in too many pieces.
    """
    size: Any = value.shape[dim]
    if isinstance(size, torch.SymInt) or any(isinstance(x, fx.Node) for x in (start, end)):
        return None
    first, last, _ = slice(start, end, step).indices(size)
    rows = range(first, max(first, last), step)
    if step > 1 and len(rows) > _MOST_PIECES:
        return None
    return dim % value.dim(), rows


def is_write(node: fx.Node) -> bool:
    """Tell whether an operator writes into one of its operands."""
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


def written_names(graph: fx.Graph) -> frozenset[str]:
    """Names of the module's tensors that a graph writes into, also through views of them."""
    return frozenset(str(base.target) for base in written_bases(graph) if base.op == "get_attr")


def written_bases(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose memory a graph writes: tensors of the module, inputs, activations."""
    found = set()
    for node in filter(is_write, graph.nodes):
        for argument, value in zip(schema_of(node.target).arguments, node.args, strict=False):
            alias = argument.alias_info
            if alias is not None and alias.is_write and isinstance(value, fx.Node):
                found.add(base_of(value))
    return found


def _is_beyond(node: fx.Node) -> bool:
    """Tell whether a write changes the size of a tensor, or another operand than the first."""
    if not is_write(node):
        return False
    arguments = schema_of(node.target).arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or any(written[1:]):
        return True
    before, after = first.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.shape != after.shape


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        parent = node.args[0]
        return isinstance(parent, fx.Node) and _is_view(parent)
    schema = schema_of(node.target)
    if schema is None or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    # What an in-place operator returns is the tensor that it wrote to.
    return any(r.alias_info is not None for r in schema.returns) and not _copies(node)


def _copies(node: fx.Node) -> bool:
    """Tell whether an operator that returns a view where it can had to copy."""
    if node.target not in _PERHAPS or "val" not in node.meta or "val" not in _parent(node).meta:
        return False
    before, after = _parent(node).meta["val"], node.meta["val"]
    if before.dtype != after.dtype or before.device != after.device:
        return True
    if node.target in (aten.reshape.default, aten.flatten.using_ints):
        try:
            before.view(after.shape)
        except (RuntimeError, ValueError):
            return True
        return False
    return bool(before.stride() != after.stride())


def _parent(view: fx.Node) -> fx.Node:
    parent = view.args[0]
    assert isinstance(parent, fx.Node)
    return parent


def base_of(view: fx.Node) -> fx.Node:
    """Return the node whose memory a node shows: itself, unless it is a view."""
    while _is_view(view):
        view = _parent(view)
    return view


def _is_reversible(view: fx.Node) -> bool:
    """Whether `put_back` knows the way back; torch itself forbids writes into pieces of a split."""
    literal = all(isinstance(x, int) for x in view.args[1:])
    if view.target in (*_RESHAPED, *_PERHAPS, aten.alias.default, aten.detach.default):
        return _sizes(_parent(view)).count(-1) <= 1
    if view.target is aten.select.int:
        return literal and _sizes(_parent(view))[view.args[1]] >= 0  # type: ignore[index]
    if view.target in (aten.slice.Tensor, aten.transpose.int, aten.permute.default):
        return True
    return is_write(view) or (view.target is aten.narrow.default and literal)


def _sizes(node: fx.Node) -> list[int]:
    """Return the sizes of a node's result, -1 where they are symbolic."""
    return [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]


def _functional(node: fx.Node) -> Any:
    """The operator that returns what an in-place operator writes, if dtypes let it do the same."""
    schema = schema_of(node.target)
    name, overload = schema.name, schema.overload_name or "default"
    result = node.meta.get("val")
    if not name.endswith("_") or not isinstance(result, torch.Tensor):
        return None
    values = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [t for t in values if isinstance(t, torch.Tensor)]
    dtypes = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
    if dtypes != {result.dtype}:
        return None
    packet = getattr(aten, name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, overload, None)
