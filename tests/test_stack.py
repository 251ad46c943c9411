"""The lossless ensemble graph: it answers, trains and is stored as its members are."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.analysis.rules.pointwise import is_pointwise
from fxfuse.ensemble.forms import Form
from fxfuse.ensemble.lowerings import lowering, registered
from fxfuse.ensemble.policy import Policy, policy_of
from fxfuse.ensemble.walk import walk
from fxfuse.errors import (
    CaptureError,
    MemberError,
    OptionError,
    RewriteError,
    RuleError,
    VerificationError,
)
from fxfuse.graph.rebuild import rebuild
from fxfuse.graph.tensors import is_constant, tensors_in
from fxfuse.refine.infer_task import infer_task
from tests.layers import FROZEN, LAYERS
from tests.models import LARGE, MIXING, PLAIN, build, excite, image, torchvision
from tests.nets import SmallResNet, images, programs, resnets
from tests.samples import SAMPLES, Net
from tests.strategies import Recipe, members_of, recipes
from tests.test_module import run_on_fake_cuda

aten = torch.ops.aten
#: Stacks wherever there is a lowering, so that every lowering is met.
GREEDY = Policy(copied=2**40, grouped=2**40, batches=True, dense=True)


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    make_greedy(monkeypatch)


def make_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not `import fxfuse.ensemble.build`: the package's name is that of its function.
    builder = importlib.import_module("fxfuse.ensemble.build")
    monkeypatch.setattr(builder, "policy_of", lambda device: GREEDY)


def other(program: fxfuse.Program, seed: int) -> fxfuse.Program:
    """The same network with other weights; running variances and the like stay positive."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, torch.Tensor] = {}
    state = {}
    for name in program.names:
        tensor = program.tensor(name)
        if is_constant(tensor):
            state[name] = tensor
            continue
        if id(tensor) not in made:
            factor = torch.rand(tensor.shape, generator=generator).to(tensor) + 0.5
            new = tensor.detach() * factor
            made[id(tensor)] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
        state[name] = made[id(tensor)]
    return replace(program, module=rebuild(program.module, state), source=None)


def answers(module: Callable[..., Any], *inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_in(module(*inputs))


def check(
    members: Sequence[nn.Module], inputs: Sequence[torch.Tensor], tolerance: float
) -> nn.Module:
    """Stacks with every output kept, and compares on other inputs and another batch size."""
    module = fxfuse.stack(members, tuple(inputs), reduce="none")
    new = tuple(
        torch.cat([x * 0.7, x.flip(0) * -0.4, x] if x.is_floating_point() else [x, x.flip(0)])
        for x in inputs
    )
    found = answers(module, *new)
    for number, member in enumerate(members):
        for together, own in zip(found, answers(member, *new), strict=True):
            error = float((together[number] - own).abs().max() / own.abs().max())
            assert error <= tolerance, (number, error)
    first, second = found[0][0], found[0][1]
    assert not torch.allclose(first, second, rtol=1e-3), "the members answer alike"
    assert not torch.allclose(first[:1].expand_as(first), first, rtol=1e-3), "inputs do not matter"
    check_unstacked(module, members)
    return module


def check_unstacked(module: nn.Module, members: Sequence[nn.Module]) -> None:
    states = fxfuse.unstack(module)
    assert len(states) == len(members)
    for state, member in zip(states, members, strict=True):
        assert list(state) == list(member.state_dict())
        for name, tensor in member.state_dict().items():
            assert torch.equal(state[name], tensor), name
            assert state[name].dtype == tensor.dtype


def count(module: Any, *targets: Any) -> int:
    return sum(node.target in targets for node in module.graph.nodes)


# --- equal to the members ------------------------------------------------------------------------


def perceptrons(n: int = 3, norm: bool = True, dtype: torch.dtype = torch.float32) -> list[Any]:
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(16)] if norm else []
        layers = [nn.Linear(6, 16, bias=not norm), *middle, nn.ReLU(), nn.Linear(16, 16), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(16, 4)).to(dtype)
        found.append(excite(model, torch.randn(8, 6, dtype=dtype)))
    return found


