"""The oracles on the usual layers of torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import verify
from tests.layers import FROZEN, LAYERS, Layer
from tests.nets import programs


# The deprecated way to normalise weights is what many networks use.
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str):
    layer = LAYERS[name]
    models = [layer.member(seed) for seed in range(2)]
    members = programs(models, layer.example())
    graph = fxfuse.analyze(members[0])

    check = verify.permutation_of(graph)
    assert check.passed, check
    assert check.tolerance == verify.EXACT
    assert verify.sensitivity(members[0]) > 1e-3

    assert fixed_parameters(graph) == {"head.bias", *layer.fixed}
    for place in layer.free:
        assert place in graph.group_of, graph.explain(*place)

    wide = verify.concatenation_equals_ensemble(members)
    assert wide.passed, wide
    assert (wide.tolerance == verify.EXACT) != layer.mixes, wide.detail

    result = fxfuse.fuse(members)
    assert list(result.state_dict()) == list(models[0].state_dict())
    loaded = result.load_into(layer.member(2))
    with torch.no_grad():
        expected = loaded(*layer.example())
        torch.testing.assert_close(result.module(*layer.example()), expected)


def fixed_parameters(graph: fxfuse.CouplingGraph) -> set[str]:
    """Parameters that the graph reads and of which no dimension is free."""
    free = {name for group in graph.groups for name, _ in group.index}
    program = graph.program
    return {
        name
        for name in program.reached()
        if isinstance(program.tensor(name), nn.Parameter) and name not in free
    }


@pytest.mark.parametrize("name", FROZEN)
def test_a_layer_that_must_stay_says_why(name: str):
    layer, why = FROZEN[name]
    graph = fxfuse.analyze(layer.member(0), layer.example())
    assert not graph.groups
    assert why in graph.frozen[("first.weight", 0)].why


def test_an_lstm_unit_is_a_row_of_every_gate_and_a_column():
    layer: Layer = LAYERS["LSTM"]
    graph = fxfuse.analyze(layer.member(0), layer.example())
    prefix = "layer.layers.0."
    (group,) = graph.group_of[(prefix + "weight_hh_l0", 1)]
    assert group.n_units == 6
    gates = [[unit + 6 * gate for gate in range(4)] for unit in range(6)]
    for tensor in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        assert group.index[(prefix + tensor, 0)].tolist() == gates
    assert group.index[("head.weight", 1)].tolist() == [[unit] for unit in range(6)]
