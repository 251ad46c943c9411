"""Rules for a user's own operators: what is ready-made is right, and what is wrong is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import verify
from fxfuse.analysis.rules import (
    AbstractTensor,
    Call,
    DimLabels,
    contracting,
    elementwise,
    find,
    positions,
    registered,
    registry,
    rule,
    rule_file,
    same_labels,
)
from fxfuse.errors import RuleError
from tests import own

FIRST = ("first.weight", 0)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that a test registers are forgotten afterwards."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


class Net(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[..., Any], wide: int = 8, narrow: int = 8) -> None:
        super().__init__()
        self.between = between
        self.first = nn.Linear(4, wide)
        self.scale = nn.Parameter(torch.rand(wide) + 0.5)
        self.weight = nn.Parameter(torch.randn(narrow, wide))
        self.second = nn.Linear(narrow, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self, self.first(x)))


def test_an_operator_that_knows_single_precision_only():
    """The oracles run in float32 then, with a tolerance from rounding, and say so."""
    x = torch.randn(6, 4)
    members = [Net(lambda net, h: own.single(h)).eval() for _ in range(2)]
    checks = [
        *fxfuse.fuse(members, x, size=1.5).verification.checks,
        verify.concatenation_equals_ensemble(members, x),
    ]
    told = [check for check in checks if "in the network's own precision" in check.detail]
    assert {check.name for check in told} == {"permutation", "wide equals ensemble"}
    assert all(check.passed and check.tolerance < 1e-3 for check in checks)
    stacked = fxfuse.stack(members, x)
    torch.testing.assert_close(stacked(x), torch.stack([m(x) for m in members]).mean(0))


def analyzed(between: Callable[..., Any], x: torch.Tensor | None = None) -> fxfuse.CouplingGraph:
    """The analysis of a network, after the permutation oracle has confirmed it."""
    x = torch.randn(3, 5, 4, dtype=torch.float64) if x is None else x
    graph = fxfuse.analyze(Net(between).double(), x)
    check = verify.permutation_of(graph)
    assert check.passed, check
    assert check.tolerance == verify.EXACT
    return graph


# --- what is ready-made ---


@pytest.mark.parametrize(
    "name", ["definition", "packet", "overload"], ids=["custom_op", "packet", "overload"]
)
def test_an_elementwise_operator_of_ones_own(name: str):
    packet = torch.ops.fxfuse_tests.swish
    target = {"definition": own.swish, "packet": packet, "overload": packet.default}[name]
    between = lambda net, h: own.swish(h, net.scale)  # noqa: E731
    before = analyzed(between)
    assert FIRST not in before.group_of
    (missing,) = before.without_rule
    assert missing.operator == "fxfuse_tests.swish.default"
    assert "test_own_rules.py" in missing.source
    assert rule(target)(elementwise) is elementwise
    after = analyzed(between)
    assert after.without_rule == ()
    assert {FIRST, ("scale", 0), ("second.weight", 1)} <= set(after.groups[0].index)


def test_torchs_own_tag_needs_no_rule():
    graph = analyzed(lambda net, h: own.tagged(h, net.scale))
    assert FIRST in graph.group_of


def test_two_members_stay_side_by_side_through_an_elementwise_operator():
    rule(own.swish)(elementwise)
    members = [Net(lambda net, h: own.swish(h, net.scale)).double() for _ in range(2)]
    check = verify.concatenation_equals_ensemble(members, torch.randn(3, 4, dtype=torch.float64))
    assert check.passed
    assert check.tolerance == verify.EXACT


def test_same_labels_mixed():
    rule(own.unit_length)(same_labels(mixed=(-1,)))
    graph = analyzed(lambda net, h: own.unit_length(h))
    assert FIRST in graph.group_of
    assert any("unit_length" in note.why for note in graph.mixing)


def test_same_labels_ordered():
    rule(own.smooth)(same_labels(ordered=(-1,)))
    along_channels = analyzed(lambda net, h: own.smooth(h))
    assert FIRST not in along_channels.group_of
    assert "order" in along_channels.frozen[FIRST].why
    assert along_channels.without_rule == ()
    along_tokens = analyzed(lambda net, h: own.smooth(h.transpose(1, 2)).transpose(1, 2))
    assert FIRST in along_tokens.group_of


@pytest.mark.parametrize("weights", ["parameter", "constant"])
def test_same_labels_does_not_cover_a_second_tensor_that_varies(weights: str):
    rule(own.weighted)(same_labels())
    constant = torch.arange(8.0, dtype=torch.float64)

    def between(net: Net, h: torch.Tensor) -> torch.Tensor:
        return own.weighted(h, net.scale if weights == "parameter" else constant.clone())

    graph = analyzed(between)
    assert FIRST not in graph.group_of
    (missing,) = graph.without_rule
    assert missing.has_rule
    assert missing.rule_file == "fxfuse/analysis/rules/templates.py"


@pytest.mark.parametrize("pattern", ["... i, o i, o -> ... o", "b t i, o i, o -> b t o"])
@pytest.mark.parametrize("bias", [False, True])
def test_contracting(pattern: str, bias: bool):
    rule(own.affine)(contracting(pattern))
    graph = analyzed(lambda net, h: own.affine(h, net.weight, net.scale if bias else None))
    names = {place for group in graph.groups for place in group.index}
    assert {FIRST, ("weight", 1), ("weight", 0), ("second.weight", 1)} <= names
    assert (("scale", 0) in graph.group_of) == bias
    if bias:
        assert graph.group_of[("scale", 0)] == graph.group_of[("weight", 0)]


def test_contracting_says_when_what_follows_is_nonlinear():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.weight = nn.Parameter(torch.randn(3, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return own.affine(self.first(x), self.weight, None)

    x = torch.randn(2, 4)
    for nonlinear in (False, True):
        registry._RULES.pop(torch.ops.fxfuse_tests.affine.default, None)
        rule(own.affine)(contracting("... i, o i, o -> ... o", nonlinear=nonlinear))
        graph = fxfuse.analyze(Last(), x)
        assert any("nonlinear" in note.why for note in graph.mixing) == nonlinear


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("b i, o i", "it has no ->"),
        ("b i -> b", "two operands or more"),
        ("b i, o i -> b q", "no operand defines q"),
        ("b i, o i, p -> b o", "no operand defines p"),
        ("b b, o b -> o", "twice"),
        ("B i, o i -> B o", "lower-case"),
        ("i ..., o i -> o", "lower-case"),
    ],
)
def test_a_pattern_that_cannot_be_read(pattern: str, why: str):
    with pytest.raises(RuleError, match="is invalid") as caught:
        contracting(pattern)
    assert why in caught.value.why


@pytest.mark.parametrize("pattern", ["b i, o i, o -> b o", "... i, o i -> ... o"])
def test_a_pattern_that_does_not_fit_the_operator(pattern: str):
    rule(own.affine)(contracting(pattern))
    with pytest.raises(RuleError, match=r"does not fit fxfuse_tests\.affine") as caught:
        analyzed(lambda net, h: own.affine(h, net.weight, net.scale))
    assert "(3, 5, 8)" in caught.value.why
    assert "test_own_rules.py" in caught.value.where


# --- what is wrong ---


def test_a_second_rule_is_an_error_however_the_operator_is_named():
    rule(own.swish)(elementwise)
    assert find(torch.ops.fxfuse_tests.swish.default) is elementwise
    for target in (own.swish, torch.ops.fxfuse_tests.swish, torch.ops.fxfuse_tests.swish.default):
        with pytest.raises(RuleError, match="two rules"):
            rule(target)(elementwise)


def other_ids(x: AbstractTensor, size: int) -> DimLabels:
    return DimLabels(torch.arange(1, 1 + size).reshape(1, 1, size), (2,))


WRONG: dict[str, tuple[Callable[[Call], Any], str]] = {
    "rank": (
        lambda c: c.args[0].moved(lambda t: t[0]),
        r"shape \(5, 8\), the operator \(3, 5, 8\)",
    ),
    "shape": (lambda c: c.args[0].moved(lambda t: t[..., :4]), r"shape \(3, 5, 4\)"),
    "ids of another size": (
        lambda c: replace(c.args[0], fields=(other_ids(c.args[0], 4),)),
        "does not broadcast",
    ),
    "ids of another rank": (
        lambda c: replace(c.args[0], fields=(DimLabels(torch.arange(1, 9), (0,)),)),
        "1 dimensions, the tensor 3",
    ),
    "dims that do not match the ids": (
        lambda c: replace(c.args[0], fields=(DimLabels(other_ids(c.args[0], 8).ids, (1,)),)),
        r"vary along \(1,\); they vary along \(2,\)",
    ),
    "ids from nowhere": (
        lambda c: replace(
            c.args[0], fields=(DimLabels(10**6 + other_ids(c.args[0], 8).ids, (2,)),)
        ),
        "ids that no neuron has",
    ),
    "ids of another type": (
        lambda c: replace(
            c.args[0], fields=(DimLabels(other_ids(c.args[0], 8).ids.float(), (2,)),)
        ),
        "torch.float32, not torch.int64",
    ),
    "a field that is none": (lambda c: replace(c.args[0], fields=(torch.arange(8),)), "a Tensor"),
    "positions that do not fit": (
        lambda c: replace(c.args[0], positions=positions((7, 5, 8), [0])),
        "does not broadcast",
    ),
    "a constant that does not fit": (
        lambda c: replace(c.args[0], constant=torch.zeros(2)),
        r"constant has shape \(2,\)",
    ),
    "no value": (lambda c: None, "a NoneType, not an AbstractTensor"),
    "a tensor": (lambda c: torch.zeros(3, 5, 8), "a Tensor, not an AbstractTensor"),
    "a list for one result": (lambda c: [c.args[0]], "a list, not an AbstractTensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_result_that_contradicts_the_operator(name: str):
    wrong, why = WRONG[name]
    rule(own.swish)(wrong)
    with pytest.raises(RuleError, match=r"fxfuse_tests\.swish\.default contradicts") as caught:
        analyzed(lambda net, h: own.swish(h, net.scale))
    assert "node 'swish'" in caught.value.where
    assert "self.between(self, self.first(x))" in caught.value.where
    assert re.search(why, caught.value.why)


@pytest.mark.parametrize(
    ("results", "why"),
    [
        (lambda x: x, "returns 2 results, the rule a AbstractTensor"),
        (lambda x: [x], "returns 2 results, the rule 1"),
        (lambda x: [x, x, x], "returns 2 results, the rule 3"),
        (lambda x: [x, 3], "result 1: the rule returns a int"),
        (lambda x: [x, x.moved(lambda t: t[..., :2])], r"result 1: the rule returns shape"),
    ],
)
def test_the_wrong_number_of_results(results: Callable[[AbstractTensor], Any], why: str):
    rule(own.halves)(lambda c: results(c.args[0].moved(lambda t: t[..., :4])))
    with pytest.raises(RuleError, match=why):
        analyzed(lambda net, h: torch.cat(own.halves(h), -1))


def test_several_results_of_a_right_rule():
    def split(call: Call) -> list[AbstractTensor]:
        call.coupling.record_use(call.args[0])
        return [call.args[0].moved(lambda t, s=s: t[..., s : s + 4]) for s in (0, 4)]

    rule(own.halves)(split)
    graph = analyzed(lambda net, h: torch.cat(own.halves(h), -1))
    assert FIRST in graph.group_of


def test_whatever_a_rule_raises_is_a_rule_error():
    def failing(call: Call) -> AbstractTensor:
        return call.args[7]

    rule(own.swish)(failing)
    with pytest.raises(RuleError, match=r"rule of fxfuse_tests\.swish\.default failed") as caught:
        analyzed(lambda net, h: own.swish(h, net.scale))
    assert isinstance(caught.value.__cause__, IndexError)
    assert "self.between(self, self.first(x))" in caught.value.where
    assert "IndexError" in caught.value.why


# --- where a rule belongs ---


@pytest.mark.parametrize(
    ("operator", "family"),
    [
        (torch.ops.aten.linear.default, "contraction"),
        (torch.ops.aten.as_strided.default, "movement"),
        (torch.ops.aten.randperm.default, "creation"),
        (torch.ops.aten.cdist.default, "contraction"),
        (torch.ops.aten.quantized_lstm.input, "recurrent"),
        (torch.ops.aten._weight_norm_interface.default, "normalisation"),
        (torch.ops.aten.scatter_reduce.two, "selection"),
        (torch.ops.aten.std.dim, "reduction"),
        (torch.ops.aten.msort.default, "ordering"),
        (torch.ops.aten.fft_rfft.default, "fourier"),
        (torch.ops.aten.grid_sampler_3d.default, "sampling"),
        (torch.ops.aten.linalg_inv.default, "movement"),
        (torch.ops.fxfuse_tests.tagged.default, "pointwise"),
    ],
)
def test_the_file_where_a_rule_belongs(operator: Any, family: str):
    assert rule_file(operator) == f"fxfuse/analysis/rules/{family}.py"
    assert Path(fxfuse.__file__).with_name("analysis").joinpath("rules", f"{family}.py").is_file()


def test_every_registered_rule_stands_where_it_is_said_to():
    root = Path(fxfuse.__file__).parents[1]
    assert all((root / rule_file(operator)).is_file() for operator in registered())


def test_a_rule_of_ones_own_stands_in_its_module():
    @rule(own.swish)
    def mine(call: Call) -> Any:
        return NotImplemented

    assert rule_file(torch.ops.fxfuse_tests.swish.default) == mine.__module__
