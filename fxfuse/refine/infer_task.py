"""Read the task off the captured graph: what its last operators say of the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxfuse.errors import OptionError
from fxfuse.graph.capture import Program
from fxfuse.graph.operator_facts import FACTS, Contraction, Dropout
from fxfuse.graph.torch_compat import output_spec, pytree
from fxfuse.refine.task import (
    Classification,
    Embedding,
    MultiLabel,
    NextToken,
    Regression,
    Task,
    main_output,
    named_tensors_in,
)

aten = torch.ops.aten

#: Operators that change neither the values nor where they stand, or only where along a dimension.
_SAME = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.slice.Tensor,
    aten.to.dtype,
    aten._to_copy.default,
    torch.ops.aten.type_as.default,
}
_SOFTMAX = {
    aten.softmax.int: "probabilities",
    aten._softmax.default: "probabilities",
    aten.log_softmax.int: "log_probabilities",
    aten._log_softmax.default: "log_probabilities",
}
_NORMS = {aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}
_AROUND_NORM = {
    aten.clamp_min.default,
    aten.clamp.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.add.Tensor,
    aten.maximum.default,
}
#: Classes that a network tells apart at every position, at least, where its inputs are tokens.
_TOKENS = 2


def infer_task(program: Program) -> tuple[Task, str]:
    """Return the task that the graph suggests, and why, as half a sentence.

    A final softmax, log-softmax, sigmoid or division by a norm tells kind and dimension. Else an
    output `[b, k]` of a linear layer or convolution is logits of k classes, `[b, t, k]` for inputs
    of tokens `[b, t]` is the next token, and anything else is values.
    """
    node = _main_output(program)
    shape = tuple(node.meta["val"].shape)
    last, dims = _mean_of_softmax(*_behind(node))
    target: Any = last.target
    if target in _SOFTMAX:
        dim: Any = last.args[1]
        kind: Any = _SOFTMAX[target]
        at = dims.index(dim % len(last.meta["val"].shape))
        return Classification(at, kind), f"the graph ends in {target} along dimension {at}"
    if target is aten.sigmoid.default:
        return MultiLabel("probabilities"), "the graph ends in a sigmoid"
    dim_of_norm = _normalised(last)
    if dim_of_norm is not None:
        return Embedding(
            dims.index(dim_of_norm % len(dims))
        ), "the graph ends in a division by a norm"
    if isinstance(FACTS.get(target), Contraction):
        if len(shape) == 2 and shape[1] > 1:
            return Classification(1), f"the output [b, {shape[1]}] is that of a layer"
        if len(shape) == 3 and shape[2] >= _TOKENS and _reads_tokens(program):
            return NextToken(), f"the inputs are tokens, and the output is [b, t, {shape[2]}]"
    return Regression(), f"nothing says more of the output {_shown(shape)}"


def task_of_all(programs: Mapping[int, Program]) -> tuple[Task, str]:
    """Return the task that the members' graphs suggest, as `infer_task`; it must be one.

    Args:
        programs: A member of each architecture, by its number.

    Raises:
        OptionError: Graphs say that outputs mean different things.
    """
    found = {number: infer_task(program) for number, program in programs.items()}
    (first, (task, why)), *others = found.items()
    for number, (other, _) in others:
        if other != task:
            raise OptionError(
                f"member {number} differs from member {first}: what its output means",
                where=f"member {first}: {task}; member {number}: {other}",
                why="members are combined, and outputs that mean different things cannot be",
                how="pass task= where the graphs do not show that they mean the same, or wrap the "
                "networks so that their outputs do",
            )
    return task, why


def _shown(shape: tuple[Any, ...]) -> str:
    return "[" + ", ".join(["b", *map(str, shape[1:])]) + "]"


def _main_output(program: Program) -> fx.Node:
    """The node whose value counts: the only output, or the one called `logits`."""
    nodes = [node for node in program.outputs() if isinstance(node, fx.Node)]
    if len(nodes) == 1 or program.heads:
        return nodes[0]
    spec = output_spec(program.graph)
    outputs = list(program.outputs())
    named = named_tensors_in(
        outputs if spec is None else pytree.tree_unflatten(outputs, spec), fx.Node
    )
    if "logits" in named:
        logits: fx.Node = named["logits"]
        return logits
    raise OptionError(
        f"the network returns {len(nodes)} tensors, and it is not clear which of them count",
        where=f"outputs: {', '.join(named)}",
        why="the distance to the ensemble is measured on what they mean",
        how='say what each output means: task={"name or place": fxfuse.Classification(), ...}; '
        "outputs that are not named do not count",
    )


def _behind(node: fx.Node) -> tuple[fx.Node, list[int]]:
    """The last operator that computes, and which of its dimensions each of the output's is."""
    dims = list(range(len(node.meta["val"].shape)))
    while True:
        if node.target in _SAME or isinstance(FACTS.get(node.target), Dropout):
            node = node.all_input_nodes[0]
        elif node.target in (aten.transpose.int, aten.permute.default):
            count, args = len(dims), list[Any](node.args)
            order = list(range(count))
            if node.target is aten.permute.default:
                order = [d % count for d in args[1]]
            else:
                one, other = (d % count for d in args[1:3])
                order[one], order[other] = order[other], order[one]
            dims = [order[d] for d in dims]
            node = node.all_input_nodes[0]
        else:
            return node, dims