def transformers(n: int = 2, dtype: torch.dtype = torch.float32, drop: float = 0.0) -> list[Any]:
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        model = torchvision().models.VisionTransformer(8, 4, 2, 2, 12, 24, drop, num_classes=4)
        found.append(excite(model.to(dtype), images(2, dtype)))
    return found


def swins(n: int = 2, dtype: torch.dtype = torch.float32) -> list[Any]:
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        model = torchvision().models.SwinTransformer(
            [2, 2], 12, [2, 2], [3, 3], [3, 3], stochastic_depth_prob=0.0, num_classes=3
        )
        found.append(excite(model.to(dtype), images(2, dtype)))
    return found


FAMILIES = {
    "perceptron": (perceptrons, lambda dtype: torch.randn(4, 6, dtype=dtype)),
    "resnet": (lambda dtype: resnets(3, dtype), lambda dtype: images(4, dtype)),
    "vision transformer": (transformers, lambda dtype: images(2, dtype)),
    "swin": (swins, lambda dtype: images(2, dtype)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_member_answers_as_it_does_alone(name: str, dtype: torch.dtype, tolerance: float):
    make, example = FAMILIES[name]
    check(make(dtype=dtype), (example(dtype),), tolerance)


#: The others run with `pytest -m nightly`.
_OFTEN = ("resnet18", "shufflenet_v2_x0_5")
ARCHITECTURES = [
    name if name in _OFTEN else pytest.param(name, marks=pytest.mark.nightly)
    for name in (*PLAIN, *MIXING)
    if name not in LARGE
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str):
    check([build(name, seed) for seed in range(2)], (image(),), 1e-12)


#: Layers with tensors, states or an order of their own; the rest are operators like others.
_PARTS = ("norm", "Attention", "LSTM", "GRU", "RNN", "Embedding", "Transformer", "learned", "tied")
SOME_LAYERS = [name for name in LAYERS if any(part.lower() in name.lower() for part in _PARTS)]


@pytest.mark.parametrize("name", SOME_LAYERS)
@pytest.mark.usefixtures("greedy")
def test_layer(name: str):
    layer = LAYERS[name]
    with warnings.catch_warnings():
        # Some cannot keep the batch dynamic.
        warnings.simplefilter("ignore")
        members = programs((layer.member(seed) for seed in range(2)), layer.example())
    check_stack(members)


class Padded(nn.Module):
    """Attention with a mask for each example, of inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(6, 12), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mask = (x[:, :, 0] > -0.5)[:, None, None]  # [b, 1, 1, t]
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.fc(y.transpose(1, 2).flatten(2))


def test_a_mask_for_each_example():
    torch.manual_seed(3)
    members, x = [Padded().double() for _ in range(3)], torch.randn(3, 7, 6).double()
    module = check(members, (x,), 1e-12)
    assert count(module, aten.scaled_dot_product_attention.default) == 1


def test_a_network_that_draws_numbers_in_eval_mode_draws_them_in_the_members_order():
    layer, _ = FROZEN["FractionalMaxPool2d"]
    members = [layer.member(seed) for seed in range(2)]
    module = fxfuse.stack(members, layer.example(), reduce="none")
    torch.manual_seed(0)
    expected = [answers(member, *layer.example())[0] for member in members]
    torch.manual_seed(0)
    torch.testing.assert_close(answers(module, *layer.example())[0], torch.stack(expected))


def check_stack(members: Sequence[fxfuse.Program]) -> None:
    """By the check that `stack` makes itself; it is not blind."""
    module = fxfuse.stack(members, reduce="none")
    assert fxfuse.verify.sensitivity(members[0]) > 1e-6
    assert len(fxfuse.unstack(module)) == len(members)


_any = settings(suppress_health_check=list(HealthCheck))


@_any
@given(recipes(), st.booleans(), st.integers(2, 3))
def test_random_network(recipe: Recipe, stacks: bool, n: int):
    with pytest.MonkeyPatch.context() as monkeypatch:
        if stacks:
            make_greedy(monkeypatch)
        check_stack(members_of(recipe, n))


#: Operators that have a lowering: all of torch's pointwise ones, and those of the table. The sample
#: of `embedding` looks up rows by data, in which members differ; `Tied` has it below.
LOWERED = [
    operator
    for operator in SAMPLES
    if (operator in registered() and operator is not aten.embedding.default)
    or (is_pointwise(operator) and not operator._schema.is_mutable)
]


@pytest.mark.parametrize("operator", LOWERED, ids=str)
@pytest.mark.usefixtures("greedy")
def test_lowering(operator: Any):
    net = Net(copy.deepcopy(SAMPLES[operator])).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        net(x)
    program = fxfuse.capture(excite(net, x), x)
    members = [program, other(program, 1)]
    writer = walk(members, GREEDY)
    forms = {writer.form(n) for n in program.graph.nodes if n.target is operator}
    assert Form.STACKED in forms, forms
    check_stack(members)


def test_an_operator_has_one_lowering():
    with pytest.raises(RuleError, match="two lowerings"):
        lowering(aten.linear.default)(lambda writer, node: None)


def test_a_wrong_lowering_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def wrong(writer: Any, node: Any) -> Any:
        return writer.call(aten.relu.default, writer.stacked(node.args[0]))

    walker = importlib.import_module("fxfuse.ensemble.walk")
    find = walker.find
    entry = replace(find(aten.tanh.default), run=wrong)
    monkeypatch.setattr(walker, "find", lambda t: entry if t is aten.tanh.default else find(t))
    with pytest.raises(VerificationError, match="the stack does not answer like its members"):
        fxfuse.stack(perceptrons(), torch.randn(4, 6))


# --- which form ----------------------------------------------------------------------------------


def test_linear_layers_are_one_product_each():
    module = fxfuse.stack(perceptrons(), torch.randn(4, 6))
    assert count(module, aten.bmm.default) == 3
    assert count(module, aten.linear.default) == 0
    assert count(module, aten.batch_norm.default) == 1
    assert module.get_parameter("stacked__0__weight").shape == (3, 16, 6)


def test_convolutions_run_member_by_member_in_a_batch():
    members = resnets(2)
    module = fxfuse.stack(members, images())
    assert count(module, aten.conv2d.default) == 10
    # One member is done with before the next one begins.
    reads = [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]
    owners = [name[:7] for name in reads if "__block" in name]
    assert owners == sorted(owners)
    assert set(owners) == {"member0", "member1"}


class Depthwise(nn.Module):
    """A dense, a depthwise and a pointwise convolution, pooling, an input that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.point = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.point(self.norm(self.depth(self.stem(x).relu())).relu())
        return self.fc(nn.functional.max_pool2d(y, 2).mean((2, 3)))


def depthwise(n: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [excite(Depthwise().double(), images(8, torch.float64)) for _ in range(n)]


def test_light_convolutions_are_grouped_for_a_single_image():
    members, x = depthwise(), images(1, torch.float64)
    module = fxfuse.stack(members, x)
    groups = [n.args[6] for n in module.graph.nodes if n.target is aten.conv2d.default]
    assert groups == [1, 18, 3]
    assert count(fxfuse.stack(members, torch.cat([x, x])), aten.conv2d.default) == 9
    check(members, (x,), 1e-12)


def test_what_is_the_same_for_all_is_computed_once():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.sin() + torch.arange(6, dtype=x.dtype).cos())

    module = fxfuse.stack([Positions() for _ in range(3)], torch.randn(4, 6))
    assert count(module, aten.sin.default, aten.cos.default) == 2


def test_large_activations_are_not_copied_together():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv1d(2, 4, 3), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).transpose(1, 2).flatten(1).unflatten(1, (-1, 8)))

    members = [Late() for _ in range(2)]
    assert count(fxfuse.stack(members, torch.randn(2, 2, 34)), aten.bmm.default) == 1
    large = fxfuse.stack(members, torch.randn(2, 2, 2**14 + 2))
    assert count(large, aten.bmm.default) == 0
    assert count(large, aten.linear.default) == 2


