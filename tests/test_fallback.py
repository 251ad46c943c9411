"""Networks that torch.export rejects: traced for the analysis, run as they are."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import verify
from fxfuse.errors import (
    CaptureError,
    CheckpointError,
    MemberError,
    RewriteError,
    VerificationError,
)
from fxfuse.graph.capture import capture_eagerly, check_reached
from fxfuse.graph.same_network import check_same_network
from tests.models import detector, excite, pictures
from tests.nets import SmallResNet, images, resnets


class Branching(nn.Module):
    """Two ways through, by the sum of an activation; `first`, then `left` or `right`, `last`."""

    def __init__(self, bound: float = 0.0, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.bound = bound
        self.first = nn.Linear(6, 12)
        self.activation = activation or nn.ReLU()
        self.left = nn.Linear(12, 10)
        self.right = nn.Linear(12, 10)
        self.last = nn.Linear(10, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 10), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.first(x))
        x = self.left(x) if x.sum() > self.bound else self.right(x)
        return self.last(x.tanh()) * self.scale[:3]


class Early(nn.Module):
    """All weights are reached; how often a layer runs depends on the data."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.activation = activation or nn.ReLU()
        self.inner = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))
        self.last = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.first(x))
        for _ in range(3):
            x = self.norm(x + self.inner(x))
            if x.abs().mean() > 0.1:
                break
        heads = [
            f(x).unflatten(-1, (3, 4)).transpose(0, 1) for f in (self.query, self.key, self.value)
        ]
        attended = nn.functional.scaled_dot_product_attention(*heads)
        return self.last(x + attended.transpose(0, 1).flatten(1))


