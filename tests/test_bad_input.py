"""What users pass that is no good, or merely unusual: a clear error, or it works."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.utils.data import TensorDataset

import fxfuse
from fxfuse import Example, Transplant, verify
from fxfuse.activations.calibration import CalibrationBatches
from fxfuse.errors import (
    CaptureError,
    FxfuseError,
    InputError,
    MemberError,
    PlanError,
)
from tests.nets import SmallResNet, images, resnets


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 6, dtype=dtype), nn.Tanh()
    ).append(nn.Linear(6, 2, dtype=dtype))


def refused(error: type[FxfuseError], why: str, *, model: Any, x: Any = None) -> FxfuseError:
    """Both analyze and fuse raise this error, with all its parts; returns it."""
    x = torch.randn(3, 4) if x is None else x
    for call in (lambda: fxfuse.analyze(model, x), lambda: fxfuse.fuse([model, model], x)):
        with pytest.raises(error, match=why) as caught:
            call()
        assert type(caught.value) is error
        assert caught.value.why
        assert caught.value.how
    return caught.value


# --- a batch of one ---


def test_a_single_example_is_repeated():
    model = resnets(1)[0]
    x = images(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = fxfuse.capture(model, x)
    assert program.dynamic_batch
    assert program.example_inputs[0][0].shape == (2, 3, 8, 8)
    more = images(5)
    torch.testing.assert_close(program.module(more), model(more))
    groups = [g.name for g in fxfuse.analyze(model, x).groups]
    assert groups == [g.name for g in fxfuse.analyze(model, images(2)).groups]
    assert fxfuse.fuse(resnets(2), x).module(more).shape == (5, 4)


def test_every_input_is_repeated_keyword_inputs_too():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mlp()

        def forward(self, x: torch.Tensor, *, shift: torch.Tensor, factor: float) -> torch.Tensor:
            return self.layer(x + shift) * factor

    inputs = {"shift": torch.randn(1, 4), "factor": 2.0}
    program = fxfuse.capture(Two(), Example(torch.randn(1, 4), kwargs=inputs))
    assert program.dynamic_batch
    assert program.example_inputs[1]["shift"].shape == (2, 4)


class Unbatched(nn.Module):
    """Dimension 0 is the channel, of which there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class OverBatch(nn.Module):
    """Takes two, and answers otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * torch.arange(1, 1 + x.shape[0]).unsqueeze(1))


@pytest.mark.parametrize(
    ("model", "shape"), [(Unbatched(), (1, 8, 8)), (OverBatch(), (1, 4))], ids=["one", "other"]
)
def test_what_does_not_answer_two_alike_is_captured_as_it_is(model: nn.Module, shape: Any):
    x = torch.randn(shape)
    with pytest.warns(UserWarning, match="batch of 2 or more"):
        program = fxfuse.capture(model, x)
    assert program.example_inputs[0][0] is x
    torch.testing.assert_close(program.module(x), model(x))


# --- modes and dtypes ---


def test_members_in_train_mode_stay_so():
    members = [model.train() for model in resnets(2)]
    before = {n: t.clone() for n, t in members[0].state_dict().items()}
    result = fxfuse.fuse(members, images())
    assert result.verification.passed
    assert all(m.training for member in members for m in member.modules())
    for name, tensor in members[0].state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype):
    members = [mlp(dtype), mlp(dtype)]
    result = fxfuse.fuse(members, torch.randn(3, 4, dtype=dtype))
    assert result.verification.passed
    assert {t.dtype for t in result.state_dict().values()} == {dtype}
    assert result.module(torch.randn(5, 4, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
def test_members_of_different_dtypes(other: torch.dtype):
    with pytest.raises(MemberError, match="dtypes") as caught:
        fxfuse.fuse([mlp(), mlp(other)], torch.randn(3, 4))
    assert caught.value.where == "0.weight"
    assert str(other) in caught.value.why


def test_members_on_different_devices():
    with pytest.raises(MemberError, match="devices") as caught:
        fxfuse.fuse([mlp(), mlp().to("meta")], torch.randn(3, 4))
    assert caught.value.why == "cpu vs meta"


def test_an_example_of_another_dtype():
    error = refused(InputError, "the model rejects the example inputs", model=mlp(torch.float16))
    assert ".to(torch.float16)" in error.how


def test_an_example_on_another_device():
    error = refused(
        InputError,
        "the model rejects the example inputs",
        model=mlp(),
        x=torch.randn(3, 4, device="meta"),
    )
    assert error.how == "move both to one device: the model is on cpu, an input on meta"


# --- complex numbers ---


def complex_mlp(dtype: torch.dtype = torch.complex64) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b, dtype=dtype) for a, b in ((4, 8), (8, 6), (6, 2))))


@pytest.mark.parametrize("method", ["transplant", "average", "weight_matching"])
def test_complex_weights_are_fused(method: str):
    members = [complex_mlp(), complex_mlp()]
    x = torch.randn(3, 4, dtype=torch.complex64)
    result = fxfuse.fuse(members, x, method=method)
    assert result.verification.checks[0].passed
    assert result.verification.checks[0].tolerance == verify.EXACT
    taken = {int(m) for m in result.plan.maps[0].member}
    assert taken == {0, 1}
    rows = torch.cat([m[0].weight for m in members])
    if method == "transplant":
        for row in result.state_dict()["0.weight"]:
            assert bool((rows == row).all(1).any())


@pytest.mark.parametrize("score", ["l1", "l2"])
def test_an_imaginary_part_counts_for_scores(score: str):
    members = [complex_mlp(), complex_mlp()]
    with torch.no_grad():
        for name, parameter in members[1].named_parameters():
            # Without its real part, and larger than the other member's as soon as the rest counts.
            parameter.copy_(3j * members[0].get_parameter(name).abs())
    x = torch.randn(3, 4, dtype=torch.complex64)
    plan = fxfuse.fuse(members, x, method=Transplant(score=score)).plan
    assert all(set(one.member.tolist()) == {1} for one in plan.maps)


def test_oracles_hold_for_complex_weights():
    x = torch.randn(3, 4, dtype=torch.complex64)
    assert verify.identity(complex_mlp(), x).passed
    check = verify.concatenation_equals_ensemble([complex_mlp(), complex_mlp()], x)
    assert check.passed
    assert check.tolerance == verify.EXACT


class Spectral(nn.Module):
    """Real in and out, complex weights between two Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.filter = nn.Parameter(torch.randn(4, 8, dtype=torch.complex64))
        self.last = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(self.first(x), dim=1) * self.filter
        return self.head(self.last(torch.fft.irfft(spectrum, dim=1)).relu())


