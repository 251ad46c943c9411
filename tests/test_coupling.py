from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fxfuse
from fxfuse import verify
from fxfuse.analysis.coupling_constraints import CouplingConstraints
from fxfuse.analysis.labels import AbstractTensor, DimLabels, Kind
from fxfuse.analysis.rules.algebra import align, meet
from fxfuse.api import stages
from fxfuse.errors import OptionError
from tests.nets import images, resnets


@pytest.fixture
def graph() -> fxfuse.CouplingGraph:
    return fxfuse.analyze(resnets(1)[0], images())


def describe(graph: fxfuse.CouplingGraph) -> str:
    return "\n".join(
        "\n  ".join([f"{g.name} x{g.n_units}", *(f"{name}:{dim}" for name, dim in g.index)])
        for g in graph.groups
    )


def test_groups_of_a_residual_network(graph: fxfuse.CouplingGraph):
    assert_expected_inline(
        describe(graph),
        """\
stem.weight:0 x8
  stem.weight:0
  bn.weight:0
  bn.bias:0
  block1.conv1.weight:1
  block1.conv2.weight:0
  block1.bn2.weight:0
  block1.bn2.bias:0
  block2.conv1.weight:1
  block2.conv2.weight:0
  block2.bn2.weight:0
  block2.bn2.bias:0
  fc.weight:1
  bn.running_mean:0
  bn.running_var:0
  block1.bn2.running_mean:0
  block1.bn2.running_var:0
  block2.bn2.running_mean:0
  block2.bn2.running_var:0
block1.conv1.weight:0 x8
  block1.conv1.weight:0
  block1.bn1.weight:0
  block1.bn1.bias:0
  block1.conv2.weight:1
  block1.bn1.running_mean:0
  block1.bn1.running_var:0
block2.conv1.weight:0 x8
  block2.conv1.weight:0
  block2.bn1.weight:0
  block2.bn1.bias:0
  block2.conv2.weight:1
  block2.bn1.running_mean:0
  block2.bn1.running_var:0""",
    )


def test_index_and_frozen(graph: fxfuse.CouplingGraph):
    index = graph.groups[0].index[("fc.weight", 1)]
    assert index.dtype == np.int64
    assert index.shape == (8, 1)
    head = graph.frozen[("fc.weight", 0)]
    assert (head.kind, head.node) == (Kind.OUTPUT, "output")
    pixels = graph.frozen[("stem.weight", 1)]
    assert pixels.kind is Kind.SHARED_INDEX
    assert "nets.py" in pixels.source
    assert graph.free_fraction == pytest.approx(
        sum(p.numel() for n, p in graph.program.module.named_parameters() if n != "fc.bias")
        / sum(p.numel() for p in graph.program.module.parameters())
    )


