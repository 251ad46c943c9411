"""Facts about operators: what their arguments mean, where channels stand, what training changes.

One row per operator, at the end of this file. The analyzer, the calibration, the refit, the
rewrite, the stack and the compile passes read it, so that none of them lists operators itself.
Arguments are addressed by their names in the operator's schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import fx

from fxfuse.errors import RuleError
from fxfuse.graph.arguments import argument, set_argument

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class OperatorFacts:
    """What holds for an operator. An attribute that names an argument is "" where there is none.

    Attributes:
        training: Name of the argument that makes it behave as in training.
    """

    input: str = "input"
    training: str = ""


@dataclass(frozen=True, kw_only=True)
class Contraction(OperatorFacts):
    """Multiplies an activation by a matrix.

    Attributes:
        factors: Names of the factors of the product and of the bias.
        space: Number of dimensions that a kernel goes along; 0 for a matrix product.
        transposed: Whether the weight is [inputs, outputs, *kernel] instead of [outputs, inputs,
            *kernel].
    """

    weight: str = "weight"
    bias: str = "bias"
    groups: str = ""
    factors: tuple[str, ...] = ()
    space: int = 0
    transposed: bool = False

    @property
    def inputs(self) -> int:
        """Dimension of the weight along which it reads the activation's channels."""
        return 0 if self.transposed else 1

    @property
    def outputs(self) -> int:
        """Dimension of the weight along which its outputs stand."""
        return 1 - self.inputs

    @property
    def channels(self) -> int:
        """Dimension of the channels of the activation and of the result."""
        return -1 - self.space


@dataclass(frozen=True, kw_only=True)
class Convolution(Contraction):
    """A convolution, or a transposed one."""

    groups: str = "groups"


@dataclass(frozen=True, kw_only=True)
class Normalisation(OperatorFacts):
    """Normalises an activation, then scales and shifts its channels.

    Attributes:
        over: What shares one mean and variance: all that a channel holds ("batch"), what it holds
            for one example ("instance"), a group of an example's channels ("group"), or the last
            dimensions ("last").
        weight: Name of the scale.
        bias: Name of the shift.
    """

    over: Literal["batch", "instance", "group", "last"]
    weight: str = "weight"
    bias: str = "bias"
    mean: str = ""
    variance: str = ""
    eps: str = "eps"
    groups: str = ""

    @property
    def state(self) -> tuple[str, ...]:
        """Names of scale, shift, running mean and running variance, as far as it has them."""
        return tuple(n for n in (self.weight, self.bias, self.mean, self.variance) if n)

    @property
    def channels(self) -> int:
        """Dimension of the channels."""
        return -1 if self.over == "last" else 1


@dataclass(frozen=True, kw_only=True)
class Recurrence(OperatorFacts):
    """Recurrent layers, or one step of one.

    Attributes:
        gates: Number of gates, each with its rows of the weights.
        resets: Whether the last gate scales what it gets from the state before the step.
        is_cell: Whether it is one step.
    """

    gates: int
    resets: bool = False
    is_cell: bool = False


@dataclass(frozen=True, kw_only=True)
class Dropout(OperatorFacts):
    """Returns its input outside of training."""

    training: str = "train"


_FACTS: dict[Any, OperatorFacts] = {}
#: The facts of each operator that has any, read-only.
FACTS: Mapping[Any, OperatorFacts] = MappingProxyType(_FACTS)


def register(operator: Any, facts: OperatorFacts) -> None:
    """Add an operator to the table."""
    if operator in _FACTS:
        raise RuleError(f"{operator} has two rows of facts", where=__name__, how="keep one of them")
    _FACTS[operator] = facts


def operators(kind: type[OperatorFacts], **facts: Any) -> tuple[Any, ...]:
    """The operators of one kind for which all of these facts hold, in the order of the table."""
    return tuple(
        operator
        for operator, own in FACTS.items()
        if isinstance(own, kind) and all(getattr(own, n) == value for n, value in facts.items())
    )