def test_a_fourier_transform_freezes_and_is_named():
    x = torch.randn(3, 6, 4)
    graph = fxfuse.analyze(Spectral(), x)
    assert {"aten.fft_rfft.default", "aten.fft_irfft.default"} >= {
        missing.operator for missing in graph.without_rule
    }
    assert verify.permutation_of(graph).passed
    assert fxfuse.fuse([Spectral(), Spectral()], x).verification.passed


# --- tensors that are not dense ---


class Holding(nn.Module):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.held = nn.Parameter(tensor, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors(layout: str):
    sparse = getattr(torch.randn(3, 4), layout)()
    error = refused(MemberError, "not dense", model=Holding(sparse))
    assert error.where == "held"
    assert "to_dense" in error.how
    error = refused(InputError, "not dense", model=mlp(), x=sparse)
    assert "to_dense" in error.how


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights():
    packed = quantize_dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)
    error = refused(MemberError, "weights that are not tensors", model=packed)
    assert "quantise the result" in error.how
    quantised = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.quint8)
    refused(MemberError, "not dense", model=Holding(quantised))


class Int8(nn.Module):
    """Weights as int8 with a scale for each row, as weight-only quantisation keeps them."""

    def __init__(self, *, as_parameter: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        weight = torch.randint(-127, 127, (8, 8), dtype=torch.int8)
        if as_parameter:
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.rand(8, 1))
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x) @ (self.weight.float() * self.scale).t()).relu())


@pytest.mark.parametrize("as_parameter", [False, True])
def test_int8_weights_are_constants(as_parameter: bool):
    members = [Int8(as_parameter=as_parameter) for _ in range(2)]
    x = torch.randn(3, 4)
    graph = fxfuse.analyze(members[0], x)
    assert graph.frozen[("weight", 0)].interface
    assert not graph.groups
    with pytest.raises(MemberError, match="member 1 differs from member 0: constants") as caught:
        fxfuse.fuse(members, x)
    assert caught.value.where == "weight"
    assert "quantise the result" in caught.value.why


# --- no values ---