class Inside(nn.Module):
    """Frozen dimensions of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(5, 6))
        self.qkv = nn.Linear(6, 24, bias=False)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Parameter(torch.randn(4, 4))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.unread = nn.Parameter(torch.randn(3))
        self.register_buffer("steps", torch.arange(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x + self.place).matmul(self.qkv.weight.t()).unflatten(-1, (3, 2, 4)).unbind(2)
        q, k = (self.norm(t).transpose(1, 2) for t in (q, k))
        q = q @ torch.linalg.inv(self.table) * self.temperature.view(1, 1, 1, 1)
        mixed = (q @ k.mT).softmax(-1) @ v.transpose(1, 2)
        return self.head(mixed.transpose(1, 2).flatten(2))


def test_what_is_frozen_by_the_interface_and_what_inside():
    graph = fxfuse.analyze(Inside(), torch.randn(2, 5, 6))
    assert verify.permutation_of(graph).passed
    interface = {place: reason.interface for place, reason in graph.frozen.items()}
    for place in (("place", 0), ("place", 1), ("qkv.weight", 1), ("head.bias", 0), ("steps", 0)):
        assert interface[place], graph.explain(place)
    for place in (("table", 0), ("table", 1), ("unread", 0), ("norm.weight", 0)):
        assert not interface[place], graph.explain(place)
    (missing,) = graph.without_rule
    assert missing.operator == "aten.linalg_inv.default"
    assert missing.nodes == ("linalg_inv",)
    assert "torch.linalg.inv(self.table)" in missing.source
    reason = graph.frozen[("table", 0)]
    assert (reason.operator, reason.rule_file) == (missing.operator, missing.rule_file)
    assert f"belongs in {missing.rule_file}" in graph.explain("table", 0)
    assert graph.frozen[("norm.weight", 0)].operator == ""


def test_every_reason_inside_names_node_and_source():
    graph = fxfuse.analyze(Inside(), torch.randn(2, 5, 6))
    inside = {p: r for p, r in graph.frozen.items() if not r.interface and p[0] != "unread"}
    assert inside
    for place, reason in inside.items():
        assert reason.node, place
        assert "test_coupling.py" in reason.source, place


def test_explain(graph: fxfuse.CouplingGraph):
    one = graph.explain("block1.conv1.weight", 0)
    assert "group 'block1.conv1.weight:0': 8 units" in one
    assert "block1.conv2.weight, dimension 1" in one
    assert "nets.py" in one
    assert "reaches the network's output" in graph.explain("fc.bias", 0)
    chain = graph.explain(("stem.weight", 0), ("block2.conv2.weight", 0))
    assert "coupled by" in chain
    assert "aten.add" in chain
    assert "(x + self.bn2(self.conv2(out))).relu()" in chain
    apart = graph.explain(("block1.conv1.weight", 0), ("fc.weight", 1))
    assert apart.endswith("not coupled")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("stem.wieght", 0), "the network has no tensor 'stem.wieght'"),
        (("stem.weight", 4), "'stem.weight' has no dimension 4"),
    ],
)
def test_explaining_what_is_not_there_is_an_error(
    graph: fxfuse.CouplingGraph, place: tuple[str, int], message: str
):
    with pytest.raises(OptionError, match=message):
        graph.explain(*place)


def test_networkx_says_who_ties_whom(graph: fxfuse.CouplingGraph):
    net = graph.to_networkx()
    assert isinstance(net, nx.Graph)
    group = graph.groups[1]
    connected = nx.node_connected_component(net, ("block1.conv1.weight", 0))
    assert connected == set(group.index)
    assert net.nodes[("fc.weight", 0)]["frozen"]
    nodes = {node.name for node in graph.program.graph.nodes}
    assert all(set(data["nodes"]) <= nodes for _, _, data in net.edges(data=True))
    net.remove_node(("fc.weight", 0))
    assert ("fc.weight", 0) in graph.to_networkx(), "a copy was handed out"


class Attention(nn.Module):
    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        if packed:
            self.qkv = nn.Linear(6, 24)
        else:
            self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (f(x).unflatten(-1, (4, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_the_unit_of_attention_is_the_head():
    packed = fxfuse.analyze(Attention(packed=True), torch.randn(2, 5, 6))
    (group,) = packed.groups
    assert group.n_units == 4
    assert group.index[("qkv.weight", 0)].tolist()[1] == [2, 3, 10, 11, 18, 19]
    assert group.index[("out.weight", 1)].tolist()[1] == [2, 3]
    split = fxfuse.analyze(Attention(packed=False), torch.randn(2, 5, 6))
    assert {p for g in split.groups for p in g.index} >= {("q.weight", 0), ("v.bias", 0)}
    assert [g.n_units for g in split.groups] == [4]


def test_the_unit_of_a_grouped_convolution_is_the_group():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Flatten(), nn.Linear(12 * 9, 2)
    )
    (group,) = fxfuse.analyze(model, torch.randn(2, 3, 5, 5)).groups
    assert group.n_units == 4
    assert group.index[("0.weight", 0)].tolist()[1] == [2, 3]
    assert group.index[("1.weight", 0)].tolist()[1] == [3, 4, 5]
    assert group.index[("3.weight", 1)].shape == (4, 27)


def test_halves_that_are_treated_differently_are_not_interchangeable():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.second = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.first(x).chunk(2, 1)
            return self.second(torch.cat([a.relu(), b], 1))

    graph = fxfuse.analyze(Halves(), torch.randn(3, 4))
    assert [g.n_units for g in graph.groups] == [4, 4]
    assert verify.permutation_of(graph).passed


def test_tied_parameters_appear_under_each_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.last = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.b(self.a(self.first(x)).relu()).relu())

    graph = fxfuse.analyze(Tied(), torch.randn(3, 4))
    places = {place for group in graph.groups for place in group.index}
    assert {("a.weight", 0), ("b.weight", 0)} <= places
    assert verify.permutation_of(graph).passed


@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize("first", [True, False])
def test_neurons_freeze_where_they_meet_neurons_in_a_part_of_a_tensor(rows: int, first: bool):
    """Register tokens of which a mask knows some: the label of the heads would be lost."""
    coupling = CouplingConstraints()
    heads, tokens = coupling.parameter("heads", (4,)), coupling.parameter("tokens", (12,))
    ids = torch.zeros(rows, 4, dtype=torch.int64)
    ids[:3] = tokens.fields[0].ids.reshape(3, 4)
    mask = AbstractTensor((rows, 4), fields=(DimLabels(ids, (0, 1)),), sources=tokens.sources)
    operands = [mask, align(AbstractTensor((4,), heads.fields, sources=heads.sources), 2)]
    meet(coupling, *operands[:: 1 if first else -1])
    frozen = {int(i) for f in coupling.freezes for i in f.ids}
    assert set(heads.fields[0].ids.tolist()) <= frozen or rows == 3
    assert not frozen or rows == 5


def test_a_wrong_group_is_found_named_and_frozen(monkeypatch: pytest.MonkeyPatch):
    """Sabotage: the bisection finds exactly the group whose index is wrong."""
    members = resnets(2, torch.float64)
    x = images(dtype=torch.float64)
    graph = fxfuse.analyze(members[0], x)
    victim = graph.groups[1]
    wrong = dict(victim.index)
    wrong[("block1.conv2.weight", 1)] = np.roll(wrong[("block1.conv2.weight", 1)], 1, axis=0)
    sabotaged = fxfuse.CouplingGroup(victim.name, victim.n_units, wrong)
    groups = (graph.groups[0], sabotaged, graph.groups[2])
    graph = replace(graph, groups=groups)
    assert not verify.permutation_of(graph).passed
    assert [g.name for g in verify.wrong_groups(graph)] == [victim.name]

    monkeypatch.setattr(stages, "couple", lambda *args, **kwargs: graph)
    with pytest.warns(UserWarning, match=r"block1\.conv1\.weight:0"):
        result = fxfuse.fuse(members, x)
    assert ("block1.conv1.weight", 0) not in result.graph.group_of
    fused = result.module.state_dict()
    # Frozen inside the network: the base member's weights, not an average of what does not
    # correspond.
    torch.testing.assert_close(fused["block1.bn1.weight"], members[0].block1.bn1.weight.detach())
