"""Checkpoints as training leaves them, made by the tools that leave them, read in every way.

Each is loaded into modules and streamed from its file, and both give the network that its own tool
would give.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxfuse
from fxfuse import Members
from fxfuse.cli.zoo import make_member, make_model
from fxfuse.errors import CheckpointError, FxfuseError, OptionError
from fxfuse.graph.rebuild import rebuild
from fxfuse.members.checkpoint import load_checkpoint
from tests import nets
from tests.nets import images

#: Writes one member's checkpoint and returns its path.
Writer = Callable[[nn.Module, Path], Path]


def resnets(n: int) -> list[nets.SmallResNet]:
    """Residual networks of one block: it is their files that count here."""
    members = nets.resnets(n)
    for member in members:
        member.block2 = nn.Identity()  # type: ignore[assignment]
    return members


@lru_cache
def captured() -> fxfuse.Program:
    return fxfuse.capture(resnets(1)[0], images())


def with_weights_of(member: nn.Module) -> fxfuse.Program:
    """A network of `resnets` as a program, without exporting each."""
    state = member.state_dict(keep_vars=True)
    return replace(captured(), module=rebuild(captured().module, state))


def trained(model: nn.Module, wrapped: nn.Module | None = None) -> torch.optim.Optimizer:
    """A step of Adam, so that its state holds tensors of the weights' names and shapes."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    (wrapped or model)(images()).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone, for DistributedDataParallel."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def with_compiled_block(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.block1 = torch.compile(model.block1)  # type: ignore[assignment]
    return model


