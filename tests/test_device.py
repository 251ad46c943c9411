"""A fused network goes where it is sent: nothing in its graph names the device of the capture."""

from __future__ import annotations

import copy
import json
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxfuse
from benchmarks import gpu
from fxfuse.transform.emit import FusedModule, emit
from tests.models import build as known
from tests.nets import images, resnets


class Tables(nn.Module):
    """A table made from positions and a mask, as language models make them in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(6, 4)
        self.inner = nn.Linear(8, 6)
        self.register_buffer("speed", torch.linspace(1, 2, 4), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n = ids.shape[1]
        where = torch.arange(n, device=ids.device)
        angles = torch.outer(where.float(), self.speed)
        x = self.words(ids) + torch.cat([angles.sin(), angles.cos()], -1)
        mask = torch.full((n, n), float("-inf"), device=ids.device).triu(1)
        scores = x @ x.transpose(1, 2) + mask
        x = torch.relu(self.inner(scores.softmax(-1) @ x))
        return self.head(x) + torch.zeros(4, device=ids.device)


def send(module: nn.Module, device: str) -> None:
    """Puts fake tensors on a device, which this machine need not have, in place of a module's."""
    for own in module.modules():
        for name, tensor in own._parameters.items():
            if tensor is not None:
                own._parameters[name] = nn.Parameter(on(tensor, device))
        for name, tensor in own._buffers.items():
            own._buffers[name] = on(tensor, device)


def on(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def devices_of(module: nn.Module, args: tuple[Any, ...], device: str) -> set[str]:
    copied = copy.deepcopy(module)
    with nullcontext() if device == "meta" else FakeTensorMode(), torch.no_grad():
        send(copied, device)
        given = pytree.tree_map_only(torch.Tensor, lambda t: on(t, device), args)
        outputs = pytree.tree_leaves(copied(*given))
    return {x.device.type for x in outputs if isinstance(x, torch.Tensor)}


def emitted(model: nn.Module, args: tuple[Any, ...]) -> FusedModule:
    program = fxfuse.capture(model.eval(), args)
    return emit(program, program.state())


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_tables_follow_the_input(device: str):
    torch.manual_seed(0)
    model, ids = Tables(), torch.randint(0, 20, (2, 5))
    module = emitted(model, (ids,))
    torch.testing.assert_close(module(ids), model(ids))
    assert devices_of(module, (ids,), device) == {device}
    again = pickle.loads(pickle.dumps(module))
    torch.testing.assert_close(again(ids), model(ids))
    assert devices_of(again, (ids,), device) == {device}


@pytest.mark.parametrize("name", ["swin_t", "vit_b_32"])
def test_known_networks_on_a_fake_gpu(name: str):
    model = known(name, dtype=torch.float32)
    x = torch.randn(2, 3, 64, 64)
    assert devices_of(emitted(model, (x,)), (x,), "cuda") == {"cuda"}


def test_fused_wide_and_stacked_networks_on_a_fake_gpu():
    members = [Tables(), Tables()]
    ids = torch.randint(0, 20, (2, 5))
    made = [
        fxfuse.fuse(members, ids).module,
        fxfuse.fuse(members, ids, size=2).module,
        fxfuse.stack(members, ids),
        fxfuse.fuse(resnets(2), images(), size=0.5).module,
    ]
    for module in made[:3]:
        assert devices_of(module, (ids,), "cuda") == {"cuda"}
    assert devices_of(made[3], (images(),), "cuda") == {"cuda"}


def test_another_precision_runs():
    members = [Tables(), Tables()]
    ids = torch.randint(0, 20, (2, 5))
    module = fxfuse.fuse(members, ids).module
    assert torch.compile(module, backend="eager", fullgraph=True)(ids).dtype == torch.float32
    plain = fxfuse.fuse(resnets(2), images()).module
    assert plain.to(torch.bfloat16)(images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.nightly
def test_the_benchmark_for_gpus_runs(tmp_path: Path):
    path = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--smoke", "--members", "2", "--json", str(path)])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [row["step"] for row in found["rows"]] == ["equality", "latency", "fusing", "compiled"]
    assert not found["left"]