def batch_norm_of(node: Any) -> Normalisation | None:
    """Return the facts of a batch norm; None for every other node."""
    facts = FACTS.get(getattr(node, "target", None))
    return facts if isinstance(facts, Normalisation) and facts.over == "batch" else None


def follows_mode(node: fx.Node) -> bool:
    """Tell whether an operator behaves differently in training."""
    facts = FACTS.get(node.target)
    if facts is None or not facts.training:
        return False
    # Without running statistics, those of the batch are used in both modes.
    return not isinstance(facts, Normalisation) or argument(node, facts.mean) is not None


def training_of(node: fx.Node) -> Any:
    """Return what an operator that behaves differently in training is told: a bool, or a node."""
    return argument(node, FACTS[node.target].training)


def set_training(node: fx.Node, training: Any) -> None:
    """Tell an operator that behaves differently in training: a bool, or a node."""
    set_argument(node, FACTS[node.target].training, training)


def in_training(node: fx.Node) -> bool:
    """Tell whether an operator behaves as in training, or reads the mode when it runs."""
    return follows_mode(node) and training_of(node) is not False


# The table. The rows of a family stand together; a fact that is the family's default is left out.

register(aten.linear.default, Contraction())
register(
    aten.addmm.default,
    Contraction(
        input="mat1", weight="mat2", bias="self", factors=("alpha", "beta"), transposed=True
    ),
)
# The second operand of these two may be an activation, too.
register(aten.mm.default, Contraction(input="self", weight="mat2", bias="", transposed=True))
register(aten.matmul.default, Contraction(input="self", weight="other", bias="", transposed=True))

register(aten.conv1d.default, Convolution(space=1))
register(aten.conv1d.padding, Convolution(space=1))
register(aten.conv2d.default, Convolution(space=2))
register(aten.conv2d.padding, Convolution(space=2))
register(aten.conv3d.default, Convolution(space=3))
register(aten.conv3d.padding, Convolution(space=3))
register(aten.conv_transpose1d.default, Convolution(space=1, transposed=True))
register(aten.conv_transpose2d.input, Convolution(space=2, transposed=True))
register(aten.conv_transpose3d.input, Convolution(space=3, transposed=True))

register(
    aten.batch_norm.default,
    Normalisation(over="batch", mean="running_mean", variance="running_var", training="training"),
)
register(
    aten.instance_norm.default,
    Normalisation(
        over="instance", mean="running_mean", variance="running_var", training="use_input_stats"
    ),
)
register(aten.group_norm.default, Normalisation(over="group", groups="num_groups"))
register(aten.layer_norm.default, Normalisation(over="last"))
register(aten.rms_norm.default, Normalisation(over="last", bias=""))

register(aten.lstm.input, Recurrence(gates=4, training="train"))
register(aten.gru.input, Recurrence(gates=3, resets=True, training="train"))
register(aten.rnn_tanh.input, Recurrence(gates=1, training="train"))
register(aten.rnn_relu.input, Recurrence(gates=1, training="train"))
register(aten.lstm_cell.default, Recurrence(gates=4, is_cell=True))
register(aten.gru_cell.default, Recurrence(gates=3, resets=True, is_cell=True))
register(aten.rnn_tanh_cell.default, Recurrence(gates=1, is_cell=True))
register(aten.rnn_relu_cell.default, Recurrence(gates=1, is_cell=True))

register(aten.dropout.default, Dropout())
register(aten.dropout_.default, Dropout(input="self"))
register(aten.feature_dropout.default, Dropout())
register(aten.feature_dropout_.default, Dropout(input="self"))
register(aten.alpha_dropout.default, Dropout())
register(aten.alpha_dropout_.default, Dropout(input="self"))
register(aten.feature_alpha_dropout.default, Dropout())
register(aten.feature_alpha_dropout_.default, Dropout(input="self"))
register(aten.rrelu.default, OperatorFacts(input="self", training="training"))
register(aten.rrelu_.default, OperatorFacts(input="self", training="training"))
