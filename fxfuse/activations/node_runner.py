"""A network run node by node on all calibration batches, with values freed once they are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.activations.parts import part_of, view_chain_of
from fxfuse.activations.spill_store import MEMORY, SpillStore, Stored
from fxfuse.errors import InputError
from fxfuse.graph.capture import Program
from fxfuse.graph.functional import base_of, written_bases, written_names
from fxfuse.graph.run import same_random_state
from fxfuse.graph.source_lines import source_of
from fxfuse.graph.torch_compat import pytree, schema_of


class NodeRunner:
    """One network on its way through the graph.

    A value is one entry per batch. It is kept until the last node that reads it has run, and as
    long as it is among `held`; what does not fit into `memory`, in a temporary folder
    (`SpillStore`).

    Args:
        program: The network's graph.
        state: Its tensors by name; read when a node needs them, so they may change on the way.
        calibration: The inputs.
        name: Who that is, for messages.
        held: Nodes whose values are kept until `drop`.
        graph: The graph, where the network has another size than `program`; None: its graph.
        constants: Tensors that this graph reads beside the network's, by name.
        asked_as: Nodes of another graph by which `run_to`, `value`, `drop` and `held` may name
            nodes of this one.
        absent: Nodes that the network does not have, as those of other members' heads: they are
            passed over, and their value is None.
        memory: Bytes of values that stay in memory, beside the calibration inputs.
    """

    def __init__(
        self,
        program: Program,
        state: Mapping[str, torch.Tensor],
        calibration: CalibrationBatches,
        *,
        name: str = "the network",
        held: Collection[fx.Node] = (),
        graph: fx.Graph | None = None,
        constants: Mapping[str, torch.Tensor] = MappingProxyType({}),
        asked_as: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
        absent: Collection[fx.Node] = (),
        memory: int = MEMORY,
    ) -> None:
        self.program = program
        self.state = state
        self.calibration = calibration.with_copies
        self.name = name
        self.asked_as = asked_as
        self.absent = absent
        self.held = {asked_as.get(node, node) for node in held}
        self.nodes = list((graph or program.graph).nodes)
        #: What is only cut out of tensors of the state is no value: they may change.
        self.written = written_names(graph or program.graph)
        self.shown = {
            n
            for n in self.nodes
            if self.written and (base := base_of(n)) is not n and base.target in self.written
        }
        self.parts = {
            n
            for n in self.nodes
            if n.op == "call_function"
            and (found := view_chain_of(n)) is not None
            and found[0].target not in self.written
        }
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.done = 0
        self.store = SpillStore(memory)
        self.values: dict[fx.Node, Sequence[Any]] = {}
        device = next((t.device for t in state.values()), torch.device("cpu"))
        self.constants = {name: tensor.to(device) for name, tensor in constants.items()}
        #: Copies of tensors that the network writes, one for each batch: all start from one state.
        self.copies: dict[str, list[torch.Tensor]] = {}
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        calls = [pytree.tree_leaves(call) for call in self.calibration.batches]
        bases = written_bases(graph or program.graph)
        self.written_inputs = [node for node in inputs if node in bases]
        for node, leaves in zip(inputs, zip(*calls, strict=True), strict=True):
            self.values[node] = [
                leaf.to(device, copy=node in bases) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in leaves
            ]

    def run_to(self, node: fx.Node) -> None:
        """Run all nodes up to and with `node`."""
        self._run(self.order[self.asked_as.get(node, node)] + 1)

    def run_before(self, node: fx.Node) -> None:
        """Run all nodes before `node`."""
        self._run(self.order[node])

    def has(self, node: fx.Node) -> bool:
        """Tell whether the network has a node, which may lie in the head of another one."""
        return self.asked_as.get(node, node) not in self.absent

    def value(self, node: fx.Node) -> Sequence[Any]:
        """Return what a node that has run returned, for each batch.

        A value in a file is read by each access, so go through the batches once, and keep none.
        """
        node = self.asked_as.get(node, node)
        if node in self.absent:
            return [None] * len(self.calibration.batches)
        if node.op == "get_attr" and node.target in self.written:
            return self._copies(node)
        if node.op == "get_attr" or node in self.parts:
            return [self._part(node)] * len(self.calibration.batches)
        return self.values[node]

    def drop(self, node: fx.Node) -> None:
        """Let a held value go."""
        node = self.asked_as.get(node, node)
        self.held.discard(node)
        if self._is_read(node):
            self._forget(node)

    def compute(self, node: fx.Node, replaced: Callable[[int, fx.Node], Any]) -> Iterator[Any]:
        """What a node returns for each batch with operands as `replaced(batch, operand)` says."""
        for batch in range(len(self.calibration.batches)):
            with torch.no_grad():
                result = self._call(node, partial(replaced, batch))
            yield result

    def _call(
        self,
        node: fx.Node,
        operand: Callable[[fx.Node], Any],
        operators: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
    ) -> Any:
        """Run a node; all networks draw the same random numbers, and torch's own state stays."""
        target: Any = operators.get(node.target, node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        with same_random_state() if random else nullcontext():
            if random:
                torch.manual_seed(self.order.get(node, 0))
            return target(*args, **kwargs)

    def once(
        self,
        batch: int,
        wanted: Collection[fx.Node],
        take: Callable[[fx.Node, Any], Any],
        operators: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
    ) -> None:
        """Run one batch through the network, and keep nothing of it.

        Gradients are recorded where the caller has them on.

        Args:
            batch: Number of the batch.
            wanted: Nodes whose values are looked at; what comes after the last one is not run.
            take: Called with each of these nodes, as it is named there, and its value, before any
                other node runs, which may change the value in place. What it returns, if anything,
                is what others read of the node.
            operators: What runs in place of an operator.
        """
        asked: dict[fx.Node, list[fx.Node]] = {}
        for node in wanted:
            asked.setdefault(self.asked_as.get(node, node), []).append(node)
        end = max((self.order[node] for node in asked), default=-1)
        known = {node: self.values[node][batch].clone() for node in self.written_inputs}
        self.copies.clear()
        for node in self._walk(batch, self.nodes[: end + 1], known, operators=operators):
            for name in asked.get(node, ()):
                found = take(name, known[node] if node in known else self.value(node)[batch])
                if found is not None:
                    known[node] = found

    def redo(self, node: fx.Node) -> None:
        """Run a node again, whose operands are still there, because tensors changed."""
        if self.order[node] >= self.done:
            return
        self._forget(node)
        results = self.compute(node, lambda batch, operand: self.value(operand)[batch])
        self.values[node] = self.store.put(results)

    def compute_one(self, node: fx.Node, batch: int, known: dict[fx.Node, Any]) -> Any:
        """Return what a node would return for one batch, whether it has run or not.

        Args:
            node: The node.
            batch: Number of the batch.
            known: Values that replace those of nodes; filled with what had to be computed.
        """
        if node in known:
            return known[node]
        if node.op == "get_attr" or node in self.parts or node in self.values:
            return self.value(node)[batch]
        with torch.no_grad():
            known[node] = self._call(node, lambda n: self.compute_one(n, batch, known))
        return known[node]

    def _run(self, end: int) -> None:
        """Run what is left of the first `end` nodes, batch by batch.

        Of what nobody reads later, nothing is kept beyond its batch.
        """
        nodes = [n for n in self.nodes[self.done : end] if self._is_computed(n)]
        if not nodes:
            self.done = max(self.done, end)
            return
        self.done = end
        read = [n for n in self.values if n not in self.held and self._is_read(n)]
        kept: dict[fx.Node, list[Any]] = {
            node: [] for node in nodes if node in self.held or not self._is_read(node)
        }
        for batch in range(len(self.calibration.batches)):
            known: dict[fx.Node, Any] = {}
            with torch.no_grad():
                for _ in self._walk(batch, nodes, known, kept):
                    pass
            for node, items in kept.items():
                # What shows a tensor that is written has to stay where that tensor is.
                items.append(known[node] if node in self.shown else self.store.keep(known[node]))
            for node in read:
                if isinstance(stored := self.values[node], Stored):
                    stored.free(batch)
        for node in read:
            del self.values[node]
        for node, items in kept.items():
            self.values[node] = items if node in self.shown else Stored(self.store, items)

    def _walk(
        self,
        batch: int,
        nodes: Sequence[fx.Node],
        known: dict[fx.Node, Any],
        kept: Collection[fx.Node] = (),
        operators: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
    ) -> Iterator[fx.Node]:
        """Run nodes on one batch, and yield each when its value is there, before the next one runs.

        Args:
            batch: Number of the batch.
            nodes: The nodes, in the order of the graph.
            known: Filled with values, which are dropped once they are read.
            kept: Nodes whose values stay.
            operators: What runs in place of an operator.
        """
        for node in nodes:
            if self._is_computed(node):
                result = self._call(
                    node, lambda n: known[n] if n in known else self.value(n)[batch], operators
                )
                known[node] = self._sound(node, result)
            yield node
            for operand in node.all_input_nodes:
                unread = operand in kept or not self._is_read(operand, self.order[node])
                if operand in known and not unread:
                    del known[operand]

    def _is_computed(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node not in self.parts and node not in self.absent

    def _copies(self, node: fx.Node) -> list[torch.Tensor]:
        """A tensor that the network writes, as it is by now in each batch."""
        name = str(node.target)
        name = self.program.canonical.get(name, name)
        if name not in self.copies:
            tensor = self._tensor(node)
            self.copies[name] = [tensor.clone() for _ in self.calibration.batches]
        return self.copies[name]

    def _forget(self, node: fx.Node) -> None:
        value = self.values.pop(node, None)
        if isinstance(value, Stored):
            value.free_all()

    def _is_read(self, node: fx.Node, now: int | None = None) -> bool:
        """Tell whether all readers of a node have run."""
        now = self.done - 1 if now is None else now
        return all(self.order[user] <= now for user in node.users)

    def _part(self, node: fx.Node) -> Any:
        """Return a tensor of the state, or a part of it, as it is now."""
        found = view_chain_of(node)
        assert found is not None
        return part_of(found[1], self._tensor(found[0]))

    def _tensor(self, node: fx.Node) -> torch.Tensor:
        name = self.program.canonical.get(str(node.target))
        if name is not None:
            return self.state[name].detach()
        if node.target in self.constants:
            return self.constants[str(node.target)]
        return self.program.tensor(str(node.target)).detach()

    def _sound(self, node: fx.Node, result: Any) -> Any:
        """Return the result of a node; it is an error if it is NaN somewhere."""
        # Masks hold infinities on purpose; NaN is what nothing recovers from.
        for x in () if _is_view(node) else pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and _has_nan(x):
                raise InputError(
                    f"an activation of {self.name} is NaN",
                    where=f"{node.name} [{node.target}]  {source_of(node)}".rstrip(),
                    why="this operator returns NaN on the calibration inputs",
                    how="check the range of the inputs and the members' weights",
                )
        return result


def _is_view(node: fx.Node) -> bool:
    """Whether an operator only looks at its operand in another way, with no value of its own."""
    schema = schema_of(node.target)
    aliases = [] if schema is None else [r.alias_info for r in schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _has_nan(x: torch.Tensor) -> bool:
    # A NaN makes the sum one, which is far cheaper to see; infinities may do so, too.
    return bool(x.sum().isnan()) and bool(x.isnan().any())
