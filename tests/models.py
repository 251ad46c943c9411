"""Networks for the oracles, made so that an oracle can see a mistake in them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

#: Every architecture of issue 2 that has no mixing operator: wide equals ensemble.
PLAIN = (
    "alexnet",
    *(f"vgg{n}{bn}" for n in (11, 13, 16, 19) for bn in ("", "_bn")),
    *(f"resnet{n}" for n in (18, 34, 50, 101, 152)),
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    *(f"densenet{n}" for n in (121, 161, 169, 201)),
    "googlenet",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    *(f"shufflenet_v2_x{n}" for n in ("0_5", "1_0", "1_5", "2_0")),
    *(f"efficientnet_b{n}" for n in range(8)),
    "efficientnet_v2_s",
    "efficientnet_v2_m",
    "efficientnet_v2_l",
)
#: The larger ones of their families: nothing that the smaller ones do not have, but half the time.
LARGE = (
    *(f"vgg{n}{bn}" for n in (13, 16, 19) for bn in ("", "_bn")),
    # Convolutions without norms are in alexnet, bottlenecks in resnext50_32x4d.
    "vgg11",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext101_32x8d",
    "resnext101_64x4d",
    *(f"densenet{n}" for n in (161, 169, 201)),
    "mobilenet_v3_large",
    *(f"shufflenet_v2_x{n}" for n in ("1_0", "1_5", "2_0")),
    *(f"efficientnet_b{n}" for n in range(1, 8)),
    # Its fused convolutions are an ordinary one, and the rest is that of efficientnet_b0.
    "efficientnet_v2_s",
    "efficientnet_v2_m",
    "efficientnet_v2_l",
)
#: Those with LayerNorm.
MIXING = ("vit_b_32", "swin_t")

_ARGUMENTS = {
    "googlenet": {"init_weights": False},
}
#: Ten classes: a thousand outputs add weights, not cases.
_CLASSES = 10


def _shallow(name: str, **arguments: Any) -> Any:
    return lambda **more: getattr(torchvision().models, name)(**arguments, **more)


#: Fewer blocks of each kind than the family's smallest network has: the others are like them. At
#: night larger ones of these families run whole, and the table of coverage holds all of them.
_SHALLOW: Mapping[str, Any] = {
    "densenet121": _shallow("DenseNet", growth_rate=32, block_config=(3, 3, 3, 3)),
    "resnext50_32x4d": lambda **more: torchvision().models.ResNet(
        torchvision().models.resnet.Bottleneck, [2] * 4, groups=32, width_per_group=4, **more
    ),
    "swin_t": _shallow(
        "SwinTransformer",
        **{"patch_size": [4, 4], "embed_dim": 96, "depths": [2, 2], "num_heads": [3, 6]},
        **{"window_size": [7, 7], "stochastic_depth_prob": 0.2},
    ),
    "vit_b_32": _shallow(
        "VisionTransformer",
        **{"image_size": 64, "patch_size": 32, "num_layers": 3},
        **{"num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
    ),
}


def torchvision() -> Any:
    """The package; a test that needs it is skipped where it is not installed."""
    return pytest.importorskip("torchvision")


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A torchvision network in eval mode, excited."""
    torch.manual_seed(seed)
    models = torchvision().models
    make = _SHALLOW.get(name) or partial(getattr(models, name), **_ARGUMENTS.get(name, {}))
    model = make(num_classes=_CLASSES)
    model = model.to(dtype)
    # All members see the same images: one that meets foreign ones may explode.
    return excite(model, image(0, 4, dtype))


def image(seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[batch, 3, 64, 64], the smallest input that every architecture takes."""
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def detector(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A torchvision detector that finds boxes in `pictures`, however unsure it is of them."""
    torch.manual_seed(seed)
    arguments: dict[str, object] = {"num_classes": 4, "weights": None, "weights_backbone": None}
    if "rcnn" in name:
        # The heads work on every box: a few of them say as much as a hundred.
        arguments |= {"box_score_thresh": 0.0, "box_detections_per_img": 10}
        arguments |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 40}
    else:
        arguments |= {"score_thresh": 0.0}
    if not name.startswith("ssd"):  # the size of those is fixed
        arguments |= {"min_size": 96, "max_size": 128}
    model = getattr(torchvision().models.detection, name)(**arguments).to(dtype)
    return excite(model, (pictures(dtype=dtype),))


def pictures(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Two images of different sizes, [3, h, w], as detectors take them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((96, 128), (80, 96))
    return [
        torch.rand(3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes
    ]


def excite(model: nn.Module, example: Any, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Makes the input reach the output: a random deep network often ignores it.

    Vectors (norm weights, biases, layer scales) are jittered, parameters that are zero or nearly so
    get values, BatchNorm statistics are calibrated on the example and jittered. Returns the model
    in eval mode.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.numel():
                continue
            if float(parameter.abs().amax()) < 1e-4:
                parameter.normal_(0.0, 0.1 if parameter.dim() <= 1 else 0.3)
            elif parameter.dim() <= 1:
                parameter *= torch.empty_like(parameter).uniform_(0.75, 1.25)
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(*(example if isinstance(example, tuple) else (example,)), **(kwargs or {}))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.running_var is not None:
                norm.running_mean += (
                    0.02 * norm.running_var.sqrt() * torch.randn_like(norm.running_var)
                )
                norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.95, 1.05)
    return model.eval()
