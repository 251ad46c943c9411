"""Compiling: eval passes keep the answers; what is returned was compared with the network."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxfuse
from fxfuse import FusionResult
from fxfuse.common.measure import race
from fxfuse.errors import (
    CheckpointError,
    CompileError,
    MissingDependencyError,
    OptionError,
    RewriteError,
)
from fxfuse.runtime import (
    ChannelsLast,
    EvalForm,
    FoldBatchNorm,
    RemoveDropout,
    apply_passes,
    inference_copy,
)
from fxfuse.runtime.candidates import ALL, EAGER, PLAIN, Candidate, by_rule, worth_measuring
from fxfuse.transform.emit import emit
from tests.nets import images, resnets
from tests.strategies import Recipe, members_of, recipes

aten = torch.ops.aten
EVAL = (EvalForm, RemoveDropout, FoldBatchNorm, ChannelsLast)


@pytest.fixture(scope="module")
def result() -> FusionResult:
    torch.manual_seed(0)
    return fxfuse.fuse(resnets(2), images())


class Layers(nn.Module):
    """Every layer that a batch norm can follow, one whose result somebody else reads, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 6, 3, padding=1)
        self.same = nn.Conv2d(6, 6, 3, padding="same", bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3)
        self.wider = nn.ConvTranspose2d(6, 5, 2)
        self.wider_grouped = nn.ConvTranspose2d(5, 5, 1, groups=5)
        self.read_twice = nn.Conv2d(5, 5, 1)
        self.dense = nn.Linear(5, 4, bias=False)
        self.tokens = nn.Linear(4, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (6, 6, 6, 5, 5, 5))
        self.norms.append(nn.BatchNorm1d(4, affine=False))
        self.norms.append(nn.BatchNorm1d(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate((self.plain, self.same, self.grouped, self.wider)):
            x = torch.relu(self.norms[number](layer(x)))
        x = self.norms[4](self.wider_grouped(x))
        x = self.read_twice(x)
        x = self.norms[5](x) + x
        x = self.drop(self.norms[6](self.dense(x.mean((2, 3)))))
        # Rows of a token are no channels: this batch norm looks along dimension 1.
        return self.norms[7](self.tokens(x.unsqueeze(1).expand(-1, 3, -1)))


def randomised(module: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that no fold can leave out unseen."""
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
            if child.affine:
                nn.init.normal_(child.weight)
                nn.init.normal_(child.bias)
    return module


def norms_of(module: fx.GraphModule) -> int:
    return sum(node.target is aten.batch_norm.default for node in module.graph.nodes)


def test_folding_every_kind_of_layer():
    member = randomised(Layers()).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    program = fxfuse.capture(member, x)
    module = inference_copy(emit(program, {n: t.clone() for n, t in program.state().items()}))
    before = norms_of(module)
    changed = apply_passes(module, [make() for make in EVAL])
    assert changed == tuple(make.__name__ for make in EVAL)
    # A transposed grouped layer, one whose result is read twice, and one over tokens keep theirs.
    assert (before, norms_of(module)) == (8, 3)
    torch.testing.assert_close(module(x), member.eval()(x), rtol=1e-9, atol=1e-9)
    assert not any(node.target is aten.dropout.default for node in module.graph.nodes)
    assert module.plain.weight_folded.is_contiguous(memory_format=torch.channels_last)
    assert not hasattr(module.plain, "weight")


def test_a_weight_that_is_read_twice_is_folded_for_one_reader():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(self.conv(x)))

    member = randomised(Tied()).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    program = fxfuse.capture(member, x)
    module = inference_copy(emit(program, program.state()))
    apply_passes(module, [make() for make in EVAL])
    assert norms_of(module) == 0
    torch.testing.assert_close(module(x), member.eval()(x), rtol=1e-9, atol=1e-9)


@given(recipe=recipes())
@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=12)
def test_passes_keep_the_answers_of_random_networks(recipe: Recipe):
    (member,) = members_of(recipe, 1)
    module = emit(member, member.state())
    args, kwargs = member.example_inputs
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*args, **kwargs))
        copied = inference_copy(module)
        apply_passes(copied, [make() for make in EVAL])
        found = torch.utils._pytree.tree_leaves(copied(*args, **kwargs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_passes_in_a_pass_manager(result: FusionResult):
    module = inference_copy(result.module)
    passes = [make() for make in EVAL]
    manager = PassManager(passes=passes, run_checks_after_each_pass=True)
    done = manager(module)
    assert done.modified
    x = images()
    torch.testing.assert_close(done.graph_module(x), result.module(x))


@pytest.mark.parametrize("make", [RemoveDropout, FoldBatchNorm])
def test_a_graph_that_follows_the_mode_is_refused(result: FusionResult, make: type):
    with pytest.raises(RewriteError, match="EvalForm first"):
        make()(copy.deepcopy(result.module))


def test_compile_leaves_the_network_as_it_was(result: FusionResult):
    before = {name: t.clone() for name, t in result.module.state_dict().items()}
    result.module.train()
    try:
        compiled = fxfuse.compile(result, backend="aot_eager")
        assert result.module.training
    finally:
        result.module.eval()
    assert compiled.report.error < 1e-5
    assert compiled.report.passes[0] == "EvalForm"
    x = images(7)
    assert not compiled(x).requires_grad
    torch.testing.assert_close(compiled(x), result.module(x))
    for name, tensor in result.module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_compile_with_inductor_and_constant_weights():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    stacked = fxfuse.stack([network, copy.deepcopy(network)], torch.randn(2, 6))
    compiled = fxfuse.compile(stacked, torch.randn(2, 6), strict=True)
    # A network as small as this is faster as it is; the layout that wins is the example's business.
    assert compiled.report.options == {}
    assert compiled.report.error < 1e-6
    compiled = fxfuse.compile(stacked, torch.randn(2, 6), strict=True, freeze=True)
    assert (compiled.report.options, compiled.report.form) == ({"freezing": True}, "frozen")
    for batch in (2, 3, 5, 2):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(compiled(x), network(x))


def test_another_precision_is_told(result: FusionResult):
    compiled = fxfuse.compile(result, backend="eager", dtype=torch.bfloat16)
    assert compiled.report.dtype == torch.bfloat16
    assert 1e-5 < compiled.report.error < 5e-2
    assert compiled(images()).dtype == torch.float32


def test_a_backend_that_fails(result: FusionResult, monkeypatch: pytest.MonkeyPatch):
    @torch._dynamo.register_backend(name="fails")
    def fails(graph_module: fx.GraphModule, inputs: object) -> None:
        raise ValueError("out of order\nmore")

    try:
        with pytest.warns(UserWarning, match="out of order"):
            compiled = fxfuse.compile(result, backend="fails")
        assert compiled.report.backend == "eager"
        assert "out of order" in compiled.report.failure
        x = images()
        torch.testing.assert_close(compiled(x), result.module(x))
        with pytest.raises(CompileError, match="out of order"):
            fxfuse.compile(result, backend="fails", strict=True)
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("fails")
        torch._dynamo.backends.registry._BACKENDS.pop("fails")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "inductr"}, "unknown backend 'inductr'"),
        ({"mode": "fastest"}, "unknown mode 'fastest'"),
        ({"options": {"max_autotun": True}}, "unknown option 'max_autotun'"),
        ({"backend": "eager", "mode": "default"}, "works with backend='inductor' only"),
        ({"dtype": torch.int8}, "unsupported dtype torch.int8"),
        ({"quantize": "int4"}, "unknown quantize 'int4'"),
        ({"tune": True, "freeze": True}, "tune=True contradicts freeze and channels_last"),
    ],
)
def test_bad_options(result: FusionResult, options: dict, message: str):
    with pytest.raises(OptionError, match=message):
        fxfuse.compile(result, **options)


def test_a_module_needs_an_example(result: FusionResult):
    with pytest.raises(OptionError, match="example inputs are missing"):
        fxfuse.compile(result.module)


def test_what_is_compiled_stays(result: FusionResult):
    compiled = fxfuse.compile(result, backend="eager")
    with pytest.raises(OptionError, match="cannot be trained"):
        compiled.train()
    with pytest.raises(OptionError, match=r"cannot be moved or cast(.|\n)*compile that again"):
        compiled.double()
    assert compiled.eval() is compiled


def test_package(tmp_path: Path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    result = fxfuse.fuse([network, copy.deepcopy(network)], torch.randn(2, 6))
    path = tmp_path / "model.pt2"
    assert fxfuse.package(result, path) < 1e-6
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    loaded = fxfuse.load_package(path)
    x = torch.randn(9, 6)
    torch.testing.assert_close(loaded(x), result.module(x))


def test_the_form_that_was_chosen_is_packaged(
    result: FusionResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Compiling is left out: what would be compiled is run instead."""
    given = {}

    def write(program: torch.export.ExportedProgram, path: str, options: dict) -> None:
        Path(path).touch()
        given.update(options, program=program)

    monkeypatch.setattr("fxfuse.graph.torch_compat.write_package", write)
    monkeypatch.setattr(
        "fxfuse.graph.torch_compat.load_package", lambda path: given["program"].module()
    )
    compiled = fxfuse.compile(result, backend="eager", dtype=torch.bfloat16)
    report = dataclasses.replace(
        compiled.report, options={"freezing": True}, form="frozen", measured={"frozen": 0.5}
    )
    compiled.report = report
    assert fxfuse.package(compiled, tmp_path / "model.pt2") < 1e-6
    told = {"form": "frozen", "dtype": "torch.bfloat16", "frozen": "0.5"}
    assert (given["freezing"], given["aot_inductor.metadata"]) == (True, told)
    # Where nothing was asked for, weights are folded, and are no constants.
    given.clear()
    assert fxfuse.package(result, tmp_path / "model.pt2") < 1e-6
    assert list(given) == ["program"]


def test_no_partial_package_is_left(
    result: FusionResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"the old one")

    def broken(program: object, *, package_path: str, inductor_configs: object) -> None:
        Path(package_path).write_bytes(b"half")
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    with pytest.raises(CompileError, match="no compiler"):
        fxfuse.package(result, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_bytes() == b"the old one"
    with pytest.raises(OptionError, match=r"must end in \.pt2, got model\.bin"):
        fxfuse.package(result, tmp_path / "model.bin")


def test_what_is_no_package(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"the package model\.pt2 does not exist"):
        fxfuse.load_package(tmp_path / "model.pt2")
    (tmp_path / "model.pt2").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="is not a package"):
        fxfuse.load_package(tmp_path / "model.pt2")


def test_onnx(result: FusionResult, tmp_path: Path):
    import onnxruntime

    path = tmp_path / "model.onnx"
    assert fxfuse.export_onnx(result, path) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = images(5)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), result.module(x), rtol=1e-4, atol=1e-4, check_device=False
    )


def test_onnx_without_its_packages(
    result: FusionResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules["fxfuse.runtime.onnx"], "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="onnxruntime"):
        fxfuse.export_onnx(result, tmp_path / "model.onnx")


@pytest.mark.parametrize("how", ["int8", "int8_dynamic"])
def test_quantised_weights(how: str):
    """A weight that something else reads as well is quantised for the linear layer alone."""
    pytest.importorskip("torchao")

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mlp = nn.Embedding(50, 16), nn.Linear(16, 16, bias=False)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.mlp(self.words(words)), self.words.weight)

    torch.manual_seed(0)
    member, x = Tied().eval(), torch.randint(50, (4, 6))
    program = fxfuse.capture(member, x)
    compiled = fxfuse.compile(program.module, x, backend="eager", quantize=how)
    assert 1e-4 < compiled.report.error < 5e-2
    assert compiled.report.quantize == how
    kinds = {n: type(p).__name__ for n, p in compiled.graph_module.named_parameters()}
    assert kinds == {
        "words.weight": "Parameter",
        "words.weight_quantised": "Int8Tensor",
        "mlp.weight_quantised": "Int8Tensor",
    }
    both = fxfuse.compile(
        program.module, x, backend="eager", dtype=torch.bfloat16, quantize=how, strict=True
    )
    assert (both.report.dtype, both(x).dtype) == (torch.bfloat16, torch.float32)


def test_what_cannot_be_quantised(result: FusionResult, monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["fxfuse.runtime.quantize"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"fxfuse\[quantize\]\""):
        fxfuse.compile(result, quantize="int8")
    # A network without linear layers, wherever torchao is; and one that torchao rejects.
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "import_module", lambda name: None)
    convolution = fxfuse.capture(nn.Conv2d(3, 2, 1).eval(), images()).module
    with pytest.raises(OptionError, match="there is nothing to quantise"):
        fxfuse.compile(convolution, images(), backend="eager", quantize="int8")
    with pytest.raises(CompileError, match="torchao cannot quantise the network as 'int8'"):
        fxfuse.compile(result, backend="eager", quantize="int8")


def test_train_mode_is_kept_apart(result: FusionResult):
    """A network in training is compiled as what it is in eval mode, its statistics untouched."""
    module = copy.deepcopy(result.module).train()
    counters = {n: b.clone() for n, b in module.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = fxfuse.compile(module, images(), backend="eager")
    x = images()
    torch.testing.assert_close(compiled(x), result.module(x))
    assert all(torch.equal(b, counters[n]) for n, b in module.named_buffers())


def test_rounds_are_bounded_and_medians(monkeypatch: pytest.MonkeyPatch):
    """A clock that the calls turn: every network has its turn in every round, the same number."""
    now, log = [0.0], list[str]()

    def network(name: str, *seconds: float) -> Callable[[], None]:
        taken = itertools.cycle(seconds)

        def call() -> None:
            log.append(name)
            now[0] += next(taken)

        return call

    monkeypatch.setattr("fxfuse.common.measure.clock", lambda: now[0])
    fast, slow = network("fast", 0.01), network("slow", 0.02)
    found = race([slow, fast], (), {}, 1.0)
    assert found == pytest.approx([20, 10])
    assert now[0] < 1.2
    assert log[4:11] == ["slow", "fast", "fast", "fast", "slow", "fast", "fast"]
    # A call that was disturbed does not count, and three rounds are made of what takes long.
    now[0] = 0
    assert race([network("", 2, 2, 2, 90, 2)], (), {}, 1.0) == pytest.approx([2000])
    assert now[0] == 98


def test_what_is_compared():
    """Plain `torch.compile` where the size does not tell, and a stack as it is."""
    member = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    module, frozen = fxfuse.capture(member, torch.randn(2, 6)).module, Candidate(freeze=True)
    stacked = fxfuse.stack([member, copy.deepcopy(member)], torch.randn(2, 6), verify=False)
    assert worth_measuring(module, 10_000_000, frozen, is_known=True) == [frozen, PLAIN]
    assert worth_measuring(module, 30_000_000, frozen, is_known=True) == [frozen]
    assert worth_measuring(module, 30_000_000, frozen, is_known=False) == [frozen, PLAIN]
    assert worth_measuring(module.to("meta"), 30_000_000, frozen, is_known=True)[1:] == [PLAIN]
    assert worth_measuring(stacked, 900_000_000, frozen, is_known=True) == [frozen, EAGER]
    names = [one.name for one in ALL]
    assert names == ["frozen", "channels last", "folded", "plain", "eager"]


@pytest.mark.parametrize(
    ("tune", "forms"),
    [
        (None, ["channels last", "plain"]),
        (True, ["channels last", "folded", "plain", "eager"]),
        (False, []),
    ],
)
def test_the_fastest_form_is_kept(
    monkeypatch: pytest.MonkeyPatch, tune: bool | None, forms: list[str]
):
    """Compiling itself is left out: the backend `eager` stands for inductor."""
    module = sys.modules["fxfuse.runtime.compiled"]
    made: list[nn.Module] = []

    def last_wins(networks: list[nn.Module], *inputs: object) -> list[float]:
        made.extend(networks)
        return [float(len(networks) - number) for number in range(len(networks))]

    monkeypatch.setattr(module, "race", last_wins)
    monkeypatch.setattr(module, "_INDUCTOR", "eager")
    monkeypatch.setattr(module, "ALL", [one for one in ALL if not one.freeze])
    monkeypatch.setattr(module, "inductor_options", lambda mode, told: told)
    x = torch.randn(2, 3, 4, 4)
    member = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    network = fxfuse.capture(member, x).module
    compiled = fxfuse.compile(network, x, backend="eager", tune=tune)
    assert [one.report.form for one in made] == forms
    assert list(compiled.report.measured) == forms
    assert compiled is (made[-1] if made else compiled)
    assert compiled.report.form == (forms or ["channels last"])[-1]
    torch.testing.assert_close(compiled(x), member(x))
    # A form that cannot be compiled costs nothing but itself.
    monkeypatch.setattr(module, "Frozen", None)
    monkeypatch.setattr(module, "by_rule", lambda *size: Candidate(freeze=True))
    if tune is None:
        assert fxfuse.compile(network, x, backend="eager").report.form == "plain"
    # A network that no pass changes is what plain `torch.compile` makes of it.
    monkeypatch.setattr(module, "by_rule", lambda *size: Candidate(channels_last=True))
    made.clear()
    bare = fxfuse.capture(nn.Linear(4, 3).eval(), x).module
    assert fxfuse.compile(bare, x, backend="eager").report.form == "plain"
    assert not made

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="no compiler"):
        assert fxfuse.compile(bare, x, backend="eager", tune=tune).report.form == "eager"


def test_large_networks_are_frozen_on_a_cpu():
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert by_rule(cpu, 5_000_000, None, None)[:2] == (False, True)
    assert by_rule(cpu, 50_000_000, None, None)[:2] == (True, False)
    assert by_rule(cpu, 50_000_000, None, True)[:2] == (True, True)
    assert by_rule(cpu, 50_000_000, False, None)[:2] == (False, True)
    # Nothing else was measured.
    assert by_rule(other, 50_000_000, None, None)[:2] == (False, True)
