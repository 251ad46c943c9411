"""Operators that behave differently in training, and the argument that says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

#: Position of the `training` argument of operators that behave differently in training.
TRAINING_ARGUMENT: dict[Any, int] = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.instance_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.dropout_.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.feature_dropout_.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.alpha_dropout_.default: 2,
    torch.ops.aten.feature_alpha_dropout.default: 2,
    torch.ops.aten.feature_alpha_dropout_.default: 2,
    torch.ops.aten.rrelu.default: 3,
    torch.ops.aten.rrelu_.default: 3,
    torch.ops.aten.lstm.input: 6,
    torch.ops.aten.gru.input: 6,
    torch.ops.aten.rnn_tanh.input: 6,
    torch.ops.aten.rnn_relu.input: 6,
}

#: Of these, those that hand their input on in eval mode.
DROPOUTS = frozenset(target for target in TRAINING_ARGUMENT if "dropout" in target._schema.name)

#: Position of the running mean of operators that always use the batch's statistics without one.
_RUNNING_MEAN: dict[Any, int] = {
    torch.ops.aten.batch_norm.default: 3,
    torch.ops.aten.instance_norm.default: 3,
}


def follows_mode(node: fx.Node) -> bool:
    """Whether an operator behaves differently in training."""
    mean = _RUNNING_MEAN.get(node.target)
    return node.target in TRAINING_ARGUMENT and (mean is None or node.args[mean] is not None)


def in_training(node: fx.Node) -> bool:
    """Whether an operator that behaves differently in training is told to, or reads the mode."""
    if not follows_mode(node):
        return False
    target: Any = node.target
    position = TRAINING_ARGUMENT[target]
    if position < len(node.args):
        return node.args[position] is not False
    return target._schema.arguments[position].default_value is not False


def set_eval(node: fx.Node) -> None:
    """Writes the `training` argument out as False; export omits it where that is the default."""
    target: Any = node.target
    position = TRAINING_ARGUMENT[target]
    defaults = [argument.default_value for argument in target._schema.arguments]
    args = [*node.args, *defaults[len(node.args) : position + 1]]
    args[position] = False
    node.args = tuple(args)
