"""Members that know different classes become one network with one output."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Heads, Match, Refit, Size
from fxfuse.analysis.head_search import find_heads
from fxfuse.errors import OptionError, RewriteError
from tests.models import excite
from tests.nets import SmallResNet
from tests.options import flat

CLASSES = [["cat", "dog"], ["dog", "fish", "bird"]]


def mlp(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, classes)
    )


def vgg(classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(4)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, classes)
    )


class ViT(nn.Module):
    """Patches, a class token, positions, a pre-norm block, LayerNorm, head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token, self.positions = (
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, 5, 8)),
        )
        self.block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, norm_first=True, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


class Dense(nn.Module):
    """Logits for each pixel: the classes are not the last dimension."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, classes, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.head(self.body(x).relu())}


class Logits(nn.Module):
    """The tensor of a network that returns a mapping."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.network(x)
        return found["out"] if isinstance(found, dict) else found


NETWORKS = {
    "MLP": (mlp, (4, 6)),
    "VGG": (vgg, (4, 3, 8, 8)),
    "ResNet": (lambda classes: SmallResNet(classes=classes), (4, 3, 8, 8)),
    "ViT": (ViT, (4, 3, 8, 8)),
    "dense": (Dense, (4, 3, 8, 8)),
}


def made(
    make: Callable[[int], nn.Module], shape: tuple[int, ...], classes: tuple[int, ...] = (2, 3)
) -> tuple[list[nn.Module], torch.Tensor]:
    """Members with random weights, in float64, and inputs."""
    members = []
    for seed, number in enumerate(classes):
        torch.manual_seed(seed)
        members.append(excite(make(number).double(), torch.randn(20, *shape[1:]).double()))
    return members, torch.randn(*shape).double()