def test_a_network_on_the_meta_device_can_be_analysed():
    real, x = SmallResNet(), images()
    expected = fxfuse.analyze(real, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = fxfuse.analyze(real.to("meta"), x.to("meta"))
    assert [(g.name, g.n_units, list(g.index)) for g in graph.groups] == [
        (g.name, g.n_units, list(g.index)) for g in expected.groups
    ]
    assert graph.free_fraction == expected.free_fraction


class Masked(nn.Module):
    """A constant made in the graph, and one that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 2)
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x) + torch.zeros(8, device=x.device)
        return self.third(self.second(hidden)[:, self.order])


def test_constants_without_values_freeze_what_depends_on_them():
    x = torch.randn(2, 4)
    assert len(fxfuse.analyze(Masked(), x).groups) == 2
    with pytest.warns(UserWarning, match="order are on the meta device"):
        graph = fxfuse.analyze(Masked().to("meta"), x.to("meta"))
    (group,) = graph.groups
    assert ("first.weight", 0) in group.index
    assert ("second.weight", 0) in graph.frozen
    assert ("second.weight", 0) not in graph.group_of


def test_there_is_nothing_to_fuse_or_to_verify_on_the_meta_device():
    members, x = [mlp().to("meta") for _ in range(2)], torch.randn(3, 4, device="meta")
    with pytest.raises(MemberError, match="no weights") as caught:
        fxfuse.fuse(members, x)
    assert "analyze" in caught.value.why
    assert caught.value.where == "0.weight"
    with pytest.raises(MemberError, match="the network has no weights"):
        verify.permutation(members[0], x)


# --- regions of the graph ---


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.layer(x),))


def test_a_region_that_stays_a_subgraph():
    assert "cond" in refused(CaptureError, "cannot be inlined", model=Branching()).what


# --- nothing in, nothing out ---


def test_nan_inputs():
    x = torch.randn(3, 4)
    x[1, 2] = float("nan")
    assert "shape (3, 4)" in refused(InputError, "an example input is NaN", model=mlp(), x=x).where


def test_infinite_inputs_are_masks():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mlp()

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.layer((x + mask).softmax(-1))

    mask = torch.zeros(3, 4)
    mask[:, 0] = -float("inf")
    assert fxfuse.analyze(Biased(), (torch.randn(3, 4), mask)).groups


def test_answers_that_are_no_floats():
    model = Returning(lambda y: (y, y > 0, y.argmax(-1)))
    assert fxfuse.capture(model, torch.randn(1, 4)).dynamic_batch


def test_an_empty_batch():
    refused(InputError, "an example input is empty", model=mlp(), x=torch.randn(0, 4))


@pytest.mark.parametrize("given", [b"text", len, nn.Linear], ids=["bytes", "function", "class"])
def test_what_is_no_model(given: Any):
    refused(CaptureError, "is not a network", model=given)


def test_a_model_without_parameters():
    graph = fxfuse.analyze(nn.ReLU(), torch.randn(3, 4))
    assert graph.groups == ()
    assert graph.free_fraction == 0.0
    with pytest.raises(PlanError, match="nothing in this network can be fused") as caught:
        fxfuse.fuse([nn.ReLU(), nn.ReLU()], torch.randn(3, 4))
    assert caught.value.why == "it has no parameters"


class Returning(nn.Module):
    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = mlp()
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.layer(x))


class Answer:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda y: None, "NoneType"),
        (lambda y: 3, "int"),
        (lambda y: "text", "str"),
        (lambda y: (None, 1), "tuple"),
        (lambda y: Answer(y), "Answer"),
    ],
)
def test_a_model_that_returns_no_tensor(wrap: Callable[[torch.Tensor], Any], kind: str):
    error = refused(CaptureError, "returns no tensor", model=Returning(wrap))
    assert kind in error.why


def test_a_model_that_returns_other_things_beside_a_tensor():
    members = [Returning(lambda y: {"logits": y, "loss": None, "step": 3}) for _ in range(2)]
    result = fxfuse.fuse(members, torch.randn(3, 4))
    answer = result.module(torch.randn(5, 4))
    assert answer["logits"].shape == (5, 2)
    assert (answer["loss"], answer["step"]) == (None, 3)


# --- members and calibration inputs of other kinds ---


def test_members_from_a_generator():
    members, x = [mlp(), mlp()], torch.randn(3, 4)
    assert fxfuse.fuse((m for m in members), x).plan.n_members == 2
    assert fxfuse.stack(nn.ModuleList(members), x)(x).shape == (3, 2)


@pytest.mark.parametrize("call", [fxfuse.fuse, fxfuse.stack])
@pytest.mark.parametrize(
    ("members", "why"),
    [
        (mlp(), "one network is not an ensemble"),
        ("member.pt", "one network is not an ensemble"),
        (None, "a NoneType holds no members"),
        ([mlp().state_dict()] * 2, "load a state_dict into a network"),
    ],
)
def test_what_is_no_list_of_networks(call: Any, members: Any, why: str):
    with pytest.raises(FxfuseError, match=why) as caught:
        call(members, torch.randn(3, 4))
    assert caught.value.how


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_member():
    refused(CaptureError, "scripted module", model=torch.jit.script(mlp()))
    refused(CaptureError, "scripted module", model=torch.jit.trace(mlp(), torch.randn(3, 4)))


def test_a_member_that_is_there_twice():
    model = mlp()
    with pytest.warns(UserWarning, match="members 0 and 2 are the same object"):
        fxfuse.fuse([model, mlp(), model], torch.randn(3, 4))
    with pytest.warns(UserWarning, match="members 0 and 1 are the same object"):
        fxfuse.stack([model, model], torch.randn(3, 4))


def test_a_data_set_as_calibration():
    members, x, y = [mlp(), mlp()], torch.randn(120, 4), torch.randint(2, (120,))
    graph = fxfuse.analyze(members[0], x[:3])
    alone, both = (
        CalibrationBatches.of(graph.program, TensorDataset(*tensors), shuffle=False)
        for tensors in ((x,), (x, y))
    )
    assert torch.equal(alone.whole[0][0], x)
    assert not alone.labels
    assert torch.equal(torch.cat(both.labels), y)


def test_calibration_without_values():
    with pytest.raises(InputError, match="no values"):
        fxfuse.fuse(
            [mlp(), mlp()], torch.randn(3, 4), calibration=torch.empty(99, 4, device="meta")
        )


# --- names, which torch.fx writes into Python code ---


class Called(nn.Module):
    """A layer, a buffer or a plain tensor of any name."""

    def __init__(self, name: str, kind: str = "layer") -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.name, self.layers = name, nn.ModuleDict()
        if kind == "layer":
            self.layers[name] = nn.Linear(4, 4)
        elif kind == "buffer":
            self.register_buffer(name, torch.ones(4), persistent=False)
        else:
            setattr(self, name, torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x).relu()
        return self.out(x * getattr(self, self.name)) if not self.layers else self.out(x)


WRITES = """x");open('opened','w');print("x"""
NAMES = ('a"b', "a\\b", '"""', "a\0b", "a\nb", "a\u2028b", "a\ud800b", "class", "None")


@pytest.mark.parametrize("name", [*NAMES, WRITES])
@pytest.mark.parametrize("kind", ["layer", "buffer", "plain"])
def test_a_name_that_is_no_python_is_refused(name: str, kind: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(MemberError, "graphs are Python code", model=Called(name, kind))
    assert "rename" in error.how
    with pytest.raises(MemberError, match="graphs are Python code"):
        fxfuse.stack([Called(name, kind), Called(name, kind)], torch.randn(3, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["it's", "a b", "é", "a" * 250, "{x}", "#", "0", "');print('x"])
def test_any_other_name_is_fine(name: str) -> None:
    torch.manual_seed(0)
    member, x = Called(name), torch.randn(3, 4)
    found = fxfuse.fuse([member, member], x, size=2)
    torch.testing.assert_close(found.module(x), member(x))


def test_a_keyword_input_that_is_no_python_is_refused(tmp_path, monkeypatch) -> None:
    class Any_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(next(iter(inputs.values())))

    monkeypatch.chdir(tmp_path)
    for name in ("x=open('opened', 'w')", "x y", "lambda", ""):
        given = Example(kwargs={name: torch.randn(3, 4)})
        refused(InputError, "no identifier of Python", model=Any_(), x=given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [torch.empty(0, 4), [], [torch.empty(0, 4)]])
def test_no_calibration_inputs_at_all(given: Any) -> None:
    with pytest.raises(InputError, match="there are no calibration inputs"):
        fxfuse.fuse([mlp(), mlp()], torch.randn(3, 4), calibration=given)


# --- calls that go wrong easily ---


class ByName(nn.Module):
    """Takes its input by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, *, pixels: torch.Tensor) -> torch.Tensor:
        return self.net(pixels)


WRONG_CALLS: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "state_dicts": (
        lambda ms, x: fxfuse.fuse([m.state_dict() for m in ms], x),
        "load a state_dict into a network of its class",
    ),
    "one network": (lambda ms, x: fxfuse.fuse(ms[0], x), "a list of two or more"),
    "one in a list": (lambda ms, x: fxfuse.fuse(ms[:1], x), "two or more trained networks"),
    "functions": (lambda ms, x: fxfuse.fuse([mlp, mlp], x), "call it, or wrap it"),
    "classes": (lambda ms, x: fxfuse.fuse([ByName, ByName], x), r"such as ByName\(\)"),
    "no inputs": (lambda ms, x: fxfuse.fuse(ms), "forward takes .*input"),
    "numpy": (lambda ms, x: fxfuse.fuse(ms, x.numpy()), r"torch\.from_numpy"),
    "by place": (
        lambda ms, x: fxfuse.fuse([ByName(), ByName()], x),
        "pass keyword inputs as a mapping, {'pixels': tensor}$",
    ),
    "calibration by place": (
        lambda ms, x: fxfuse.fuse([ByName(), ByName()], {"pixels": x}, calibration=x),
        "in the form of the example, {'pixels': tensor}",
    ),
    "calibration by name": (
        lambda ms, x: fxfuse.fuse(ms, x, calibration={"pixels": x}),
        "in the form of the example, tensor",
    ),
    "calibration path": (lambda ms, x: fxfuse.fuse(ms, x, calibration="images/"), "DataLoader"),
    "calibration of another size": (
        lambda ms, x: fxfuse.fuse(ms, x, calibration=torch.randn(99, 5)),
        "resize them",
    ),
    "method": (lambda ms, x: fxfuse.fuse(ms, x, method="transplnt"), "did you mean transplant"),
    "class of a method": (
        lambda ms, x: fxfuse.fuse(ms, x, method=Transplant),
        r"pass Transplant\(\)",
    ),
    "score": (
        lambda ms, x: fxfuse.fuse(ms, x, method=Transplant(score="l3")),
        "did you mean l2",
    ),
    "size": (lambda ms, x: fxfuse.fuse(ms, x, size="half"), "pass a number such as 0.5"),
    "large size": (lambda ms, x: fxfuse.fuse(ms, x, size=3), "."),
    "heads": (lambda ms, x: fxfuse.fuse(ms, x, heads=["4"]), r"pass fxfuse\.Heads"),
    "constraints": (
        lambda ms, x: fxfuse.fuse(ms, x, constraints={"freeze": "0"}),
        r"pass fxfuse\.Constraints",
    ),
    "task": (lambda ms, x: fxfuse.fuse(ms, x, task="classes", calibration=x), "Classification"),
    "refine": (
        lambda ms, x: fxfuse.fuse(ms, x, refine=["refit"], calibration=x),
        r"\[Refit\(\), Match\(\)\]",
    ),
    "refine without inputs": (lambda ms, x: fxfuse.fuse(ms, x, refine=[fxfuse.Refit()]), "."),
    "unused inputs": (
        lambda ms, x: fxfuse.fuse(ms, x, method="average", refine=[], calibration=x),
        "leave calibration out",
    ),
    "files without a template": (
        lambda ms, x: fxfuse.fuse(["a.pt", "b.pt"], x),
        r"from_files\(paths, template\)",
    ),
    "pruning without a size": (lambda ms, x: fxfuse.prune(ms[0], x), "size=0.5"),
    "pruning a list": (lambda ms, x: fxfuse.prune(ms, x, size=0.5), "the network itself"),
    "frozen name": (
        lambda ms, x: fxfuse.fuse(ms, x, constraints=fxfuse.Constraints(freeze="0.wight")),
        "0.weight",
    ),
    "no folder": (lambda ms, x: fxfuse.load("/nobody"), r"fxfuse\.save"),
    "an existing folder": (
        lambda ms, x: fxfuse.save(fxfuse.fuse(ms, x, verify=False), "."),
        "force=True",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_names_the_fix(name: str):
    call, fix = WRONG_CALLS[name]
    with pytest.raises(FxfuseError) as caught:
        call([mlp(), mlp()], torch.randn(3, 4))
    assert caught.value.how
    assert re.search(fix, f"{caught.value.why}\n{caught.value.how}", re.MULTILINE)
