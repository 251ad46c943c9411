"""Every operator that has a rule: the oracle on its sample."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import verify
from fxfuse.analysis.rules import registered, rule
from fxfuse.analysis.rules.registry import name_of
from fxfuse.errors import RuleError
from fxfuse.graph.rebuild import rebuild
from tests.fusing import check_without_repetitions
from tests.models import excite
from tests.samples import BY_DATA, BY_VALUE, EINSUMS, SAMPLES, Call, Net


def test_every_rule_has_a_sample_and_every_sample_a_rule():
    assert set(SAMPLES) == set(registered())


@pytest.mark.parametrize("operator", SAMPLES, ids=str)
def test_sample(operator: Any):
    program = _captured(SAMPLES[operator])
    _check(program)
    if name_of(operator).endswith("_"):
        # Capture makes values of writes; a trace for the eager fallback keeps them.
        program = _with_writes(SAMPLES[operator])
        _check(program)
    targets = {node.target for node in program.graph.nodes}
    assert operator in targets | {name_of(target) for target in targets}


@pytest.mark.parametrize("form", BY_DATA)
def test_indexing_by_data(form: str):
    _check(_captured(BY_DATA[form]))


@pytest.mark.parametrize("operator", ["index.Tensor", "index_select.default"])
def test_a_constant_index_keeps_every_copy(operator: str):
    sample = next(sample for key, sample in SAMPLES.items() if str(key) == f"aten.{operator}")
    torch.manual_seed(0)
    check = verify.concatenation_equals_ensemble([_captured(sample), _captured(sample)])
    assert check.tolerance < 1
    assert check.passed, check


@pytest.mark.parametrize("form", BY_VALUE)
def test_values_among_channels_freeze_nothing(form: str):
    program = _captured(BY_VALUE[form])
    _check(program)
    assert fxfuse.analyze(program).mixing
    # Sorting returns as many values as there are units, so they keep their number.
    smaller = fxfuse.prune(program, size=0.25).module
    assert smaller(*program.example_inputs[0]).shape == (2, 4)


def test_indices_among_channels_freeze_if_they_are_read():
    graph = fxfuse.analyze(_captured(Call(lambda t: t.max(1)[1] + t.mean(1))))
    assert "chosen by its index" in graph.frozen[("conv.weight", 0)].why


@pytest.mark.parametrize("form", EINSUMS)
def test_every_form_of_einsum(form: str):
    program = _captured(EINSUMS[form])
    _check(program)
    assert not fxfuse.analyze(program).without_rule


def _model(sample: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = Net(copy.deepcopy(sample)).double()
    model(x)  # sizes the lazy layer
    return excite(model, torch.randn(4, 3, 6, 6, dtype=torch.float64)), x


def _captured(sample: nn.Module) -> fxfuse.Program:
    return fxfuse.capture(*_model(sample))


def _with_writes(sample: nn.Module) -> fxfuse.Program:
    model, x = _model(sample)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    state = model.state_dict(keep_vars=True)
    module = rebuild(program.module(check_guards=False), state, prune=False)
    return fxfuse.Program(module, tuple(state), {n: n for n in state}, ((x,), {}))


def _check(program: fxfuse.Program) -> None:
    graph = fxfuse.analyze(program)
    check = verify.permutation_of(graph)
    assert check.passed, check
    assert check.tolerance == verify.EXACT
    check_without_repetitions(graph)
    assert verify.sensitivity(program) > 1e-3
    assert ("conv.weight", 0) in graph.group_of, graph.explain("conv.weight", 0)
    assert sum(group.n_units for group in graph.group_of[("conv.weight", 0)]) >= 2


def test_an_operator_with_two_rules_is_an_error():
    with pytest.raises(RuleError, match="two rules"):
        rule(torch.ops.aten.linear.default)(lambda call: None)


class Overwritten(nn.Module):
    """An index that starts as a constant; the data decide one entry (it is always 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.first(x)
        order = torch.arange(8)
        order[0] = (t.abs().sum() > 0).long() * 5
        return self.last(t[:, order])


def test_a_constant_that_data_overwrite_is_no_constant():
    model = Overwritten().double()
    graph = fxfuse.analyze(model, torch.randn(3, 4, dtype=torch.float64))
    assert verify.permutation_of(graph).passed
    assert ("first.weight", 0) not in graph.group_of
    assert "indexed by data" in graph.frozen[("first.weight", 0)].why


class Renormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.renorm(self.second(self.first(x)), 2, 0, 1.0))


def test_an_operator_without_a_rule_freezes_and_says_so():
    graph = fxfuse.analyze(Renormalised(), torch.randn(2, 4))
    assert ("first.weight", 0) in graph.group_of
    for place in (("second.weight", 0), ("third.weight", 1)):
        assert place not in graph.group_of
        reason = graph.frozen[place]
        assert "aten.renorm" in reason.why
        assert "test_rules.py" in reason.source
    assert verify.permutation_of(graph).passed


def test_a_pointwise_operator_of_numbers_alone_carries_no_neurons():
    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(x) / torch.div(9, 2, rounding_mode="floor"))

    (group,) = fxfuse.analyze(Chunks(), torch.randn(2, 5)).groups
    assert group.n_units == 8
