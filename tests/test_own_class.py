"""`to_module()` at another width: the user's class with numbers that follow its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

import fxfuse
from fxfuse import Size
from fxfuse.errors import RewriteError
from fxfuse.graph.layer_sizes import sizes_of_layer
from fxfuse.transform.emit import FusedModule
from tests.models import build, image
from tests.nets import SmallResNet, images, resnets
from tests.options import flat
from tests.test_prune import SmallVGG

WIDTHS = [0.5, 1.5, 2]
TOKENS = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = 16
        self.first = nn.Linear(12, self.hidden)
        self.unused = 16
        self.last = nn.Linear(self.hidden, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        assert x.shape[-1] == self.hidden
        return self.last(x)


class Attention(nn.Module):
    """Heads of a fused projection, in numbers that only the class knows; a LayerNorm."""

    def __init__(self, embed: int = 16, heads: int = 4) -> None:
        super().__init__()
        # As many heads as there are channels in one: values alone do not tell them apart.
        self.num_heads, self.head_dim, self.embed = heads, embed // heads, embed
        self.size = (heads, self.head_dim)
        self.first = nn.Linear(12, embed)
        self.norm = nn.LayerNorm(embed)
        self.qkv = nn.Linear(embed, 3 * embed)
        self.out = nn.Linear(embed, embed)
        self.last = nn.Linear(embed, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).split(self.embed, -1)
        q, k, v = (y.view(b, t, self.num_heads, self.head_dim).transpose(1, 2) for y in (q, k, v))
        heads = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        assert heads.shape[2:] == self.size
        return self.last(x + self.out(heads.reshape(b, t, self.embed)))


class ChannelFirst(nn.Module):
    """Heads beside the batch: the class, or a part without tensors, knows only how many."""

    class Heads(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.heads = heads

        def forward(self, qkv: torch.Tensor) -> torch.Tensor:
            b, width, n = qkv.shape
            channels = width // (3 * self.heads)
            qkv = qkv.reshape(b * self.heads, 3 * channels, n)
            q, k, v = qkv.split(channels, dim=1)
            weight = torch.einsum("bct,bcs->bts", q, k).softmax(-1)
            return torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, n)

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.unrelated = heads, 16
        self.first, self.last = nn.Conv1d(5, width, 1), nn.Conv1d(width, 3, 1)
        self.norm = nn.GroupNorm(1, width)
        self.apart, self.out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)
        self.joint, self.inner = nn.Conv1d(width, 3 * width, 1), self.Heads(heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.inner(self.joint(self.norm(x)))
        b, c, n = x.shape
        q, k, v = self.apart(x).chunk(3, 1)
        ch = q.shape[1] // self.heads
        q, k, v = (t.reshape(b * self.heads, ch, n) for t in (q, k, v))
        heads = functional.scaled_dot_product_attention(*(t.mT for t in (q, k, v))).mT
        return self.last(x + self.out(heads.reshape(b, c, n)))


class Odd(nn.Module):
    """Layers of torch whose sizes are literals or tensors: groups, shapes, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.slope = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.rnn = nn.GRU(64, 10, batch_first=True)
        self.shape = nn.Sequential(nn.Linear(10, 24), nn.Unflatten(-1, (6, 4)))
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.slope(self.depthwise(self.mix(self.norm(self.conv(x)))))
        x = self.up(x)[:, :, ::2, ::2].flatten(2)
        x = self.rnn(x)[0].mean(1)
        return self.last(self.shape(x).mean(-1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(tokens)).tanh())


def seeded(make: Callable[[], nn.Module], n: int = 2) -> list[nn.Module]:
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        found.append(make().eval())
        for tensor in found[-1].parameters():
            if not tensor.any():
                nn.init.normal_(tensor, std=0.1)
    return found


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], list[nn.Module]], torch.Tensor]] = {
    "mlp": (lambda: seeded(MLP), TOKENS),
    "vgg_bn": (lambda: seeded(SmallVGG), images()),
    "resnet18": (lambda: [build("resnet18", seed) for seed in range(2)], image()),
    "mobilenet_v2": (lambda: [build("mobilenet_v2", seed) for seed in range(2)], image()),
    "vit": (lambda: seeded(vit), torch.randn(2, 3, 16, 16)),
    "attention": (lambda: seeded(Attention), TOKENS),
    "channel first": (lambda: seeded(ChannelFirst), torch.randn(3, 5, 7)),
    "odd": (lambda: seeded(Odd), images()),
    "tied": (lambda: seeded(Tied), torch.randint(11, (3, 4))),
}


def fused(name: str, width: float, **options: Any) -> fxfuse.FusionResult:
    make, x = NETWORKS[name]
    return fxfuse.fuse(make(), x, verify=False, **flat(width=width, mixing="joint", **options))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_of_the_class_answers_as_the_module_does(name: str, width: float) -> None:
    members, x = NETWORKS[name][0](), NETWORKS[name][1]
    result = fxfuse.fuse(members, x, verify=False, size=Size(width, mixing="joint"))
    own = result.to_module()
    assert type(own) is type(members[0])
    longer = torch.cat([x, x[:1]])
    with torch.no_grad():
        torch.testing.assert_close(own(longer), result.module(longer), rtol=1e-5, atol=1e-5)
    assert {n: t.shape for n, t in own.state_dict().items()} == {
        n: t.shape for n, t in result.state_dict().items()
    }
    # Every layer of torch's says what it holds: a layer made with these numbers holds it, too.
    for part in own.modules():
        for attribute, size in (sizes_of_layer(part) or {}).items():
            assert getattr(part, attribute) == size
    # It trains, and shares nothing with the module or the members.
    own.train()(x).sum().backward()
    assert all(p.grad is not None for p in own.parameters())
    assert all(p.grad is None for m in (*members, result.module) for p in m.parameters())


