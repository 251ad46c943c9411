"""What a fused module can do: everything that the user's own class can."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxfuse
from fxfuse.transform.emit import FusedModule
from tests.nets import SmallResNet, images, resnets


@pytest.fixture
def fused() -> FusedModule:
    return fxfuse.fuse(resnets(2), images()).module


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(
    "survive", [pickled, copy.deepcopy, lambda m: m], ids=["pickle", "deepcopy", "itself"]
)
@pytest.mark.parametrize("training", [False, True])
def test_one_training_step_equals_the_users_own_class(
    fused: FusedModule, survive: Callable[[nn.Module], nn.Module], training: bool
):
    reference = SmallResNet()
    reference.load_state_dict(fused.state_dict(), strict=True)
    module = survive(fused.train(training))
    reference.train(training)
    assert module.training is training
    module.train()
    reference.train()
    x, y = images(6), torch.tensor([0, 1, 2, 3, 0, 1])
    for network in (module, reference):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(0)  # dropout
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, msg=name)
    assert module.state_dict()["bn.num_batches_tracked"] == reference.bn.num_batches_tracked
    module.eval()
    reference.eval()
    torch.testing.assert_close(module(x), reference(x))
    assert not torch.equal(module(x), fused(x)) or module is fused


def test_eval_does_not_touch_statistics(fused: FusedModule):
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    fused(images())
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_compile_fullgraph_in_eval_and_training(fused: FusedModule):
    x = images()
    expected = fused(x)
    compiled = torch.compile(fused, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    twin = copy.deepcopy(fused).train()
    compiled_twin = torch.compile(copy.deepcopy(twin), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    out = compiled_twin(x)
    out.sum().backward()
    torch.manual_seed(0)
    twin(x).sum().backward()
    compiled_state = compiled_twin._orig_mod.state_dict()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(compiled_state[name], tensor, msg=name)


def test_a_compiled_module_follows_its_mode(fused: FusedModule):
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    x = images()
    evaluated = compiled(x)
    fused.train()
    assert not torch.equal(compiled(x), evaluated)
    assert fused.get_buffer("bn.num_batches_tracked") > 0


def test_export(fused: FusedModule):
    x = images()
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert program.module()(images(7)).shape == (7, 4)
    torch.testing.assert_close(program.module()(x), fused(x))
    assert set(program.state_dict) == set(fused.state_dict())


def test_no_device_or_dtype_is_baked_in(fused: FusedModule):
    half = copy.deepcopy(fused).to(torch.bfloat16)
    out = half(images().to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), copy.deepcopy(fused)(images()).float(), atol=10, rtol=1, check_dtype=False
    )
    meta = copy.deepcopy(fused).to("meta")
    assert meta(images().to("meta")).shape == (4, 4)


def run_on_fake_cuda(module: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Runs a module whose tensors and input pretend to be on a GPU; needs none."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(tensor.detach()) for name, tensor in tensors.items()}
    with mode:
        on_gpu = {name: tensor.to("cuda") for name, tensor in fake.items()}
        return torch.func.functional_call(module, on_gpu, (torch.empty(shape, device="cuda"),))


@pytest.mark.parametrize("training", [False, True])
def test_fake_cuda(fused: FusedModule, training: bool):
    out = run_on_fake_cuda(fused.train(training), (4, 3, 8, 8))
    assert out.device.type == "cuda"
    assert out.shape == (4, 4)


def test_swins_masks_follow_the_device():
    import torchvision

    kwargs = {
        "patch_size": [4, 4],
        "embed_dim": 12,
        "depths": [2],
        "num_heads": [3],
        "window_size": [3, 3],
    }
    members = [torchvision.models.SwinTransformer(num_classes=3, **kwargs) for _ in range(2)]
    module = fxfuse.fuse(members, torch.randn(2, 3, 28, 28)).module
    assert run_on_fake_cuda(module, (2, 3, 28, 28)).device.type == "cuda"
    assert copy.deepcopy(module).to("meta")(torch.empty(2, 3, 28, 28, device="meta")).shape == (
        2,
        3,
    )
    assert (
        module.to(torch.bfloat16)(torch.randn(2, 3, 28, 28, dtype=torch.bfloat16)).isfinite().all()
    )


@pytest.mark.parametrize("size", [None, 0.5])
def test_weights_keep_the_memory_format_of_the_members(size: float | None):
    members = [member.to(memory_format=torch.channels_last) for member in resnets(2)]
    result = fxfuse.fuse(members, images(), size=size)
    weight = result.module.block1.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert result.to_module().block1.conv1.weight.stride() == weight.stride()
