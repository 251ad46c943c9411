"""Members of different widths and of different depths."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import densenet, mobilenetv2, resnet, shufflenetv2

import fxfuse
from fxfuse import verify
from fxfuse.analysis.coupling import analyze
from fxfuse.analysis.multi_width import multi_width
from fxfuse.cli.report.content import gather
from fxfuse.errors import MemberError, VerificationError
from fxfuse.graph.tensors import tensors_in
from fxfuse.planning.plan import FusionPlan
from fxfuse.planning.size import sizes_of
from fxfuse.transform.resizing import emit_resized, limit_sizes
from fxfuse.verify.check import as_double, in_double, inputs_of, relative_error
from fxfuse.verify.outputs import parts
from fxfuse.verify.wide import _error
from tests.models import excite, image
from tests.test_widths import plans

X = torch.randn(6, 8, dtype=torch.float64)


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return excite(make().double(), image(0, 4, torch.float64))


def mlp(width: int, seed: int, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width + 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width + 3, outputs)).double().eval()


class Vgg(nn.Module):
    """Channels whose pixels are flattened, so that a unit owns several columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=4)
        self.classifier = nn.Linear(2 * width * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.classifier(x.view(-1, self.classifier.in_features))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], ...]] = {
    "vgg": tuple(lambda w=w: Vgg(w) for w in (4, 6, 3)),
    "resnet": tuple(
        lambda w=w: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 5, width_per_group=w)
        for w in (16, 24)
    ),
    "densenet": tuple(
        lambda g=g: densenet.DenseNet(g, (2, 2), 4 * g, num_classes=5) for g in (4, 6)
    ),
    "mobilenet": tuple(lambda m=m: mobilenetv2.MobileNetV2(5, width_mult=m) for m in (0.35, 0.5)),
    "shufflenet": tuple(
        lambda c=c: shufflenetv2.ShuffleNetV2([1, 1, 1], [8, c, 2 * c, 4 * c, 32], 5)
        for c in (8, 12)
    ),
}


def members_of(family: str) -> list[fxfuse.Program]:
    models = [made(make, seed) for seed, make in enumerate(FAMILIES[family])]
    return [fxfuse.capture(model, image(dtype=torch.float64)) for model in models]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_wide_model_of_different_widths_is_their_mean(family: str):
    check = verify.concatenation_equals_ensemble(members_of(family))
    assert check.passed, check
    assert check.tolerance == 1e-9


def test_whole_numbers_of_different_widths():
    """They have no mean: compared exactly where members agree, and else left out by name."""

    class Named(nn.Module):
        def __init__(self, width: int, only: bool = False) -> None:
            super().__init__()
            self.hidden, self.last, self.only = nn.Linear(4, width), nn.Linear(width, 3), only

        def forward(self, x: torch.Tensor) -> Any:
            logits = self.last(torch.relu(self.hidden(x)))
            classes = logits.argmax(-1)
            return classes if self.only else (logits, classes, (x > 0).sum(-1))

    torch.manual_seed(0)
    x = torch.randn(6, 4)
    check = verify.concatenation_equals_ensemble([Named(5), Named(7)], x)
    assert check.passed
    assert check.detail.endswith("not compared: outputs 1, whole numbers without a mean")
    with pytest.raises(VerificationError, match="members answer other whole numbers"):
        fxfuse.fuse([Named(5, only=True), Named(7, only=True)], x)
    zeros, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    assert parts(zeros, [ones, ones], {}) == ([zeros], [ones])
    assert _error([zeros + 10**12], [ones + 10**12]) == math.inf


@pytest.mark.parametrize("family", FAMILIES)
def test_any_width_is_the_concatenation_with_dead_units(family: str):
    members = members_of(family)
    graph = multi_width(analyze(members[0]), members, analyze)
    assert graph.members
    states = [as_double(m.state()) for m in members]
    args, kwargs = inputs_of(graph.program)
    for width in (0.5, 1.0, 1.5):
        wanted = sizes_of(graph, len(members), width, at_least_one=True)
        sizes, refused = limit_sizes(graph, wanted)
        assert not refused
        with torch.no_grad():
            found, expected = (
                tensors_in(in_double(emit_resized(graph, plan, states))(*args, **kwargs))
                for plan in plans(graph, states, sizes)
            )
        assert relative_error(found, expected) < 1e-9