def mapped(members: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """cat, dog, fish, bird: by hand."""
    first, second = (Logits(m)(x) for m in members)
    columns = [first[:, 0], (first[:, 1] + second[:, 0]) / 2, second[:, 1], second[:, 2]]
    return torch.stack(columns, 1)


def program(members: list[nn.Module], x: torch.Tensor) -> list[fxfuse.Program]:
    """Members that are fused more than once."""
    return [fxfuse.capture(m, x) for m in members]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_wide_model_hands_out_all_members(name: str):
    members, x = made(*NETWORKS[name])
    own = program(members, x)
    concat = fxfuse.fuse(own, size=2, heads=Heads(output="concat"))
    union = fxfuse.fuse(own, size=2, heads=Heads(output="union", classes=CLASSES))
    side_by_side = torch.cat([Logits(m)(x) for m in members], 1)
    assert union.classes == ("cat", "dog", "fish", "bird")
    for result, expected in ((concat, side_by_side), (union, mapped(members, x))):
        torch.testing.assert_close(Logits(result.module)(x), expected, rtol=1e-9, atol=1e-9)
        check = result.verification.checks[-1]
        assert (check.name, check.passed) == ("heads equal members", True)
        assert check.tolerance < 1e-8
        assert result.plan.inexact() == []


@pytest.mark.parametrize(("name", "head"), [("ResNet", "fc"), ("ViT", "head")])
def test_other_widths_hand_out_the_heads_of_their_tuple(name: str, head: str):
    """One tensor is the tuple's entries side by side, whatever the trunk is."""
    members, x = made(*NETWORKS[name])
    own = program(members, x)
    for width in (None, 0.5, 1.5):
        options = {"width": width, "score": "l1", "verify": False}
        apart = fxfuse.fuse(own, **flat(heads=[head], **options))
        one = fxfuse.fuse(own, **flat(heads="concat", **options))
        named = fxfuse.fuse(own, **flat(heads=head, head_output="concat", **options))
        torch.testing.assert_close(one.module(x), torch.cat(apart.module(x), 1))
        assert torch.equal(named.module(x), one.module(x))
        assert one.plan.sizes() == apart.plan.sizes()
        assert set(one.state_dict()) == set(apart.state_dict())


def test_a_tuple_of_heads_is_exact_at_full_width_too():
    members, x = made(*NETWORKS["ViT"])
    result = fxfuse.fuse(members, x, size=2, heads=Heads(["head"]))
    assert result.plan.mixing.mode == "per_member"
    for m, found in zip(members, result.module(x), strict=True):
        torch.testing.assert_close(found, m(x), rtol=1e-9, atol=1e-9)


def test_a_head_that_mixes_runs_over_all_units():
    """Where a head holds a LayerNorm over the trunk, members cannot run one by one."""
    members, x = made(*NETWORKS["ViT"])
    result = fxfuse.fuse(members, x, size=2, heads=Heads(["norm", "head"], output="concat"))
    assert result.plan.mixing.mode == "joint"
    assert any("norm" in why for why in result.plan.inexact())
    with pytest.raises(fxfuse.errors.RewriteError, match="a head mixes neurons of the trunk"):
        fxfuse.fuse(members, x, size=Size(2, mixing="per_member"), heads=Heads(["norm", "head"]))


def test_members_that_know_equally_many_classes_and_one_that_knows_one():
    members, x = made(*NETWORKS["MLP"], classes=(3, 3, 1))
    result = fxfuse.fuse(members, x, size=3, heads=Heads(output="concat"))
    torch.testing.assert_close(result.module(x), torch.cat([m(x) for m in members], 1))
    assert result.module(x).shape == (4, 7)
    assert result.plan.heads.modules == ("4",)


def test_freezing_and_a_plan_go_with_it():
    members, x = made(*NETWORKS["ResNet"])
    options = {"heads": "union", "classes": CLASSES, "freeze": ["stem.*"], "width": 0.5}
    result = fxfuse.fuse(members, x, **flat(**options))
    plan = fxfuse.FusionPlan.from_json(result.plan.to_json())
    assert (plan.heads, plan.heads.output) == (result.plan.heads, "union")
    assert "cat, dog, fish, bird" in plan.summary()
    again = fxfuse.build(plan, members, x)
    assert torch.equal(again.module(x), result.module(x))
    assert again.classes == result.classes
    # The map of the classes goes with the module, and is no tensor of its state.
    loaded = pickle.loads(pickle.dumps(result.module))
    assert torch.equal(loaded(x), result.module(x))
    assert not [name for name in result.state_dict() if "fxfuse" in name]


def test_the_members_class_holds_the_heads_as_one():
    members, x = made(*NETWORKS["ResNet"])
    own = program(members, x)
    for options, classes in (({"heads": "concat"}, 5), ({"heads": "union", "classes": CLASSES}, 4)):
        for width in (None, 0.5):
            result = fxfuse.fuse(own, verify=False, **flat(width=width, **options))
            model = result.to_module()
            assert isinstance(model, SmallResNet)
            assert model.fc.out_features == classes
            torch.testing.assert_close(model(x), result.module(x))


def test_a_head_of_several_layers_does_not_fit_the_members_class():
    members, x = made(*NETWORKS["MLP"])
    result = fxfuse.fuse(members, x, heads=Heads(["2", "4"], output="concat"))
    with pytest.raises(RewriteError, match="cannot be built at this width"):
        result.to_module()


class Two(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(self.body(x).relu()), x.mean(1)


class Mixer(nn.Module):
    """A layer over the tokens behind one over the features: both have an index for each place."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head, self.mix = nn.Linear(6, classes), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.head(x).transpose(1, 2))


@pytest.fixture(scope="module")
def own_mlps() -> list[fxfuse.Program]:
    return program(*made(*NETWORKS["MLP"]))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"heads": "union"}, OptionError, "union(.|\n)*class names"),
        (
            {"heads": "concat", "classes": CLASSES},
            OptionError,
            "classes and output 'concat' contradict",
        ),
        ({"heads": ["4"], "head_output": "sum"}, OptionError, "tuple, concat, union"),
        (
            {"heads": "union", "classes": [["a"], ["b", "c", "d"]]},
            OptionError,
            "member 0 needs 2 classes, one for each logit, got 1",
        ),
        (
            {"heads": "union", "classes": [["a", "b"]]},
            OptionError,
            "classes must hold 2 lists, one for each member, got 1",
        ),
        ({"heads": "union", "classes": ["ab", ["c"]]}, OptionError, "not a list of names"),
        ({"heads": "union", "classes": [["a", "a"], ["b"]]}, OptionError, "named 'a'"),
        ({"heads": ["9"], "head_output": "concat"}, OptionError, "heads='9' matches nothing"),
    ],
)
def test_bad_input(options: dict[str, object], error: type[Exception], match: str, own_mlps):
    with pytest.raises(error, match=match):
        fxfuse.fuse(own_mlps, **flat(**options))


def test_heads_are_options_of_their_own(own_mlps):
    assert Heads("fc") == Heads(["fc"]) == Heads(iter(["fc"]))
    assert Heads(["fc"], "union", [["a", 1]]).classes == (("a", "1"),)
    assert Heads(["fc"])
    assert Heads()
    assert not Heads(())
    with pytest.raises(OptionError, match="needs heads, but no module is one"):
        Heads([], output="concat")
    # Without names they are found, whatever is returned of them.
    for output in ("tuple", "concat"):
        assert find_heads(own_mlps, Heads(output=output)) == (Heads("4", output), 1)


def test_heads_that_are_not_found():
    members, x = made(Two, (4, 6))
    with pytest.raises(OptionError, match="must return one tensor, got 2"):
        fxfuse.fuse(members, x, heads=Heads(output="concat"))
    members, x = made(lambda c: nn.Sequential(mlp(4), nn.Flatten(0)), (4, 6))
    with pytest.raises(OptionError, match="no dimension of the output is written by a layer"):
        fxfuse.fuse(members, x, heads=Heads(output="concat"))
    members, x = made(Mixer, (4, 3, 6), (2, 2))
    with pytest.raises(OptionError, match=r"dimension of classes is ambiguous(.|\n)*1, 2"):
        fxfuse.fuse(members, x, heads=Heads(output="concat"))


def test_what_needs_one_teacher_is_refused(own_mlps):
    with pytest.raises(OptionError, match="several heads"):
        fxfuse.fuse(
            own_mlps,
            calibration=torch.randn(100, 6).double(),
            refine=[Refit(), Match()],
            heads=Heads(output="concat"),
        )