def test_numbers_of_the_class_follow() -> None:
    own = fused("attention", 0.5).to_module()
    assert (own.num_heads, own.head_dim, own.embed, own.size) == (2, 4, 8, (2, 4))
    own = fused("channel first", 0.5).to_module()
    assert (own.heads, own.inner.heads, own.unrelated) == (2, 2, 16)
    own = fused("odd", 0.5).to_module()
    assert (own.depthwise.groups, own.depthwise.in_channels, own.up.in_channels) == (4, 4, 4)
    assert (own.norm.num_groups, own.norm.num_channels) == (2, 4)
    assert (own.rnn.hidden_size, own.shape[1].unflattened_size) == (5, (3, 4))
    own = fused("vit", 1.5).to_module()
    attention = own.encoder.layers[0].self_attention
    assert (attention.embed_dim, attention.num_heads, attention.kdim) == (48, 6, 48)
    assert own.hidden_dim == 48


def test_numbers_that_the_forward_pass_does_not_read_stay() -> None:
    own = fused("mlp", 0.5).to_module()
    assert (own.hidden, own.unused) == (8, 16)


def test_tied_tensors_stay_tied() -> None:
    own = fused("tied", 0.5).to_module()
    assert own.head.weight is own.embed.weight
    assert own.embed.embedding_dim == own.head.in_features == 4


def test_the_copy_has_the_mode_of_its_source() -> None:
    members = [m.train() for m in resnets(2)]
    result = fxfuse.fuse(members, images(), size=0.5)
    own = result.to_module()
    assert own.training
    assert all(part.training for part in own.modules())
    assert not result.module.training
    x = images()
    answers = []
    for module in (own, result.module.train()):
        torch.manual_seed(0)
        answers.append(module(x))
    torch.testing.assert_close(*answers)


def test_a_pruned_network() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), TOKENS
    result = fxfuse.prune(model, x, size=0.5)
    own = result.to_module()
    assert (type(own), own.num_heads) == (Attention, 2)
    torch.testing.assert_close(own(x), result.module(x))
    # What was fused or pruned before is of no class of the user's.
    again = fxfuse.prune(result.module, x, size=0.5)
    copied = again.to_module()
    assert isinstance(copied, FusedModule)
    assert copied is not again.module
    torch.testing.assert_close(copied(x), again.module(x))


def test_a_trained_network_is_what_is_copied() -> None:
    result = fxfuse.fuse(resnets(2), images(), size=0.5)
    with torch.no_grad():
        for tensor in result.module.double().parameters():
            tensor += 0.1
    own = result.to_module()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(own(x), result.module(x))


def test_a_model_of_the_right_size_can_be_loaded() -> None:
    members, x = resnets(2), images()
    result = fxfuse.fuse(members, x, size=1.5)
    own = result.load_into(SmallResNet(width=12).eval())
    torch.testing.assert_close(own(x), result.module(x))


# --- where there is no such module ---


class Written(nn.Module):
    """A size that stands in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu().view(*x.shape[:-1], 4, 4).sum(-1))


class Hidden(nn.Module):
    """A size in a place that is not looked into; a head of zeros hides what follows from it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"kept": 16}
        self.first = nn.Linear(12, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last(x * (x.shape[-1] / self.sizes["kept"]))


def heads_only() -> nn.Module:
    """An embedding that is interface, so that heads no longer add up to it."""
    layer = nn.TransformerEncoderLayer(12, 4, 24, batch_first=True, dropout=0.0)
    return nn.Sequential(layer, nn.Linear(12, 3))


@pytest.mark.parametrize(
    ("make", "why"),
    [(Written, "shape"), (Hidden, "differ by"), (heads_only, "embed_dim")],
)
def test_a_class_that_cannot_be_built(make: Callable[[], nn.Module], why: str) -> None:
    members = seeded(make)
    with torch.no_grad():
        for member in members:
            for tensor in list(member.parameters())[-2:]:
                tensor.zero_()
    options = {"ignore": "0.norm2"} if make is heads_only else {}
    result = fxfuse.fuse(members, TOKENS, **flat(width=0.5, **options))
    with pytest.raises(RewriteError, match=r"cannot be built at this width") as caught:
        result.to_module()
    assert why in caught.value.why
    assert "result.module" in caught.value.how
    assert result.module(TOKENS).shape == (3, 5, 3)


def test_what_was_tried_is_told() -> None:
    class Sizes(Written):
        def __init__(self) -> None:
            super().__init__()
            self.channels = 16

    result = fxfuse.fuse(seeded(Sizes), TOKENS, size=0.5)
    with pytest.raises(RewriteError, match=r"2 ways to set Sizes\.channels were tried"):
        result.to_module()


def test_members_that_run_one_by_one_fit_no_class() -> None:
    result = fxfuse.fuse(seeded(Attention), TOKENS, size=2)
    with pytest.raises(RewriteError, match=r"each member keeps its own.*\n.*joint"):
        result.to_module()


def test_a_class_that_cannot_be_copied() -> None:
    class Locked(MLP):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            raise RuntimeError("holds a file")

    result = fxfuse.fuse(seeded(Locked), TOKENS, size=0.5)
    with pytest.raises(RewriteError, match="cannot be copied"):
        result.to_module()