def test_the_score_decides_who_provides_what():
    small, large = mlp(6, 0), mlp(12, 1)
    with torch.no_grad():
        # The small member's first three neurons outweigh all others.
        small[0].weight[:3] *= 100
    result = fxfuse.fuse([small, large], X)
    first = result.plan.map_of("0.weight:0")
    assert first.n_units == 6
    assert set(first.of_member(0)[1]) >= {0, 1, 2}
    rows = [(small, large)[m][0].weight[u] for m, u in zip(first.member, first.unit, strict=True)]
    torch.testing.assert_close(result.module.get_parameter("0.weight"), torch.stack(rows))
    assert "wide equals ensemble" in [check.name for check in result.verification.checks]


@pytest.mark.parametrize(("width", "units"), [(None, 6), (0.5, 5), (1, 9), (2, 18)])
def test_a_width_is_in_units_of_the_mean_member(width: float | None, units: int):
    members = [mlp(6, 0), mlp(12, 1)]
    result = fxfuse.fuse(members, X, size=width)
    assert result.plan.sizes()["0.weight:0"] == units
    again = fxfuse.build(FusionPlan.from_json(result.plan.to_json()), members, X)
    torch.testing.assert_close(again.state_dict(), result.state_dict(), rtol=0, atol=0)
    if width == 2:
        mean = torch.stack([member(X) for member in members]).mean(0)
        torch.testing.assert_close(result.module(X), mean)


class Heads(nn.Module):
    """Attention with some heads of some size, which mixes members in its norm."""

    def __init__(self, heads: int, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 3 * heads * size)
        self.out = nn.Linear(heads * size, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm(x)).view(x.shape[0], 1, 3, self.heads, self.size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(y.reshape(x.shape[0], 1, self.heads * self.size)).flatten(1)


def test_heads_are_chosen_whole():
    members = [Heads(2).double().eval(), Heads(3).double().eval()]
    result = fxfuse.fuse(members, X, size=2)
    mean = torch.stack([member(X) for member in members]).mean(0)
    torch.testing.assert_close(result.module(X), mean)


class Strided(nn.Module):
    def __init__(self, width: int, stride: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2)
        self.last = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (lambda: Strided(6, stride=2), "graphs"),
        (lambda: Strided(6, kernel=5), "graphs"),
        (lambda: nn.Sequential(Strided(6)), "residual blocks"),
    ],
)
def test_members_that_differ_in_more_are_refused(other: Callable[[], nn.Module], why: str):
    x = image(dtype=torch.float32)
    with pytest.raises(MemberError, match=why):
        fxfuse.fuse([Strided(4), other()], x)


def test_other_classes_are_refused():
    with pytest.raises(MemberError, match="reaches the network's output"):
        fxfuse.fuse([mlp(6, 0), mlp(8, 1, outputs=4)], X)


# --- depth ----------------------------------------------------------------------------------------


def deep(blocks: list[int], seed: int) -> nn.Module:
    return made(lambda: resnet.ResNet(resnet.BasicBlock, blocks, 5), seed)


def test_missing_blocks_are_the_identity():
    x = image(dtype=torch.float64)
    members = [deep([1, 1, 1, 1], 0), deep([2, 1, 2, 1], 1), deep([1, 1, 2, 1], 2)]
    result = fxfuse.fuse(members, x, size=3)
    with torch.no_grad():
        mean = torch.stack([member(x) for member in members]).mean(0)
        torch.testing.assert_close(result.module(x), mean)
    assert result.plan.absent["layer1.1.conv1.weight"] == (0, 2)
    assert result.plan.absent["layer3.1.conv1.weight"] == (0,)
    assert FusionPlan.from_json(result.plan.to_json()).roles == result.plan.roles
    assert "not in 0, 2" in result.plan.summary()


def test_a_member_without_a_block_still_provides_units():
    x = image(dtype=torch.float64)
    result = fxfuse.fuse([deep([1, 1, 1, 1], 0), deep([2, 1, 1, 1], 1)], x)
    inner = result.plan.map_of("layer1.1.conv1.weight:0")
    assert set(inner.member) == {1}
    stream = result.plan.map_of("conv1.weight:0")
    assert 16 < (stream.member == 0).sum() < 48


