"""Members of different widths whose mixing operators run once for each of them."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

import fxfuse
from fxfuse import Constraints, Size, verify
from fxfuse.errors import MemberError, OptionError
from fxfuse.planning.plan import FusionPlan
from fxfuse.transform.cost import operations_of, parameters_of
from tests.models import excite, image
from tests.nets import mean_of
from tests.strategies import Block, Recipe, build, images, recipes
from tests.test_mixing import TOKENS, seeded

X = torch.randn(6, 8, dtype=torch.float64)
PIXELS = torch.randn(3, 2, 4, 4, dtype=torch.float64)
SMALL = image(dtype=torch.float64)[:, :, :32, :32]


def mlp(first: int, second: int) -> nn.Module:
    layers = [nn.Linear(8, first), nn.LayerNorm(first), nn.ReLU(), nn.Linear(first, second)]
    return nn.Sequential(*layers, nn.LayerNorm(second), nn.ReLU(), nn.Linear(second, 3))


def vit(heads: int, width: int, hidden: int) -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, 1, heads, width, hidden, num_classes=5)


def swin(width: int, heads: list[int], ratio: float) -> nn.Module:
    return torchvision.models.SwinTransformer(
        [4, 4], width, [1, 2], heads, [4, 4], ratio, num_classes=5
    )


class Mixer(nn.Module):
    """Layers along tokens and along channels, with other hidden widths and another stream."""

    def __init__(self, width: int, tokens: int, channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.tokens = nn.Sequential(nn.Linear(3, tokens), nn.GELU(), nn.Linear(tokens, 3))
        hidden = nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, width)
        self.channels = nn.Sequential(*hidden)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(self.norms[2](x).mean(1))


class Attention(nn.Module):
    """Heads that share a norm, so that every head of every member needs its own member's."""

    def __init__(self, heads: int, width: int, size: int = 6) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.embed, self.norm = nn.Linear(4, width), nn.LayerNorm(width)
        self.qkv, self.q_norm = nn.Linear(width, 3 * heads * size), nn.RMSNorm(size)
        self.out, self.head = nn.Linear(heads * size, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.size)).unbind(2)
        q, k, v = self.q_norm(q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = (q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x.mean(1)).softmax(-1)


class Statistics(nn.Module):
    """A norm over groups of some channels, and a sum over channels that feeds the head."""

    def __init__(self, groups: int, width: int, size: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, size * groups, 3, padding=1)
        self.norm = nn.GroupNorm(groups, size * groups)
        self.second = nn.Conv2d(size * groups, width, 3, padding=1)
        self.batch, self.last = nn.BatchNorm2d(width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.batch(self.second(self.norm(self.first(x)).relu())).relu()
        return self.last(x.flatten(2).std(-1)).log_softmax(-1)


Made = Sequence[Callable[[], nn.Module]]
#: Units of other sizes: heads and groups that no head or group of another member can replace.
IRREGULAR: dict[str, tuple[Made, torch.Tensor]] = {
    "sizes of heads": ([lambda: Attention(2, 10, 4), lambda: Attention(2, 12, 6)], TOKENS),
    "other heads, one shape": ([lambda: Attention(4, 12, 3), lambda: Attention(3, 12, 4)], TOKENS),
    "sizes of groups": ([lambda: Statistics(2, 6, 4), lambda: Statistics(2, 4, 6)], PIXELS),
}
FAMILIES: dict[str, tuple[Made, torch.Tensor]] = {
    **IRREGULAR,
    "mlp": ([lambda: mlp(6, 5), lambda: mlp(9, 4), lambda: mlp(3, 11)], X),
    "hidden widths": ([lambda: vit(2, 16, 32), lambda: vit(2, 16, 48)], SMALL),
    "streams": ([lambda: vit(3, 24, 32), lambda: vit(2, 16, 48)], SMALL),
    "windows": ([lambda: swin(24, [2, 4], 4), lambda: swin(36, [3, 6], 2)], SMALL),
    "mixer": ([lambda: Mixer(6, 5, 8), lambda: Mixer(6, 5, 12)], TOKENS),
    "tokens": ([lambda: Mixer(6, 5, 8), lambda: Mixer(9, 4, 12)], TOKENS),
    "heads": ([lambda h=h, w=w: Attention(h, w) for h, w in ((2, 12), (3, 10), (4, 7))], TOKENS),
    "statistics": ([lambda: Statistics(2, 6), lambda: Statistics(3, 4)], PIXELS),
}


def members_of(family: str) -> list[nn.Module]:
    makers, x = FAMILIES[family]
    return [excite(seeded(make, seed), x) for seed, make in enumerate(makers)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_wide_model_is_the_mean_of_its_members(family: str):
    members, x = members_of(family), FAMILIES[family][1]
    result = fxfuse.fuse(members, x, size=len(members))
    assert result.plan.mixing.mode == "per_member"
    assert result.plan.names_of("per_member")
    check = next(c for c in result.verification.checks if c.name == "wide equals ensemble")
    assert check.passed
    assert check.tolerance == 1e-9
    with torch.no_grad():
        found = result.module(x)
    torch.testing.assert_close(found, mean_of(members, x), rtol=1e-9, atol=1e-9)
    # An oracle that would pass for any input says nothing.
    assert not torch.allclose(found, result.module(x.flip(0)))


def wider(recipe: Recipe) -> Recipe:
    """The same blocks with one more neuron in each layer, part, head or group."""

    def more(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(replace(block, width=block.width + 1) for block in blocks)

    return replace(
        recipe,
        stem=recipe.stem + 2,
        images=more(recipe.images),
        tokens=more(recipe.tokens),
        vectors=more(recipe.vectors),
    )


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=12)
@given(recipes())
def test_random_networks(recipe: Recipe):
    both = enumerate((recipe, wider(recipe)))
    members = [fxfuse.capture(build(r, seed), images()) for seed, r in both]
    try:
        check = verify.concatenation_equals_ensemble(members, mixing="per_member")
    except MemberError as error:
        if "differs from member 0" not in str(error):
            raise
        assume(False)  # A shortcut that only one of them needs, since its width changes.
    assert check.passed, check
    assert check.tolerance == 1e-9


@pytest.mark.parametrize(("family", "width"), zip(IRREGULAR, (None, 0.5, 0.5), strict=True))
def test_the_first_member_keeps_units_of_other_sizes(family: str, width: float | None):
    members, x = members_of(family), FAMILIES[family][1]
    result = fxfuse.fuse(members, x, size=width)
    found, kept, state = result.module(x), result.plan.names_of("base"), result.state_dict()
    assert found.shape == members[0](x).shape
    assert not torch.allclose(found, result.module(x.flip(0)))
    name, reader = ("qkv.weight", "out") if "qkv.weight" in kept else ("first.weight", "second")
    assert {name, f"{reader}.weight"} <= set(kept)
    assert re.search(
        rf"- `{name}`: a unit has \d+ indices .* member 0, \d+ in", result.plan.summary()
    )
    # Along the stream, what member 0 keeps reads its own units, and nothing of the others'.
    own, fused = members[0].get_parameter(name), state[name]
    if name == "qkv.weight":
        stream = result.plan.map_of("embed.weight:0")
        theirs = torch.zeros_like(fused)
        fused_units, units = (torch.from_numpy(a) for a in stream.of_member(0))
        theirs[:, fused_units] = own.detach()[:, units]
        own = theirs
    torch.testing.assert_close(fused, own.detach())


def test_who_keeps_units_of_other_sizes_has_to_come_first():
    members, x = members_of("sizes of heads"), TOKENS
    with pytest.raises(OptionError, match=r"member 1 cannot be the base member(.|\n)*first"):
        fxfuse.fuse(members, x, constraints=Constraints(base_member=1))


class Scaled(nn.Module):
    """A number that the network calculates with."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(8, width), nn.Linear(width, 3), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x) * self.scale).tanh())


def test_a_number_that_differs_with_the_width_is_each_members_own():
    members = [Scaled(5, 0.5).double(), Scaled(7, 0.25).double()]
    wide = fxfuse.fuse(members, X, size=2)
    torch.testing.assert_close(wide.module(X), mean_of(members, X), rtol=1e-9, atol=1e-9)
    (note,) = fxfuse.fuse(members, X).plan.mixing.notes
    assert "other numbers: [0.5] in member 0, [0.25] in member 1" in note.why


def test_a_number_that_no_width_decides_is_named():
    members = [Scaled(5, 0.5).double(), Scaled(5, 0.25).double()]
    with pytest.raises(MemberError, match=r"0\.5(.|\n)* vs (.|\n)*0\.25"):
        fxfuse.fuse(members, X)


def test_each_member_has_tensors_of_its_own_size():
    members, x = members_of("mlp"), X
    result = fxfuse.fuse(members, x, size=3)
    own = [result.state_dict()[f"members.{i}.1.weight"] for i in range(3)]
    for tensor, member in zip(own, members, strict=True):
        torch.testing.assert_close(tensor, member[1].weight.detach())
    reloaded = pickle.loads(pickle.dumps(result.module))
    torch.testing.assert_close(reloaded(x), result.module(x))
    torch.export.export(result.module, (x,))
    again = fxfuse.build(FusionPlan.from_json(result.plan.to_json()), members, x)
    torch.testing.assert_close(again.state_dict(), result.state_dict(), rtol=0, atol=0)
    sizes = result.plan.sizes()
    elements = sum(p.numel() for p in result.module.parameters())
    assert elements == parameters_of(result.graph, sizes, result.plan)
    assert operations_of(result.graph, sizes, result.plan) > 0


def test_each_member_trains_as_it_would_alone():
    members, x = members_of("statistics"), PIXELS
    wide = fxfuse.fuse(members, x, size=2).module.train()
    alone = [copy.deepcopy(member).train() for member in members]
    torch.stack([member(x) for member in alone]).mean(0).square().sum().backward()
    wide(x).square().sum().backward()
    for i, member in enumerate(alone):
        found = wide.get_parameter(f"members.{i}.last.weight").grad
        torch.testing.assert_close(found, member.get_parameter("last.weight").grad)


def test_members_run_apart_only_where_all_of_them_is_kept():
    members = members_of("mlp")
    with pytest.raises(OptionError, match="does not keep every unit"):
        fxfuse.fuse(members, X, size=Size(2, mixing="per_member"))
    joint = fxfuse.fuse(members, X, size=Size(3, mixing="joint"))
    assert joint.plan.inexact()
