"""The table of facts about operators: no row is wrong, none is missing, and there is no other."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse.analysis.rules import registered
from fxfuse.errors import RuleError
from fxfuse.graph import operator_facts
from fxfuse.graph.arguments import argument, argument_names, set_argument
from fxfuse.graph.operator_facts import (
    FACTS,
    Contraction,
    Convolution,
    Dropout,
    Normalisation,
    OperatorFacts,
    Recurrence,
    operators,
)

aten = torch.ops.aten


def call(operator: Any, **given: Any) -> Any:
    """Runs an operator on arguments by name; what its schema demands beside these is 1e-5 or no."""
    for declared in operator._schema.arguments:
        if declared.name not in given and not declared.has_default_value():
            numbers = {"float": 1e-5, "bool": False}
            given[declared.name] = numbers.get(str(declared.type))
    return operator(**given)


@pytest.mark.parametrize("operator", FACTS, ids=str)
def test_every_argument_is_in_the_schema(operator: Any):
    facts = asdict(FACTS[operator])
    facts.pop("over", None)
    named = {value for value in facts.values() if isinstance(value, str) and value}
    assert named | set(facts.get("factors", ())) <= set(argument_names(operator))


def _kind(operator: Any) -> type[OperatorFacts] | None:
    """What an operator is, by the names of its arguments."""
    names = set(argument_names(operator))
    if {"weight", "stride", "groups"} <= names:
        return Convolution
    if {"weight", "eps"} <= names:
        return Normalisation
    if names & {"w_hh", "has_biases"}:
        return Recurrence
    if {"p", "train"} <= names:
        return Dropout
    return OperatorFacts if names & {"train", "training", "use_input_stats"} else None


def test_no_operator_with_a_rule_lacks_its_row():
    kinds = {operator: _kind(operator) for operator in registered() if hasattr(operator, "_schema")}
    found = [kind for kind in kinds.values() if kind is not None]
    # The search finds them at all.
    for kind in (Convolution, Normalisation, Recurrence, Dropout):
        assert found.count(kind) == len(operators(kind)) > 0
    missing = [str(op) for op, kind in kinds.items() if kind and type(FACTS.get(op)) is not kind]
    assert not missing, f"add a row for each of them to {operator_facts.__name__}"


def test_every_row_has_a_rule():
    pointwise = {op for op in FACTS if torch.Tag.pointwise in op.tags}
    assert set(FACTS) - pointwise <= set(registered())


def _contraction(facts: Contraction) -> dict[str, torch.Tensor]:
    """An activation of 4 channels, a matrix to 6, and what is added to these."""
    sizes = [0, 0, *[3] * facts.space]
    sizes[facts.inputs], sizes[facts.outputs] = 4, 6
    tensors = {
        facts.input: torch.randn(2, 4, *[5] * facts.space),
        facts.weight: torch.randn(sizes),
        facts.bias: torch.randn(6),
    }
    return {name: x.double() for name, x in tensors.items() if name}


@pytest.mark.parametrize("operator", operators(Contraction), ids=str)
def test_dimensions_of_a_contraction(operator: Any):
    facts = FACTS[operator]
    assert isinstance(facts, Contraction)
    given = _contraction(facts)
    result = call(operator, **given)
    inputs, outputs = torch.randperm(4), torch.randperm(6)
    moved = given | {
        facts.input: given[facts.input].index_select(facts.channels, inputs),
        facts.weight: given[facts.weight]
        .index_select(facts.inputs, inputs)
        .index_select(facts.outputs, outputs),
    }
    if facts.bias:
        moved[facts.bias] = given[facts.bias][outputs]
    expected = result.index_select(facts.channels, outputs)
    torch.testing.assert_close(call(operator, **moved), expected)
    for factor in facts.factors:
        assert not call(operator, **given, **{factor: 2}).equal(result)
    assert isinstance(facts, Convolution) == bool(facts.groups)
    if facts.groups:
        half = given | {facts.weight: given[facts.weight].narrow(1, 0, 2)}
        shared = half if facts.inputs else half | {facts.bias: given[facts.bias][:4]}
        assert call(operator, **shared, **{facts.groups: 2}).shape[facts.channels] in (4, 6)


@pytest.mark.parametrize("operator", operators(Normalisation), ids=str)
def test_what_a_normalisation_is_over(operator: Any):
    facts = FACTS[operator]
    assert isinstance(facts, Normalisation)
    x = torch.randn(2, 4, 3, 5).double()
    dim = facts.channels % x.dim()
    own = {"normalized_shape": [3, 5], "num_groups": 2, facts.training: True}
    given = {name: value for name, value in own.items() if name in argument_names(operator)}
    plain = call(operator, **{facts.input: x}, **given)
    bumped = x.clone()
    bumped[1, 2, 1, 1] += 1
    changed = call(operator, **{facts.input: bumped}, **given) != plain
    expected = torch.zeros_like(changed)
    if facts.over == "batch":
        expected[:, 2] = True
    elif facts.over == "group":
        expected[1, 2:] = True
    else:
        expected[1, 2] = True
    assert changed.equal(expected)
    # Channels are scaled; the last dimensions have one scale for each place.
    shape = (3, 5) if facts.over == "last" else (4,)
    scale = torch.rand(shape).double() + 1
    wide = scale if facts.over == "last" else scale.reshape(-1, 1, 1)
    assert wide.shape[dim - x.dim()] == shape[-1]
    scaled = call(operator, **{facts.input: x, facts.weight: scale}, **given)
    torch.testing.assert_close(scaled, plain * wide)
    if facts.bias:
        shifted = call(operator, **{facts.input: x, facts.bias: scale}, **given)
        torch.testing.assert_close(shifted, plain + wide)
    if facts.mean:
        statistics = {facts.mean: scale.clone(), facts.variance: scale.clone(), facts.eps: 0.5}
        still = call(operator, **{facts.input: x}, **statistics, **given | {facts.training: False})
        torch.testing.assert_close(still, (x - wide) / (wide + 0.5).sqrt())
    one = call(operator, **{facts.input: x, facts.eps: 1e9}, **given)
    assert one.abs().max() < 1e-3


@pytest.mark.parametrize("operator", operators(Recurrence, is_cell=True), ids=str)
def test_gates_of_a_cell(operator: Any):
    facts = FACTS[operator]
    assert isinstance(facts, Recurrence)
    rows, zero = facts.gates * 3, torch.zeros(2, 3)
    states = [zero, zero] if "lstm" in str(operator) else zero
    given = {facts.input: torch.randn(2, 4), "hx": states, "w_ih": torch.randn(rows, 4)}
    bias, none = torch.randn(rows), torch.zeros(rows)
    results = []
    for names in (("b_ih", "b_hh"), ("b_hh", "b_ih")):
        biases = dict(zip(names, (bias, none), strict=True))
        found = call(operator, w_hh=torch.zeros(rows, 3), **given, **biases)
        results.append(found[0] if isinstance(found, tuple) else found)
    # Only a gate that scales one of both products can tell which of them was shifted.
    assert torch.allclose(*results) != facts.resets
    (layers,) = (
        other
        for other in operators(Recurrence, is_cell=False)
        if str(other).partition(".")[2].partition(".")[0] + "_cell" in str(operator)
    )
    assert (FACTS[layers].gates, FACTS[layers].resets) == (facts.gates, facts.resets)  # type: ignore[attr-defined]


def _told(operator: Any, facts: OperatorFacts, x: torch.Tensor, training: bool) -> torch.Tensor:
    """What an operator answers to x [8, 2, 16] when it is told whether it is in training."""
    given: dict[str, Any] = {facts.input: x.clone(), facts.training: training}
    if "p" in argument_names(operator):
        given["p"] = 0.5
    if isinstance(facts, Normalisation):
        given |= {facts.mean: torch.zeros(2), facts.variance: torch.ones(2)}
    if isinstance(facts, Recurrence):
        zero, weight = torch.zeros(2, 2, 16), torch.ones(facts.gates * 16, 16) / 16
        given["hx"] = [zero, zero] if facts.gates == 4 else zero
        given |= {"params": [weight] * 4, "num_layers": 2, "dropout": 0.5}
    found: Any = call(operator, **given)
    result: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return result


@pytest.mark.parametrize("operator", [op for op in FACTS if FACTS[op].training], ids=str)
def test_the_training_argument_changes_the_result(operator: Any):
    facts, sign = FACTS[operator], 1 if isinstance(FACTS[operator], Recurrence) else -1
    x = sign * (torch.rand(8, 2, 16) + 1)
    still = _told(operator, facts, x, False)
    assert not _told(operator, facts, x, True).equal(still)
    assert still.equal(x) == isinstance(facts, Dropout)


def test_an_operator_with_two_rows_is_an_error():
    with pytest.raises(RuleError, match="two rows"):
        operator_facts.register(aten.conv2d.default, Convolution(space=2))


#: Files that name operators of the table, to register a function for just these, to write
#: calls, or to run them in another way.
NAMED = {
    "analysis/heads.py": {"linear"},
    "analysis/rules/contraction.py": {"addmm", "linear", "matmul", "mm"},
    "analysis/rules/pointwise.py": {"rrelu_"},
    "ensemble/lowerings/contraction.py": {"addmm", "linear", "matmul", "mm"},
    "ensemble/lowerings/elementwise.py": {"dropout"},
    "refine/regression/sensitivity.py": {"conv1d", "conv2d", "conv3d"},
    "runtime/quantize.py": {"linear"},
    "verify/in_double.py": {"conv1d"},
}


def test_no_other_file_lists_operators_of_the_table():
    names = {operator._schema.name.removeprefix("aten::") for operator in FACTS}
    known = names | {f"native_{name}" for name in names} | {"convolution", "cudnn_batch_norm"}
    root, found = Path(fxfuse.__file__).parent, dict[str, set[str]]()
    for path in root.rglob("*.py"):
        used = set(re.findall(r"\b_?aten(?:\.|::)(\w+)", path.read_text(), re.IGNORECASE)) & known
        if used and path != Path(operator_facts.__file__):
            found[path.relative_to(root).as_posix()] = used
    assert found == NAMED, f"facts belong in {operator_facts.__name__}"


def test_arguments_by_name():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.rrelu.default, (x,), {"upper": 0.5})
    assert argument(node, "self") is x
    assert (argument(node, "lower"), argument(node, "upper")) == (0.125, 0.5)
    assert argument(node, "no such") is None
    set_argument(node, "training", True)
    assert (node.args, node.kwargs) == ((x, 0.125, 0.5, True), {})
    set_argument(node, "upper", 0.75)
    assert node.args == (x, 0.125, 0.75, True)
    added = graph.call_function(aten.addmm.default, (x, x, x))
    set_argument(added, "alpha", 2)
    assert (added.args, dict(added.kwargs)) == ((x, x, x), {"alpha": 2})
    assert argument(added, "alpha") == 2