def test_a_transformer_without_a_block():
    def vit(layers: int, seed: int) -> nn.Module:
        return made(
            lambda: torchvision.models.VisionTransformer(64, 16, layers, 2, 16, 32, num_classes=5),
            seed,
        )

    x = image(dtype=torch.float64)
    members = [vit(3, 0), vit(2, 1)]
    result = fxfuse.fuse(members, x, size=2)
    with torch.no_grad():
        mean = torch.stack([member(x) for member in members]).mean(0)
        torch.testing.assert_close(result.module(x), mean)


class Chain(nn.Module):
    """Blocks without a residual: leaving one out is not leaving it as it was."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(blocks)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return x


def test_blocks_that_are_not_residual_are_refused():
    with pytest.raises(MemberError, match="returns other outputs"):
        fxfuse.fuse([Chain(3).double(), Chain(2).double()], X)
    other = made(lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], 4), 1)
    with pytest.raises(MemberError, match=r"member 1 (.|\n)*fc\.weight"):
        fxfuse.fuse([deep([2, 1, 1, 1], 0), other], image(dtype=torch.float64))


def test_widths_and_depths_need_a_program():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(MemberError, match="member 1 differs from member 0: shapes"):
            fxfuse.fuse([Branching(6).double(), Branching(8).double()], X)


class Branching(nn.Module):
    """Refused by torch.export, so that members are traced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(y.relu() if float(y.sum()) > 0 else y.tanh())


class Residual(nn.Module):
    """Residual blocks with some activation and some width inside."""

    def __init__(self, blocks: int, activation: Callable[[], nn.Module], inner: int = 8) -> None:
        super().__init__()
        parts = [[nn.Linear(8, inner), activation(), nn.Linear(inner, 8)] for _ in range(blocks)]
        self.blocks = nn.ModuleList([nn.Sequential(*part) for part in parts])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_members_as_deep_as_the_deepest_are_looked_at_too():
    shallow, deep_one = Residual(1, nn.ReLU).double(), Residual(2, nn.ReLU).double()
    assert fxfuse.fuse([shallow, deep_one, Residual(2, nn.ReLU).double()], X).verification.passed
    with pytest.raises(MemberError, match=r"member 2 is not member 1(.|\n)*returns other outputs"):
        fxfuse.fuse([shallow, deep_one, Residual(2, nn.Tanh).double()], X)


# --- depth and width ------------------------------------------------------------------------------