def _mean_of_softmax(node: fx.Node, dims: list[int]) -> tuple[fx.Node, list[int]]:
    """The softmax whose mean over one dimension a node is, as probabilities have; else the node."""
    if node.target is not aten.mean.dim or len(node.args) > 2:
        return node, dims
    over: Any = node.args[1]
    last, own = _behind(node.all_input_nodes[0])
    target: Any = last.target
    if len(over) != 1 or _SOFTMAX.get(target) != "probabilities":
        return node, dims
    at: Any = last.args[1]
    gone = over[0] % len(own)
    if own[gone] == at % len(own):
        return node, dims
    return last, [own[d + (d >= gone)] for d in dims]


def _normalised(node: fx.Node) -> int | None:
    """The dimension along which a node divides a value by its own norm, or None."""
    if node.target is not aten.div.Tensor or len(node.all_input_nodes) != 2:
        return None
    value, by = node.all_input_nodes
    while by.target in _AROUND_NORM:
        by = by.all_input_nodes[0]
    if by.target not in _NORMS or by.all_input_nodes[0] is not value:
        return None
    given = by.args[2] if len(by.args) > 2 else None
    found = list(given) if isinstance(given, (list, tuple)) else [given]
    return int(found[0]) if len(found) == 1 and isinstance(found[0], int) else None


def _reads_tokens(program: Program) -> bool:
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    return any(
        isinstance(v, torch.Tensor) and not v.is_floating_point() and v.dim() == 2 for v in values
    )


def logits_of(outputs: Iterable[Any]) -> list[fx.Node]:
    """Return what outputs are the softmax of, and outputs that are not one as they are."""
    nodes = [node for node in outputs if isinstance(node, fx.Node)]
    return [n.all_input_nodes[0] if n.target in _SOFTMAX else n for n in nodes]


def task_of_head(program: Program, task: Task | None) -> Classification | None:
    """Return the task, in terms of logits, of a network that tells classes apart, else None."""
    if task is None:
        nodes = [node for node in program.outputs() if isinstance(node, fx.Node)]
        asked = nodes if program.heads else nodes[:1]
        if len(nodes) > 1:
            shapes = [node.meta["val"].shape for node in asked]
            classes = any(len(shape) == 2 and shape[1] > 1 for shape in shapes)
            return Classification(combine_by="logits") if classes else None
        task, _ = infer_task(program)
    # Of the next token there are too many to be fitted at every position.
    if not isinstance(task, Classification) or isinstance(task, NextToken):
        return None
    return replace(task, outputs="logits")


def task_of_answer(output: Any) -> Task:
    """Return the task that an output suggests by its shape, where there is no graph to read."""
    answer = main_output(output)
    return Classification() if answer.dim() == 2 and answer.shape[1] > 1 else Regression()