def test_memory_is_written_over_where_members_run_apart():
    module = fxfuse.stack(resnets(2), images())
    assert count(module, aten.relu_.default) == 10
    assert count(module, aten.add_.Tensor) >= 4


# --- what the output is --------------------------------------------------------------------------


def test_mean_and_none():
    members, x = perceptrons(), torch.randn(5, 6)
    own = torch.stack([answers(member, x)[0] for member in members])
    torch.testing.assert_close(fxfuse.stack(members, x)(x), own.mean(0))
    torch.testing.assert_close(fxfuse.stack(members, x, reduce="none")(x), own)


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_mean_of_probabilities(class_dim: int):
    members, x = perceptrons(), torch.randn(5, 6)
    own = torch.stack([member(x).softmax(1) for member in members]).mean(0)
    module = fxfuse.stack(members, x, reduce="probabilities", class_dim=class_dim)
    torch.testing.assert_close(module(x), own)
    task, _ = infer_task(fxfuse.capture(module, (x,)))
    assert task == fxfuse.Classification(1, "probabilities")
    with pytest.raises(RewriteError, match="no dimension 2"):
        fxfuse.stack(members, x, reduce="probabilities", class_dim=2)


class Says(nn.Module):
    """Answers what it is told, whatever is asked."""

    def __init__(self, answer: list[list[float]]) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer + 0 * x.sum()