def prefixed(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


#: What wraps a network in training → its state_dict.
WRAPPED: dict[str, Callable[[nn.Module], Mapping[str, torch.Tensor]]] = {
    "ddp": lambda model: DistributedDataParallel(model).state_dict(),
    "data parallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled": lambda model: torch.compile(model).state_dict(),  # type: ignore[attr-defined]
    "compiled in ddp": lambda model: DistributedDataParallel(torch.compile(model)).state_dict(),  # type: ignore[arg-type]
    "a compiled part": lambda model: with_compiled_block(model).state_dict(),
    "swa": lambda model: AveragedModel(model).state_dict(),
    "swa of ddp": lambda model: AveragedModel(DistributedDataParallel(model)).state_dict(),
    # Of releases whose state_dict() keeps the wrapper's name.
    "fsdp": lambda model: prefixed(model, "_fsdp_wrapped_module."),
    "no prefix": lambda model: model.state_dict(),
}

#: How a training script puts the weights into what it saves.
NESTED: dict[str, Callable[[Mapping[str, torch.Tensor], Any], Any]] = {
    "alone": lambda state, optimizer: state,
    **{
        key: lambda state, optimizer, key=key: {
            "epoch": 3,
            "best": torch.tensor(0.9),
            "optimizer": optimizer,
            key: state,
        }
        for key in (
            "state_dict",
            "model",
            "model_state_dict",
            "net",
            "network",
            "module",
            "ema",
            "state_dict_ema",
            "model_ema",
            "generator",
            "params",
        )
    },
    "two deep": lambda state, optimizer: {"state": {"model": state}, "optim": optimizer},
    "an own key": lambda state, optimizer: {"student": state, "optimizers": [optimizer]},
}


def check_read(tmp_path: Path, members: list[nn.Module], write: Writer, **options: Any) -> None:
    """Check that checkpoints give the members, loaded and streamed, and that the result fits."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    paths = [write(member, tmp_path / str(number)) for number, member in enumerate(members)]
    template = copy.deepcopy(members[0])
    for parameter in template.parameters():
        nn.init.zeros_(parameter)
    given = Members.from_files(paths, template, **options)
    for member, loaded in zip(members, given.load().networks, strict=True):
        assert isinstance(loaded, nn.Module)
        expected = member.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    result = fxfuse.fuse(given, images(), verify=False)
    same = fxfuse.fuse([with_weights_of(m) for m in members], verify=False).state_dict()
    assert list(result.state_dict()) == list(same)
    assert all(torch.equal(tensor, same[name]) for name, tensor in result.state_dict().items())
    template.load_state_dict(result.state_dict(), strict=True)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_prefixes_of_wrappers(tmp_path: Path, wrapper: str, caplog: pytest.LogCaptureFixture):
    def write(member: nn.Module, folder: Path) -> Path:
        torch.save(WRAPPED[wrapper](member), folder / "a.pt")
        return folder / "a.pt"

    caplog.set_level(logging.INFO, "fxfuse")
    check_read(tmp_path, list(resnets(2)), write)
    said = [r.getMessage() for r in caplog.records if r.name == "fxfuse"]
    # Once for each file that is loaded, and for each that is streamed.
    assert len(said) == (0 if wrapper == "no prefix" else 4)
    assert all("names without" in text for text in said)
    if wrapper == "swa":
        assert said[0] == "a.pt: names without 'module.'; not read: n_averaged"


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap", [DistributedDataParallel, nn.DataParallel, torch.compile, AveragedModel]
)
def test_wrapped_networks_are_what_they_wrap(tmp_path: Path, wrap: Callable[..., Any]):
    """As members, as a template, and as what the result is loaded into."""
    members = list(resnets(2))
    wrapped = [wrap(member) for member in members]
    result = fxfuse.fuse(wrapped, images(), size=0.5, verify=False)
    same = fxfuse.fuse(members, images(), size=0.5, verify=False)
    for name, tensor in same.state_dict().items():
        assert torch.equal(result.state_dict()[name], tensor)
    assert type(result.to_module()) is type(members[0])
    assert fxfuse.prune(wrapped[0], images(), size=0.5).plan.n_members == 1
    x = images()
    found = fxfuse.stack(wrapped, x, reduce="none")(x)
    torch.testing.assert_close(found[0], members[0].eval()(x), rtol=0, atol=1e-5)
    torch.save(members[1].state_dict(), tmp_path / "a.pt")
    template = wrap(copy.deepcopy(members[0]))
    (loaded,) = Members.from_files([tmp_path / "a.pt"], template).load().networks
    assert isinstance(loaded, type(members[0]))
    assert torch.equal(loaded.fc.weight, members[1].fc.weight)
    whole = fxfuse.fuse(members, images(), verify=False)
    assert whole.load_into(template) is template
    expected = whole.state_dict()["fc.weight"]
    assert any(torch.equal(t, expected) for t in template.state_dict().values())


@pytest.mark.parametrize("nesting", NESTED)
def test_keys_of_training_scripts(tmp_path: Path, nesting: str):
    """The optimiser's tensors have the weights' shapes, and are no weights."""

    def write(member: nn.Module, folder: Path) -> Path:
        member.zero_grad()
        optimizer = trained(member).state_dict()
        torch.save(NESTED[nesting](member.state_dict(), optimizer), folder / "last.pth.tar")
        return folder / "last.pth.tar"

    check_read(tmp_path, list(resnets(2)), write)


def test_safetensors_with_a_prefix(tmp_path: Path):
    def write(member: nn.Module, folder: Path) -> Path:
        save_file(prefixed(member, "module.model."), folder / "a.safetensors")
        return folder / "a.safetensors"

    check_read(tmp_path, list(resnets(2)), write)


def test_weights_without_counters(tmp_path: Path):
    """As torch, which reads weights of releases whose BatchNorm counted nothing."""

    def write(member: nn.Module, folder: Path) -> Path:
        state = member.state_dict()
        old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
        assert len(old) < len(state)
        state |= {name: torch.zeros_like(t) for name, t in state.items() if name not in old}
        member.load_state_dict(state)
        fresh = copy.deepcopy(members[0])
        fresh.load_state_dict(old, strict=True)
        torch.save(old, folder / "a.pt")
        return folder / "a.pt"

    members = list(resnets(2))
    check_read(tmp_path, members, write)


# Weights and their moving average.


def averaged(member: nn.Module) -> AveragedModel:
    """A moving average, as it is after a step of training."""
    average = AveragedModel(member, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(member)  # a copy
    trained(member)
    average.update_parameters(member)
    assert not torch.equal(average.module.fc.weight, member.fc.weight)
    return average


#: How both stand in a checkpoint, and the names of the average.
BOTH: dict[str, tuple[Callable[[nn.Module, nn.Module], Any], list[str]]] = {
    "keys": (
        lambda model, ema: {"model": model.state_dict(), "model_ema": ema.state_dict()},
        ["ema", "model_ema", "model_ema.module"],
    ),
    "params": (
        lambda model, ema: {"params_ema": ema.state_dict(), "params": model.state_dict()},
        ["ema", "params_ema"],
    ),
    "prefixes": (
        lambda model, ema: {
            "state_dict": prefixed(model, "model.") | prefixed(ema.module, "ema_model.")
        },
        ["ema", "ema_model", "state_dict.ema_model"],
    ),
    "own keys": (
        lambda model, ema: {
            "student": prefixed(model, "backbone.") | prefixed(model.fc, "head."),
            "teacher": prefixed(ema.module, "backbone.") | prefixed(model.fc, "head."),
        },
        ["teacher", "teacher.backbone"],
    ),
}


@pytest.mark.parametrize("where", BOTH)
def test_the_weights_or_their_average(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture):
    make, names = BOTH[where]
    members = list(resnets(2))
    averages: list[nn.Module] = [averaged(member) for member in members]
    made = dict(zip(map(id, members), averages, strict=True))

    def write(member: nn.Module, folder: Path) -> Path:
        torch.save(make(member, made[id(member)]), folder / "a.ckpt")
        return folder / "a.ckpt"

    inner: list[nn.Module] = [average.module for average in averages]  # type: ignore[misc]
    by_average = dict(zip(map(id, inner), members, strict=True))
    for number, name in enumerate(names):
        (tmp_path / str(number)).mkdir()
        check_read(
            tmp_path / str(number),
            inner,
            lambda average, folder: write(by_average[id(average)], folder),
            weights=name,
        )
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    (tmp_path / "default").mkdir()
    if where == "own keys":
        with pytest.raises(FxfuseError, match=r"weights='(student|teacher)\.backbone'"):
            check_read(tmp_path / "default", members, write)
        return
    check_read(tmp_path / "default", members, write)
    # The choice is shown even where nobody has set logging up.
    said = [r for r in caplog.records if r.name == "fxfuse" and r.levelno >= logging.WARNING]
    assert "would read others that fit, too" in said[0].getMessage()
    assert said[0].levelno == logging.WARNING


def test_one_of_several(tmp_path: Path):
    """Nothing says which of two is meant; one that is not there is said, too."""
    first, second = (nn.Linear(3, 2) for _ in range(2))
    torch.save({"a": first.state_dict(), "b": second.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(OptionError, match=r"several weights that fit(.|\n)*'a', 'b'"):
        load_checkpoint(nn.Linear(3, 2), tmp_path / "a.pt")
    with pytest.raises(OptionError, match=r"no weights named 'ema'(.|\n)*'a', 'b'"):
        load_checkpoint(nn.Linear(3, 2), tmp_path / "a.pt", "ema")
    loaded = nn.Linear(3, 2)
    load_checkpoint(loaded, tmp_path / "a.pt", "b")
    assert torch.equal(loaded.weight, second.weight)


def test_a_part_of_a_larger_network_is_read_only_when_it_is_named(tmp_path: Path):
    larger = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    torch.save(larger.state_dict(), tmp_path / "a.pt")
    part = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match=r"weights='0' or weights='2'"):
        load_checkpoint(part, tmp_path / "a.pt")
    load_checkpoint(part, tmp_path / "a.pt", "2")
    assert torch.equal(part.weight, larger[2].weight)  # type: ignore[arg-type]


def test_what_does_not_fit_is_said_without_the_prefix(tmp_path: Path):
    model = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")  # type: ignore[attr-defined]
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(other, tmp_path / "a.pt")
    assert caught.value.why.startswith("under 'state_dict': shapes differ: 1.weight is (2, 4)")
    assert "_orig_mod" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"a model that has only\.here") as caught:
        load_checkpoint(
            nn.ModuleDict({"only": nn.ParameterDict({"here": torch.ones(1)})}), tmp_path / "a.pt"
        )
    assert "arguments" not in caught.value.how


# Objects beside the weights.


class Config:
    """A class of the training script's own."""

    def __init__(self, **values: Any) -> None:
        self.values = values


class Runs:
    """Runs a program when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> Any:
        return subprocess.check_call, (["touch", self.trace],)


def test_weights_beside_pickled_objects(tmp_path: Path):
    """As Lightning keeps hyper-parameters: the weights are read, and no object is made."""
    trace = tmp_path / "trace"

    def write(member: nn.Module, folder: Path) -> Path:
        wrapped = nn.ModuleDict({"model": member, "loss": nn.CrossEntropyLoss(torch.ones(3))})
        content = {
            "epoch": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": wrapped.state_dict(),
            "optimizer_states": [trained(member).state_dict()],
            "callbacks": {"ModelCheckpoint": {"best": torch.tensor(1.0), "folder": folder}},
            "hyper_parameters": {
                "config": Config(width=4, kind=Path),
                "args": argparse.Namespace(lr=0.1),
                "runs": Runs(trace),
            },
        }
        content["state_dict"] = wrapped.state_dict()
        torch.save(content, folder / "a.ckpt")
        return folder / "a.ckpt"

    check_read(tmp_path, list(resnets(2)), write)
    assert not trace.exists()
    # What the file does to who trusts it.
    torch.load(tmp_path / "0" / "a.ckpt", weights_only=False)
    assert trace.exists()


def test_objects_among_the_weights_are_not_read(tmp_path: Path):
    """A whole network that was pickled; what to do is said."""
    for content in (nn.Linear(3, 2), {"model": nn.Linear(3, 2), "epoch": 3}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"Linear(.|\n)*save model.state_dict\(\) alone"):
            load_checkpoint(nn.Linear(3, 2), tmp_path / "a.pt")


# Files of libraries.


def test_timm_checkpoints(tmp_path: Path):
    """What timm's training script saves, and a folder that it makes for the hub."""

    def made(**options: Any) -> Any:
        return timm.create_model("test_resnet", num_classes=5, **options)

    from timm.models import save_for_hf
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = made()
    average = ModelEmaV3(model, decay=0.5)
    optimizer = trained(model)
    average.update(model)
    saver = CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="test_resnet"),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    written = tmp_path / "last.pth.tar"
    for weights, expected in ((None, model), ("ema", average.module)):
        loaded = make_member("timm:test_resnet", {"num_classes": 5}, written, weights)
        assert all(torch.equal(t, expected.state_dict()[n]) for n, t in loaded.state_dict().items())
    save_for_hf(model, str(tmp_path / "hub"), model_config={"num_classes": 5})
    by_folder = make_model(f"timm:{tmp_path / 'hub'}", {})
    load_checkpoint(by_folder, tmp_path / "hub")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in by_folder.state_dict().items())
    assert by_folder.pretrained_cfg["num_classes"] == 5


