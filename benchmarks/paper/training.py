"""How a member is trained, and where trained members are kept.

A member is decided by its first weights, the source of its class, the inputs and labels that it
sees, and the recipe; the name of its file is a hash of all that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.paper import networks
from fxfuse.cli.data import Batches
from fxfuse.refine import finetune


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to zero."""

    steps: int
    learning_rate: float
    weight_decay: float = 1e-2
    batch: int = 64


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fxfuse-bench"


def trained(network: nn.Module, recipe: Recipe, inputs: Tensor, labels: Tensor, seed: int) -> None:
    """Train `network` in place, or load what the same training gave before."""
    path = cache_folder() / f"{_key(network, recipe, inputs, labels, seed)}.safetensors"
    if not path.exists():
        _train(network, recipe, inputs, labels, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed once complete, so that another script never reads half a file.
        part = path.with_suffix(f".{os.getpid()}")
        save_file(network.state_dict(), part)
        part.replace(path)
    network.load_state_dict(load_file(path))
    network.eval()


def _train(network: nn.Module, recipe: Recipe, inputs: Tensor, labels: Tensor, seed: int) -> None:
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.1
    )
    finetune(
        network,
        Batches(inputs, labels, recipe.batch, seed=seed),
        steps=recipe.steps,
        optimizer=optimizer,
        scheduler=schedule,
        progress=False,
        seed=seed,
    )


def _key(network: nn.Module, recipe: Recipe, inputs: Tensor, labels: Tensor, seed: int) -> str:
    digest = hashlib.sha256()
    decided_by = [torch.__version__, seed, dataclasses.asdict(recipe), str(network)]
    digest.update(repr(decided_by).encode())
    digest.update(Path(networks.__file__).read_bytes())
    for tensor in (*network.state_dict().values(), inputs, labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