@pytest.mark.parametrize("class_dim", [-1, 0])
def test_vote(class_dim: int):
    told = [
        # Most votes against the largest mean; three-way tie; a member that votes for two.
        [[1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [2.0, 2.0, 0.0]],
        [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 1.0, 0.0]],
        [[0.0, 9.0, 0.0], [0.0, 0.0, 1.0], [9.0, 0.0, 0.0]],
    ]
    if class_dim == 0:
        told = [torch.tensor(answer).t().tolist() for answer in told]
    module = fxfuse.stack(
        [Says(answer) for answer in told], torch.ones(3), reduce="vote", class_dim=class_dim
    )
    found = module(torch.ones(3))
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 0, 0]
    assert module.train()(torch.ones(3)).tolist() == [0, 0, 0]


class Several(nn.Module):
    """A dictionary of outputs, one of them whole numbers, and a constant."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.fc, self.whole = nn.Linear(6, 4), whole

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.fc(x)
        return {"logits": y, "more": (y.argmax(1) if self.whole else y.exp(), 3)}


def test_every_output_is_reduced_and_keeps_its_place():
    members, x = [Several(False) for _ in range(2)], torch.randn(5, 6)
    found = fxfuse.stack(members, x)(x)
    own = [member(x) for member in members]
    torch.testing.assert_close(found["logits"], (own[0]["logits"] + own[1]["logits"]) / 2)
    torch.testing.assert_close(found["more"][0], (own[0]["more"][0] + own[1]["more"][0]) / 2)
    assert found["more"][1] == 3


def test_whole_numbers_have_no_mean():
    members, x = [Several(True) for _ in range(2)], torch.randn(5, 6)
    found = fxfuse.stack(members, x, reduce="none")(x)
    expected = torch.stack([member(x)["more"][0] for member in members])
    assert torch.equal(found["more"][0], expected)
    for reduce in ("mean", "vote", "probabilities"):
        with pytest.raises(RewriteError, match="int64"):
            fxfuse.stack(members, x, reduce=reduce)
    with pytest.raises(RewriteError, match="no dimension 2"):
        fxfuse.stack(perceptrons(), torch.randn(4, 6), reduce="vote", class_dim=2)


# --- training and state --------------------------------------------------------------------------


MODELS = {
    "stacked": (lambda: perceptrons(dtype=torch.float64), lambda: torch.randn(6, 6).double()),
    "split": (lambda: resnets(3, torch.float64), lambda: images(6, torch.float64)),
    "transformer": (
        lambda: transformers(dtype=torch.float64),
        lambda: images(6, torch.float64),
    ),
    "grouped": (depthwise, lambda: images(6, torch.float64)),
}


@pytest.mark.parametrize("survive", [False, True], ids=["itself", "pickled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_trains_every_member_as_alone(name: str, survive: bool):
    make, example = MODELS[name]
    members, x = make(), example()
    given = x[:1] if name == "grouped" else x
    module = fxfuse.stack(members, given, reduce="none")
    module = pickle.loads(pickle.dumps(module)) if survive else module
    module.train()
    y = torch.arange(6) % 4
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    outputs = module(x)
    sum(nn.functional.cross_entropy(output, y) for output in outputs).backward()
    optimizer.step()
    torch.manual_seed(0)
    for member in members:
        before = copy.deepcopy(member.state_dict())
        member.train()
        optimizer = torch.optim.SGD(member.parameters(), lr=0.1, momentum=0.9)
        nn.functional.cross_entropy(member(x), y).backward()
        optimizer.step()
        moved = [n for n, t in member.state_dict().items() if not torch.equal(t, before[n])]
        assert len(moved) == len(before)
    for state, member in zip(fxfuse.unstack(module), members, strict=True):
        for key, tensor in member.state_dict().items():
            torch.testing.assert_close(state[key], tensor, rtol=1e-9, atol=1e-12, msg=key)
    for member in members:
        member.eval()
    module.eval()
    own = torch.stack([answers(member, x)[0] for member in members])
    torch.testing.assert_close(module(x), own, rtol=1e-9, atol=1e-12)


def test_the_members_stay_as_they_were():
    members, x = perceptrons(), torch.randn(6, 6)
    before = copy.deepcopy([member.state_dict() for member in members])
    module = fxfuse.stack(members, x).train()
    module(x).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    for member, state in zip(members, before, strict=True):
        assert all(torch.equal(member.state_dict()[name], state[name]) for name in state)
        assert all(parameter.grad is None for parameter in member.parameters())


class Tied(nn.Module):
    """One weight under two names, read in two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.table(x)).tanh())


