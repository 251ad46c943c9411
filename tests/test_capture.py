from __future__ import annotations

import warnings
from contextvars import copy_context

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxfuse
from fxfuse import Example, verify
from fxfuse.errors import CaptureError, InputError, MemberError
from fxfuse.graph.same_network import check_same_network
from fxfuse.graph.source_lines import source_of
from tests.nets import SmallResNet, images, resnets


def test_captures_modules_graph_modules_and_exported_programs():
    model = resnets(1)[0]
    x = images()
    traced = torch.fx.symbolic_trace(model)
    exported = torch.export.export(model, (x,))
    expected = model(x)
    for given in (model, traced, exported, exported.module(), fxfuse.capture(model, x).module):
        with warnings.catch_warnings():
            # The program was exported with a static batch; that it stays so is said.
            warnings.simplefilter("ignore")
            program = fxfuse.capture(given, x)
        assert set(program.names) == set(model.state_dict())
        torch.testing.assert_close(program.module(x), expected)


def test_the_model_stays_as_it_was():
    model = SmallResNet().train()
    model.block1.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    variables = set(copy_context())
    fxfuse.capture(model, images())
    assert set(copy_context()) == variables  # torch leaves two of each export
    assert model.training
    assert model.fc.training
    assert not model.block1.bn1.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_batch_is_dynamic_and_dynamic_shapes_are_passed_on():
    model = resnets(1)[0]
    program = fxfuse.capture(model, images(4))
    assert program.dynamic_batch
    more = images(7)
    torch.testing.assert_close(program.module(more), model(more))
    dim = torch.export.Dim("height", min=4, max=64)
    shaped = fxfuse.capture(model, Example(images(4), dynamic_shapes=({2: dim},)))
    assert shaped.module(torch.randn(4, 3, 12, 8)).shape == (4, 4)


def test_a_static_batch_is_warned_about():
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, -1) if x.shape[0] == 4 else x

    with pytest.warns(UserWarning, match="static batch"):
        program = fxfuse.capture(Fixed(), torch.randn(4, 6))
    assert not program.dynamic_batch


def test_source_locations_survive():
    program = fxfuse.capture(resnets(1)[0], images())
    norms = [n for n in program.graph.nodes if "batch_norm" in str(n.target)]
    assert "nets.py" in source_of(norms[0])
    assert "self.bn(self.stem(x))" in source_of(norms[0])


def test_tied_parameters_keep_both_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    program = fxfuse.capture(Tied(), torch.randn(3, 6))
    assert set(program.names) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert program.canonical["b.weight"] == "a.weight"
    assert program.tensor("b.weight") is program.tensor("a.weight")


def test_rejected_inputs_are_an_error():
    with pytest.raises(InputError, match=r"SmallResNet called with shapes \(\(2, 5, 8, 8\)"):
        fxfuse.capture(SmallResNet(), torch.randn(2, 5, 8, 8))


def test_without_fallback_a_data_dependent_branch_is_an_error_with_torchs_reason():
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="data-dependent") as caught:
        fxfuse.capture(Branch(), torch.randn(2, 3), fallback=False)
    assert "export" in caught.value.how


class Activated(nn.Module):
    def __init__(self, activation: nn.Module, scale: float = 1.0, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.activation = activation
        self.second = nn.Linear(width, 2)
        self.register_buffer("scale", torch.tensor([scale, 1.0]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(x))) * self.scale


@pytest.mark.parametrize(
    ("other", "where", "why"),
    [
        (Activated(nn.Tanh()), "node 'relu'", "tanh"),
        (Activated(nn.ReLU(), scale=2.0), "scale", "another value"),
        (Activated(nn.ReLU(), width=6), "first.weight", r"\(8, 4\) vs \(6, 4\)"),
        (Activated(nn.ReLU()).double(), "first.weight", "float32 vs torch.float64"),
        (nn.Sequential(nn.Linear(4, 2)), "first.weight", "only member 0"),
    ],
)
def test_the_first_difference_between_members_is_named(other: nn.Module, where: str, why: str):
    dtype = next(other.parameters()).dtype
    ours = fxfuse.capture(Activated(nn.ReLU()), torch.randn(3, 4))
    theirs = fxfuse.capture(other, torch.randn(3, 4, dtype=dtype))
    with pytest.raises(MemberError, match=why) as caught:
        check_same_network([ours, theirs])
    assert where in caught.value.where


def test_no_grad_regions_are_inlined():
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.second = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                scale = x.abs().mean() + 1
            return self.second(self.first(x).relu() / scale)

    model = Partly()
    x = torch.randn(3, 4)
    program = fxfuse.capture(model, x)
    assert all(node.op != "call_module" for node in program.graph.nodes)
    assert "higher_order" not in str(program.graph)
    torch.testing.assert_close(program.module(x), model(x))


class Regions(nn.Module):
    """Parts that torch.export wraps into subgraphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = torch.arange(x.shape[0]).to(x).cos()
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            x, y = self.second(x).relu(), x.tanh()
        x = checkpoint(lambda t: t.tanh() * 2, x + y, use_reentrant=False)
        return self.third(x) * scale[:, None]


def test_regions_are_inlined():
    model, x = Regions().double(), torch.randn(4, 5, dtype=torch.float64)
    program = fxfuse.capture(model, x)
    assert not [n for n in program.graph.nodes if "wrap_with" in str(n.target)]
    torch.testing.assert_close(program.module(x), model(x))
    graph = fxfuse.analyze(program)
    assert verify.permutation_of(graph).passed
    assert ("second.weight", 0) in graph.group_of


class ForEach(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        count = torch.arange(8)
        mask = torch.vmap(lambda k: count.new_ones([], dtype=torch.bool) & (k >= 0))(count)
        return self.head(torch.vmap(lambda row: row / (1 + row.abs().sum()))(h) * mask)


def test_what_is_mapped_over_examples_is_written_out():
    members, x = [ForEach() for _ in range(2)], torch.randn(4, 5)
    with pytest.warns(UserWarning, match=r"torch\.vmap is written out"):
        result = fxfuse.fuse(members, x, size=1.5)
    assert result.module(torch.randn(7, 5)).shape == (7, 3)
    assert result.module.get_parameter("first.weight").shape == (12, 5)
    torch.testing.assert_close(fxfuse.prune(members[0], x, size=1).module(x), members[0](x))
