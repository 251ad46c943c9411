"""What is done in blocks is what would be done at once, and pages nobody writes are zeros."""

from __future__ import annotations

import importlib
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxfuse
from fxfuse import verify
from fxfuse.common.scratch import Scratch, zeros
from fxfuse.errors import CheckpointError
from fxfuse.members.tensor_file import TensorFile
from fxfuse.planning.context import State
from fxfuse.planning.scores.owned import _lines
from fxfuse.transform.apply import fused_tensors
from tests.nets import images, resnets
from tests.options import planned


def fused(options: dict[str, Any], n: int = 3) -> tuple[fxfuse.FusionPlan, dict[str, torch.Tensor]]:
    members = resnets(n, torch.float64)
    program = [fxfuse.capture(m, images(dtype=torch.float64)) for m in members]
    graph = fxfuse.analyze(program[0])
    states: list[State] = [c.state() for c in program]
    plan = planned(graph, states, "transplant", **options)
    return plan, fused_tensors(graph, plan, states)


@pytest.mark.parametrize("variant", [None, "iterative"])
def test_blocks(variant: str | None, monkeypatch: pytest.MonkeyPatch):
    """Scores and gathers: a tensor that is cut into many blocks, the last one shorter."""
    plan, at_once = fused({"variant": variant})
    # A convolution's row has 72 elements: one row in a block, or three, of eight.
    for block in (1, 250):
        for name in ("fxfuse.planning.scores.owned", "fxfuse.transform.combine"):
            monkeypatch.setattr(importlib.import_module(name), "BLOCK", block)
        again, tensors = fused({"variant": variant})
        assert again.digest == plan.digest
        assert all(torch.equal(tensors[name], at_once[name]) for name in at_once)


def test_the_wide_oracle_holds_one_weight_of_a_member(monkeypatch: pytest.MonkeyPatch):
    """Beside the wide network there are, in float64, a tensor of a member and of the next one."""
    program = [fxfuse.capture(m, images()) for m in resnets(4)]
    module = importlib.import_module("fxfuse.verify.in_double")
    original, alive, most = module.to_double, list[weakref.ref[Any]](), 0

    def tracked(value: Any) -> Any:
        nonlocal most
        # A tensor of an array keeps the array, however many views there are of it.
        array = original(value).numpy().copy()
        alive[:] = [*(ref for ref in alive if ref() is not None), weakref.ref(array)]
        most = max(most, sum(found.size for ref in alive if (found := ref()) is not None))
        return torch.from_numpy(array)

    monkeypatch.setattr(module, "to_double", tracked)
    assert verify.concatenation_equals_ensemble(program, mixing="per_member").passed
    sizes = [tensor.numel() for tensor in program[0].state().values()]
    assert max(sizes) <= most <= 2 * max(sizes) + 64 < sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_zeros(dtype: torch.dtype):
    """Those that the system hands out, and torch's own."""
    for shape in [(), (0, 3), (3, 5), (700, 1031)]:
        made = zeros(shape, dtype, torch.device("cpu"))
        assert torch.equal(made, torch.zeros(shape, dtype=dtype))
        made.add_(1)
        assert torch.equal(pickle.loads(pickle.dumps(made)), torch.ones(shape, dtype=dtype))
        assert made.data_ptr() % 64 == 0
        assert made.is_contiguous()


TENSORS = {
    "weight": torch.randn(7, 5),
    "half": torch.randn(3).bfloat16(),
    "flag": torch.tensor([True, False, True]),
    "eighth": torch.randn(4).to(torch.float8_e4m3fn),
    "after": torch.randn(6).double(),
    "nothing": torch.empty(0, 2),
    "number": torch.tensor(3),
}


def test_a_file_is_read_tensor_by_tensor(tmp_path: Path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"by": "a test"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.float(), tensor.float())
    # A tensor belongs to whoever reads it.
    file.read("weight").zero_()
    assert torch.equal(file.read("weight"), TENSORS["weight"])


def test_a_file_that_becomes_another_one_is_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="changed"):
        file.read("weight")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot open the checkpoint"):
        file.read("weight")


def test_finite_weights_may_add_up_to_infinity():
    """What is finite is asked of the sum first, which is in the weights' own precision."""
    members = [nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    for member in members:
        torch.nn.init.constant_(member[0].weight, 3e37)
        assert not torch.isfinite(member[0].weight.sum())
    assert fxfuse.fuse(members, torch.randn(3, 8)).verification.passed


@pytest.mark.parametrize("threads", [2, 5])
def test_scores_do_not_depend_on_threads(threads: int):
    def scores() -> list[np.ndarray]:
        tensor = torch.randn(130, 1031, 3, generator=torch.Generator().manual_seed(0))
        return list(_lines(tensor, {0: {}, 1: {}}, torch.square_, Scratch()).values())

    before, one = torch.get_num_threads(), scores()
    torch.set_num_threads(threads)
    try:
        assert all(np.array_equal(*pair) for pair in zip(one, scores(), strict=True))
    finally:
        torch.set_num_threads(before)