class Stream(nn.Module):
    """Residual blocks on a stream of some width, with or without an operator that mixes members."""

    def __init__(self, blocks: int, width: int, inner: int, *, norm: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            before = nn.LayerNorm(width) if norm else nn.Identity()
            layers = before, nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)
            self.blocks.append(nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Images(nn.Module):
    """Residual blocks on images, with batch statistics and heads that views take apart."""

    def __init__(self, blocks: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, width = heads, 4 * heads
        self.stem, self.head = nn.Conv2d(3, width, 3, stride=8), nn.Linear(width, 5)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            layers = nn.BatchNorm2d(width), nn.Conv2d(width, inner, 3, padding=1), nn.ReLU()
            self.blocks.append(nn.Sequential(*layers, nn.Conv2d(inner, width, 1)))
        self.scale = nn.Parameter(torch.rand(1, heads, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            heads = block(x).unflatten(1, (self.heads, 4)) * self.scale
            x = x + heads.flatten(1, 2)
        return self.head(x.mean((2, 3)))


class Attentive(nn.Module):
    """Attention of torch, whose views hold batch · heads: one number for all blocks."""

    def __init__(self, blocks: int, heads: int, size: int = 4, *, first: bool = True) -> None:
        super().__init__()
        width, self.first = size * heads, first
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), nn.MultiheadAttention(width, heads)])
            for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(torch.stack([x.roll(i, -1) for i in range(5)]))
        for norm, attention in self.blocks:
            y = norm(x) if self.first else x
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x if self.first else norm(x)
        return self.head(x.mean(0))


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make().double().eval()


DIFFERENT: dict[str, tuple[list[Callable[[], nn.Module]], torch.Tensor]] = {
    "stream": ([lambda: Stream(1, 8, 6), lambda: Stream(3, 10, 9), lambda: Stream(2, 12, 5)], X),
    "deepest first": ([lambda: Stream(3, 8, 6), lambda: Stream(1, 10, 9)], X),
    "norm": ([lambda: Stream(1, 6, 9, norm=True), lambda: Stream(2, 8, 5, norm=True)], X),
    "images": ([lambda: Images(1, 3, 4), lambda: Images(2, 2, 6)], image(dtype=torch.float64)),
    "attention": ([lambda: Attentive(1, 2), lambda: Attentive(2, 3)], X),
}


@pytest.mark.parametrize("family", DIFFERENT)
def test_members_of_other_depth_and_width(family: str):
    make, x = DIFFERENT[family]
    members = [seeded(each, seed) for seed, each in enumerate(make)]
    n = len(members)
    result = fxfuse.fuse(members, x, size=n)
    check = next(c for c in result.verification.checks if c.name == "wide equals ensemble")
    assert check.passed
    assert check.tolerance == 1e-9
    with torch.no_grad():
        mean = torch.stack([member(x) for member in members]).mean(0)
        torch.testing.assert_close(result.module(x), mean, rtol=1e-9, atol=1e-9)
    depths = [len(member.blocks) for member in members]
    last = max(depths) - 1
    lacking = tuple(i for i, depth in enumerate(depths) if depth <= last)
    found = {m for name, m in result.plan.absent.items() if name.startswith(f"blocks.{last}.")}
    assert found == {lacking}
    summary = result.plan.summary()
    assert "not in" in summary
    # Who has how many units of each group, and none of a block that is not there.
    for group in result.plan.sizes():
        units = [m.units[group] for m in result.plan.members]
        number = int(group.split(".")[1]) if group.startswith("blocks.") else -1
        assert [n > 0 for n in units] == [depth > number for depth in depths]
        taken = result.plan.map_of(group).counts(n)
        cells = [f"{a} of {b}" if b else "–" for a, b in zip(taken, units, strict=True)]
        assert f"| `{group}` | {sum(taken)} | {' | '.join(cells)} |" in summary
    assert FusionPlan.from_json(result.plan.to_json()).members == result.plan.members
    again = fxfuse.build(FusionPlan.from_json(result.plan.to_json()), members, x)
    torch.testing.assert_close(again.state_dict(), result.state_dict(), rtol=0, atol=0)


def test_what_no_width_and_no_block_explains_is_named():
    """A block that is normalised after its sum is no identity; heads have one size."""
    after = [seeded(lambda n=n: Attentive(n, 2, first=False), n) for n in (1, 2)]
    with pytest.raises(MemberError, match=r"returns other outputs(.|\n)*norm_first"):
        fxfuse.fuse(after, X)
    sizes = [seeded(lambda n=n: Attentive(n, 2, 3 + n), n) for n in (1, 2)]
    with pytest.raises(MemberError, match="24 is not a multiple of 15"):
        fxfuse.fuse(sizes, X)


def test_the_result_has_the_width_of_the_first_and_the_depth_of_the_deepest():
    members = [seeded(lambda: Stream(1, 8, 6), 0), seeded(lambda: Stream(2, 12, 9), 1)]
    result = fxfuse.fuse(members, X)
    sizes = result.plan.sizes()
    # A block that member 0 lacks has no width of its own in it.
    assert sizes == {"stem.weight:0": 8, "blocks.0.1.weight:0": 6, "blocks.1.1.weight:0": 9}
    said = gather(result, title="", members=members)
    assert "Members differ in width in 2 of 3 groups." in said.verdict
    assert "(members 0): 4 tensors." in " ".join(said.verdict)
    assert [share.counts[0] > 0 for share in said.shares] == [True, True, False]
    assert all(0 < share.kept <= 1 for share in said.shares)


def test_a_member_of_another_width_has_to_be_the_same_network_too():
    wider = Residual(2, nn.ReLU, inner=6).double()
    shallow, deep_one = Residual(1, nn.ReLU).double(), Residual(2, nn.ReLU).double()
    assert fxfuse.fuse([shallow, deep_one, wider], X).verification.passed
    with pytest.raises(MemberError, match="member 2 differs from member 0: graphs"):
        fxfuse.fuse([shallow, deep_one, Residual(2, nn.Tanh, inner=6).double()], X)
    with pytest.raises(MemberError, match="returns other outputs"):
        fxfuse.fuse([Residual(1, nn.Tanh, inner=6).double(), deep_one], X)
