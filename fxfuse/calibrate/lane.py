"""A network run node by node on all calibration batches, with values freed once they are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfuse.calibration import Calibration
from fxfuse.capture import Captured
from fxfuse.errors import CalibrationError
from fxfuse.source_lines import source_of


class Lane:
    """One network on its way through the graph.

    A value is one entry per batch. It is kept until the last node that reads it has run, and as
    long as it is among `held`.

    Args:
        captured: The network's graph.
        state: Its tensors by name; read when a node needs them, so they may change on the way.
        calibration: The inputs.
        name: Who that is, for messages.
        held: Nodes whose values are kept until `drop`.
        graph: The graph, where the network has another size than `captured`; None: its graph.
        constants: Tensors that this graph reads beside the network's, by name.
        asked_as: Nodes of another graph by which `run_to`, `value`, `drop` and `held` may name
            nodes of this one.
        absent: Nodes that the network does not have, as those of other members' heads: they are
            passed over, and their value is None.
    """

    def __init__(
        self,
        captured: Captured,
        state: Mapping[str, torch.Tensor],
        calibration: Calibration,
        *,
        name: str = "the network",
        held: Collection[fx.Node] = (),
        graph: fx.Graph | None = None,
        constants: Mapping[str, torch.Tensor] = MappingProxyType({}),
        asked_as: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
        absent: Collection[fx.Node] = (),
    ) -> None:
        self.captured = captured
        self.state = state
        self.calibration = calibration
        self.name = name
        self.asked_as = asked_as
        self.absent = absent
        self.held = {asked_as.get(node, node) for node in held}
        self.nodes = list((graph or captured.graph).nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.done = 0
        self.values: dict[fx.Node, list[Any]] = {}
        device = next((t.device for t in state.values()), torch.device("cpu"))
        self.constants = {name: tensor.to(device) for name, tensor in constants.items()}
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        for node in inputs:
            self.values[node] = []
        for args, kwargs in calibration.batches:
            leaves = pytree.tree_leaves((args, kwargs))
            for node, leaf in zip(inputs, leaves, strict=True):
                moved = leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf
                self.values[node].append(moved)

    def run_to(self, node: fx.Node) -> None:
        """Runs all nodes up to and with `node`.

        Raises:
            CalibrationError: An activation is not finite; names the node.
        """
        end = self.order[self.asked_as.get(node, node)]
        while self.done <= end:
            self._step(self.nodes[self.done])
            self.done += 1

    def value(self, node: fx.Node) -> list[Any]:
        """What a node that has run returned, for each batch."""
        node = self.asked_as.get(node, node)
        if node in self.absent:
            return [None] * len(self.calibration.batches)
        if node.op == "get_attr":
            return [self._tensor(node)] * len(self.calibration.batches)
        return self.values[node]

    def drop(self, node: fx.Node) -> None:
        """Lets a held value go."""
        node = self.asked_as.get(node, node)
        self.held.discard(node)
        if self._is_read(node):
            self.values.pop(node, None)

    def compute(self, node: fx.Node, replaced: Callable[[int, fx.Node], Any]) -> list[Any]:
        """What a node returns for each batch with operands as `replaced(batch, operand)` says."""
        target: Any = node.target
        results = []
        with torch.no_grad():
            for batch in range(len(self.calibration.batches)):

                def operand(n: fx.Node, batch: int = batch) -> Any:
                    return replaced(batch, n)

                args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
                results.append(target(*args, **kwargs))
        return results

    def redo(self, node: fx.Node) -> None:
        """Runs a node again, whose operands are still there, because tensors changed."""
        self.values[node] = self.compute(node, lambda batch, n: self.value(n)[batch])

    def compute_one(self, node: fx.Node, batch: int, known: dict[fx.Node, Any]) -> Any:
        """What a node would return for one batch, whether it has run or not.

        Args:
            node: The node.
            batch: Number of the batch.
            known: Values that stand in for those of nodes; filled with what had to be computed.
        """
        if node in known:
            return known[node]
        if node.op == "get_attr" or node in self.values:
            return self.value(node)[batch]
        target: Any = node.target
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self.compute_one(n, batch, known)
        )
        with torch.no_grad():
            known[node] = target(*args, **kwargs)
        return known[node]

    def _step(self, node: fx.Node) -> None:
        if node.op != "call_function":
            return
        if node not in self.absent:
            self.redo(node)
            self._check(node)
        for operand in node.all_input_nodes:
            if operand not in self.held and self._is_read(operand, self.order[node]):
                self.values.pop(operand, None)

    def _is_read(self, node: fx.Node, now: int | None = None) -> bool:
        """Whether all readers of a node have run."""
        now = self.done - 1 if now is None else now
        return all(self.order[user] <= now for user in node.users)

    def _tensor(self, node: fx.Node) -> torch.Tensor:
        name = self.captured.canonical.get(str(node.target))
        if name is not None:
            return self.state[name].detach()
        if node.target in self.constants:
            return self.constants[str(node.target)]
        return self.captured.tensor(str(node.target)).detach()

    def _check(self, node: fx.Node) -> None:
        if _is_view(node):
            return
        # Masks hold infinities on purpose; NaN is what nothing recovers from.
        for x in pytree.tree_leaves(self.values[node]):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and _has_nan(x):
                raise CalibrationError(
                    f"an activation of {self.name} is not a number",
                    where=f"{node.name} [{node.target}]  {source_of(node)}".rstrip(),
                    why="NaN appears there on the calibration inputs",
                    how="check the inputs' range and the members' weights",
                )


def _is_view(node: fx.Node) -> bool:
    """Whether an operator only looks at its operand in another way, with no value of its own."""
    schema = getattr(node.target, "_schema", None)
    aliases = [] if schema is None else [r.alias_info for r in schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _has_nan(x: torch.Tensor) -> bool:
    # A NaN makes the sum one, which is far cheaper to see; infinities may do so, too.
    return bool(x.sum().isnan()) and bool(x.isnan().any())