@pytest.fixture
def quiet():
    """For tests of what comes after the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.export rejects")
        yield


def early(n: int, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        found.append(excite(Early().to(dtype), torch.randn(5, 6, dtype=dtype)))
    return found


def test_a_trace_replaces_what_cannot_be_exported():
    model = Early().train()
    x = torch.randn(5, 6)
    with pytest.warns(UserWarning, match=r"torch.export rejects Early.*data-dependent"):
        program = fxfuse.capture(model, x)
    assert not program.is_exported
    assert "data-dependent" in program.refusal
    # The line that torch.export could not follow.
    assert "test_fallback.py" in program.refusal
    assert program.source is model
    assert model.training
    assert model.norm.training
    assert program.names == tuple(model.state_dict())
    assert all(program.tensor(name) is t for name, t in model.state_dict(keep_vars=True).items())
    assert program.reached() == set(program.names)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    targets = {str(node.target) for node in calls}
    whole = {"linear", "layer_norm", "scaled_dot_product_attention"}
    assert {f"aten.{name}.default" for name in whole} <= targets
    for node in calls:
        if any(str(node.target) == f"aten.{name}.default" for name in whole):
            assert isinstance(node.meta["val"], torch.Tensor)
            assert "test_fallback.py" in node.stack_trace
    assert fxfuse.capture(SmallResNet(), images()).is_exported


def test_without_fallback_the_refusal_is_an_error():
    with pytest.raises(CaptureError, match="data-dependent"):
        fxfuse.capture(Early(), torch.randn(5, 6), fallback=False)


def test_frozen_reasons_name_source_lines(quiet):
    graph = fxfuse.analyze(early(1)[0], torch.randn(5, 6))
    assert "self.activation(self.first(x))" in graph.frozen[("first.weight", 1)].source


def test_the_permutation_oracle_runs_the_module_itself(quiet):
    model = early(1, torch.float64)[0]
    program = fxfuse.capture(model, torch.randn(5, 6, dtype=torch.float64))
    graph = fxfuse.analyze(program)
    check = verify.permutation_of(graph)
    assert check.passed, check
    assert check.tolerance == verify.EXACT
    assert verify.sensitivity(program) > 1e-3
    assert graph.free_fraction > 0.99
    group = next(g for g in graph.groups if ("first.weight", 0) in g.index)
    # A unit whose slots do not belong together has to be noticed.
    index = {
        p: rows[::-1].copy() if p[0] == "first.weight" else rows for p, rows in group.index.items()
    }
    wrong = dataclasses.replace(graph, groups=(dataclasses.replace(group, index=index),))
    assert not verify.permutation_of(wrong).passed


def test_buffers_that_are_not_persistent_are_cast_for_the_oracle(quiet):
    model = Branching()
    program = fxfuse.capture(model, torch.randn(5, 6))
    with pytest.warns(UserWarning, match=r"do not reach (left|right).weight"):
        check = verify.permutation(program)
    assert check.passed, check
    assert model.scale.dtype is torch.float32


def test_what_a_module_makes_is_float64_for_the_oracle_too(quiet):
    class Making(Early):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            buffer = torch.zeros(x.shape[0], 3, dtype=self.dtype)
            buffer[torch.arange(x.shape[0])] = super().forward(x)
            return buffer

    Making.dtype = None
    x = torch.randn(5, 6)
    assert verify.permutation(Making(), x).passed
    Making.dtype = torch.float32
    check = verify.permutation(Making(), x)
    assert check.passed
    assert 1e-9 < check.tolerance < 1e-3 or check.error < 1e-9
    assert "in the network's own precision" in check.detail

    class Asserting(Early):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype is torch.float32
            return super().forward(x)

    check = verify.permutation(Asserting(), x)
    assert check.passed
    assert "in the network's own precision" in check.detail

    class Rounded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            single = x.to(torch.float32)
            return (single * single.square().sum(-1, keepdim=True)).tanh().to(x.dtype)

    check = verify.permutation(Early(Rounded()), x)
    assert check.passed, check
    assert check.error > verify.EXACT
    assert torch.get_default_dtype() is torch.float32


def test_what_leaves_the_graph_as_a_number_freezes(quiet):
    class Leaving(nn.Module):
        def __init__(self, leave) -> None:
            super().__init__()
            self.leave = leave
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
            self.last = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            return self.last(self.second(x * self.leave(x)).relu())

    leaves = {
        "tolist": lambda x: torch.tensor(x.mean(0).tolist()),
        "numpy": lambda x: torch.from_numpy(x.mean(0).detach().numpy().copy()),
        "data": lambda x: x.data.mean(0)[3],
        "item": lambda x: x.mean(0)[3].item(),
        "branch": lambda x: 2.0 if x[0, 3] > x[0, 4] else 1.0,
        "equal": lambda x: 2.0 if torch.equal(x[0], torch.arange(8.0)) else 1.0,
    }
    for name, leave in leaves.items():
        graph = fxfuse.analyze(
            capture_eagerly(Leaving(leave), torch.randn(5, 6), refusal="because of a test")
        )
        free = {
            i
            for g in graph.group_of.get(("first.weight", 0), ())
            for i in g.index[("first.weight", 0)].ravel()
        }
        assert 3 not in free, name
        assert ("second.weight", 0) in graph.group_of, name


def test_a_tensor_on_the_memory_of_a_weight_is_that_weight():
    class Twice(Early):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + nn.functional.linear(self.first(x), self.last.weight.data)

    program = capture_eagerly(Twice(), torch.randn(5, 6), refusal="because of a test")
    assert not any("constant" in str(n.target) for n in program.graph.nodes if n.op == "get_attr")
    check = verify.permutation(program)
    assert check.passed, check


def test_outputs_that_may_hide_tensors_are_an_error(quiet):
    class Answer:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    class Opaque(Early):
        def forward(self, x: torch.Tensor) -> Answer:
            return Answer(super().forward(x))

    with pytest.raises(CaptureError, match="finds no tensor"):
        fxfuse.capture(Opaque(), torch.randn(5, 6))


def test_weights_that_the_example_does_not_reach(quiet):
    members = [Branching(), Branching()]
    x = torch.randn(5, 6)
    missing = "left" if fxfuse.capture(members[0], x).unreached()[0].startswith("left") else "right"
    names = (f"{missing}.weight", f"{missing}.bias")
    with pytest.raises(CaptureError, match="do not reach 2 of the network's tensors") as caught:
        fxfuse.fuse(members, x)
    assert caught.value.where == ", ".join(names)
    assert "ignore=" in caught.value.how
    program = fxfuse.capture(members[0], x)
    assert program.unreached() == names
    assert program.unreached(names[:1]) == names[1:]
    check_reached(program, excused=names)
    with pytest.raises(CaptureError, match="1 of"):
        check_reached(program, excused=names[:1])
    with pytest.warns(UserWarning, match=f"do not reach {names[0]}, {names[1]}"):
        graph = fxfuse.analyze(program)
    assert (names[0], 0) not in graph.group_of


def test_members_are_compared_by_what_they_answer(quiet):
    x = torch.randn(5, 6)
    ours, theirs = (fxfuse.capture(m, x) for m in early(2))
    check_same_network([ours, theirs])
    with pytest.raises(MemberError, match="answers") as caught:
        check_same_network([ours, fxfuse.capture(Early(nn.Tanh()), x)])
    assert caught.value.where.startswith("node 'relu'")
    with pytest.raises(MemberError, match="tensor names"):
        check_same_network([ours, fxfuse.capture(Branching(), x)])


class Heads(nn.Module):
    """Attention with a number of heads that no tensor tells."""

    def __init__(self, heads: int, *, branches: bool) -> None:
        super().__init__()
        self.heads, self.branches = heads, branches
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        if self.branches and x.sum() > 1e9:
            x = -x
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.mT.reshape(b * self.heads, c // self.heads, n).mT for t in (q, k, v))
        return self.out((q @ k.mT).softmax(-1).matmul(v).mT.reshape(b, c, n).mT)


@pytest.mark.parametrize("branches", [False, True])
def test_another_number_of_heads_is_named_where_it_is_used(branches: bool, quiet: None):
    members = [Heads(heads, branches=branches).eval() for heads in (2, 4)]
    with pytest.raises(MemberError) as caught:
        fxfuse.fuse(members, torch.randn(3, 5, 8))
    assert "member 1 differs from member 0" in caught.value.what
    assert "test_fallback.py" in caught.value.where
    assert "self.heads" in caught.value.where


def test_fusion_without_a_program():
    members = early(3)
    x = torch.randn(5, 6)
    with pytest.warns(UserWarning, match="torch.export rejects") as said:
        result = fxfuse.fuse(members, x)
    assert len(said) == 1
    assert not result.emitted
    with pytest.raises(CaptureError, match="no exported graph") as caught:
        _ = result.module
    assert caught.value.where == "Early"
    assert "data-dependent" in caught.value.why
    assert "to_module" in caught.value.how
    assert result.verification.passed
    assert [c.name for c in result.verification.checks] == ["permutation", "finite outputs"]
    state = result.state_dict()
    assert list(state) == list(members[0].state_dict())
    model = result.to_module()
    assert type(model) is Early
    assert not model.training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(result.load_into(Early()).eval()(x), model(x))
    assert len({i for unit_map in result.plan.maps for i in unit_map.member.tolist()}) > 1
    with pytest.raises(CheckpointError, match="the fused network does not fit Branching"):
        result.load_into(Branching())
    with (
        pytest.warns(UserWarning, match="rejects"),
        pytest.raises(CaptureError, match=r"no exported graph\n  where: Early"),
    ):
        verify.concatenation_equals_ensemble(members, x)


def test_a_fused_network_that_answers_nan_is_not_handed_over(quiet):
    class Nan(Early):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 0.0 * 0.0

    with pytest.raises(VerificationError, match="finite"):
        fxfuse.fuse([Nan(), Nan()], torch.randn(5, 6))


def test_to_module_of_an_exported_fusion():
    members = resnets(2)
    members[0].train()
    x = images()
    before = copy.deepcopy(members[0].state_dict())
    result = fxfuse.fuse(members, x)
    assert result.emitted
    model = result.to_module()
    assert type(model) is SmallResNet
    assert model.training
    torch.testing.assert_close(model.eval()(x), result.module(x))
    # What is trained in the module comes along, and the member stays as it is.
    with torch.no_grad():
        result.module.get_parameter("fc.bias").add_(1.0)
    torch.testing.assert_close(result.to_module().eval()(x), result.module(x))
    assert all(torch.equal(t, before[name]) for name, t in members[0].state_dict().items())
    batch = {0: torch.export.Dim.DYNAMIC}
    programs = [torch.export.export(m.eval(), (x,), dynamic_shapes=(batch,)) for m in members]
    with pytest.raises(RewriteError, match="no module to copy"):
        fxfuse.fuse(programs, x).to_module()


def test_to_module_of_a_module_that_cannot_be_copied():
    members = resnets(2)
    members[0].cache = members[0].fc.weight * 2  # no leaf: deepcopy refuses it
    with pytest.raises(RewriteError, match="cannot be copied"):
        fxfuse.fuse(members, images()).to_module()


def test_detection_end_to_end():
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    members = [detector(name, seed) for seed in range(2)]
    x = pictures()
    for member in members:
        found = member(x)
        assert all(len(image["boxes"]) > 5 for image in found), "the network is blind"
        assert len(found[0]["scores"].unique()) > 5
    with pytest.warns(UserWarning, match="torch.export rejects FasterRCNN"):
        result = fxfuse.fuse(members, (x,))
    check = result.verification.checks[0]
    assert check.passed, check
    assert check.tolerance == verify.EXACT
    assert verify.sensitivity(result.graph.program) > 1e-3
    assert result.graph.free_fraction > 0.99
    # Across roi_align and the writes by level: the pyramid's channels are free.
    pyramid = [p for p in result.graph.group_of if "fpn.layer_blocks" in p[0] and p[1] == 0]
    assert pyramid
    model = result.to_module()
    assert type(model) is type(members[0])
    assert all(torch.isfinite(t).all() for image in model(x) for t in image.values())
    assert all(torch.equal(t, result.state_dict()[n]) for n, t in model.state_dict().items())