def transformer() -> Any:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    config.architectures = ["BertForSequenceClassification"]
    return transformers.BertForSequenceClassification(config).eval()


def save_shards(model: Any, folder: Path) -> None:
    """A folder with several `.bin` files, as older releases wrote it."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=1000
    )
    for file, names in split.filename_to_tensors.items():
        torch.save({name: state[name] for name in names}, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_bin(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "save",
    [
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: model.save_pretrained(folder, max_shard_size=1000),
        save_bin,
        save_shards,
    ],
    ids=["safetensors", "sharded", "bin", "sharded bin"],
)
def test_folders_of_transformers(tmp_path: Path, save: Callable[[Any, Path], None]):
    members = [transformer() for _ in range(2)]
    folders = [tmp_path / "0", tmp_path / "1"]
    for member, folder in zip(members, folders, strict=True):
        folder.mkdir()
        save(member, folder)
    inputs = {"input_ids": torch.randint(0, 30, (2, 5))}
    result = fxfuse.fuse(Members.from_files(folders, transformer()), inputs, verify=False)
    same = fxfuse.fuse(members, inputs, verify=False).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in result.state_dict().items())
    for member, folder in zip(members, folders, strict=True):
        loaded = make_member(f"hf:{folders[0]}", {}, folder)
        expected = member.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())


def test_a_distributed_checkpoint_is_read_once_it_is_converted(tmp_path: Path):
    source, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    save({"model": source.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(CheckpointError, match="dcp_to_torch_save"):
        load_checkpoint(loaded, tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "converted.pt")
    load_checkpoint(loaded, tmp_path / "converted.pt")
    assert torch.equal(loaded.weight, source.weight)


def test_a_folder_without_weights_names_the_file_that_is_looked_for(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(nn.Linear(3, 2), tmp_path)