def test_tied_weights_stay_tied():
    members, x = [Tied() for _ in range(3)], torch.randint(0, 7, (4, 2))
    module = check(members, (x,), 1e-5)
    for state in fxfuse.unstack(module):
        assert state["head.weight"] is state["table.weight"]
    assert len(list(module.parameters())) == 3


def test_members_may_share_tensors():
    members, x = perceptrons(norm=False), torch.randn(4, 6)
    for member in members:
        member[0] = members[0][0]
    members[2][2] = members[1][2]
    module = check(members, (x,), 1e-5)
    names = set(module.state_dict())
    assert {"shared__0__weight", "member0__2__weight"} <= names
    assert count(module, aten.linear.default) == 1 + 3
    own = {id(p) for p in module.parameters()}
    assert len(own) == len({id(p) for m in members for p in m.parameters()}) - 2 * 2
    # What is shared gets the gradients of all that share it.
    module(x).sum().backward()
    for member in members:
        member(x).sum().backward()
    torch.testing.assert_close(
        module.get_parameter("shared__0__weight").grad, members[0][0].weight.grad
    )


def test_what_only_some_members_train_stays_apart():
    members, x = perceptrons(norm=False), torch.randn(4, 6)
    members[1][2].weight.requires_grad_(False)
    module = check(members, (x,), 1e-5)
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    assert trained["stacked__0__weight"]
    found = [trained[f"member{i}__2__weight"] for i in range(3)]
    assert found == [True, False, True]


