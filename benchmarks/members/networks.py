"""The networks that are trained on CIFAR-10. All take images [b, 3, 32, 32], all return logits."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional

_CLASSES = 10


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[b, inputs, s, s] → [b, outputs, s / stride, s / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks (He et al. 2015, section 4.2; shortcuts are convolutions).

    Modules are named as in other repositories' ResNet-20s, so that these merge it, too.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        last = width
        for stage in range(3):
            channels = width * 2**stage
            blocks = [
                BasicBlock(last if i == 0 else channels, channels, 2 if i == 0 and stage else 1)
                for i in range(3)
            ]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            last = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(last, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 32, 32] → logits [b, 10]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


class VGG11(nn.Module):
    """VGG-11's eight convolutions with BatchNorm at a quarter of its width, and one linear layer.

    Simonyan and Zisserman, arXiv:1409.1556.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        last = 3
        for multiple in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8):
            if not multiple:
                layers.append(nn.MaxPool2d(2))
                continue
            channels = width * multiple
            layers += [nn.Conv2d(last, channels, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            last = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 32, 32] → logits [b, 10]."""
        return self.classifier(self.features(x).mean((2, 3)))


class Mixer(nn.Module):
    """A depthwise convolution with a shortcut, then a pointwise one."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding="same", groups=channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[b, channels, s, s] → [b, channels, s, s]."""
        x = x + self.norm1(functional.gelu(self.depthwise(x)))
        return self.norm2(functional.gelu(self.pointwise(x)))


class ConvMixer(nn.Module):
    """Patches and mixers (Trockman and Kolter, arXiv:2201.09792)."""

    def __init__(self, channels: int = 96, depth: int = 6, kernel: int = 5, patch: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, patch, stride=patch)
        self.norm = nn.BatchNorm2d(channels)
        self.mixers = nn.Sequential(*(Mixer(channels, kernel) for _ in range(depth)))
        self.head = nn.Linear(channels, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 32, 32] → logits [b, 10]."""
        x = self.norm(functional.gelu(self.patches(x)))
        return self.head(self.mixers(x).mean((2, 3)))


class MLP(nn.Module):
    """Hidden layers with ReLU: three of 512 are the network of the paper's first experiments."""

    def __init__(self, hidden: tuple[int, ...] = (512, 512, 512)) -> None:
        super().__init__()
        sizes = [3 * 32 * 32, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.head = nn.Linear(sizes[-1], _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 32, 32] → logits [b, 10]."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = functional.relu(layer(x))
        return self.head(x)


NETWORKS: dict[str, type[nn.Module]] = {
    "resnet20": ResNet20,
    "vgg11": VGG11,
    "convmixer": ConvMixer,
    "mlp": MLP,
}
