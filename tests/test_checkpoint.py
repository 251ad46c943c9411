"""Checkpoints: what is read, what is refused, and that nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fxfuse.errors import (
    CheckpointError,
)
from fxfuse.members.checkpoint import load_checkpoint, read_file, read_state_dict, write_state_dict


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class Innocent:
    """Any class that is not a tensor."""


class TouchesFile:
    """Runs code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def state():
    return nn.Linear(3, 4).state_dict()


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_reads_torch_files(tmp_path, state, suffix):
    torch.save(state, tmp_path / f"a{suffix}")
    assert_same(read_state_dict(tmp_path / f"a{suffix}"), state)


def test_reads_safetensors(tmp_path, state):
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    assert_same(read_state_dict(tmp_path / "a.safetensors"), state)


def test_reads_the_older_torch_format(tmp_path, state):
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_same(read_state_dict(tmp_path / "a.pt"), state)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_reads_nested_state_dicts(tmp_path, state, key):
    torch.save({key: state, "epoch": 3}, tmp_path / "a.pt")
    assert_same(read_state_dict(tmp_path / "a.pt"), state)


def test_a_parameter_named_model_is_no_nesting(tmp_path):
    torch.save({"model": torch.ones(2)}, tmp_path / "a.pt")
    assert_same(read_state_dict(tmp_path / "a.pt"), {"model": torch.ones(2)})


@pytest.mark.parametrize("name", ["no.pt", "no.safetensors", "no.txt", "folder.pt"])
def test_missing(tmp_path, name):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="cannot open the checkpoint") as caught:
        read_state_dict(tmp_path / name)
    assert str(tmp_path / name) in caught.value.where


@pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, 0.9, -1])
def test_truncated_torch_file(tmp_path, state, keep, older):
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not older)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_state_dict(path)


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_truncated_safetensors(tmp_path, state, keep):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [b"hello world\n" * 9, b"\x80\x02}q\x00.", bytes(range(256))])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_state_dict(path)


def test_unknown_suffix(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="unknown format"):
        read_file(tmp_path / "a.npz")


def _pickled(content, path):
    path.write_bytes(pickle.dumps(content))


def _pickled_protocol_0(content, path):
    path.write_bytes(pickle.dumps(content, protocol=0))


def _saved_older(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, _saved_older, _pickled, _pickled_protocol_0])
def test_pickled_objects_are_refused(tmp_path, state, write):
    write(OrderedDict(state, extra=Innocent()), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="unpickling can run any code"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("write", [torch.save, _saved_older, _pickled, _pickled_protocol_0])
def test_code_in_a_pickle_never_runs(tmp_path, write):
    trace = tmp_path / "trace"
    write({"w": TouchesFile(trace)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds pickled Python objects"):
        read_state_dict(tmp_path / "a.pt")
    assert not trace.exists()


def test_the_object_is_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content",
    [torch.ones(2), {}, [torch.ones(2)], {"a": 1}, {1: torch.ones(2)}, {"model": {}}],
    ids=["tensor", "empty", "list", "number", "unnamed", "nested empty"],
)
def test_tensor_files_that_hold_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        read_state_dict(tmp_path / "a.pt")


def test_load_is_strict_and_names_the_difference(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"weight is \(4, 3\), the model's is \(5, 3"):
        load_checkpoint(nn.Linear(3, 5), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="lacks running_mean"):
        load_checkpoint(nn.BatchNorm1d(4), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="the model has no bias"):
        load_checkpoint(nn.Linear(3, 4, bias=False), tmp_path / "a.pt")


def test_a_mismatch_leaves_the_model_alone(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    model = nn.Linear(3, 4, bias=False)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"a\.pt does not fit the model"):
        load_checkpoint(model, tmp_path / "a.pt")
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)


def test_load_keeps_the_dtype_of_the_checkpoint(tmp_path):
    source = nn.BatchNorm1d(4).double()
    torch.save(source.state_dict(), tmp_path / "a.pt")
    model = nn.BatchNorm1d(4)
    load_checkpoint(model, tmp_path / "a.pt")
    assert model.weight.dtype == model.running_mean.dtype == torch.float64
    assert model.num_batches_tracked.dtype == torch.int64


def test_mixed_dtypes_are_refused(tmp_path, state):
    state["bias"] = state["bias"].double()
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="other dtypes than the model"):
        load_checkpoint(nn.Linear(3, 4), tmp_path / "a.pt")


def test_tied_parameters_survive_the_round_trip(tmp_path):
    source, model = Tied(), Tied()
    write_state_dict(tmp_path / "a.safetensors", source.state_dict())
    assert read_state_dict(tmp_path / "a.safetensors").keys() == source.state_dict().keys()
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert_same(model.state_dict(), source.state_dict())
    assert model.head.weight is model.embedding.weight


def test_names_that_safetensors_leaves_out_are_restored(tmp_path):
    source, model = Tied(), Tied()
    safetensors.torch.save_model(source, str(tmp_path / "a.safetensors"))
    assert len(read_state_dict(tmp_path / "a.safetensors")) == 1
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert_same(model.state_dict(), source.state_dict())


def test_write_accepts_views(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"all": base, "transposed": base.T, "row": base[1]}
    write_state_dict(tmp_path / "a.safetensors", state)
    assert_same(read_state_dict(tmp_path / "a.safetensors"), state)


def test_permissions_are_those_of_an_ordinary_file(tmp_path, state):
    write_state_dict(tmp_path / "a.safetensors", state)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_packed_records_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    """A few kilobytes could become gigabytes; torch.save packs nothing."""
    torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as source,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        read_state_dict(tmp_path / "packed.pt")


@pytest.mark.parametrize(
    "file", [["x"], [[]] * 400, "x" * 300, "\ud800.safetensors", "a\0b", "..", "../x", ""]
)
def test_an_index_names_files_beside_it(tmp_path: Path, file: object) -> None:
    path = tmp_path / "a.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"0.weight": file}}))
    with pytest.raises(CheckpointError, match=r"it places 0\.weight in"):
        load_checkpoint(nn.Linear(2, 2), path)


def test_a_header_has_bounds(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((40 << 20).to_bytes(8, "little") + b"{")
        file.truncate(50 << 20)
    with pytest.raises(CheckpointError, match="its header is longer than"):
        read_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize("mmap", [False, True])
def test_a_record_is_not_larger_than_it_is(tmp_path: Path, mmap: bool) -> None:
    torch.save({"x": torch.ones(40)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as source,
        zipfile.ZipFile(tmp_path / "large.pt", "w") as target,
    ):
        for name in source.namelist():
            # 40 elements become 10 to the 9, of a record that is empty.
            large = source.read(name).replace(b"K(", b"J" + (10**9).to_bytes(4, "little"))
            target.writestr(name, b"" if name.endswith("data/0") else large)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_file(tmp_path / "large.pt", mmap=mmap)