def test_names_that_are_one_word_stay_apart():
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"_b": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
            self.a_ = nn.ModuleDict({"b": nn.Linear(3, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a_["b"](self.a["b"](self.a["_b"](x)))

    check([Names() for _ in range(2)], (torch.randn(4, 3),), 1e-5)


@pytest.mark.parametrize(
    "survive",
    [
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.deepcopy,
        lambda m: torch.compile(m, backend="eager"),
    ],
    ids=["pickle", "deepcopy", "compile"],
)
def test_unstack_knows_a_copy(survive: Callable[[nn.Module], nn.Module]):
    members, x = resnets(2), images()
    module = survive(fxfuse.stack(members, x))
    check_unstacked(module, members)
    torch.testing.assert_close(
        module(x), torch.stack([answers(m, x)[0] for m in members]).mean(0), rtol=1e-4, atol=1e-5
    )


def test_a_state_dict_goes_to_disk_and_back():
    members, x = resnets(2), images()
    module = fxfuse.stack(members, x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = fxfuse.stack([SmallResNet().eval() for _ in range(2)], x)
    twin.load_state_dict(torch.load(file), strict=True)
    check_unstacked(twin, members)


# --- what a module can do ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stacked", "split", "transformer"])
def test_compile_in_eval_and_training(name: str):
    make, example = MODELS[name]
    x = example()
    module = fxfuse.stack(make(), x)
    torch.testing.assert_close(
        torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x)
    )
    twin = copy.deepcopy(module).train()
    compiled = torch.compile(copy.deepcopy(twin), fullgraph=True, backend="aot_eager")
    for each in (twin, compiled):
        torch.manual_seed(0)
        each(x).sum().backward()
    compiled_state = compiled._orig_mod.state_dict()
    for key, tensor in twin.state_dict().items():
        torch.testing.assert_close(compiled_state[key], tensor, msg=key)
    grads = dict(compiled._orig_mod.named_parameters())
    for key, parameter in twin.named_parameters():
        torch.testing.assert_close(grads[key].grad, parameter.grad, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_export_and_any_batch(name: str):
    make, example = MODELS[name]
    x = example()
    module = fxfuse.stack(make(), x[:1] if name == "grouped" else x)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert set(program.state_dict) == set(module.state_dict())
    for rows in (x[:1], torch.cat([x, x])):
        torch.testing.assert_close(program.module()(rows), module(rows))
    again = fxfuse.capture(module, x)
    torch.testing.assert_close(again.module(x), module(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["split", "transformer"])
def test_no_device_or_dtype_is_baked_in(name: str, training: bool):
    make, example = MODELS[name]
    x = example()
    module = fxfuse.stack(make(), x, reduce="none").train(training)
    expected = module(x)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == expected.shape
    assert run_on_fake_cuda(module.float(), tuple(x.shape)).device.type == "cuda"


def test_an_input_that_is_written_into_is_every_members_own():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            x.add_(self.fc(x))
            return x * self.calls

    members, x = [Writes() for _ in range(2)], torch.randn(4, 6)
    own = [answers(member, x.clone())[0] for member in copy.deepcopy(members)]
    module = fxfuse.stack(members, x.clone(), reduce="none")
    before = [int(state["calls"]) for state in fxfuse.unstack(module)]
    given = x.clone()
    answers(module, given)
    assert torch.equal(given, x), "the caller's tensor was written into"
    assert [int(s["calls"]) for s in fxfuse.unstack(module)] == [n + 1 for n in before]
    fresh = [{**s, "calls": torch.zeros(())} for s in fxfuse.unstack(module)]
    for state, member, expected in zip(fresh, members, own, strict=True):
        member.load_state_dict(state)
        torch.testing.assert_close(answers(member, x.clone())[0], expected)


# --- bad input -----------------------------------------------------------------------------------


class DependsOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


def test_bad_input_is_named():
    members, x = perceptrons(), torch.randn(4, 6)
    with pytest.raises(MemberError, match="a stack needs at least 2 members, got 1"):
        fxfuse.stack(members[:1], x)
    with pytest.raises(OptionError, match="unknown reduce 'sum'"):
        fxfuse.stack(members, x, reduce="sum")
    with pytest.raises(
        MemberError, match=r"member 1 differs from member 0: outputs(.|\n)*\[b, 2\]"
    ):
        fxfuse.stack([members[0], nn.Linear(6, 2)], x)
    with pytest.raises(MemberError, match="member 1 differs from member 0: inputs"):
        fxfuse.stack([members[0], fxfuse.capture(nn.Linear(5, 4), torch.randn(4, 5))], x)
    with pytest.raises(MemberError, match="dtypes"):
        fxfuse.stack([members[0], copy.deepcopy(members[1]).double()], x)
    with pytest.raises(MemberError, match="the network has no weights"):
        fxfuse.stack([copy.deepcopy(m).to("meta") for m in members], x.to("meta"))
    with pytest.raises(RewriteError, match="Sequential is not a stack"):
        fxfuse.unstack(members[0])


class Other(nn.Module):
    """Not the network of `resnets`, with a buffer that no state_dict() has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(picture * self.scale).mean((2, 3))))


def test_members_of_different_architectures_stand_side_by_side(tmp_path: Path):
    x = images()
    first, last = resnets(2)
    members = [first, excite(Other(), x), last, Other().eval()]
    members[3].fc = members[1].fc
    each = torch.stack([answers(member, x)[0] for member in members])
    votes = nn.functional.one_hot(each.argmax(2), 4).sum(0) + 1e-3 * each.mean(0).softmax(1)
    for reduce, wanted in (
        ("none", each),
        ("vote", votes.argmax(1)),
        ("probabilities", each.softmax(2).mean(0)),
        ("mean", each.mean(0)),
    ):
        module = fxfuse.stack(members, x, reduce=reduce, verify=reduce == "mean")
        torch.testing.assert_close(module(x), wanted)
    check_unstacked(module, members)
    assert module.member1__fc__weight is module.member3__fc__weight
    fxfuse.save(module, tmp_path / "stack")
    for again in (
        fxfuse.load(tmp_path / "stack"),
        torch.export.export(module, (x,)).module(),
        torch.compile(module, backend="eager", fullgraph=True),
        pickle.loads(pickle.dumps(module)),
    ):
        torch.testing.assert_close(again(x), module(x))
    module.train()(x)
    assert not torch.equal(module.member1__norm__running_mean, members[1].norm.running_mean)


def test_a_network_that_cannot_be_exported_is_refused():
    members, x = [DependsOnData() for _ in range(2)], torch.randn(4, 6)
    with pytest.raises(CaptureError, match=r"torch\.export cannot capture DependsOnData"):
        fxfuse.stack(members, x)
    with pytest.warns(UserWarning, match="rejects"):
        traced = [fxfuse.capture(member, x) for member in members]
    with pytest.raises(CaptureError, match="no exported graph"):
        fxfuse.stack(traced)


def test_members_that_answer_no_numbers_are_refused():
    members = perceptrons()
    with torch.no_grad():
        members[1][0].weight.fill_(float("nan"))
    with pytest.raises(VerificationError):
        fxfuse.stack(members, torch.randn(4, 6))
    fxfuse.stack(members, torch.randn(4, 6), verify=False)


def test_devices_without_figures_are_treated_like_the_cpu():
    assert policy_of(torch.device("cuda")) == policy_of(torch.device("cpu"))


class Spectral(nn.Module):
    """Complex weights on the lowest frequencies, written into complex zeros (FNO)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(0.2 * torch.randn(6, 6, 4, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).transpose(1, 2)
        spectrum = torch.fft.rfft(h)
        out = torch.zeros(h.shape[0], 6, spectrum.shape[-1], dtype=torch.cfloat)
        out[:, :, :4] = torch.einsum("bit,iot->bot", spectrum[:, :, :4], self.weight)
        return self.last((torch.fft.irfft(out, n=h.shape[-1]) + h).relu().transpose(1, 2))


def test_complex_numbers_in_single_precision_are_compared_in_double():
    torch.manual_seed(0)
    members, x = [Spectral() for _ in range(2)], torch.randn(3, 10, 2)
    module = fxfuse.stack(members, x, reduce="none")
    expected = torch.stack([answers(member, x)[0] for member in members])
    torch.testing.assert_close(answers(module, x)[0], expected)
