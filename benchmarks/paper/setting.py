"""The setting that the experiments share: data, networks, members, controls.

    python -m benchmarks.paper.setting [--data mnist5k] [--network vgg] [-n 2] [--seeds 3]

trains the members (or loads them from the user's cache) and prints their accuracies. Validation
data chooses, test data reports.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.paper import datasets
from benchmarks.paper.datasets import Data, load
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.training import Recipe, trained
from benchmarks.real import controls
from fxfuse.cli.data import Split, specialist_indices
from fxfuse.cli.evaluate import Ensemble

SETTINGS = ("same data", "specialists")
_SHARE_OF_OTHERS = 0.1

# So many that a member takes seconds, and specialists have something left to learn from others.
_STEPS = {
    "mnist5k": {"mlp": 300, "vgg": 200, "resnet": 200, "vit": 600},
    "mnist1d": {"mlp": 400, "vgg": 400, "resnet": 400, "vit": 400},
}
_STEPS_ELSEWHERE = 4000
_RATES = {"mlp": 2e-3, "vgg": 5e-3, "resnet": 5e-3, "vit": 2e-3}


@dataclass(frozen=True)
class Size:
    """How large a network is.

    Attributes:
        width: Factor of every hidden width.
        depth: Layers or blocks, as `networks` counts them; None is the architecture's own.
    """

    width: float = 1.0
    depth: int | None = None


OWN_SIZE = Size()


@dataclass(frozen=True)
class Case:
    """One repetition of one experiment: members, and the data by what it is used for.

    Attributes:
        network: Name of the architecture, one of `NETWORKS`.
        data: The whole data set.
        setting: One of `SETTINGS`.
        seed: Number of the repetition.
        members: The trained members, in eval mode; not to be changed.
        parts: Indices of the training, validation and test inputs.
        size: Of each member.
    """

    network: str
    data: Data
    setting: str
    seed: int
    members: tuple[nn.Module, ...]
    parts: Split
    size: Size = OWN_SIZE

    @property
    def calibration(self) -> Tensor:
        """The training inputs `[t, ...]` without their labels."""
        return self.data.inputs[self.parts.train]

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.data.inputs[self.parts.train], self.data.labels[self.parts.train]

    @property
    def val(self) -> tuple[Tensor, Tensor]:
        return self.data.inputs[self.parts.val], self.data.labels[self.parts.val]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.data.inputs[self.parts.test], self.data.labels[self.parts.test]

    @property
    def ensemble(self) -> Ensemble:
        return Ensemble(list(self.members))

    @functools.cached_property
    def best(self) -> nn.Module:
        """The member that validates best."""
        return max(self.members, key=lambda member: accuracy(member, *self.val))

    def fresh(self, seed: int) -> nn.Module:
        """An untrained network of the members' class."""
        return network(self.network, self.data, seed, self.size)


def case(
    name: str,
    data: Data,
    setting: str,
    n: int,
    seed: int,
    steps: int | None = None,
    size: Size = OWN_SIZE,
) -> Case:
    """Members of one repetition, trained or from the cache, with their data."""
    models = members(name, data, setting, n, seed, steps, size)
    return Case(name, data, setting, seed, tuple(models), data.split(seed), size)


def members(
    name: str,
    data: Data,
    setting: str,
    n: int,
    seed: int,
    steps: int | None = None,
    size: Size = OWN_SIZE,
) -> list[nn.Module]:
    """`n` trained members in eval mode; with the same data, the first of many are those of few.

    Args:
        name: Name of the architecture.
        data: The data set.
        setting: `same data`: only seeds differ. `specialists`: member i sees the classes c with
            c % n == i, and 10 % of the others.
        n: How many.
        seed: Number of the repetition; it decides the split, the first weights and the batches.
        steps: Training steps; None takes those of the data set.
        size: Of each member.
    """
    if setting not in SETTINGS:
        raise ValueError(f"no setting {setting!r}; there are {', '.join(SETTINGS)}")
    parts = data.split(seed)
    default = _STEPS[data.name][name] if data.name in _STEPS else _STEPS_ELSEWHERE
    recipe = Recipe(steps or default, _RATES[name])
    found = []
    for index in range(n):
        own_seed = 100 * seed + index
        member = network(name, data, own_seed, size)
        indices = seen(data, parts, setting, n, index, own_seed)
        trained(member, recipe, data.inputs[indices], data.labels[indices], own_seed)
        found.append(member)
    return found


def network(name: str, data: Data, seed: int, size: Size = OWN_SIZE) -> nn.Module:
    """An untrained network for a data set."""
    depth = {} if size.depth is None else {"depth": size.depth}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return NETWORKS[name](tuple(data.inputs.shape[1:]), data.classes, size.width, **depth)


def accuracy(module: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Percent of the inputs whose class a network in eval mode gets right."""
    return 100 * float(right(module, inputs, labels).mean())


def right(module: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Of which inputs a network in eval mode gets the class right: 1 or 0, float64 `[n]`."""
    return controls.right(controls.outputs_of(module.eval(), inputs, batch=500), labels)


def seen(data: Data, parts: Split, setting: str, n: int, index: int, seed: int) -> Tensor:
    """Indices of the inputs that member `index` of `n` is trained on."""
    if setting == "same data":
        return parts.train
    own = range(index, data.classes, n)
    generator = torch.Generator().manual_seed(seed)
    return specialist_indices(data.labels, parts.train, own, _SHARE_OF_OTHERS, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=datasets.NAMES, default=["mnist5k", "mnist1d"])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("-n", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for data in [load(name, options.data_root) for name in options.data]:
        for name in options.network:
            for setting in options.setting:
                for n in options.n:
                    for seed in range(options.seeds):
                        start = time.process_time()
                        made = case(name, data, setting, n, seed, options.steps)
                        seconds = time.process_time() - start
                        each = " ".join(f"{accuracy(m, *made.test):5.1f}" for m in made.members)
                        together = accuracy(made.ensemble, *made.test)
                        print(
                            f"{data.name:9}{name:8}{setting:12}N={n} seed {seed}: members {each}, "
                            f"best {accuracy(made.best, *made.test):5.1f}, ensemble "
                            f"{together:5.1f}, {seconds:.1f} CPU s",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
